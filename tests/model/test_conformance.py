"""Every kind of encoder keeps the same promises, and computes what transformers' own model computes."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from afa.model.backbone import Backbone
from afa.model.network import AfaNetwork
from afa.model.registry import BACKBONES, build_backbone
from afa.model.vit import TokenBackbone
from encoders import ONE_OF_EACH_KIND, SMALL, load_eager, random_backbone, random_image
from mistakes import refused

IMAGE_SIZES = [(40, 72), (57, 33), (64, 64)]
NUM_PREFIX_TOKENS = dict(zip(SMALL, (1, 5, 5, 1, 2, 1, 0), strict=True))
HALF = [0.5, 0.5, 0.5]
NORMALIZATION: dict[str, tuple[list[float], list[float]]] = {
    "vit_mini": (HALF, HALF),
    "clip_mini": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "siglip_mini": (HALF, HALF),
}
# Million parameters of the image encoders as their papers and model cards have them, without heads.
MILLION_PARAMETERS = {
    "mit_b0": 3.32,
    "mit_b1": 13.15,
    "mit_b2": 24.20,
    "mit_b3": 44.07,
    "mit_b4": 60.84,
    "mit_b5": 81.44,
    "dinov2_small": 22.1,
    "dinov2_base": 86.6,
    "dinov2_large": 304.4,
    "dinov2_small_reg": 22.1,
    "dinov3_small": 21.6,
    "dinov3_base": 85.7,
    "dinov3_large": 303.1,
    "vit_base": 85.8,
    "vit_large": 303.3,
    "deit_tiny": 5.5,
    "clip_b16": 85.8,
    "clip_b32": 87.5,
    "siglip_b16": 85.8,
}


def depth(name: str) -> int:
    return BACKBONES[name].size.depth


def blocks_of(backbone: Any) -> list[Any]:
    if isinstance(backbone, TokenBackbone):
        return list(backbone._blocks)
    return [block for stage in backbone.encoder.stages for block in stage.blocks]


def attention_of(block: nn.Module) -> Any:
    return next(part for part in block.modules() if hasattr(part, "is_causal"))


def everything(backbone: Backbone, image: Tensor) -> list[Tensor]:
    output = backbone(image, attention=True)
    assert output.attention_logits is not None
    return [*output.features, output.attention_logits]


def rotated(tokens: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """(B, heads, hw, d) turned by its place: pairs of channels, half the width apart, as complex numbers."""
    one, two = tokens.chunk(2, -1)
    half = one.shape[-1]
    turned = torch.complex(one, two) * torch.complex(cosine[:, :half], sine[:, :half])
    return torch.cat([turned.real, turned.imag], -1)


def weighted_sum(outputs: list[Tensor]) -> Tensor:
    return sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).mean() for x in outputs)  # type: ignore[return-value]


def test_one_of_each_kind_is_tested() -> None:
    assert sorted(BACKBONES[name].kind for name in ONE_OF_EACH_KIND) == sorted(
        {spec.kind for spec in BACKBONES.values()}
    )


# --- What transformers computes ------------------------------------------------------------------------------------


def renormalize(image: Tensor, name: str) -> Tensor:
    """Take ImageNet's normalization back and apply the family's."""
    if name not in NORMALIZATION:
        return image
    ours, theirs = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD), NORMALIZATION[name]
    (mean, std), (new_mean, new_std) = ([torch.tensor(x).view(3, 1, 1) for x in pair] for pair in (ours, theirs))
    return (image * std + mean - new_mean) / new_std


def run_eager(backbone: Any, eager: Any, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Feature maps and the softmax of the last two blocks over patch tokens, as transformers has them."""
    options: dict[str, Any] = {"output_hidden_states": True, "output_attentions": True}
    if eager.config.model_type in ("vit", "deit", "clip_vision_model", "siglip_vision_model"):
        options["interpolate_pos_encoding"] = True
    with torch.no_grad():
        found = eager(image, **options)
    maps = torch.cat(found.attentions[-2:], dim=1)
    if not isinstance(backbone, TokenBackbone):
        assert len(found.hidden_states) == 4
        return list(found.hidden_states), [maps]
    prefix = backbone.num_prefix_tokens
    levels = [
        nn.functional.layer_norm(found.hidden_states[level], (backbone.shape.width,)) for level in backbone.levels[:-1]
    ]
    last = found.last_hidden_state
    levels.append(eager.post_layernorm(last) if backbone.shape.family == "clip" else last)
    grid = [side // backbone.shape.patch for side in image.shape[2:]]
    features = [tokens[:, prefix:].transpose(1, 2).unflatten(2, grid) for tokens in levels]
    # Their softmax runs over all tokens; within the patch tokens it is ours up to a factor a row.
    patches = maps[:, :, prefix:, prefix:]
    return features, [patches / patches.sum(-1, keepdim=True)]


def assert_equals_eager(backbone: Any, eager: Any, image: Tensor, theirs: Tensor, *, tolerance: float) -> None:
    """Every level with and without maps, relative to its largest value; maps by their softmax."""
    features, (maps,) = run_eager(backbone, eager, theirs)
    with torch.no_grad():
        plain, recorded = backbone(image), backbone(image, attention=True)
    assert plain.attention_logits is None
    for output in (plain, recorded):
        for feature, expected in zip(output.features, features, strict=True):
            assert feature.shape == expected.shape
            assert (feature - expected).abs().max() <= tolerance * expected.abs().max()
    assert maps.shape[1] == backbone.num_attention_maps
    found = torch.softmax(recorded.attention_logits * backbone.attention_scale, dim=-1)
    torch.testing.assert_close(found, maps, rtol=0, atol=tolerance, check_dtype=False)


# Square, wide, tall and odd; 32 is the smallest that MiT takes, 64 x 64 the size of the others' position embeddings.
MIT_CASES = [(name, size) for name in ("mit_tiny", "mit_b0") for size in ((32, 32), (48, 80), (97, 65), (33, 47))]
TOKEN_CASES = [(name, size) for name in SMALL for size in ((64, 64), (32, 96), (128, 64), (80, 40))]


@pytest.mark.parametrize(("name", "image_size"), MIT_CASES + TOKEN_CASES)
def test_outputs_equal_transformers(name: str, image_size: tuple[int, int]) -> None:
    backbone, image = random_backbone(name), random_image(image_size)
    if name in SMALL:
        assert backbone.num_prefix_tokens == NUM_PREFIX_TOKENS[name]
    tolerance = 1e-4 if name in SMALL else 1e-5
    assert_equals_eager(backbone, load_eager(backbone), image, renormalize(image, name), tolerance=tolerance)


@pytest.mark.parametrize("image_size", [(32, 32), (48, 80), (97, 65), (33, 47)])
def test_fused_outputs_of_mit_equal_transformers_in_float64(
    image_size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Eager attention asks for its softmax in float32, whatever its input; here it must not round.
    softmax = nn.functional.softmax
    monkeypatch.setattr(nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim))
    backbone, image = random_backbone("mit_tiny").double(), random_image(image_size).double()
    expected, _ = run_eager(backbone, load_eager(backbone).double(), image)
    with torch.no_grad():
        for feature, theirs in zip(backbone(image).features, expected, strict=True):
            torch.testing.assert_close(feature, theirs, rtol=0, atol=1e-10)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "folder", "image_size"),
    [
        *(("mit_b0", "mit-b0-near-imagenet", size) for size in ((32, 32), (48, 80), (97, 65), (33, 47))),
        *(("dinov2_small_reg", "dinov2-with-registers-small", size) for size in ((224, 224), (252, 336))),
    ],
)
def test_outputs_equal_transformers_on_real_weights(
    shared_dir: Path, name: str, folder: str, image_size: tuple[int, int]
) -> None:
    path = str(shared_dir / "weights" / folder)
    backbone: Any = build_backbone(name, path).eval()
    # Read from the files, not copied: what is loaded is tested too.
    settings = {"strides": [4, 2, 2, 1]} if name == "mit_b0" else {}
    eager = type(backbone.encoder).from_pretrained(path, dtype=torch.float32, attn_implementation="eager", **settings)
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}
    image = random_image(image_size, batch=2 if name == "mit_b0" else 1)
    tolerance = 1e-5 if name == "mit_b0" else 1e-4
    assert_equals_eager(backbone, eager.eval(), image, image, tolerance=tolerance)


# --- Sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MILLION_PARAMETERS)
def test_sizes_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        backbone = build_backbone(name)
    count = sum(parameter.numel() for parameter in backbone.parameters())
    expected = MILLION_PARAMETERS[name]
    assert count / 1e6 == pytest.approx(expected, abs=0.002 * expected if name.startswith("mit") else 0.06)


@pytest.mark.parametrize("name", BACKBONES)
def test_attention_scale_is_that_of_the_encoder(name: str) -> None:
    with torch.device("meta"):
        backbone = build_backbone(name)
    module = attention_of(blocks_of(backbone)[-1])
    assert backbone.attention_scale == (module.scale if name.startswith(("clip", "siglip")) else module.scaling)


@pytest.mark.parametrize("name", ["mit_b0", "dinov2_tiny", "dinov2_tiny_reg"])
def test_stochastic_depth_is_linear_over_depth(name: str) -> None:
    backbone = build_backbone(name, drop_path=0.35)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks_of(backbone)]
    assert rates == pytest.approx([0.35 * i / (depth(name) - 1) for i in range(depth(name))])
    torch.manual_seed(0)
    image = random_image((32, 32)).repeat(8, 1, 1, 1)
    assert not torch.equal(backbone(image).features[-1], backbone(image).features[-1])
    if name != "mit_b0":
        assert torch.equal(backbone(image).features[0], backbone(image).features[0])


@pytest.mark.parametrize(
    ("name", "key", "blocks"),
    [
        ("mit_b0", "affinity_blocks", 2),
        *((name, "freeze_blocks", 5 if name == "mit_tiny" else 4) for name in ONE_OF_EACH_KIND),
        *(("clip_mini", key, 4) for key in ("affinity_blocks", "feature_levels")),
    ],
)
def test_more_blocks_than_there_are(name: str, key: str, blocks: int) -> None:
    setting: dict[str, Any] = {key.replace("affinity", "attention"): blocks + 1}
    with refused(f"model.{key} is {blocks + 1}", f"{name} has {blocks} blocks; use at most"):
        build_backbone(name, **setting)


# --- Promises ------------------------------------------------------------------------------------------------------


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

    def test_maps_change_neither_features_nor_gradients(self, name: str) -> None:
        backbone = random_backbone(name)
        features, gradients = [], []
        for attention in (True, False):
            backbone.zero_grad()
            features.append(backbone(random_image((40, 72)), attention=attention).features)
            weighted_sum(list(features[-1])).backward()
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in backbone.parameters()]))
        for feature, expected in zip(*features, strict=True):
            torch.testing.assert_close(feature, expected, rtol=1e-4, atol=1e-4)
        assert (gradients[0] - gradients[1]).abs().max() <= 1e-5 * gradients[1].abs().max()

    def test_maps_are_the_raw_products_of_the_last_blocks(self, name: str) -> None:
        backbone = random_backbone(name)
        blocks = [attention_of(block) for block in blocks_of(backbone)[-2:]]
        seen: dict[nn.Module, Tensor] = {}
        for block in blocks:
            for part in (block.q_proj, block.k_proj):
                part.register_forward_hook(lambda module, _, output: seen.update({module: output}))
        maps = backbone(random_image((40, 72)), attention=True).attention_logits
        heads, prefix = backbone.num_attention_maps // 2, NUM_PREFIX_TOKENS.get(name, 0)
        for i, block in enumerate(blocks):
            query, key = (
                seen[part].unflatten(-1, (heads, -1)).transpose(1, 2)[:, :, prefix:]
                for part in (block.q_proj, block.k_proj)
            )
            if name == "dinov3_mini":
                query, key = (rotated(part, *backbone.encoder.rope_embeddings(torch.zeros(1, 3, 40, 72)))
                              for part in (query, key))  # fmt: skip
            expected = query @ key.transpose(2, 3)
            torch.testing.assert_close(maps[:, heads * i : heads * (i + 1)], expected, rtol=1e-4, atol=1e-4)

    def test_gradient_of_the_maps_reaches_query_and_key_of_their_blocks(self, name: str) -> None:
        backbone = random_backbone(name)
        weighted_sum([backbone(random_image((40, 72)), attention=True).attention_logits]).backward()
        blocks = [attention_of(block) for block in blocks_of(backbone)[-2:]]
        for block in blocks:
            for part in (block.q_proj, block.k_proj):
                assert part.weight.grad.abs().max() > 0
        # What made the tokens learns too; what comes after the last product does not.
        assert next(backbone.parameters()).grad.abs().max() > 0
        assert blocks[-1].v_proj.weight.grad is None

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
