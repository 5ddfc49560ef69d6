"""What only MiT has: stages, the published sizes, and the original layout of its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from afa.model.mit import MixTransformer, convert_original_keys
from encoders import random_backbone
from mistakes import refused

STAGE_CHANNELS = {f"mit_b{i}": (64, 128, 320, 512) for i in range(1, 6)} | {"mit_b0": (32, 64, 160, 256)}


@pytest.mark.parametrize("size", STAGE_CHANNELS)
def test_shapes_are_those_of_the_paper(size: str) -> None:
    with torch.device("meta"):
        backbone = MixTransformer(size)
        output = backbone(torch.empty(1, 3, 64, 96), attention=True)
    assert backbone.channels == STAGE_CHANNELS[size]
    assert backbone.strides == (4, 8, 16, 16)
    assert backbone.num_attention_maps == 16
    assert [tuple(feature.shape[1:]) for feature in output.features] == [
        (channels, 64 // stride, 96 // stride)
        for channels, stride in zip(STAGE_CHANNELS[size], (4, 8, 16, 16), strict=True)
    ]


def test_the_tiny_size_is_small() -> None:
    with torch.device("meta"):
        backbone = MixTransformer("mit_tiny")
    assert sum(parameter.numel() for parameter in backbone.parameters()) < 0.7e6


def test_every_norm_layer_learns() -> None:
    # Per stage: patch embedding, final, two a block, and one a block where keys are reduced (not in the last stage).
    assert len(MixTransformer("mit_b0").norm_parameters()) == 2 * (4 * (1 + 1 + 2 * 2) + 3 * 2)


def test_frozen_stages_in_order() -> None:
    for blocks, expected in [(0, 0), (1, 3), (2, 6), (4, 11), (5, 13)]:
        backbone = MixTransformer("mit_tiny", freeze_blocks=blocks)
        stages = backbone.encoder.stages
        order = [part for stage in stages for part in (stage.patch_embeddings, *stage.blocks, stage.layer_norm)]
        assert list(backbone.frozen_modules()) == order[:expected]


# --- The original layout of weights --------------------------------------------------------------------------------


def original_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name a SegformerModel's weights as the published mit_b*.pth files do."""
    layers = {
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.q_proj": "attn.q",
        "attention.o_proj": "attn.proj",
        "attention.sequence_reduction.sequence_reduction": "attn.sr",
        "attention.sequence_reduction.layer_norm": "attn.norm",
        "mlp.fc1": "mlp.fc1",
        "mlp.dwconv.dwconv": "mlp.dwconv.dwconv",
        "mlp.fc2": "mlp.fc2",
    }
    original: dict[str, Tensor] = {}
    for key, tensor in state.items():
        _, index, *rest = key.split(".")
        stage, layer, kind = int(index) + 1, ".".join(rest[:-1]), rest[-1]
        if layer == "patch_embeddings.proj":
            original[f"patch_embed{stage}.proj.{kind}"] = tensor
        elif layer == "patch_embeddings.layer_norm":
            original[f"patch_embed{stage}.norm.{kind}"] = tensor
        elif layer == "layer_norm":
            original[f"norm{stage}.{kind}"] = tensor
        else:
            _, block, layer = layer.split(".", 2)
            name = f"block{stage}.{block}"
            if layer == "attention.k_proj":
                value = state[key.replace("k_proj", "v_proj")]
                original[f"{name}.attn.kv.{kind}"] = torch.cat([tensor, value])
            elif layer != "attention.v_proj":
                original[f"{name}.{layers[layer]}.{kind}"] = tensor
    return original


@pytest.fixture
def reference() -> MixTransformer:
    backbone: MixTransformer = random_backbone("mit_tiny")
    return backbone


@pytest.fixture
def original_state(reference: MixTransformer) -> dict[str, Tensor]:
    """The reference's weights as a published file holds them, ImageNet head included."""
    head = {"head.weight": torch.zeros(1000, 128), "head.bias": torch.zeros(1000)}
    return original_layout(reference.encoder.state_dict()) | head


def assert_message(size: str, weights: object, *parts: str) -> None:
    with refused(f"{weights}: ", *parts):
        MixTransformer(size, str(weights))


def test_original_layout_of_the_test_is_that_of_the_published_files(original_state: dict[str, Tensor]) -> None:
    block = ("norm1", "attn.q", "attn.kv", "attn.proj", "attn.sr", "attn.norm", "norm2", "mlp.fc1", "mlp.dwconv.dwconv")
    layers = [
        "patch_embed2.proj",
        "patch_embed2.norm",
        *(f"block2.0.{layer}" for layer in (*block, "mlp.fc2")),
        "norm2",
    ]
    second_stage = {key for key in original_state if key.startswith(("patch_embed2", "block2", "norm2"))}
    assert second_stage == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert original_state["block2.0.attn.kv.weight"].shape == (64, 32)


@pytest.mark.parametrize(("suffix", "wrapped"), [(".pth", False), (".pth", True), (".pt", False)])
def test_original_weights_round_trip(
    reference: MixTransformer, original_state: dict[str, Tensor], tmp_path: Path, wrapped: bool, suffix: str
) -> None:
    path = tmp_path / f"mit_tiny{suffix}"
    torch.save({"state_dict": original_state, "epoch": 300} if wrapped else original_state, path)
    converted, loaded = (
        convert_original_keys(original_state),
        MixTransformer("mit_tiny", str(path)).encoder.state_dict(),
    )
    expected = reference.encoder.state_dict()
    assert converted.keys() == loaded.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(converted[key], tensor), key
        assert torch.equal(loaded[key], tensor), key


def test_half_precision_weights_are_loaded_as_float32(original_state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({key: tensor.half() for key, tensor in original_state.items()}, tmp_path / "half.pth")
    backbone = MixTransformer("mit_tiny", str(tmp_path / "half.pth"))
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}


LAST_NORM = "stages.2.layer_norm.bias"


@pytest.mark.parametrize(
    ("added", "lacking", "parts"),
    [
        *(
            ({key: 2}, (), (f"unmatched key '{key}'", "expected a mit_b*.pth"))
            for key in ("decode_head.linear.weight", "block2.0.attn.qkv.weight", "patch_embed5.proj.weight")
        ),
        ({"block1.7.norm1.weight": 16}, (), ("'stages.0.blocks.7.layernorm_before.weight' (1 in all); check",)),
        ({}, ("norm3.bias",), (f"lacks key '{LAST_NORM}' (1 in all); check model.backbone",)),
        ({}, ("norm3.bias", "norm4.bias"), (f"lacks key '{LAST_NORM}' (2 in all)",)),
        ({"norm3.bias": 5}, (), (f"'{LAST_NORM}' has shape (5,)", "(64,); check model.backbone")),
    ],
)
def test_keys_of_an_original_file_that_do_not_match_are_named(
    original_state: dict[str, Tensor],
    tmp_path: Path,
    added: dict[str, int],
    lacking: tuple[str, ...],
    parts: tuple[str, ...],
) -> None:
    state = original_state | {key: torch.zeros(length) for key, length in added.items()}
    torch.save({key: tensor for key, tensor in state.items() if key not in lacking}, tmp_path / "mit.pth")
    assert_message("mit_tiny", tmp_path / "mit.pth", *parts)


def test_original_file_of_another_size(original_state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(original_state, tmp_path / "mit.pth")
    key = "stages.0.blocks.1.attention.k_proj.bias"
    assert_message("mit_b0", tmp_path / "mit.pth", f"'{key}' (", " in all); check model.backbone")


class Harmful:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return Path.touch, (Path("executed"),)  # type: ignore[return-value]


def test_a_pickle_with_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"norm1.weight": Harmful()}, "mit.pth")
    assert_message("mit_tiny", "mit.pth", "more than tensors", "model.weights")
    assert not Path("executed").exists()
    # It is the loading that keeps it from running, not the pickle.
    torch.load("mit.pth", weights_only=False)
    assert Path("executed").exists()


@pytest.mark.parametrize("length", [0, 5, 5000])
def test_truncated_original_file(original_state: dict[str, Tensor], tmp_path: Path, length: int) -> None:
    path = tmp_path / "mit.pth"
    assert_message("mit_tiny", path, "no such weights file", "model.weights")
    torch.save(original_state, path)
    path.write_bytes(path.read_bytes()[:length])
    assert_message("mit_tiny", path, "broken", "model.weights")


@pytest.mark.parametrize("content", [torch.zeros(3), {"epoch": 3}, [1, 2], {"state_dict": {"epoch": 3}}])
def test_original_file_without_a_state_dictionary(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "mit.pth")
    assert_message("mit_tiny", tmp_path / "mit.pth", "no state dictionary", "mit_tiny.pth")
