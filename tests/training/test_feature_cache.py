"""Training from the feature cache is training on the same views; a stale or unfinished cache is never used."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from afa.config import Config
from afa.data.loader import train_batches
from afa.data.open import open_data
from afa.errors import AfaError
from afa.model.network import AfaNetwork
from afa.model.vit import TokenBackbone
from afa.runs.network import build_network
from afa.training import feature_cache, feature_store
from afa.training.engine import TrainingEngine
from afa.training.feature_cache import FeatureReader, feature_key, prepare_features
from afa.types import Batch
from tiny import assert_same_weights, tiny_config, train_tiny

CPU = torch.device("cpu")
CACHED = {
    "model.backbone": "dinov2_tiny",
    "model.freeze_blocks": 2,
    "model.drop_path": 0.0,
    "model.decoder_dropout": 0.0,
    "augment.whole_images": True,
    "train.feature_cache": True,
    "pseudo.scales": [1.0, 0.5, 1.5],
    # The CAMs of an untrained network are faint: with these, all kinds of label are there.
    "pseudo.background_low": 0.3,
    "pseudo.background_high": 0.4,
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 6 smooth pictures that are not square."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "JPEGImages").mkdir()
    (root / "lists").mkdir()
    names = [f"p{index}" for index in range(6)]
    for index, name in enumerate(names):
        coarse = np.random.default_rng(index).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        size = (50 + 6 * index, 70 - 5 * index)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(root / "JPEGImages" / f"{name}.png")
    (root / "lists" / "train.txt").write_text("\n".join(names))
    (root / "classes.txt").write_text("red\ngreen\nblue")
    tags = ["red", "green", "blue", "red green", "green blue", "red"]
    lines = [f"{name},{tag}" for name, tag in zip(names, tags, strict=True)]
    (root / "lists" / "tags.csv").write_text("\n".join(["image,tags", *lines]))
    return root


def make_config(root: Path, **keys: Any) -> Config:
    return tiny_config(root, CACHED | {"data.val_list": ""} | keys)


def make_network(config: Config) -> AfaNetwork:
    torch.manual_seed(0)
    network = build_network(config.model, 3)
    with torch.no_grad():
        # The blocks of an untrained encoder do next to nothing.
        for name, parameter in network.backbone.named_parameters():
            if "layer_scale" in name:
                parameter.fill_(1.0)
    return network


def prepare(config: Config, run: Path, network: AfaNetwork | None = None) -> FeatureReader:
    network = network or make_network(config)
    return prepare_features(network, open_data(config.data).train(), config, run, progress=False)


def batches(config: Config, reader: FeatureReader | None, **options: Any) -> list[Batch]:
    read = None if reader is None else reader.read
    return list(train_batches(open_data(config.data).train(), config, features=read, **options))


def test_rows_are_the_tokens_of_each_view(pictures: Path, tmp_path: Path) -> None:
    """Against the encoder on views that are made here, with Pillow's own resizing of the whole picture."""
    config = make_config(pictures)
    network = make_network(config)
    reader = prepare(config, tmp_path, network)
    backbone = network.backbone
    assert isinstance(backbone, TokenBackbone)
    index = 1
    image = Image.fromarray(open_data(config.data).train().image(index))
    width, height = image.size
    scaled = (round(width * 64 / max(image.size)), round(height * 64 / max(image.size)))
    canvas = Image.new("RGB", (64, 64))
    canvas.paste(image.resize(scaled, Image.Resampling.BILINEAR), ((64 - scaled[0]) // 2, (64 - scaled[1]) // 2))
    pixels = torch.from_numpy(np.array(canvas)).permute(2, 0, 1)[None] / 255
    normalized = (pixels - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    row, start = reader.store.row(index), 0
    found = {}
    for part in reader.parts:
        end = start + int(np.prod(part.shape))
        found[part.scale, part.name] = torch.from_numpy(np.array(row[start:end])).reshape(part.shape).float()
        start = end
    assert start == len(row)
    assert found.keys() == {(s, "tokens") for s in (0.5, 1.0, 1.5)} | {(1.0, "features_0")}
    for scale, side in ((0.5, 32), (1.0, 64), (1.5, 96)):
        view = torch.nn.functional.interpolate(normalized, size=(side, side), mode="bilinear", align_corners=False)
        for flip in (False, True):
            with torch.no_grad():
                tokens = backbone.frozen(view.flip(-1) if flip else view)
            assert tokens.grid == (side // 8, side // 8)
            torch.testing.assert_close(found[scale, "tokens"][int(flip)], tokens.tokens[0], rtol=2e-3, atol=2e-3)
            if scale == 1:
                kept = found[scale, "features_0"][int(flip)]
                torch.testing.assert_close(kept, tokens.features[0][0], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("frozen", [1, 3, 4])
def test_steps_from_the_cache_equal_steps_from_the_same_views(pictures: Path, tmp_path: Path, frozen: int) -> None:
    """All phases, mirrored images among them; with 3 and 4 the attention is computed from kept tokens too."""
    config = make_config(pictures, **{"model.freeze_blocks": frozen})
    reader = prepare(config, tmp_path)
    names = {part.name for part in reader.parts}
    assert ("attention_tokens" in names) == (frozen > 2)
    for step, (cached, plain) in enumerate(zip(batches(config, reader), batches(config, None), strict=True)):
        assert cached.image.equal(plain.image)
        results = []
        for batch in (cached, plain):
            engine = TrainingEngine(make_network(config).train(), config, device=CPU)
            engine.features = reader if batch is cached else None
            results.append((engine.take_step(step, batch), engine.network.state_dict()))
        (ours, weights), (theirs, others) = results
        for name in ("total", "cls", "seg", "aff"):
            one, other = getattr(ours, name), getattr(theirs, name)
            assert (one is None) == (other is None), name
            if one is not None:
                torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-4)
        for name in ("initial_label", "refined_label"):
            label, other = getattr(ours.labels, name), getattr(theirs.labels, name)
            assert (label is None) == (other is None), name
            if label is not None:
                assert len(other.unique()) > 2
                assert (label != other).float().mean() < 2e-3
        assert all(torch.isfinite(weights[key]).all() for key in others)
    flips = [plan_is_mirrored(config, step) for step in range(6)]
    assert {flip for step in flips for flip in step} == {False, True}


def plan_is_mirrored(config: Config, step: int) -> list[bool]:
    seen: list[bool] = []

    def note(_: int, __: Sequence[int], flips: Sequence[bool]) -> tuple[Tensor, ...]:
        seen.extend(flips)
        return ()

    next(train_batches(open_data(config.data).train(), config, start=step, features=note))
    return seen


def test_passes_never_run_the_frozen_part(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(pictures)
    reader = prepare(config, tmp_path)

    def fail(*_: object) -> None:
        raise AssertionError("the frozen part ran")

    monkeypatch.setattr(TokenBackbone, "frozen", fail)
    engine = TrainingEngine(make_network(config).train(), config, device=CPU)
    engine.features = reader
    for step, batch in enumerate(batches(config, reader)):
        engine.take_step(step, batch)


def test_a_step_reads_what_its_phase_needs(pictures: Path, tmp_path: Path) -> None:
    config = make_config(pictures, **{"model.freeze_blocks": 4})
    reader = prepare(config, tmp_path)
    shapes = [[tuple(part.shape[:2]) for part in batch.frozen] for batch in batches(config, reader)]
    # Steps 0 and 1 learn the tags alone: tokens and features of one side. Then the affinity needs its tokens, and the
    # CAM both sides of three scales; the walk, from step 4 on, the attention of the largest scale.
    assert shapes[0] == shapes[1] == [(4, 1)] * 4
    assert shapes[2] == [(4, 2), (4, 2), (4, 1), (4, 1), (4, 1), (4, 1), (4, 2)]
    assert shapes[5] == [*shapes[2], (4, 1)]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_device_change_nothing(pictures: Path, tmp_path: Path, workers: int) -> None:
    config = make_config(pictures)
    reader = prepare(config, tmp_path)
    expected = batches(config, reader)
    threaded = make_config(pictures, **{"data.workers": workers})
    for device in (None, CPU):
        for batch, other in zip(batches(threaded, reader, device=device), expected, strict=True):
            assert len(batch.frozen) == len(other.frozen) > 0
            assert all(part.equal(same) for part, same in zip(batch.frozen, other.frozen, strict=True))


def test_key_covers_all_that_the_tokens_depend_on(pictures: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(pictures, root)
    config = make_config(root)

    def key(config: Config = config, network: AfaNetwork | None = None) -> dict[str, Any]:
        backbone = (network or make_network(config)).backbone
        assert isinstance(backbone, TokenBackbone)
        return feature_key(backbone, open_data(config.data).train(), config)

    def changed(other: dict[str, Any]) -> set[str]:
        return {name for name in first if first[name] != other[name]}

    first = key()
    assert key() == first == json.loads(json.dumps(first))
    network = make_network(config)
    next(iter(network.backbone.parameters())).data.view(-1)[0] += 1e-3
    assert changed(key(network=network)) == {"weights"}
    trained = make_network(config)
    trained.classifier.weight.data += 1
    list(trained.backbone.parameters())[-1].data += 1
    assert key(network=trained) == first
    for name, value, names in (
        ("model.freeze_blocks", 3, {"freeze_blocks", "weights"}),
        ("model.feature_levels", 2, {"feature_levels"}),
        ("model.affinity_blocks", 1, {"affinity_blocks"}),
        ("augment.crop_size", 72, {"crop_size"}),
        ("pseudo.scales", [1.0, 0.5], {"scales", "attention_scales"}),
        ("pseudo.propagation", "none", {"attention_scales"}),
        ("augment.flip_probability", 0.0, {"mirrored"}),
        ("train.precision", "bf16", {"precision"}),
    ):
        assert changed(key(make_config(root, **{name: value}))) == names, name
    file = root / "JPEGImages" / "p3.png"
    os.utime(file, ns=(1, 1))
    assert changed(key()) == {"images"}
    (root / "lists" / "train.txt").write_text("p0\np1")
    assert changed(key()) == {"images"}


def count_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts: list[int] = []
    write = feature_store.FeatureStore.write

    def counted(self: feature_store.FeatureStore, rows: Any) -> None:
        counts.append(len(rows))
        write(self, rows)

    monkeypatch.setattr(feature_store.FeatureStore, "write", counted)
    return counts


def test_a_complete_cache_is_used_again_and_a_stale_one_never(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = count_rows(monkeypatch)
    config = make_config(pictures)
    prepare(config, tmp_path)
    prepare(config, tmp_path)
    assert sum(counts) == 6
    assert capsys.readouterr().err == ""
    network = make_network(config)
    next(iter(network.backbone.parameters())).data.view(-1)[0] += 1
    first = prepare(config, tmp_path)
    row = np.array(first.store.row(0))
    other = prepare(config, tmp_path, network)
    assert sum(counts) == 12
    assert not np.array_equal(other.store.row(0), row)
    folders = list((tmp_path / "features").iterdir())
    assert folders == [other.store.folder]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"{first.store.folder}: ")
    assert "deleted" in said


def test_runs_share_a_folder(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = count_rows(monkeypatch)
    config = make_config(pictures, **{"data.feature_dir": str(tmp_path / "shared")})
    prepare(config, tmp_path / "a")
    prepare(config, tmp_path / "b")
    prepare(make_config(pictures, **{"data.feature_dir": str(tmp_path / "shared"), "model.freeze_blocks": 1}), tmp_path)
    assert sum(counts) == 12
    assert len(list((tmp_path / "shared").iterdir())) == 2
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("how", ["crash", "ctrl_c"])
def test_a_cache_that_was_cut_off_goes_on(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(feature_cache, "_BATCH_IMAGES", {"cpu": 1})
    monkeypatch.setattr(feature_cache, "_COMMIT_BYTES", 0)
    config = make_config(pictures)
    straight = prepare(config, tmp_path / "straight")
    counts = count_rows(monkeypatch)
    with monkeypatch.context() as patch:
        if how == "ctrl_c":
            patch.setattr(feature_cache, "interrupts", lambda: Answers([False, False, True]))
            with pytest.raises(AfaError, match=r"stopped after 3 of 6 .*; the same"):
                prepare(config, tmp_path / "run")
        else:
            commit = feature_store.FeatureStore.commit

            def crash(self: feature_store.FeatureStore) -> None:
                if len(counts) == 4:
                    raise KeyboardInterrupt
                commit(self)

            patch.setattr(feature_store.FeatureStore, "commit", crash)
            with pytest.raises(KeyboardInterrupt):
                prepare(config, tmp_path / "run")
    counts.clear()
    reader = prepare(config, tmp_path / "run")
    assert sum(counts) == 3
    for index in range(6):
        np.testing.assert_array_equal(reader.store.row(index), straight.store.row(index))


class Answers:
    """Stands for `interrupts`: a context that answers whether Ctrl-C was pressed."""

    def __init__(self, answers: list[bool]) -> None:
        self.answers = answers

    def __enter__(self) -> Any:
        return lambda: self.answers.pop(0)

    def __exit__(self, *_: object) -> None:
        return None


def test_size_is_said_before_it_is_made(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(pictures)
    monkeypatch.setattr(feature_cache._Maker, "_fill", lambda *_, **__: None)
    images = open_data(config.data).train()
    with monkeypatch.context() as patch:
        patch.setattr(feature_store.FeatureStore, "is_complete", True)
        patch.setattr(feature_store.FeatureStore, "open", lambda _: None)
        patch.setattr(feature_cache, "FeatureReader", lambda store, _: store)
        store: Any = prepare_features(make_network(config), images, config, tmp_path)
    values = 64 * 2 * (1 + 64 + 64 + 1 + 16 + 1 + 144)
    assert store.num_bytes == 6 * 2 * values
    said = capsys.readouterr().err
    size = f"{6 * 2 * values / 2**20:.1f} MiB"
    assert said.startswith(f"feature cache: 6 images, 6 views each, {size} of at most 20 GiB in {store.folder}; about ")


def test_limit(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(AfaError, match=r"MiB, .*feature_cache_gib is 1e-05.*raise"):
        prepare(make_config(pictures, **{"train.feature_cache_gib": 1e-5}), tmp_path)
    assert not (tmp_path / "features").exists()


def test_tokens_too_large_for_fp16(pictures: Path, tmp_path: Path) -> None:
    config = make_config(pictures)
    network = make_network(config)
    network.backbone.get_parameter("encoder.embeddings.cls_token").data.fill_(1e6)
    with pytest.raises(AfaError, match=r"image p0: .*fp16; .*feature_cache"):
        prepare(config, tmp_path, network)


def test_encoders_that_cannot_be_cut(pictures: Path, tmp_path: Path) -> None:
    config = make_config(pictures, **{"model.backbone": "mit_tiny"})
    with pytest.raises(AfaError, match=r"mit_tiny .*blocks .*; take a plain"):
        prepare(config, tmp_path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model.freeze_blocks": 0}, r"train\.feature_cache is true, but model\.freeze_blocks is 0"),
        ({"augment.whole_images": False}, r"train\.feature_cache is true, but augment\.whole_images is false"),
    ],
)
def test_settings_that_contradict_it(pictures: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(AfaError, match=message):
        make_config(pictures, **keys)


def test_a_stopped_run_ends_like_one_that_was_not(pictures: Path, tmp_path: Path) -> None:
    """Dropout on; the stopped run keeps its cache, and makes no other."""
    config = make_config(pictures, **{"model.drop_path": 0.2, "model.decoder_dropout": 0.2})
    train_tiny(config, tmp_path / "straight")
    run = tmp_path / "run"
    stopped = dataclasses.replace(config, train=dataclasses.replace(config.train, save_steps=1))
    shutil.copytree(tmp_path / "straight", run)
    for path in run.iterdir():
        if path.name not in ("features", "config.toml", "classes.txt"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    took = 0
    take_step = TrainingEngine.take_step

    def crash(self: TrainingEngine, step: int, batch: Batch) -> Any:
        nonlocal took
        took += 1
        if took == 4:
            raise KeyboardInterrupt
        return take_step(self, step, batch)

    with pytest.MonkeyPatch.context() as patch:
        counts = count_rows(patch)
        patch.setattr(TrainingEngine, "take_step", crash)
        with pytest.raises(KeyboardInterrupt):
            train_tiny(stopped, run, resume=True)
        patch.setattr(TrainingEngine, "take_step", take_step)
        train_tiny(stopped, run, resume=True)
        assert not counts
    assert took == 4
    assert_same_weights(run, tmp_path / "straight")
