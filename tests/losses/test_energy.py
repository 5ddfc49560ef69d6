"""Energy loss: value against sums over all pairs, gradient against finite differences and the published form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from afa.filtering.gaussian import FilterMethod
from afa.losses.energy import energy_loss
from tensors import unchanged, value_and_gradient


def inputs(batch: int = 2, classes: int = 3, height: int = 8, width: int = 10) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of the image's size, image, label with 255 in some places, and a box that leaves some out."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(batch, classes, height, width, generator=generator, dtype=torch.float64)
    image = 0.5 + 0.1 * torch.rand(batch, 3, height, width, generator=generator)
    label = torch.randint(classes + 1, (batch, height, width), generator=generator)
    label[label == classes] = 255
    box = torch.tensor([[0, height, 0, width], [2, height, 0, width - 4]])[:batch]
    return logits, image, label, box


SETTINGS: dict[str, Any] = {"xy_bandwidth": 6.0, "rgb_bandwidth": 15.0, "factor": 0.01}


def naive_energy(logits: Tensor, image: Tensor, label: Tensor, box: Tensor) -> tuple[float, Tensor]:
    """Value, and (B, K, h, w) published gradient with respect to the halved probabilities, pixel by pixel."""
    batch, classes, height, width = logits.shape
    small = (height // 2, width // 2)
    full = logits.softmax(1)
    halved = torch.zeros(batch, classes, *small, dtype=torch.float64)
    for y in range(small[0]):
        for x in range(small[1]):
            halved[:, :, y, x] = full[:, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean((2, 3))
    value, gradient = 0.0, torch.zeros_like(halved)
    places = [(y, x) for y in range(small[0]) for x in range(small[1])]
    for b in range(batch):
        top, bottom, left, right = box[b].tolist()
        inside = {(y, x): top <= 2 * y < bottom and left <= 2 * x < right for y, x in places}
        for y, x in places:
            gate = max(float(inside[y, x]) - float(halved[b, :, y, x].max()), 0.0)
            if label[b, 2 * y, 2 * x] == 255:
                gate = 1.0
            for v, u in places:
                if not (inside[y, x] and inside[v, u]):
                    continue
                distance = ((y - v) ** 2 + (x - u) ** 2) / 3.0**2
                color = 255 * (image[b, :, 2 * y, 2 * x] - image[b, :, 2 * v, 2 * u]).double()
                kernel = math.exp(-(distance + float(color.square().sum()) / 15.0**2) / 2)
                value -= gate * kernel * float(halved[b, :, y, x] @ halved[b, :, v, u])
                gradient[b, :, y, x] -= 2 * gate * kernel * halved[b, :, v, u]
    return value * 0.01 / batch, gradient * 0.01 / batch


def test_value_and_published_gradient_agree_with_naive() -> None:
    logits, image, label, box = inputs()
    expected, by_halved = naive_energy(logits, image, label, box)
    value, gradient = value_and_gradient(energy_loss, logits, image, label, box, method="exact", **SETTINGS)
    assert value == pytest.approx(expected, rel=1e-4)
    logits.requires_grad_()
    torch.nn.functional.avg_pool2d(logits.softmax(1), 2).backward(by_halved)
    torch.testing.assert_close(gradient, logits.grad, rtol=1e-3, atol=1e-7)
    assert gradient.abs().max() > 1e-4


@pytest.mark.parametrize("method", ["exact", "lattice"])
def test_gradient_is_the_derivative_where_gates_are_equal(method: FilterMethod) -> None:
    """Without labels all gates are 1, and the energy is quadratic in the probabilities."""
    logits, image, label, _ = inputs()
    label.fill_(255)
    box = torch.tensor([[0, 8, 0, 10]] * 2)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    settings: dict[str, Any] = {"method": method, **SETTINGS}
    step = 1e-2
    ahead, behind = (
        energy_loss(logits + sign * step * direction, image, label, box, **settings).item() for sign in (1, -1)
    )
    _, gradient = value_and_gradient(energy_loss, logits, image, label, box, **settings)
    # The lattice is not quite symmetric where vertices lack neighbors.
    tolerance = 2e-3 if method == "exact" else 0.1
    assert float((gradient * direction).sum()) == pytest.approx((ahead - behind) / (2 * step), rel=tolerance)


def test_logits_are_resized_to_the_image() -> None:
    logits, image, label, box = inputs(height=16, width=24)
    small = logits[:, :, ::4, ::4].float()
    large = torch.nn.functional.interpolate(small, size=(16, 24), mode="bilinear", align_corners=False)
    assert energy_loss(small, image, label, box) == energy_loss(large, image, label, box)


def test_odd_sizes_lose_their_last_row_and_column() -> None:
    logits, image, label, box = inputs(height=9, width=11)
    cut = energy_loss(logits[:, :, :8, :10], image[:, :, :8, :10], label[:, :8, :10], box)
    assert energy_loss(logits, image, label, box).item() == pytest.approx(cut.item(), rel=1e-6)


def test_outside_of_the_box_nothing_counts() -> None:
    logits, image, label, _ = inputs()
    box = torch.tensor([[2, 8, 0, 6]] * 2)
    inside = (slice(None), slice(None), slice(2, 8), slice(0, 6))
    other = -3 * logits
    other[inside] = logits[inside]
    changed = label.clone()
    changed[:, :2] = 255
    loss, gradient = value_and_gradient(energy_loss, other, image, changed, box, method="exact")
    assert loss == pytest.approx(energy_loss(logits, image, label, box, method="exact").item(), rel=1e-6)
    assert gradient[inside].any()
    gradient[inside] = 0
    assert not gradient.any()


def test_agreement_of_like_pixels_costs_less() -> None:
    _, image, label, box = inputs()
    image = torch.full_like(image, 0.5)
    image[..., 4:] = 0.9
    sides = torch.zeros(2, 3, 8, 10)
    sides[:, 0, :, :4], sides[:, 1, :, 4:] = 5.0, 5.0
    mixed = sides.clone()
    mixed[:, :, ::4], mixed[:, :, 1::4] = sides.roll(1, 1)[:, :, ::4], sides.roll(1, 1)[:, :, 1::4]
    label = torch.full_like(label, 255)
    assert energy_loss(sides, image, label, box) < energy_loss(mixed, image, label, box) < 0


def test_certain_and_labeled_pixels_cost_nothing() -> None:
    logits, image, label, box = inputs(batch=1)
    certain = 200 * torch.nn.functional.one_hot(logits.argmax(1), 3).permute(0, 3, 1, 2).float()
    certain = certain[:, :, ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3)
    loss, gradient = value_and_gradient(energy_loss, certain, image, label.clamp(max=2), box)
    assert loss == 0
    assert not gradient.any()


def test_halves_of_a_batch_average_to_the_whole() -> None:
    logits, image, label, box = inputs()
    whole = energy_loss(logits, image, label, box, method="exact")
    halves = [energy_loss(*(part[i : i + 1] for part in (logits, image, label, box)), method="exact") for i in range(2)]
    assert whole.item() == pytest.approx(torch.stack(halves).mean().item(), rel=1e-5)


def test_inputs_stay_as_they_are() -> None:
    given = inputs()
    with unchanged(*given):
        energy_loss(*given)
