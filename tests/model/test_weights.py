"""Loading weights: every layout they come in, every line for a user's mistake.

tests/model/test_mit.py has the original files of MiT.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    DeiTForImageClassificationWithTeacher,
    Dinov2ForImageClassification,
    Dinov2WithRegistersForImageClassification,
    PreTrainedModel,
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
    SegformerModel,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipModel,
    SiglipVisionModel,
    ViTForImageClassification,
    ViTModel,
)

from afa.model.backbone import Backbone
from afa.model.registry import build_backbone
from afa.model.weights import init_from_scratch
from encoders import ONE_OF_EACH_KIND, random_backbone
from mistakes import refused

TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TEXT |= {"vocab_size": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def plain_config(size: str) -> Any:
    config = random_backbone(size).encoder.config
    config._attn_implementation = "eager"
    return config


def fill(model: PreTrainedModel, encoder: nn.Module, part: str = "") -> PreTrainedModel:
    """Copy an encoder's weights into a model, or into the part of it that is such an encoder."""
    target = model.get_submodule(part)
    missing, unexpected = target.load_state_dict(encoder.state_dict(), strict=False)
    assert unexpected == []
    assert all(key.startswith(("embeddings.mask_token", "pooler.", "head.")) for key in missing)
    return model


def save_encoder(size: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """Save an encoder with what transformers adds by default: a pooler, a pooling head, a mask token."""
    backbone = random_backbone(size).to(dtype)
    model = type(backbone.encoder)(plain_config(size)).to(dtype)
    fill(model, backbone.encoder).save_pretrained(folder)
    return backbone.float()


def assert_same(size: str, folder: Path, expected: Backbone) -> None:
    loaded = build_backbone(size, str(folder)).state_dict()
    wanted = expected.state_dict()
    assert loaded.keys() == wanted.keys()
    for key, tensor in loaded.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, wanted[key]), key


def assert_message(size: str, weights: object, *parts: str) -> None:
    with refused(f"{weights}: ", *parts):
        build_backbone(size, str(weights))


# --- Layouts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ONE_OF_EACH_KIND)
def test_folder_of_an_encoder_is_loaded_in_silence(
    size: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    backbone = save_encoder(size, tmp_path)
    capfd.readouterr()
    build_backbone(size, str(tmp_path))
    assert capfd.readouterr() == ("", "")
    assert_same(size, tmp_path, backbone)


def test_folder_without_a_pooler_or_head(tmp_path: Path) -> None:
    backbone = random_backbone("vit_mini")
    fill(ViTModel(plain_config("vit_mini"), add_pooling_layer=False), backbone.encoder).save_pretrained(tmp_path / "v")
    assert_same("vit_mini", tmp_path / "v", backbone)
    backbone = random_backbone("siglip_mini")
    fill(SiglipVisionModel(backbone.encoder.config), backbone.encoder).save_pretrained(tmp_path / "s")
    assert_same("siglip_mini", tmp_path / "s", backbone)


@pytest.mark.parametrize(
    ("size", "model", "part"),
    [
        ("dinov2_tiny", Dinov2ForImageClassification, "dinov2"),
        ("dinov2_tiny_reg", Dinov2WithRegistersForImageClassification, "dinov2_with_registers"),
        ("vit_mini", ViTForImageClassification, "vit"),
        ("deit_mini", DeiTForImageClassificationWithTeacher, "deit"),
        ("mit_tiny", SegformerForImageClassification, "segformer"),
        ("mit_tiny", SegformerForSemanticSegmentation, "segformer"),
    ],
)
def test_folder_of_a_model_with_a_head(
    size: str, model: Any, part: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    backbone = random_backbone(size)
    fill(model(plain_config(size)), backbone.encoder, part).save_pretrained(tmp_path)
    capfd.readouterr()
    assert_same(size, tmp_path, backbone)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("size", "model", "config"),
    [
        ("clip_mini", CLIPModel, CLIPConfig),
        ("clip_mini", CLIPForImageClassification, CLIPConfig),
        ("siglip_mini", SiglipModel, SiglipConfig),
        ("siglip_mini", SiglipForImageClassification, SiglipConfig),
    ],
)
def test_folder_of_an_image_text_model(size: str, model: Any, config: Any, tmp_path: Path) -> None:
    backbone = random_backbone(size)
    vision = {key: value for key, value in backbone.encoder.config.to_dict().items() if value is not None}
    full = model(config(text_config=TEXT, vision_config=vision))
    fill(full, backbone.encoder, "vision_model").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == size.split("_")[0]
    assert_same(size, tmp_path, backbone)


@pytest.mark.parametrize("size", ["mit_tiny", "dinov2_tiny"])
def test_half_precision_is_loaded_as_float32(size: str, tmp_path: Path) -> None:
    assert_same(size, tmp_path, save_encoder(size, tmp_path, dtype=torch.float16))


def test_the_stride_of_a_folder_is_overruled(tmp_path: Path) -> None:
    config = plain_config("mit_tiny")
    config.strides = [4, 2, 2, 2]
    SegformerModel(config).save_pretrained(tmp_path)
    features = build_backbone("mit_tiny", str(tmp_path))(torch.zeros(2, 3, 64, 96)).features
    assert features[3].shape[2:] == (4, 6)


# --- Mistakes ------------------------------------------------------------------------------------------------------


def test_another_architecture(tmp_path: Path) -> None:
    save_encoder("vit_mini", tmp_path / "v")
    assert_message("dinov2_tiny_reg", tmp_path / "v", "'vit'", "model.weights", "DINOv2 with registers")
    assert_message("mit_tiny", tmp_path / "v", "'vit'", "model.weights", "SegFormer")
    save_encoder("clip_mini", tmp_path / "c")
    assert_message("siglip_mini", tmp_path / "c", "'clip_vision_model'", "model.weights", "SigLIP")


@pytest.mark.parametrize(
    ("field", "found", "needed"),
    [("hidden_size", 64, 768), ("num_hidden_layers", 4, 12), ("patch_size", 8, 16), ("image_size", 64, 224)],
)
def test_another_size_is_named(field: str, found: int, needed: int, tmp_path: Path) -> None:
    save_encoder("clip_mini", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 16}
    config |= {"image_size": 224, field: found} | ({"num_attention_heads": 4} if field == "hidden_size" else {})
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_message("clip_b16", tmp_path, f"{field} is {found}, but clip_b16 has {needed}; set model.backbone")


@pytest.mark.parametrize(
    ("stored", "asked", "said"),
    [
        ("mit_tiny", "mit_b0", "hidden_sizes is [16, 32, 64, 128], but mit_b0 has [32, 64, 160, 256]"),
        ("mit_b1", "mit_b2", "depths is [2, 2, 2, 2], but mit_b2 has [3, 4, 6, 3]"),
    ],
)
def test_another_size_of_mit_is_named(stored: str, asked: str, said: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        encoder: Any = build_backbone(stored).encoder
    encoder.config.save_pretrained(tmp_path)
    assert_message(asked, tmp_path, f"{said}; set model.backbone")


def test_sizes_of_an_image_text_model_are_those_of_its_image_encoder(tmp_path: Path) -> None:
    config: dict[str, Any] = {"model_type": "clip", "text_config": {"hidden_size": 768}}
    config |= {"vision_config": {"hidden_size": 1024, "num_attention_heads": 16}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_message("clip_b16", tmp_path, "hidden_size is 1024, but clip_b16 has 768")


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("size", "stored", "key"),
    [
        ("dinov2_tiny", "layernorm.bias", "layernorm.bias"),
        ("mit_tiny", "encoder.layer_norm.2.bias", "stages.2.layer_norm.bias"),
    ],
)
def test_keys_that_do_not_match_are_named(size: str, stored: str, key: str, tmp_path: Path) -> None:
    save_encoder(size, tmp_path)
    edit_weights(tmp_path, lambda state: state.update(odd=torch.zeros(1)))
    assert_message(size, tmp_path, "unmatched key 'odd' (1 in all); check model.backbone")
    edit_weights(tmp_path, lambda state: (state.pop("odd"), state.update({stored: torch.zeros(5)})))
    assert_message(size, tmp_path, f"{key!r} has shape (5,)", "(64,); check model.backbone")
    edit_weights(tmp_path, lambda state: state.pop(stored))
    assert_message(size, tmp_path, f"lacks key {key!r} (1 in all); check model.backbone")


@pytest.mark.parametrize(("size", "family"), [("vit_mini", "ViT"), ("mit_tiny", "SegFormer (MiT)")])
def test_a_folder_that_cannot_be_read(size: str, family: str, tmp_path: Path) -> None:
    assert_message(size, tmp_path, "no config.json", "model.weights")
    save_encoder(size, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"garbage")
    assert_message(size, tmp_path, f"{family} encoder weights (")


@pytest.mark.parametrize(
    ("size", "weights"),
    [
        *(("mit_b0", weights) for weights in ("weights", "./missing/folder", "~/weights", "a/b/c", "/nowhere/weights")),
        *(("vit_mini", weights) for weights in ("weights", "mit_b1.pth")),
    ],
)
def test_missing_folder(size: str, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    accepted = "a hub id or a .pth" if size == "mit_b0" else "a folder or a hub id"
    assert_message(size, weights, "no such weights folder", accepted, "model.weights")


@pytest.mark.parametrize("size", ["mit_b0", "dinov2_small"])
def test_unreachable_hub(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[Any] = []

    def refuse(*address: Any, **_: Any) -> None:
        attempts.append(address)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_message(size, "nobody/no-such-model", "cannot be fetched", "(", "); download", "model.weights")
    assert attempts == []


# --- Random weights ------------------------------------------------------------------------------------------------


def test_random_weights_keep_the_scale_of_their_input() -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(400, 300), nn.Conv2d(16, 64, 5), nn.Conv2d(64, 64, 3, groups=64, bias=False)])
    init_from_scratch(layers)
    for layer, gain in zip(layers, (0.25, 2.0, 2.0), strict=True):
        weight: Any = layer.weight
        assert weight[0].numel() * weight.var().item() == pytest.approx(gain, rel=0.15)
    assert not layers[0].bias.any()  # type: ignore[union-attr, operator]
