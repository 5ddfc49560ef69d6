"""Every kind of encoder keeps the same promises; the registry names what it builds; the page shows the table."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from afa.errors import AfaError
from afa.model.backbone import Backbone
from afa.model.network import AfaNetwork
from afa.model.registry import BACKBONES, build_backbone, table
from afa.model.vit import TokenBackbone
from mistakes import refused

ONE_OF_EACH_KIND = (
    "mit_tiny",
    "dinov2_tiny",
    "dinov2_tiny_reg",
    "vit_mini",
    "deit_mini",
    "clip_mini",
    "siglip_mini",
)
TOKENS = ONE_OF_EACH_KIND[1:]
IMAGE_SIZES = [(40, 72), (57, 33), (64, 64)]


def random_image(size: tuple[int, int], *, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def random_backbone(name: str, **settings: Any) -> Any:
    """The same weights for every setting, each parameter off its initial value; in evaluation mode."""
    torch.manual_seed(0)
    backbone = build_backbone(name, **settings)
    state = backbone.state_dict()
    generator = torch.Generator().manual_seed(0)
    for key in sorted(state):
        state[key] = state[key] + 0.1 * torch.randn(state[key].shape, generator=generator)
    backbone.load_state_dict(state)
    return backbone.eval()


def depth(name: str) -> int:
    size: Any = BACKBONES[name].size
    return sum(size.depths) if name.startswith("mit") else size.depth


def everything(backbone: Backbone, image: Tensor) -> list[Tensor]:
    output = backbone(image, attention=True)
    assert output.attention_logits is not None
    return [*output.features, output.attention_logits]


def weighted_sum(outputs: list[Tensor]) -> Tensor:
    return sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).mean() for x in outputs)  # type: ignore[return-value]


def test_one_of_each_kind_is_tested() -> None:
    assert sorted(BACKBONES[name].kind for name in ONE_OF_EACH_KIND) == sorted(
        {spec.kind for spec in BACKBONES.values()}
    )


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
class TestPromises:
    @pytest.mark.parametrize("image_size", IMAGE_SIZES)
    def test_features_and_maps_have_the_published_shapes(self, name: str, image_size: tuple[int, int]) -> None:
        backbone = random_backbone(name)
        output = backbone(random_image(image_size), attention=True)
        assert len(output.features) == len(backbone.channels) == len(backbone.strides) == 4
        for feature, channels, stride in zip(output.features, backbone.channels, backbone.strides, strict=True):
            assert feature.shape == (2, channels, *(math.ceil(side / stride) for side in image_size))
        tokens = math.prod(output.features[-1].shape[2:])
        assert output.attention_logits.shape == (2, backbone.num_attention_maps, tokens, tokens)
        assert backbone(random_image(image_size)).attention_logits is None

    def test_the_smallest_image_is_taken(self, name: str) -> None:
        backbone = random_backbone(name)
        outputs = everything(backbone, random_image((backbone.min_size, backbone.min_size)))
        assert all(output.isfinite().all() for output in outputs)

    def test_maps_do_not_change_the_features(self, name: str) -> None:
        backbone = random_backbone(name)
        with_maps, without = (backbone(random_image((40, 72)), attention=x).features for x in (True, False))
        for feature, expected in zip(with_maps, without, strict=True):
            torch.testing.assert_close(feature, expected, rtol=1e-4, atol=1e-4)

    def test_maps_do_not_pile_up(self, name: str) -> None:
        backbone = random_backbone(name)
        first, second = (backbone(random_image((40, 72)), attention=True).attention_logits for _ in range(2))
        assert torch.equal(first, second)

    def test_fewer_blocks_give_the_last_ones_maps(self, name: str) -> None:
        heads = random_backbone(name).num_attention_maps // 2
        one, two = (random_backbone(name, attention_blocks=n) for n in (1, 2))
        assert (one.num_attention_maps, two.num_attention_maps) == (heads, 2 * heads)
        maps, expected = (backbone(random_image((40, 72)), attention=True).attention_logits for backbone in (one, two))
        torch.testing.assert_close(maps, expected[:, -heads:], rtol=1e-3, atol=1e-3)

    def test_images_of_a_batch_do_not_see_each_other(self, name: str) -> None:
        backbone = random_backbone(name)
        image = random_image((40, 72))
        other = torch.cat([image[:1], -image[1:]])
        for output, expected in zip(everything(backbone, other), everything(backbone, image), strict=True):
            torch.testing.assert_close(output[0], expected[0], rtol=1e-4, atol=1e-4)
            assert not torch.allclose(output[1], expected[1], rtol=1e-2, atol=1e-2)

    @pytest.mark.parametrize("part", ["first", "most", "all"])
    def test_freezing_stops_gradients_and_changes_nothing_else(self, name: str, part: str) -> None:
        blocks = {"first": 1, "most": depth(name) - 1, "all": depth(name)}[part]
        free, frozen = random_backbone(name), random_backbone(name, freeze_blocks=blocks)
        image = random_image((40, 72))
        for output, expected in zip(everything(frozen, image), everything(free, image), strict=True):
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
        learning = {key for key, parameter in frozen.named_parameters() if parameter.requires_grad}
        assert bool(learning) == (part != "all")
        outputs = everything(frozen.train(), image)
        if part == "all":
            assert not any(output.requires_grad for output in outputs)
            return
        weighted_sum(outputs).backward()
        assert {key for key, parameter in frozen.named_parameters() if parameter.grad is not None} == learning
        assert any("layer" in key or "stage" in key for key in learning)

    def test_nothing_frozen_lets_everything_learn(self, name: str) -> None:
        backbone = random_backbone(name).train()
        weighted_sum(everything(backbone, random_image((40, 72)))).backward()
        silent = [key for key, parameter in backbone.named_parameters() if parameter.grad is None]
        assert silent == []

    def test_frozen_blocks_stay_in_evaluation_mode(self, name: str) -> None:
        backbone = random_backbone(name, freeze_blocks=2, drop_path=0.9).train()
        frozen = set(backbone.frozen_modules())
        assert frozen
        assert not any(part.training for module in frozen for part in module.modules())
        assert backbone.training
        assert backbone.encoder.training
        assert not any(module.training for module in copy.deepcopy(backbone).train().frozen_modules())

    def test_more_frozen_blocks_than_there_are(self, name: str) -> None:
        blocks = depth(name)
        with refused(f"model.freeze_blocks is {blocks + 1}", f"{name} has {blocks} blocks; use"):
            build_backbone(name, freeze_blocks=blocks + 1)

    def test_inference_mode(self, name: str) -> None:
        for blocks in (0, 2):
            backbone = random_backbone(name, freeze_blocks=blocks)
            with torch.inference_mode():
                inferred = everything(backbone, random_image((40, 72)))
            # A pass with gradients must not trip over anything that was kept from it.
            outputs = everything(backbone, random_image((40, 72)))
            weighted_sum(outputs).backward()
            for output, expected in zip(inferred, outputs, strict=True):
                torch.testing.assert_close(output, expected.detach(), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("blocks", [0, 2])
    def test_autocast(self, name: str, blocks: int) -> None:
        backbone = random_backbone(name, freeze_blocks=blocks)
        expected = everything(backbone, random_image((40, 72)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = everything(backbone, random_image((40, 72)))
        for output, exact in zip(outputs, expected, strict=True):
            assert (output - exact).abs().mean() < 0.05 * exact.abs().mean()
        weighted_sum([output.float() for output in outputs]).backward()
        gradients = [parameter.grad for parameter in backbone.parameters() if parameter.grad is not None]
        assert gradients
        assert all(gradient.isfinite().all() for gradient in gradients)

    def test_state_round_trip(self, name: str) -> None:
        backbone = random_backbone(name)
        other = build_backbone(name, freeze_blocks=1).eval()
        image = random_image((40, 72))
        before = everything(other, image)
        other.load_state_dict({key: tensor.clone() for key, tensor in backbone.state_dict().items()})
        for output, expected, old in zip(everything(other, image), everything(backbone, image), before, strict=True):
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
            assert not torch.allclose(output, old, rtol=1e-2, atol=1e-2)

    def test_norm_parameters_are_those_of_the_learning_norm_layers(self, name: str) -> None:
        for blocks in (0, 2):
            backbone = random_backbone(name, freeze_blocks=blocks)
            found = {id(parameter) for parameter in backbone.norm_parameters()}
            assert found
            for key, parameter in backbone.named_parameters():
                is_norm = "norm" in key or "layrnorm" in key
                assert (id(parameter) in found) == (is_norm and parameter.requires_grad), key

    def test_hash_is_that_of_the_frozen_weights(self, name: str) -> None:
        backbone = random_backbone(name, freeze_blocks=2)
        before = backbone.weights_hash()
        assert len(before) == 64
        assert before == random_backbone(name, freeze_blocks=2).weights_hash()
        assert before != random_backbone(name, freeze_blocks=1).weights_hash()
        with torch.no_grad():
            for parameter in backbone.parameters():
                if parameter.requires_grad:
                    parameter += 1
        assert backbone.weights_hash() == before
        with torch.no_grad():
            next(iter(backbone.frozen_modules()[0].parameters())).view(-1)[0] += 1e-3
        assert backbone.weights_hash() != before

    def test_a_network_on_top_learns(self, name: str) -> None:
        network = AfaNetwork(random_backbone(name, freeze_blocks=1), 3, decoder_width=16).train()
        output = network(random_image((40, 72)))
        assert output.seg_logits is not None
        assert output.affinity is not None
        (output.image_logits.mean() + output.seg_logits.square().mean() + output.affinity.mean()).backward()
        for key, parameter in network.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, key
        scored = network.eval().score(random_image((40, 72)), affinity=True)
        assert scored.class_scores.shape[2:] == network.backbone(random_image((40, 72))).features[-1].shape[2:]


@pytest.mark.parametrize("name", TOKENS)
class TestTwoHalves:
    @pytest.mark.parametrize(("blocks", "feature_levels"), [(0, 3), (1, 4), (2, 3), (3, 4), (4, 1)])
    def test_frozen_then_trainable_is_forward(self, name: str, blocks: int, feature_levels: int) -> None:
        backbone = random_backbone(name, freeze_blocks=blocks, feature_levels=feature_levels)
        assert isinstance(backbone, TokenBackbone)
        image = random_image((40, 57))
        half = backbone.frozen(image)
        assert half.grid == (5, 8)
        assert half.tokens.requires_grad == (blocks == 0)
        assert len(half.features) == sum(level < blocks for level in backbone.levels)
        # The maps of the last two of four blocks need tokens of their own where these blocks are frozen.
        assert (half.attention_tokens is not None) == (blocks > 2)
        for attention in (False, True):
            output = backbone.trainable(half, attention=attention)
            expected = backbone(image, attention=attention)
            for feature, whole in zip(output.features, expected.features, strict=True):
                assert torch.equal(feature, whole)
            if attention:
                assert torch.equal(output.attention_logits, expected.attention_logits)
        free = random_backbone(name, feature_levels=feature_levels)
        for feature, whole in zip(everything(backbone, image), everything(free, image), strict=True):
            torch.testing.assert_close(feature, whole, rtol=1e-4, atol=1e-4)

    def test_half_precision_tokens_are_taken(self, name: str) -> None:
        backbone = random_backbone(name, freeze_blocks=3)
        half = backbone.frozen(random_image((40, 72)))
        assert half.attention_tokens is not None
        kept = type(half)(
            half.tokens.half(), tuple(x.half() for x in half.features), half.grid, half.attention_tokens.half()
        )
        output, expected = backbone.trainable(kept, attention=True), backbone.trainable(half, attention=True)
        assert {feature.dtype for feature in output.features} == {torch.float32}
        for feature, whole in zip(output.features, expected.features, strict=True):
            torch.testing.assert_close(feature, whole, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(output.attention_logits, expected.attention_logits, rtol=2e-2, atol=0.1)


# --- Registry ------------------------------------------------------------------------------------------------------


def test_every_name_builds_the_architecture_that_it_says() -> None:
    for name, spec in BACKBONES.items():
        with torch.device("meta"):
            backbone = build_backbone(name)
        assert backbone.channels[-1] == (spec.size.channels[-1] if spec.kind == "mit" else spec.size.width)
        assert (
            bool(spec.weights) == bool(spec.license) == (not name.endswith(("_mini", "mit_tiny", "v2_tiny", "y_reg")))
        )


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("dinov2_smal_reg", "dinov2_small_reg or dinov2_small or dinov2_base_reg"),
        ("vit-small", "vit_small or deit_small or dinov2_small"),
        ("xyz", ", ".join(BACKBONES)),
    ],
)
def test_unknown_name(name: str, suggestion: str) -> None:
    with pytest.raises(AfaError) as caught:
        build_backbone(name)
    assert str(caught.value) == f"model.backbone is {name!r}; use {suggestion}"


def test_mit_has_its_four_levels() -> None:
    with pytest.raises(AfaError, match=r"^model\.feature_levels is 2, .*4 stages"):
        build_backbone("mit_tiny", feature_levels=2)


def test_frozen_stages_of_mit_in_order() -> None:
    for blocks, expected in [(0, 0), (1, 3), (2, 6), (4, 11), (5, 13)]:
        backbone: Any = build_backbone("mit_tiny", freeze_blocks=blocks)
        stages = backbone.encoder.stages
        order = [part for stage in stages for part in (stage.patch_embeddings, *stage.blocks, stage.layer_norm)]
        assert list(backbone.frozen_modules()) == order[:expected]


def test_the_page_shows_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "backbones.md"
    assert table() in page.read_text(encoding="utf-8"), "run `python -m afa.model.registry` and paste what it prints"
