"""Sizes, scales and fusion of the protocols, seen through networks that report what they were given."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

import naive
from afa.config import Config, EvaluationConfig, ModelConfig, PseudoConfig
from afa.errors import AfaError
from afa.evaluation import protocols
from afa.evaluation.protocols import (
    group_sizes,
    image_tensor,
    logit_maps,
    pseudo_labels,
    pseudo_sizes,
    view_sizes,
)
from afa.filtering.crf import CrfSettings, dense_crf
from afa.model.network import AfaNetwork
from afa.runs.network import build_network
from afa.types import NetworkOutput, normalize_image


class SpyNetwork(nn.Module):
    """Two classes and background; logits are the channels of the input at a quarter of its size."""

    num_classes = 2

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.views: list[Tensor] = []

    def forward(self, image: Tensor, *, segmentation: bool, affinity: bool) -> NetworkOutput:
        assert segmentation
        assert not affinity
        self.views.append(image)
        size = ((image.shape[2] + 3) // 4, (image.shape[3] + 3) // 4)
        # Not symmetric in x: a flip that is not undone would show.
        ramp = torch.linspace(0, 1, size[1])
        logits = interpolate(image, size=size, mode="bilinear", align_corners=False) + ramp
        return NetworkOutput(
            image_logits=image.mean((2, 3))[:, :2] * len(self.views),
            class_scores=logits[:, :2],
            seg_logits=logits,
        )


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def with_settings(pseudo: dict[str, Any] | None = None, **evaluation: Any) -> Config:
    return Config(evaluation=EvaluationConfig(**evaluation), pseudo=PseudoConfig(**(pseudo or {})))


def seg_logits(network: Any, image: np.ndarray, config: Config) -> Tensor:
    """(K, H, W) logits of one image at its size."""
    (maps,) = logit_maps(network, [image], config)
    return maps.enlarge((image.shape[0], image.shape[1]))


def pseudo_label(network: Any, image: np.ndarray, tags: list[int], config: Config, **settings: Any) -> Tensor:
    (label,) = pseudo_labels(network, [image], [np.array(tags, dtype=np.float32)], config, **settings)
    return label


def run_spy(image: np.ndarray, **settings: Any) -> tuple[SpyNetwork, Tensor]:
    network = SpyNetwork()
    return network, seg_logits(network, image, with_settings(**settings))


def test_single_is_one_pass_at_native_size() -> None:
    image = random_image(45, 70)
    network, logits = run_spy(image)
    (view,) = network.views
    assert torch.equal(view, normalize_image(image_tensor(image, device=torch.device("cpu"))))
    assert logits.shape == (3, 45, 70)
    again = SpyNetwork()(view, segmentation=True, affinity=False).seg_logits
    expected = interpolate(again, size=(45, 70), mode="bilinear", align_corners=False)[0]
    assert torch.equal(logits, expected)


def test_short_side_scales_the_view_and_not_the_logits() -> None:
    network, logits = run_spy(random_image(50, 100), short_side=64)
    assert network.views[0].shape == (1, 3, 64, 128)
    assert logits.shape == (3, 50, 100)


@pytest.mark.parametrize("size", [(1, 1), (7, 50), (31, 32)])
def test_small_images_are_stretched_to_32_pixels(size: tuple[int, int]) -> None:
    network, logits = run_spy(random_image(*size))
    assert network.views[0].shape[2:] == (max(32, size[0]), max(32, size[1]))
    assert logits.shape == (3, *size)


def test_multiscale_runs_each_scale_with_its_flip() -> None:
    network, logits = run_spy(random_image(40, 80), protocol="multiscale", long_side=128, scales=(1.0, 0.5, 0.75))
    assert [tuple(view.shape) for view in network.views] == [(2, 3, 64, 128), (2, 3, 32, 64), (2, 3, 48, 96)]
    for view in network.views:
        assert torch.equal(view[1], view[0].flip(-1))
    assert logits.shape == (3, 40, 80)


def test_multiscale_is_the_maximum_over_scales_of_the_mean_over_flips() -> None:
    image = random_image(40, 80)
    rule = {"multiscale_rule": "direct"}
    network, logits = run_spy(image, protocol="multiscale", long_side=96, scales=(1.0, 0.75), **rule)
    passes = []
    for view in network.views:
        again = SpyNetwork()(view, segmentation=True, affinity=False).seg_logits
        # Enlarged before the flip is undone: the mean commutes with both.
        plain, flipped = interpolate(again, size=(40, 80), mode="bilinear", align_corners=False)
        passes.append((plain + flipped.flip(-1)) / 2)
    torch.testing.assert_close(logits, torch.maximum(*passes), rtol=0, atol=1e-5)
    assert not torch.allclose(logits, passes[0])
    assert not torch.allclose(logits, passes[1])


@pytest.mark.parametrize("scales", [(1.0, 0.5, 0.75), (0.75, 1.0)])
def test_multiscale_of_the_reference_scales_on_what_it_scaled(scales: tuple[float, ...]) -> None:
    image = random_image(45, 70)
    network, logits = run_spy(image, protocol="multiscale", long_side=101, scales=scales)

    def logits_of(view: np.ndarray) -> np.ndarray:
        output = SpyNetwork()(torch.from_numpy(view).float()[None], segmentation=True, affinity=False)
        return output.seg_logits[0].numpy()

    seen = normalize_image(image_tensor(image, device=torch.device("cpu")))[0].numpy()
    expected = naive.multiscale_logits(seen, logits_of, long_side=101, scales=scales)
    np.testing.assert_allclose(logits.numpy(), expected, atol=1e-5)
    sizes = {1.0: (64, 101), 0.5: (32, 50), 0.75: (48, 75)}
    assert [view.shape[2:] for view in network.views] == [sizes[scale] for scale in scales]
    _, direct = run_spy(image, protocol="multiscale", long_side=101, scales=scales, multiscale_rule="direct")
    assert (direct - logits).abs().max() > 0.01


def test_image_logits_come_from_the_same_passes() -> None:
    network = SpyNetwork()
    config = with_settings(protocol="multiscale", long_side=64, scales=(1.0, 0.5))
    (maps,) = logit_maps(network, [random_image(32, 64)], config)
    means = [(view.mean((2, 3))[:, :2] * (i + 1)).mean(0) for i, view in enumerate(network.views)]
    torch.testing.assert_close(maps.image, torch.maximum(*means))
    assert len(network.views) == 2


def test_other_sizes_and_read_only_or_flipped_arrays() -> None:
    image = random_image(40, 40)
    image.flags.writeable = False
    (maps,) = logit_maps(SpyNetwork(), [image[:, ::-1]], Config())
    assert maps.enlarge((11, 13)).shape == (3, 11, 13)


def test_unknown_protocol_lists_the_known_ones() -> None:
    with pytest.raises(AfaError, match=r"^protocol is 'crf'; use .*single\+crf"):
        run_spy(random_image(32, 32), protocol="crf")


class FakePipeline:
    """Takes the place of `infer_pseudo`: the label is the column's index."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, score: Any, image: Tensor, tags: Tensor, **settings: Any) -> dict[str, Tensor]:
        self.calls.append({"score": score, "image": image, "tags": tags, **settings})
        batch, _, height, width = image.shape
        label = torch.arange(width).expand(batch, height, width)
        return dict.fromkeys(settings["want"], label)


def test_pseudo_label_asks_for_the_kind_at_native_size(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = FakePipeline()
    monkeypatch.setattr(protocols, "infer_pseudo", pipeline)
    config = Config()
    label = pseudo_label(SpyNetwork(), random_image(70, 90), [0, 1], config, kind="propagated", refine=True)
    (call,) = pipeline.calls
    assert call["want"] == ("propagated_label",)
    assert call["refined"] is True
    assert call["config"] is config.pseudo
    assert call["tags"].tolist() == [[0.0, 1.0]]
    assert call["image"].shape == (1, 3, 70, 90)
    assert float(call["image"].max()) <= 1.0
    assert torch.equal(label, torch.arange(90).expand(70, 90))


def test_pseudo_label_of_a_small_image_has_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = FakePipeline()
    monkeypatch.setattr(protocols, "infer_pseudo", pipeline)
    config = with_settings({"scales": (1.0, 0.5)})
    label = pseudo_label(SpyNetwork(), random_image(16, 100), [1, 1], config, kind="cam")
    assert pipeline.calls[0]["image"].shape == (1, 3, 64, 100)
    assert label.shape == (16, 100)
    assert label.dtype == torch.int64


def test_unknown_pseudo_label_lists_the_known_ones() -> None:
    with pytest.raises(AfaError, match=r"^labels is 'seg'; use .*refined"):
        pseudo_label(SpyNetwork(), random_image(9, 9), [1, 1], Config(), kind="seg")


@pytest.mark.parametrize("kind", ["cam", "propagated", "initial", "refined"])
@pytest.mark.parametrize("size", [(9, 40), (65, 50)])
def test_every_pseudo_label_of_a_real_network(kind: str, size: tuple[int, int]) -> None:
    network = real_network().train()
    label = pseudo_label(network, random_image(*size), [1, 0, 1], with_settings({"iterations": 2}), kind=kind)
    assert label.shape == size
    # Class 2 is not tagged; only the labels that training learns from have uncertain pixels.
    allowed = {0, 1, 3} if kind in ("cam", "propagated") else {0, 1, 3, 255}
    assert set(label.unique().tolist()) <= allowed
    assert network.training


def real_network() -> AfaNetwork:
    torch.manual_seed(0)
    return build_network(ModelConfig(backbone="mit_tiny", weights="", decoder_width=8), 3).eval()


# Under a short side of 64 all three are seen at 64 x 96.
SAME_VIEWS = [random_image(64, 96, seed=1), random_image(32, 48, seed=2), random_image(128, 192, seed=3)]


@pytest.mark.parametrize("protocol", ["single", "multiscale"])
def test_a_batch_equals_its_images_one_by_one(protocol: str) -> None:
    network = real_network()
    config = with_settings(protocol=protocol, short_side=64, long_side=96, scales=(1.0, 0.5))
    batch = logit_maps(network, SAME_VIEWS, config)
    for image, maps in zip(SAME_VIEWS, batch, strict=True):
        size = image.shape[0], image.shape[1]
        (alone,) = logit_maps(network, [image], config)
        logits = alone.enlarge(size)
        torch.testing.assert_close(maps.enlarge(size), logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(maps.image, alone.image, rtol=0, atol=1e-5)
        assert (maps.label(size) == logits.argmax(0)).float().mean() > 0.9999
        torch.testing.assert_close(maps.scores(size), logits.softmax(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["cam", "propagated", "initial", "refined"])
def test_a_batch_of_pseudo_labels_equals_one_by_one(kind: str) -> None:
    network = real_network()
    # The first image has one tag more than the others: their spare slots must not show.
    tags = [[1, 0, 1], [0, 1, 0], [0, 0, 1]]
    config = with_settings({"iterations": 2}, short_side=64)
    batch = pseudo_labels(network, SAME_VIEWS, [np.array(row) for row in tags], config, kind=kind)
    for image, image_tags, label in zip(SAME_VIEWS, tags, batch, strict=True):
        alone = pseudo_label(network, image, image_tags, config, kind=kind)
        assert label.shape == alone.shape == image.shape[:2]
        assert label.dtype == torch.int64
        assert (label == alone).float().mean() > 0.9999


@pytest.mark.parametrize("size", [(45, 70), (7, 300), (480, 320)])
@pytest.mark.parametrize("protocol", ["single", "multiscale"])
def test_view_sizes_are_those_that_the_network_sees(size: tuple[int, int], protocol: str) -> None:
    settings: dict[str, Any] = {"short_side": 50, "long_side": 100, "scales": (1.0, 0.5, 0.75), "protocol": protocol}
    network, _ = run_spy(random_image(*size), **settings)
    seen = tuple((view.shape[2], view.shape[3]) for view in network.views)
    assert view_sizes(size, with_settings(**settings)) == seen


def test_pseudo_sizes_are_those_that_the_network_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    network = real_network()
    seen: list[tuple[int, ...]] = []
    score = network.score
    monkeypatch.setattr(
        network, "score", lambda view, affinity: (seen.append(view.shape[2:]), score(view, affinity))[1]
    )
    config = with_settings({"scales": (1.0, 0.5, 1.5), "iterations": 1}, short_side=48)
    pseudo_label(network, random_image(40, 90), [1, 0, 0], config, kind="cam")
    assert pseudo_sizes((40, 90), config) == tuple(dict.fromkeys(seen)) == ((64, 108), (32, 54), (96, 162))


@pytest.mark.parametrize("protocol", ["single", "multiscale"])
def test_segmentation_never_looks_at_the_values(protocol: str) -> None:
    """Tensors without values stand in for those of a GPU, which would have to be waited for."""
    network = real_network().to("meta")
    images = [random_image(40, 50), random_image(40, 50)]
    for maps in logit_maps(network, images, with_settings(protocol=protocol, long_side=64)):
        restricted = maps.allow(np.array([True, True, False, False]))
        assert restricted.label((40, 50)).is_meta
        assert restricted.scores((40, 50)).is_meta


@pytest.mark.parametrize("base", ["single", "multiscale"])
def test_crf_refines_the_softmax_of_the_enlarged_logits(base: str) -> None:
    network, image = real_network(), smooth_image(48, 60)
    settings: dict[str, Any] = {"short_side": 40, "long_side": 64, "scales": (1.0, 0.5)}
    (maps,) = logit_maps(network, [image], with_settings(protocol=f"{base}+crf", **settings))
    (plain,) = logit_maps(network, [image], with_settings(protocol=base, **settings))
    before = plain.scores((48, 60))
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    settings = CrfSettings(
        iterations=10, gaussian_weight=3, gaussian_xy=3, bilateral_weight=4, bilateral_xy=64, bilateral_rgb=5
    )
    expected = dense_crf(before[None], pixels, settings)[0]
    torch.testing.assert_close(maps.scores((48, 60)), expected, rtol=0, atol=1e-5)
    assert (expected - before).abs().max() > 0.02
    assert torch.equal(maps.image, plain.image)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("iterations", 1),
        ("gaussian_weight", 0.5),
        ("gaussian_xy", 1.0),
        ("bilateral_weight", 1.0),
        ("bilateral_xy", 5.0),
        ("bilateral_rgb", 30.0),
    ],
)
def test_settings_of_the_crf_reach_it(key: str, value: float) -> None:
    image = smooth_image(40, 48)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    probabilities = torch.rand(1, 3, 40, 48, generator=torch.Generator().manual_seed(0)).mul(3).softmax(1)
    found = protocols.crf(probabilities, pixels, config=EvaluationConfig(**{f"crf_{key}": value}))
    torch.testing.assert_close(found, dense_crf(probabilities, pixels, CrfSettings(**{key: value})))  # type: ignore[arg-type]
    assert (found - dense_crf(probabilities, pixels)).abs().max() > 1e-3


def test_classes_ruled_out_stay_out_of_the_crf() -> None:
    network, image = real_network(), smooth_image(40, 48)
    allowed = np.array([True, False, True, False])
    for classes in (allowed, None):
        only = None if classes is None else [classes]
        (maps,) = logit_maps(network, [image], with_settings(protocol="single+crf"), allowed=only)
        scores = maps.scores((40, 48))
        assert bool(scores[~allowed].any()) == (classes is None)
        torch.testing.assert_close(scores.sum(0), torch.ones(40, 48))


def test_images_of_one_view_and_several_sizes_go_through_the_crf() -> None:
    network = real_network()
    config = with_settings(protocol="single+crf", short_side=64)
    batch = logit_maps(network, SAME_VIEWS, config)
    for image, maps in zip(SAME_VIEWS, batch, strict=True):
        (alone,) = logit_maps(network, [image], config)
        size = image.shape[0], image.shape[1]
        # The CRF enlarges what a batch rounds otherwise.
        torch.testing.assert_close(maps.scores(size), alone.scores(size), rtol=0, atol=5e-4)
        assert group_sizes(size, config) == ((64, 96), size)
    assert group_sizes((50, 60), with_settings(short_side=64)) == ((64, 77),)


@pytest.mark.parametrize("kind", ["cam", "propagated", "initial", "refined"])
@pytest.mark.parametrize("refine", [True, False])
def test_pseudo_labels_are_decided_by_what_the_crf_returns(
    kind: str, refine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = real_network()
    images = [smooth_image(64, 72, seed=seed) for seed in (1, 2)]
    tags = [np.array(row, dtype=np.float32) for row in ([1, 0, 1], [0, 1, 0])]
    pseudo = {"iterations": 2, "affinity_radius": 1, "walk_epsilon": 0.0, "background_propagated": 0.45}
    plain = pseudo_labels(network, images, tags, with_settings(pseudo), kind=kind, refine=refine)
    calls: list[tuple[int, ...]] = []

    def mirror(probabilities: Tensor, pixels: Tensor, settings: CrfSettings) -> Tensor:
        assert settings.bilateral_xy == 7
        calls.append(tuple(probabilities.shape))
        torch.testing.assert_close(probabilities.sum(1), torch.ones(2, 64, 72))
        assert torch.equal(pixels.round().to(torch.uint8), torch.stack([as_tensor(image) for image in images]))
        # Classes that an image is not tagged with may get the most; they must not win.
        return probabilities.flip(-1) + 9.0 * (probabilities.amax((2, 3), keepdim=True) == 0)

    monkeypatch.setattr(protocols, "dense_crf", mirror)
    config = with_settings(pseudo | {"crf": True}, crf_bilateral_xy=7)
    found = pseudo_labels(network, images, tags, config, kind=kind, refine=refine)
    channels = 4 if kind == "propagated" else 3  # all classes, or background and the two most tags
    assert calls == [(2, channels, 64, 72)] * (1 if kind in ("cam", "propagated") else 2)
    assert any((label != label.flip(-1)).float().mean() > 0.1 for label in plain)
    for before, after in zip(plain, found, strict=True):
        assert (after == before.flip(-1)).float().mean() > 0.999


def as_tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)


def smooth_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    coarse = torch.rand(1, 3, 5, 6, generator=torch.Generator().manual_seed(seed))
    image = interpolate(coarse, size=(height, width), mode="bilinear")[0]
    return (image.permute(1, 2, 0) * 255).to(torch.uint8).numpy()
