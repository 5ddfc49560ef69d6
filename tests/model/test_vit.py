"""Plain vision transformers against transformers' own forward pass, and how they handle positions and sizes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Dinov2WithRegistersModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from afa.errors import AfaError
from afa.model import vit
from afa.model.families import TOKEN_FAMILIES, TOKEN_SIZES
from afa.model.vit import TokenBackbone

SMALL = ("dinov2_tiny", "dinov2_tiny_reg", "vit_mini", "deit_mini", "clip_mini", "siglip_mini")
# 64 x 64 is the size of their position embeddings.
IMAGE_SIZES = [(64, 64), (32, 96), (128, 64), (80, 40)]
NUM_PREFIX_TOKENS = dict(zip(SMALL, (1, 5, 1, 2, 1, 0), strict=True))
HALF = [0.5, 0.5, 0.5]
NORMALIZATION: dict[str, tuple[list[float], list[float]]] = {
    "vit_mini": (HALF, HALF),
    "clip_mini": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "siglip_mini": (HALF, HALF),
}
# Million parameters of the image encoders as their papers and model cards have them, without heads.
MILLION_PARAMETERS = {
    "dinov2_small": 22.1,
    "dinov2_base": 86.6,
    "dinov2_large": 304.4,
    "dinov2_small_reg": 22.1,
    "vit_base": 85.8,
    "vit_large": 303.3,
    "deit_tiny": 5.5,
    "clip_b16": 85.8,
    "clip_b32": 87.5,
    "siglip_b16": 85.8,
}


def random_image(size: tuple[int, int]) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def random_backbone(size: str, **settings: Any) -> TokenBackbone:
    """Every parameter off its initial value, so that biases, norm layers and tokens count."""
    torch.manual_seed(0)
    backbone = TokenBackbone(size, **settings)
    for parameter in backbone.parameters():
        parameter += 0.1 * torch.randn(parameter.shape)
    return backbone.eval()


def eager_model(backbone: TokenBackbone) -> Any:
    """transformers' own model with the same weights and its own attention."""
    config = copy.deepcopy(backbone.encoder.config)
    config._attn_implementation = "eager"
    model = backbone.family.model(config, **backbone.family.options)
    missing, unexpected = model.load_state_dict(backbone.encoder.state_dict(), strict=False)
    assert set(missing) <= {"embeddings.mask_token"}
    assert unexpected == []
    return model.eval()


def run_eager(model: Any, image: Tensor) -> Any:
    options = {"output_hidden_states": True, "output_attentions": True}
    if not isinstance(model, Dinov2WithRegistersModel) and "dinov2" not in model.config.model_type:
        options["interpolate_pos_encoding"] = True
    with torch.no_grad():
        return model(image, **options)


def renormalize(image: Tensor, size: str) -> Tensor:
    """Take ImageNet's normalization back and apply the family's."""
    mean, std = NORMALIZATION.get(size, (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    column: Callable[[Any], Tensor] = lambda values: torch.tensor(values).view(3, 1, 1)  # noqa: E731
    pixels = image * column(IMAGENET_DEFAULT_STD) + column(IMAGENET_DEFAULT_MEAN)
    return (pixels - column(mean)) / column(std)


def as_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, grid)


def assert_equals_eager(
    backbone: TokenBackbone, eager: Any, image: Tensor, theirs: Tensor, *, prefix: int, tolerance: float
) -> None:
    """Every level and every map, for the same picture once as our contract has it and once as the model expects it."""
    with torch.no_grad():
        ours = backbone(image, attention=True)
    expected = run_eager(eager, theirs)
    grid = tuple(side // backbone.shape.patch for side in theirs.shape[2:])
    levels = [
        nn.functional.layer_norm(expected.hidden_states[level], (backbone.shape.width,))
        for level in backbone.levels[:-1]
    ]
    last = expected.last_hidden_state
    levels.append(eager.post_layernorm(last) if backbone.shape.family == "clip" else last)
    for feature, tokens in zip(ours.features, levels, strict=True):
        reference = as_map(tokens[:, prefix:], grid)
        assert (feature - reference).abs().max() <= tolerance * reference.abs().max()
    # Their softmax runs over all tokens; within the patch tokens it is ours up to a factor a row.
    probabilities = torch.cat(expected.attentions[-2:], dim=1)[:, :, prefix:, prefix:]
    assert probabilities.shape[1] == backbone.num_attention_maps
    torch.testing.assert_close(
        torch.softmax(ours.attention_logits * backbone.attention_scale, dim=-1),
        probabilities / probabilities.sum(-1, keepdim=True),
        rtol=0,
        atol=tolerance,
    )


@pytest.mark.parametrize("size", SMALL)
@pytest.mark.parametrize("image_size", IMAGE_SIZES)
def test_outputs_equal_transformers(size: str, image_size: tuple[int, int]) -> None:
    backbone, image = random_backbone(size), random_image(image_size)
    assert_equals_eager(
        backbone,
        eager_model(backbone),
        image,
        renormalize(image, size),
        prefix=NUM_PREFIX_TOKENS[size],
        tolerance=1e-4,
    )


@pytest.mark.data
@pytest.mark.parametrize("image_size", [(224, 224), (252, 336)])
def test_outputs_equal_transformers_on_real_weights(shared_dir: Path, image_size: tuple[int, int]) -> None:
    folder = str(shared_dir / "weights" / "dinov2-with-registers-small")
    backbone = TokenBackbone("dinov2_small_reg", folder).eval()
    eager = Dinov2WithRegistersModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    image = random_image(image_size)[:1]
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}
    assert_equals_eager(backbone, eager, image, image, prefix=5, tolerance=1e-4)


@pytest.mark.parametrize("size", SMALL)
def test_other_sizes_are_resized_up_to_whole_patches(size: str) -> None:
    backbone, image = random_backbone(size), random_image((57, 90))
    resized = nn.functional.interpolate(image, size=(64, 96), mode="bilinear")
    for feature, expected in zip(backbone(image).features, backbone(resized).features, strict=True):
        assert feature.shape[2:] == (8, 12)
        torch.testing.assert_close(feature, expected, rtol=1e-4, atol=1e-4)


def test_a_mirrored_image_has_mirrored_patches() -> None:
    backbone = random_backbone("dinov2_tiny")
    nn.init.zeros_(backbone.encoder.embeddings.position_embeddings)
    kernel = backbone.encoder.embeddings.patch_embeddings.projection.weight
    kernel.data = (kernel.data + kernel.data.flip(3)) / 2
    image = random_image((50, 61))
    feature, mirrored = backbone(image).features[-1], backbone(image.flip(3)).features[-1]
    torch.testing.assert_close(mirrored.flip(3), feature, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("feature_levels", "levels"), [(1, (4,)), (2, (2, 4)), (3, (1, 2, 4)), (4, (1, 2, 3, 4))])
def test_levels_are_evenly_spaced_and_end_with_the_last(feature_levels: int, levels: tuple[int, ...]) -> None:
    backbone = random_backbone("vit_mini", feature_levels=feature_levels)
    assert backbone.levels == levels
    every = random_backbone("vit_mini")(random_image((64, 64))).features
    features = backbone(random_image((64, 64))).features
    assert len(features) == feature_levels
    for level, feature in zip(levels, features, strict=True):
        assert torch.equal(feature, every[level - 1])
    with torch.device("meta"):
        assert TokenBackbone("dinov2_small").levels == (3, 6, 9, 12)


@pytest.mark.parametrize("size", ["dinov2_tiny_reg", "clip_mini"])
def test_an_exported_program_takes_every_size(size: str) -> None:
    backbone = random_backbone(size, freeze_blocks=2)

    class LastFeature(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone

        def forward(self, image: Tensor) -> Tensor:
            return self.backbone(image).features[-1]  # type: ignore[no-any-return]

    sides = ({2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)
    example = (random_image((64, 96))[:1],)
    program = torch.export.export(
        LastFeature(), example, dynamic_shapes=sides, prefer_deferred_runtime_asserts_over_guards=True
    ).module()
    for image_size in ((64, 96), (64, 64), (90, 51)):
        image = random_image(image_size)[:1]
        torch.testing.assert_close(program(image), backbone(image).features[-1], rtol=1e-3, atol=1e-3)


# --- Position embeddings -------------------------------------------------------------------------------------------


@pytest.fixture
def interpolations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Grids that position embeddings were interpolated to."""
    grids: list[tuple[int, int]] = []
    interpolate = nn.functional.interpolate

    def count(tensor: Tensor, *, size: tuple[int, int], mode: str, **settings: Any) -> Tensor:
        if mode == "bicubic":
            grids.append(tuple(size))  # type: ignore[arg-type]
        return interpolate(tensor, size=size, mode=mode, **settings)

    monkeypatch.setattr(nn.functional, "interpolate", count)
    return grids


def test_frozen_positions_are_interpolated_once_for_each_grid(interpolations: list[tuple[int, int]]) -> None:
    backbone = random_backbone("dinov2_tiny", freeze_blocks=1)
    for image_size in ((32, 96), (64, 64), (32, 96), (96, 32), (32, 96)):
        backbone(random_image(image_size))
    assert interpolations == [(4, 12), (12, 4)]


def test_kept_positions_do_not_outlive_their_weights() -> None:
    backbone, image = random_backbone("dinov2_tiny", freeze_blocks=1), random_image((32, 96))
    before = backbone(image).features[-1]
    other = TokenBackbone("dinov2_tiny")
    for change in (
        lambda: backbone.load_state_dict(other.state_dict()),
        lambda: nn.init.ones_(backbone.encoder.embeddings.position_embeddings),
        lambda: backbone.double(),
        lambda: backbone.float(),
    ):
        change()
        fresh = copy.deepcopy(backbone)
        fresh._positions.clear()
        dtype = next(backbone.parameters()).dtype
        after = backbone(image.to(dtype)).features[-1]
        assert torch.equal(after, fresh(image.to(dtype)).features[-1])
    assert not torch.allclose(after, before, rtol=1e-2, atol=1e-2)


def test_only_so_many_grids_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vit, "_MAX_GRIDS", 2)
    backbone = random_backbone("dinov2_tiny", freeze_blocks=1)
    for width in (16, 24, 32, 40):
        backbone(random_image((16, width)))
    assert list(backbone._positions) == [(2, 4), (2, 5)]


def test_learning_positions_get_their_gradient_at_every_size(interpolations: list[tuple[int, int]]) -> None:
    backbone = random_backbone("dinov2_tiny_reg")
    for _ in range(2):
        backbone.zero_grad()
        backbone(random_image((32, 96))).features[-1].square().mean().backward()
        assert backbone.encoder.embeddings.position_embeddings.grad.abs().amax(2).all()
    assert interpolations == [(4, 12)] * 2


# --- Sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", MILLION_PARAMETERS)
def test_sizes_are_the_published_ones(size: str) -> None:
    with torch.device("meta"):
        backbone = TokenBackbone(size)
    count = sum(parameter.numel() for parameter in backbone.parameters())
    assert count / 1e6 == pytest.approx(MILLION_PARAMETERS[size], abs=0.06)


@pytest.mark.parametrize("size", SMALL)
def test_attention_scale_is_that_of_the_encoder(size: str) -> None:
    backbone = random_backbone(size)
    module: Any = vit._attention_of(backbone._blocks[-1])
    assert backbone.attention_scale == (module.scale if size in ("clip_mini", "siglip_mini") else module.scaling)


def test_every_family_has_a_size() -> None:
    assert {TOKEN_SIZES[size].family for size in SMALL} == set(TOKEN_FAMILIES)


@pytest.mark.parametrize("size", ["dinov2_tiny", "dinov2_tiny_reg"])
def test_stochastic_depth_is_linear_over_depth(size: str) -> None:
    backbone = TokenBackbone(size, drop_path=0.3)
    torch.manual_seed(0)
    rates = [block.drop_path.drop_prob for block in backbone._blocks]  # type: ignore[union-attr]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    image = random_image((32, 32)).repeat(8, 1, 1, 1)
    assert not torch.equal(backbone(image).features[-1], backbone(image).features[-1])
    assert torch.equal(backbone(image).features[0], backbone(image).features[0])


def test_frozen_blocks_drop_nothing() -> None:
    torch.manual_seed(0)
    backbone = TokenBackbone("dinov2_tiny", drop_path=0.5, freeze_blocks=3)
    image = random_image((32, 32)).repeat(8, 1, 1, 1)
    assert torch.equal(backbone.frozen(image).tokens, backbone.frozen(image).tokens)
    assert not torch.equal(backbone(image).features[-1], backbone(image).features[-1])


@pytest.mark.parametrize("key", ["affinity_blocks", "freeze_blocks", "feature_levels"])
def test_more_blocks_than_there_are(key: str) -> None:
    message = f"model.{key} is 5, but clip_mini has 4 blocks; use at most that many"
    with pytest.raises(AfaError, match=f"^{message}$"):
        TokenBackbone("clip_mini", "", **{key.replace("affinity", "attention"): 5})


def test_names_of_weights_do_not_depend_on_the_version_of_transformers() -> None:
    state = TokenBackbone("dinov2_tiny").state_dict()
    old = dict(state)
    for layer in range(4):
        for kind in ("weight", "bias"):
            for name, before in [("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")]:
                key = f"encoder.encoder.layer.{layer}.attention."
                old[f"{key}attention.{before}.{kind}"] = old.pop(f"{key}{name}.{kind}")
            old[f"{key}output.dense.{kind}"] = old.pop(f"{key}o_proj.{kind}")
    renamed = {f"backbone.{key}": tensor for key, tensor in old.items()} | {"other": torch.zeros(1)}
    vit._rename_saved(nn.Identity(), renamed, "backbone.", None)
    assert renamed.keys() == {f"backbone.{key}" for key in state} | {"other"}
    vit._rename_loaded(nn.Identity(), renamed, "backbone.", None)
    assert renamed.keys() == {f"backbone.{key}" for key in old} | {"other"}
