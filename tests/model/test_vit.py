"""What only plain vision transformers have: patches, position embeddings, levels, names of weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from afa.model import vit
from afa.model.families import TOKEN_FAMILIES, TOKEN_SIZES
from afa.model.vit import TokenBackbone
from encoders import SMALL, random_backbone, random_image


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


def test_every_family_has_a_size() -> None:
    assert {TOKEN_SIZES[size].family for size in SMALL} == set(TOKEN_FAMILIES)


def test_frozen_blocks_drop_nothing() -> None:
    torch.manual_seed(0)
    backbone = TokenBackbone("dinov2_tiny", drop_path=0.5, freeze_blocks=3)
    image = random_image((32, 32)).repeat(8, 1, 1, 1)
    assert torch.equal(backbone(image).features[2], backbone(image).features[2])
    assert not torch.equal(backbone(image).features[-1], backbone(image).features[-1])


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
