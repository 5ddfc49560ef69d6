"""Networks from configurations and runs, and the messages of run folders that hold no usable weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from afa.config import Config, ModelConfig, config_to_toml
from afa.errors import AfaError
from afa.model.network import AfaNetwork
from afa.model.weights import load_weights
from afa.runs.network import build_network, load_run
from afa.runs.run import Run
from mistakes import refused

CPU = torch.device("cpu")
CLASSES = ("cat", "dog", "horse")
MODEL = ModelConfig(backbone="mit_tiny", weights="", decoder_width=16)


def small_network(seed: int = 0) -> AfaNetwork:
    torch.manual_seed(seed)
    return build_network(MODEL, len(CLASSES))


def write_run(run: Path, model: ModelConfig = MODEL) -> Path:
    """A run folder without weights."""
    run.mkdir()
    (run / "config.toml").write_text(config_to_toml(Config(model=model)))
    (run / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    return run


def save_weights(path: Path, network: AfaNetwork) -> dict[str, Tensor]:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), path)
    return network.state_dict()


def assert_holds(network: torch.nn.Module, state: dict[str, Tensor]) -> None:
    loaded = network.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


# --- Building ------------------------------------------------------------------------------------------------------


def test_every_model_key_reaches_the_network() -> None:
    network = build_network(
        ModelConfig(
            backbone="mit_tiny",
            weights="",
            drop_path=0.4,
            pooling="topk",
            pooling_percent=10.0,
            decoder_width=24,
            decoder_dropout=0.3,
            affinity_blocks=1,
            attention_scaling=True,
            norm_eps=1e-4,
        ),
        7,
    )
    assert network.num_classes == network.classifier.out_channels == 7
    assert network.decoder.classify.out_channels == 8
    assert (network.pooling, network.pooling_percent) == ("topk", 10.0)
    assert (network.decoder.width, network.decoder.dropout.p) == (24, 0.3)
    assert network.backbone.encoder.config.drop_path_rate == 0.4
    assert network.backbone.num_attention_maps == network.affinity_head.mix.in_channels == 8
    assert network.attention_factor == network.backbone.attention_scale
    norms = {name: each.eps for name, each in network.backbone.named_modules() if isinstance(each, torch.nn.LayerNorm)}
    inner = ("patch_embeddings.layer_norm", "sequence_reduction.layer_norm")
    assert {eps for name, eps in norms.items() if name.endswith(inner)} == {1e-5}
    assert {eps for name, eps in norms.items() if not name.endswith(inner)} == {1e-4}
    assert sum(eps == 1e-4 for eps in norms.values()) == 4 + 2 * 5


@pytest.mark.parametrize(("kind", "std"), [("kaiming", (2 / 256) ** 0.5), ("uniform", 1024**-0.5 / 3**0.5)])
def test_initial_weights_of_the_fusing_convolution(kind: Literal["kaiming", "uniform"], std: float) -> None:
    torch.manual_seed(0)
    network = build_network(ModelConfig(backbone="mit_tiny", weights="", decoder_init=kind), 2)
    assert network.decoder.fuse.weight.detach().std().item() == pytest.approx(std, rel=0.01)


def test_initial_weights_are_loaded_only_when_asked_for() -> None:
    model = dataclasses.replace(MODEL, weights="missing/mit_tiny.pth")
    build_network(model, 3, pretrained=False)
    with pytest.raises(AfaError, match=r"^missing/mit_tiny\.pth: .*model\.weights"):
        build_network(model, 3)


# --- Loading a run -------------------------------------------------------------------------------------------------


def test_a_finished_run_loads_its_final_weights(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", dataclasses.replace(MODEL, weights="missing/mit_tiny.pth"))
    state = save_weights(run / "model.safetensors", small_network())
    # Where the encoder once started from is not needed any more; an older checkpoint does not win.
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "latest").write_text("step_00000002\n")
    save_weights(run / "checkpoints" / "step_00000002" / "model.safetensors", small_network(seed=1))
    loaded = load_run(run, CPU)
    assert_holds(loaded.network, state)
    assert not any(module.training for module in loaded.network.modules())
    assert loaded.classes == CLASSES
    assert loaded.config.model.weights == "missing/mit_tiny.pth"


def test_an_unfinished_run_loads_its_latest_checkpoint(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    states = {
        step: save_weights(run / "checkpoints" / step / "model.safetensors", small_network(seed))
        for seed, step in enumerate(("step_00000002", "step_00000004"))
    }
    for step, state in states.items():
        (run / "checkpoints" / "latest").write_text(f"{step}\n")
        assert Run(run).newest_weights() == run / "checkpoints" / step / "model.safetensors"
        assert_holds(load_run(run, CPU).network, state)


@pytest.mark.parametrize("missing", ["config.toml", "classes.txt", "run"])
def test_not_a_run_folder(tmp_path: Path, missing: str) -> None:
    run = tmp_path / "run"
    if missing != "run":
        write_run(run)
        (run / missing).unlink()
    for read in (lambda: load_run(run, CPU), lambda: Run(run).classes()):
        with refused(f"{run}: not a run folder", "config.toml", "classes.txt", "afa train"):
            read()


def test_an_empty_configuration_is_not_the_default_one(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run)
    (run / "config.toml").write_text("\n")
    with refused(run / "config.toml", "is empty", "restore"):
        Run(run).config()


@pytest.mark.parametrize(("contents", "found"), [(b"\xaa\xff", "UTF-8"), (b"", "no class")])
def test_broken_list_of_classes(tmp_path: Path, contents: bytes, found: str) -> None:
    run = tmp_path / "run"
    write_run(run)
    (run / "classes.txt").write_bytes(contents)
    with refused("classes.txt", found, "restore"):
        Run(run).classes()


@pytest.mark.parametrize("leftover", ["nothing", "empty folder", "pointer"])
def test_no_weights_yet(tmp_path: Path, leftover: str) -> None:
    run = write_run(tmp_path / "run")
    if leftover != "nothing":
        (run / "checkpoints").mkdir()
    if leftover == "pointer":
        (run / "checkpoints" / "latest").write_text("step_00000002\n")
    with refused(f"{run}: ", "no weights", "train"):
        load_run(run, CPU)


# --- Loading weights -----------------------------------------------------------------------------------------------


def assert_refused(network: AfaNetwork, path: Path) -> str:
    """Loading fails with one line that begins with the path, and leaves the network as it was."""
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    with pytest.raises(AfaError) as caught:
        load_weights(network, path)
    assert_holds(network, before)
    prefix, message = f"{path}: ", str(caught.value)
    assert message.startswith(prefix)
    assert "\n" not in message
    return message.removeprefix(prefix)


def test_missing_weights_file(tmp_path: Path) -> None:
    assert assert_refused(small_network(), tmp_path / "model.safetensors") == "no such weights file"


@pytest.mark.parametrize("length", [0, 4, 1000, -1])
def test_broken_weights_file(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.safetensors"
    save_weights(path, small_network())
    path.write_bytes(path.read_bytes()[:length])
    message = assert_refused(small_network(seed=1), path)
    assert message.startswith("broken weights file (")
    assert message.endswith("); restore it or train again")


def test_weights_with_a_key_too_many(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(small_network().state_dict() | {"a.b": torch.zeros(1), "a.c": torch.zeros(1)}, path)
    message = assert_refused(small_network(seed=1), path)
    assert "'a.b' (2 in all); it belongs to another" in message


def test_weights_with_a_key_too_few(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    state = small_network().state_dict()
    del state["classifier.weight"]
    save_file(state, path)
    message = assert_refused(small_network(seed=1), path)
    assert "lacks key 'classifier.weight' (1 in all)" in message


def test_weights_of_other_classes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    save_weights(run / "model.safetensors", build_network(MODEL, 5))
    with refused(
        run / "model.safetensors", "'classifier.weight' has shape (5, 128, 1, 1)", "(3, 128, 1, 1)", "another"
    ):
        load_run(run, CPU)
