"""Training from the feature cache is training on the same views; a stale or unfinished cache is never used."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
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
from afa.errors import AfaError, GoneError
from afa.model.language import LanguageBackbone
from afa.model.network import AfaNetwork
from afa.pseudo.cam import normalize_cam
from afa.runs.network import build_network
from afa.runtime import process_group, showing_progress
from afa.training import feature_cache, feature_store
from afa.training.engine import TrainingEngine
from afa.training.feature_cache import FeatureReader, feature_key, prepare_features
from afa.types import Batch, normalize_image
from encoders import write_embeddings
from mistakes import refused
from tiny import assert_same_weights, tiny_config, train_tiny
from together import together

CPU = torch.device("cpu")
WORDS = [("red",), ("green",), ("blue",)]
CACHED = {
    "model.backbone": "clip_mini",
    "model.classifier": "text",
    "model.freeze_blocks": 4,
    "model.affinity_blocks": 1,
    "model.drop_path": 0.0,
    "model.text_sharpness": 10.0,
    "model.decoder_dropout": 0.0,
    "augment.whole_images": True,
    "train.feature_cache": True,
    "pseudo.scales": [1.0],
    "pseudo.mirror": False,
    "schedule.cls_steps": 0,
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
    words = {
        "model.text_embeddings": str(write_embeddings(root / "words", ["red", "green", "blue", "sky", "grass"], 32))
    }
    return tiny_config(root, CACHED | words | {"data.val_list": ""} | keys)


def make_network(config: Config, words: Sequence[Sequence[str]] = WORDS) -> AfaNetwork:
    torch.manual_seed(0)
    network = build_network(config.model, 3, words=words)
    with torch.no_grad():
        for parameter in network.backbone.parameters():  # an untrained encoder says the same everywhere
            parameter += 0.1 * torch.randn(parameter.shape)
    return network


def prepare(config: Config, run: Path, network: AfaNetwork | None = None) -> FeatureReader:
    network = network or make_network(config)
    with showing_progress(False):
        return prepare_features(network, open_data(config.data).train(), config, run)


def batches(config: Config, reader: FeatureReader | None, **options: Any) -> list[Batch]:
    return list(train_batches(open_data(config.data).train(), config, features=reader, **options))


def pixels_of(config: Config, index: int) -> Tensor:
    """(1, 3, H, W) view of an image, with Pillow's own resizing of the whole picture."""
    image = Image.fromarray(open_data(config.data).train().image(index))
    width, height = (8 * round(side * 64 / max(image.size) / 8) for side in image.size)
    return torch.from_numpy(np.array(image.resize((width, height), Image.Resampling.BILINEAR))).permute(2, 0, 1)[None]


def test_rows_are_what_the_encoder_makes_of_each_image(pictures: Path, tmp_path: Path) -> None:
    config = make_config(pictures)
    network = make_network(config).eval()
    reader = prepare(config, tmp_path, network)
    for index in range(6):
        pixels = pixels_of(config, index)
        grid = (pixels.shape[2] // 8, pixels.shape[3] // 8)
        assert reader.grids[index] == grid
        kept = network.encode(normalize_image(pixels / 255))
        for flip in (False, True):
            arrays = reader.read([index], [flip])
            for array, expected in zip(arrays, (*kept.features, normalize_cam(kept.class_scores)), strict=True):
                assert array.shape == (1, expected.shape[1], 8, 8)
                found = array[0, :, : grid[0], : grid[1]].float()
                torch.testing.assert_close(found.flip(-1) if flip else found, expected[0], rtol=2e-3, atol=2e-3)
                assert array.count_nonzero() <= found.numel()


def test_batches_show_the_pixels_that_the_features_are_of(pictures: Path, tmp_path: Path) -> None:
    config = make_config(pictures)
    reader = prepare(config, tmp_path)
    flips = set()
    for batch in batches(config, reader):
        for row, name in enumerate(batch.names):
            index = int(name.removeprefix("p"))
            expected = pixels_of(config, index)[0]
            _, bottom, _, right = batch.valid_box[row].tolist()
            assert (bottom, right) == expected.shape[1:]
            seen = batch.image[row, :, :bottom, :right]
            mirrored = not seen.equal(expected)
            assert seen.equal(expected.flip(-1) if mirrored else expected)
            kept = reader.read([index], [mirrored])
            assert all(part[row].equal(same[0]) for part, same in zip(batch.frozen, kept, strict=True))
            flips.add(mirrored)
    assert flips == {False, True}


def test_steps_from_the_cache_equal_steps_from_the_pixels(pictures: Path, tmp_path: Path) -> None:
    """Of square pictures, which fill the canvas: elsewhere the encoder would see the margin."""
    root = tmp_path / "square"
    shutil.copytree(pictures, root)
    for path in (root / "JPEGImages").iterdir():
        Image.open(path).resize((64, 64)).save(path)
    config = make_config(root, **{"augment.flip_probability": 0.0})
    reader = prepare(config, tmp_path)
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
                torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)
        for name in ("initial_label", "refined_label"):
            label, other = getattr(ours.labels, name), getattr(theirs.labels, name)
            assert (label is None) == (other is None), name
            if label is not None:
                assert len(other.unique()) > 2
                assert (label != other).float().mean() < 3e-2  # half precision: where two scores are near
        for key, weight in others.items():
            torch.testing.assert_close(weights[key], weight, rtol=1e-2, atol=5e-3)


def test_a_step_from_the_cache_never_runs_the_encoder(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(pictures)
    reader = prepare(config, tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the encoder ran")

    monkeypatch.setattr(LanguageBackbone, "forward", fail)
    engine = TrainingEngine(make_network(config).train(), config, device=CPU)
    engine.features = reader
    for step, batch in enumerate(batches(config, reader)):
        engine.take_step(step, batch)


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


def test_key_covers_all_that_the_rows_depend_on(pictures: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(pictures, root)
    config = make_config(root)

    def key(config: Config = config, network: AfaNetwork | None = None) -> dict[str, Any]:
        return feature_key(network or make_network(config), open_data(config.data).train(), config)

    def changed(other: dict[str, Any]) -> set[str]:
        return {name for name in first if first[name] != other[name]}

    first = key()
    assert key() == first == json.loads(json.dumps(first))
    network = make_network(config)
    next(iter(network.backbone.parameters())).data.view(-1)[0] += 1e-3
    assert changed(key(network=network)) == {"weights"}
    trained = make_network(config)
    for part in (trained.decoder, trained.affinity_head):
        for parameter in part.parameters():
            parameter.data += 1
    assert key(network=trained) == first
    assert changed(key(network=make_network(config, [("sky",), *WORDS[1:]]))) == {"words"}
    for name, value, names in (
        ("model.feature_levels", 3, {"feature_levels", "weights"}),  # drawn before the encoder's, in this test
        ("model.background_words", ["sky"], {"words"}),
        ("model.text_sharpness", 20.0, {"sharpness"}),
        ("augment.crop_size", 72, {"crop_size"}),
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

    def counted(self: feature_store.FeatureStore, number: int, row: Any) -> None:
        counts.append(1)
        write(self, number, row)

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


def test_only_images_that_steps_take_are_kept_and_more_are_added(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = count_rows(monkeypatch)
    short = make_config(pictures, **{"schedule.max_steps": 1, "schedule.refined_steps": 1, "schedule.batch_size": 2})
    few = prepare_features(make_network(short), open_data(short.data).train(), short, tmp_path)
    taken = {int(name.removeprefix("p")) for batch in batches(short, few) for name in batch.names}
    assert sum(counts) == len(taken) == len(few.grids) == 2
    assert capsys.readouterr().err.startswith("feature cache: the 2 of 6 images to be used, ")
    every = prepare(make_config(pictures), tmp_path)
    assert sum(counts) == 6
    assert every.store.folder == few.store.folder
    for index in taken:
        np.testing.assert_array_equal(every.store.row(index), few.store.row(index))
    straight = prepare(make_config(pictures), tmp_path / "straight")
    for index in range(6):  # images of one batch are computed together, which may move the last bit
        np.testing.assert_allclose(every.store.row(index), straight.store.row(index), rtol=2e-3, atol=2e-3)


def test_runs_share_a_folder(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = count_rows(monkeypatch)
    config = make_config(pictures, **{"data.feature_dir": str(tmp_path / "shared")})
    prepare(config, tmp_path / "a")
    prepare(config, tmp_path / "b")
    prepare(
        make_config(pictures, **{"data.feature_dir": str(tmp_path / "shared"), "model.feature_levels": 3}), tmp_path
    )
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


def _fill_shared(rank: int, folder: Path, root: str, end: int) -> None:
    """Fill a cache with another process; the second one is killed in its batch after `end`."""
    feature_cache._BATCH_IMAGES, feature_cache._COMMIT_BYTES = {"cpu": 2}, 0  # type: ignore[misc]
    config, done = make_config(Path(root)), 0
    compute = feature_cache._rows

    def rows(*arguments: Any) -> Any:
        nonlocal done
        if rank == 1 and done == end:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1
        with (folder / "batches").open("a") as file:
            file.write("x")
        return compute(*arguments)

    feature_cache._rows = rows
    network, images = make_network(config), open_data(config.data).train()
    try:
        with process_group(CPU) as processes:
            prepare_features(network, images, config, folder / "run", processes=processes)
    except GoneError:
        raise SystemExit(3) from None


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then two others, and one: each row has the bytes that one process alone gives it."""
    monkeypatch.setattr(feature_cache, "_BATCH_IMAGES", {"cpu": 2})
    root = shutil.copytree(pictures, tmp_path / "pictures")
    lines = (root / "lists" / "tags.csv").read_text().splitlines()
    names = []
    for number in range(20):
        names.append(f"q{number}")
        shutil.copy(root / "JPEGImages" / f"p{number % 6}.png", root / "JPEGImages" / f"q{number}.png")
        lines.append(f"q{number},red")
    (root / "lists" / "tags.csv").write_text("\n".join(lines))
    (root / "lists" / "train.txt").write_text("\n".join([f"p{number}" for number in range(6)] + names))
    config = make_config(root)
    alone = prepare(config, tmp_path / "alone")
    taken = list(alone.grids)
    assert len(taken) == 24
    assert together(_fill_shared, tmp_path, str(root), 2) == [3, -signal.SIGKILL]
    done = len((tmp_path / "batches").read_text())
    store = feature_store.FeatureStore.open(next((tmp_path / "run" / "features").iterdir()))
    assert store is not None
    assert 24 - len(store.missing(taken)) == 2 * done
    assert 2 <= done < 12
    assert together(_fill_shared, tmp_path, str(root), -1) == [0, 0]
    assert len((tmp_path / "batches").read_text()) == 12
    reader = prepare(config, tmp_path / "run")
    for index in taken:
        assert reader.store.row(index).tobytes() == alone.store.row(index).tobytes()


class Answers:
    """Stands for `interrupts`: a context that answers whether Ctrl-C was pressed."""

    def __init__(self, answers: list[bool]) -> None:
        self.answers = answers

    def __enter__(self) -> Any:
        return lambda: self.answers.pop(0)

    def __exit__(self, *_: object) -> None:
        return None


def test_size_and_time_are_said(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(pictures)
    monkeypatch.setattr(feature_cache, "_TELL_SECONDS", -1)
    monkeypatch.setattr(feature_cache, "_BATCH_IMAGES", {"cpu": 2})
    reader = prepare_features(make_network(config), open_data(config.data).train(), config, tmp_path)
    tokens = sum(height * width for height, width in reader.grids.values())
    assert reader.store.num_bytes == 2 * tokens * (3 * 64 + 32 + 3)
    first, second = capsys.readouterr().err.splitlines()[:2]
    size = f"{reader.store.num_bytes / 2**20:.1f} MiB"
    assert first == f"feature cache: 6 images, {size} of at most 20 GiB in {reader.store.folder}"
    assert second.startswith("feature cache: about ")


def test_limit(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(AfaError, match=r"MiB, .*feature_cache_gib is 1e-05.*raise"):
        prepare(make_config(pictures, **{"train.feature_cache_gib": 1e-5}), tmp_path)
    assert not (tmp_path / "features").exists()


def test_features_too_large_for_fp16(pictures: Path, tmp_path: Path) -> None:
    config = make_config(pictures)
    network = make_network(config)
    network.backbone.get_parameter("encoder.encoder.layers.1.layer_norm2.bias").data.fill_(float("inf"))
    with pytest.raises(AfaError, match=r"image p0: .*fp16; .*feature_cache"):
        prepare(config, tmp_path, network)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.classifier", "learned"),
        ("augment.whole_images", False),
        ("pseudo.scales", [1.0, 0.5]),
        ("pseudo.mirror", True),
    ],
)
def test_settings_that_contradict_it(pictures: Path, key: str, value: Any) -> None:
    with refused(f"train.feature_cache is true, but {key} is "):
        make_config(pictures, **{key: value})


def test_an_encoder_with_blocks_that_learn(pictures: Path, tmp_path: Path) -> None:
    with refused("model.freeze_blocks is 3", "all 4 blocks", "set it to 4"):
        prepare(make_config(pictures, **{"model.freeze_blocks": 3}), tmp_path)


def test_a_stopped_run_ends_like_one_that_was_not(pictures: Path, tmp_path: Path) -> None:
    """Dropout on; the stopped run keeps its cache, and makes no other."""
    config = make_config(pictures, **{"model.decoder_dropout": 0.2})
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
