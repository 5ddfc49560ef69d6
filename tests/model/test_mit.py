"""Mix Transformers against transformers' own eager SegformerModel; every way to load weights and to fail at it."""

from __future__ import annotations

import math
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
    SegformerConfig,
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
    SegformerModel,
    ViTConfig,
    ViTModel,
)

from afa.model.heads import AffinityHead
from afa.model.mit import MIT_SIZES, MixTransformer, convert_original_keys
from mistakes import refused

# Square, wide, tall and odd; 32 is the smallest size that the encoders take.
IMAGE_SIZES = [(32, 32), (48, 80), (97, 65), (33, 47)]
# Million encoder parameters as the SegFormer paper and the hub's model cards have them.
MILLION_PARAMETERS = {
    "mit_b0": 3.32,
    "mit_b1": 13.15,
    "mit_b2": 24.20,
    "mit_b3": 44.07,
    "mit_b4": 60.84,
    "mit_b5": 81.44,
}
STAGE_CHANNELS = dict.fromkeys(MILLION_PARAMETERS, (64, 128, 320, 512)) | {"mit_b0": (32, 64, 160, 256)}


def random_image(size: tuple[int, int], *, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@torch.no_grad()
def shake(module: nn.Module) -> None:
    """Move every parameter off its initial value, so that biases and norm layers count."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def random_backbone(size: str = "mit_tiny") -> MixTransformer:
    torch.manual_seed(0)
    backbone = MixTransformer(size)
    shake(backbone)
    return backbone.eval()


def hugging_face_config(size: str, *, strides: tuple[int, ...] = (4, 2, 2, 1)) -> SegformerConfig:
    shape = MIT_SIZES[size]
    return SegformerConfig(
        hidden_sizes=list(shape.channels),
        depths=list(shape.depths),
        num_attention_heads=list(shape.heads),
        strides=list(strides),
    )


def eager_model(backbone: MixTransformer, size: str = "mit_tiny") -> SegformerModel:
    """transformers' own model with the same weights and its own attention."""
    config = hugging_face_config(size)
    config._attn_implementation = "eager"
    model = SegformerModel(config)
    model.load_state_dict(backbone.encoder.state_dict())
    return model.eval()


def assert_equals_eager(backbone: MixTransformer, eager: SegformerModel, image: Tensor, *, tolerance: float) -> None:
    """Every stage with and without maps, relative to its largest value; maps by their softmax."""
    with torch.no_grad():
        expected = eager(image, output_hidden_states=True, output_attentions=True)
        plain = backbone(image)
        recorded = backbone(image, attention=True)
    assert plain.attention_logits is None
    assert len(expected.hidden_states) == 4
    for ours in (plain, recorded):
        for feature, theirs in zip(ours.features, expected.hidden_states, strict=True):
            assert feature.shape == theirs.shape
            assert (feature - theirs).abs().max() <= tolerance * theirs.abs().max()
    probabilities = torch.softmax(recorded.attention_logits * backbone.attention_scale, dim=-1)
    theirs = torch.cat(expected.attentions[-2:], dim=1)
    assert theirs.shape[1] == backbone.num_attention_maps
    torch.testing.assert_close(probabilities, theirs, rtol=0, atol=max(tolerance, 1e-6), check_dtype=False)


# --- Outputs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["mit_tiny", "mit_b0"])
@pytest.mark.parametrize("image_size", IMAGE_SIZES)
def test_outputs_equal_transformers_in_float32(size: str, image_size: tuple[int, int]) -> None:
    backbone = random_backbone(size)
    assert_equals_eager(backbone, eager_model(backbone, size), random_image(image_size), tolerance=1e-5)


@pytest.mark.parametrize("image_size", IMAGE_SIZES)
def test_fused_outputs_equal_transformers_in_float64(
    image_size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Eager attention asks for its softmax in float32, whatever its input; here it must not round.
    softmax = nn.functional.softmax
    monkeypatch.setattr(nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim))
    backbone = random_backbone()
    eager = eager_model(backbone).double()
    backbone.double()
    image = random_image(image_size, dtype=torch.float64)
    with torch.no_grad():
        expected = eager(image, output_hidden_states=True).hidden_states
        features = backbone(image).features
    for feature, theirs in zip(features, expected, strict=True):
        torch.testing.assert_close(feature, theirs, rtol=0, atol=1e-10)


@pytest.mark.data
@pytest.mark.parametrize("image_size", IMAGE_SIZES)
def test_outputs_equal_transformers_on_real_weights(shared_dir: Path, image_size: tuple[int, int]) -> None:
    folder = str(shared_dir / "weights" / "mit-b0-near-imagenet")
    backbone = MixTransformer("mit_b0", folder).eval()
    eager = SegformerModel.from_pretrained(
        folder, strides=[4, 2, 2, 1], dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert backbone.encoder.dtype == torch.float32
    assert_equals_eager(backbone, eager, random_image(image_size), tolerance=1e-5)


def test_the_weights_folders_own_stride_is_overruled(tmp_path: Path) -> None:
    SegformerModel(hugging_face_config("mit_tiny", strides=(4, 2, 2, 2))).save_pretrained(tmp_path)
    features = MixTransformer("mit_tiny", str(tmp_path))(random_image((64, 96))).features
    assert features[3].shape[2:] == (4, 6)


@pytest.mark.parametrize("image_size", IMAGE_SIZES)
def test_features_have_the_published_channels_and_strides(image_size: tuple[int, int]) -> None:
    backbone = random_backbone()
    output = backbone(random_image(image_size), attention=True)
    assert backbone.strides == (4, 8, 16, 16)
    for feature, channels, stride in zip(output.features, backbone.channels, backbone.strides, strict=True):
        assert feature.shape == (2, channels, *(math.ceil(side / stride) for side in image_size))
    tokens = math.prod(output.features[-1].shape[2:])
    assert output.attention_logits.shape == (2, backbone.num_attention_maps, tokens, tokens)


def test_attention_logits_are_the_raw_products_of_the_last_blocks() -> None:
    backbone = random_backbone()
    inputs: list[Tensor] = []
    blocks = backbone.encoder.stages[-1].blocks[-2:]
    for block in blocks:
        block.attention.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        logits = backbone(random_image((48, 80)), attention=True).attention_logits
        for i, (block, hidden) in enumerate(zip(blocks, inputs, strict=True)):
            query, key = (
                projection(hidden).unflatten(2, (8, -1)).transpose(1, 2)
                for projection in (block.attention.q_proj, block.attention.k_proj)
            )
            torch.testing.assert_close(
                logits[:, 8 * i : 8 * (i + 1)], query @ key.transpose(2, 3), rtol=1e-5, atol=1e-4
            )


def test_affinity_gradient_reaches_query_and_key_of_the_last_two_blocks() -> None:
    backbone = random_backbone("mit_b0")
    head = AffinityHead(backbone.num_attention_maps)
    affinity = head(backbone(random_image((48, 80)), attention=True).attention)
    (affinity * torch.randn_like(affinity)).sum().backward()
    for block in backbone.encoder.stages[-1].blocks[-2:]:
        for projection in (block.attention.q_proj, block.attention.k_proj):
            assert projection.weight.grad.abs().max() > 0
    # What made the tokens learns too; what comes after the last product does not.
    assert backbone.encoder.stages[0].patch_embeddings.proj.weight.grad.abs().max() > 0
    assert backbone.encoder.stages[-1].blocks[-1].attention.v_proj.weight.grad is None


def test_gradients_are_the_same_with_and_without_maps() -> None:
    backbone = random_backbone()
    gradients = []
    for attention in (False, True):
        backbone.zero_grad()
        feature = backbone(random_image((48, 80)), attention=attention).features[-1]
        (feature * torch.linspace(-1, 1, feature.numel()).view_as(feature)).sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in backbone.parameters()]))
    fused, recorded = gradients
    assert (fused - recorded).abs().max() <= 1e-5 * fused.abs().max()


def test_maps_do_not_pile_up_over_passes() -> None:
    backbone = random_backbone()
    first = backbone(random_image((32, 32)), attention=True).attention_logits
    second = backbone(random_image((32, 32)), attention=True).attention_logits
    assert torch.equal(first, second)


@pytest.mark.parametrize("attention_blocks", [1, 2])
def test_attention_blocks_are_counted_from_the_end(attention_blocks: int) -> None:
    backbone = MixTransformer("mit_tiny", attention_blocks=attention_blocks).eval()
    assert backbone.num_attention_maps == 8 * attention_blocks
    maps = backbone(random_image((32, 32)), attention=True).attention_logits
    both = MixTransformer("mit_tiny").eval()
    both.load_state_dict(backbone.state_dict())
    expected = both(random_image((32, 32)), attention=True).attention_logits[:, -8 * attention_blocks :]
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-4)


def test_attention_scale_is_that_of_the_encoder() -> None:
    for size in MIT_SIZES:
        with torch.device("meta"):
            backbone = MixTransformer(size)
        assert backbone.attention_scale == backbone.encoder.stages[-1].blocks[-1].attention.scaling


def test_stochastic_depth_is_linear_over_depth() -> None:
    backbone = MixTransformer("mit_b0", drop_path=0.35)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in backbone.encoder.stages for block in stage.blocks]
    assert rates == pytest.approx([0.05 * i for i in range(8)])


def test_norm_parameters_are_all_layer_norms_and_nothing_else() -> None:
    backbone = random_backbone("mit_b0")
    found = {id(parameter) for parameter in backbone.norm_parameters()}
    for name, parameter in backbone.named_parameters():
        assert (id(parameter) in found) == ("norm" in name), name
    # Per stage: patch embedding, final, two a block, and one a block where keys are reduced (not in the last stage).
    assert len(found) == 2 * (4 * (1 + 1 + 2 * 2) + 3 * 2)


# --- Sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", MILLION_PARAMETERS)
def test_sizes_are_those_of_the_paper(size: str) -> None:
    with torch.device("meta"):
        backbone = MixTransformer(size)
        output = backbone(torch.empty(1, 3, 64, 96), attention=True)
    count = sum(parameter.numel() for parameter in backbone.parameters())
    assert count / 1e6 == pytest.approx(MILLION_PARAMETERS[size], rel=0.002)
    assert backbone.channels == STAGE_CHANNELS[size]
    assert backbone.num_attention_maps == 16
    assert [tuple(feature.shape[1:]) for feature in output.features] == [
        (channels, 64 // stride, 96 // stride)
        for channels, stride in zip(STAGE_CHANNELS[size], (4, 8, 16, 16), strict=True)
    ]


def test_the_tiny_size_is_small() -> None:
    with torch.device("meta"):
        backbone = MixTransformer("mit_tiny")
    assert sum(parameter.numel() for parameter in backbone.parameters()) < 0.7e6


def test_more_attention_blocks_than_the_last_stage_has() -> None:
    with refused("model.affinity_blocks is 3", "mit_b0 has 2 blocks; use"):
        MixTransformer("mit_b0", attention_blocks=3)


# --- Loading the original layout -----------------------------------------------------------------------------------


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
def reference() -> SegformerModel:
    """An encoder with weights of its own, at transformers' eager attention."""
    config = hugging_face_config("mit_tiny")
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = SegformerModel(config)
    shake(model)
    return model.eval()


@pytest.fixture
def original_state(reference: SegformerModel) -> dict[str, Tensor]:
    """The reference's weights as a published file holds them, ImageNet head included."""
    head = {"head.weight": torch.zeros(1000, 128), "head.bias": torch.zeros(1000)}
    return original_layout(reference.state_dict()) | head


def assert_same_encoder(backbone: MixTransformer, reference: SegformerModel) -> None:
    assert_equals_eager(backbone.eval(), reference, random_image((48, 80)), tolerance=1e-5)


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


@pytest.mark.parametrize("suffix", [".pth", ".pt"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_original_weights_round_trip(
    reference: SegformerModel, original_state: dict[str, Tensor], tmp_path: Path, wrapped: bool, suffix: str
) -> None:
    path = tmp_path / f"mit_tiny{suffix}"
    torch.save({"state_dict": original_state, "epoch": 300} if wrapped else original_state, path)
    assert_same_encoder(MixTransformer("mit_tiny", str(path)), reference)


def test_converted_keys_are_those_of_transformers(reference: SegformerModel, original_state: dict[str, Tensor]) -> None:
    converted = convert_original_keys(original_state)
    expected = reference.state_dict()
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[key], expected[key]) for key in expected)


def test_half_precision_weights_are_loaded_as_float32(original_state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({key: tensor.half() for key, tensor in original_state.items()}, tmp_path / "half.pth")
    backbone = MixTransformer("mit_tiny", str(tmp_path / "half.pth"))
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}


@pytest.mark.parametrize("key", ["decode_head.linear.weight", "block2.0.attn.qkv.weight", "patch_embed5.proj.weight"])
def test_unmatched_key_of_an_original_file_is_named(
    original_state: dict[str, Tensor], tmp_path: Path, key: str
) -> None:
    path = tmp_path / "mit.pth"
    torch.save(original_state | {key: torch.zeros(2)}, path)
    assert_message("mit_tiny", path, f"unmatched key '{key}'", "expected a mit_b*.pth")


def test_extra_block_of_an_original_file_is_named(original_state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "mit.pth"
    torch.save(original_state | {"block1.7.norm1.weight": torch.zeros(16)}, path)
    assert_message("mit_tiny", path, "'stages.0.blocks.7.layernorm_before.weight' (1 in all); check model.backbone")


def test_missing_key_of_an_original_file_is_named(original_state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "mit.pth"
    del original_state["norm3.bias"]
    torch.save(original_state, path)
    assert_message("mit_tiny", path, "lacks key 'stages.2.layer_norm.bias' (1 in all); check model.backbone")
    del original_state["norm4.bias"]
    torch.save(original_state, path)
    assert_message("mit_tiny", path, "lacks key 'stages.2.layer_norm.bias' (2 in all)")


def test_wrong_shape_in_an_original_file_is_named(original_state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "mit.pth"
    torch.save(original_state | {"norm3.bias": torch.zeros(5)}, path)
    assert_message("mit_tiny", path, "'stages.2.layer_norm.bias' has shape (5,)", "(64,); check model.backbone")


def test_original_file_of_another_size(original_state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "mit.pth"
    torch.save(original_state, path)
    assert_message("mit_b0", path, "'stages.0.blocks.1.attention.k_proj.bias' (", " in all); check model.backbone")


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
    torch.save(original_state, path)
    path.write_bytes(path.read_bytes()[:length])
    assert_message("mit_tiny", path, "broken", "model.weights")


@pytest.mark.parametrize("content", [torch.zeros(3), {"epoch": 3}, [1, 2], {"state_dict": {"epoch": 3}}])
def test_original_file_without_a_state_dictionary(tmp_path: Path, content: object) -> None:
    path = tmp_path / "mit.pth"
    torch.save(content, path)
    assert_message("mit_tiny", path, "no state dictionary", "mit_tiny.pth")


def test_missing_original_file(tmp_path: Path) -> None:
    path = tmp_path / "mit.pth"
    assert_message("mit_tiny", path, "no such weights file", "model.weights")


# --- Loading with from_pretrained ----------------------------------------------------------------------------------


def test_folder_of_an_encoder(reference: SegformerModel, tmp_path: Path) -> None:
    reference.save_pretrained(tmp_path)
    assert_same_encoder(MixTransformer("mit_tiny", str(tmp_path)), reference)


@pytest.mark.parametrize("kind", [SegformerForImageClassification, SegformerForSemanticSegmentation])
def test_folder_of_a_model_with_a_head(reference: SegformerModel, tmp_path: Path, kind: Any) -> None:
    model = kind(hugging_face_config("mit_tiny"))
    model.segformer.load_state_dict(reference.state_dict())
    model.save_pretrained(tmp_path)
    assert_same_encoder(MixTransformer("mit_tiny", str(tmp_path)), reference)


def test_half_precision_folder_is_loaded_as_float32(reference: SegformerModel, tmp_path: Path) -> None:
    reference.half().save_pretrained(tmp_path)
    backbone = MixTransformer("mit_tiny", str(tmp_path))
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}
    assert_same_encoder(backbone, reference.float())


def test_folder_of_another_size(reference: SegformerModel, tmp_path: Path) -> None:
    reference.save_pretrained(tmp_path)
    found = "hidden_sizes is [16, 32, 64, 128], but mit_b0 has [32, 64, 160, 256]"
    assert_message("mit_b0", tmp_path, found, "set model.backbone")


def test_folder_of_another_depth(tmp_path: Path) -> None:
    with torch.device("meta"):
        config = SegformerModel(hugging_face_config("mit_b1")).config
    config.save_pretrained(tmp_path)
    assert_message("mit_b2", tmp_path, "depths is [2, 2, 2, 2], but mit_b2 has [3, 4, 6, 3]; set model.backbone")


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_key_of_a_folder_is_named(reference: SegformerModel, tmp_path: Path) -> None:
    reference.save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda state: state.pop("encoder.layer_norm.2.bias"))
    assert_message("mit_tiny", tmp_path, "lacks key 'stages.2.layer_norm.bias' (1 in all); check model.backbone")


def test_unmatched_key_of_a_folder_is_named(reference: SegformerModel, tmp_path: Path) -> None:
    reference.save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda state: state.update(odd=torch.zeros(1)))
    assert_message("mit_tiny", tmp_path, "unmatched key 'odd' (1 in all); check model.backbone")


def test_wrong_shape_in_a_folder_is_named(reference: SegformerModel, tmp_path: Path) -> None:
    reference.save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda state: state.update({"encoder.layer_norm.2.bias": torch.zeros(5)}))
    assert_message("mit_tiny", tmp_path, "'stages.2.layer_norm.bias' has shape (5,)", "(64,); check model.backbone")


def test_broken_weights_in_a_folder(reference: SegformerModel, tmp_path: Path) -> None:
    reference.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"garbage")
    assert_message("mit_tiny", tmp_path, "SegFormer (MiT) encoder weights (")


def test_folder_without_config(tmp_path: Path) -> None:
    assert_message("mit_b0", tmp_path, "no config.json", "model.weights")


def test_folder_of_another_architecture(tmp_path: Path) -> None:
    ViTModel(
        ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)
    ).save_pretrained(tmp_path)
    assert_message("mit_b0", tmp_path, "'vit'", "model.weights", "SegFormer")


@pytest.mark.parametrize("weights", ["weights", "./missing/folder", "~/weights", "a/b/c", "/nowhere/weights"])
def test_missing_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert_message("mit_b0", weights, "no such weights folder", ".pth", "model.weights")


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Attempts to reach the network, which all fail."""
    attempts: list[Any] = []

    def refuse(*address: Any, **_: Any) -> None:
        attempts.append(address)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return attempts


def test_unreachable_hub(connections: list[Any]) -> None:
    assert_message("mit_b0", "nobody/no-such-model", "cannot be fetched", "(", "); download", "model.weights")
    assert connections == []


def test_loading_is_silent(reference: SegformerModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = SegformerForImageClassification(hugging_face_config("mit_tiny"))
    model.save_pretrained(tmp_path)
    capfd.readouterr()
    MixTransformer("mit_tiny", str(tmp_path))
    assert capfd.readouterr() == ("", "")
