from __future__ import annotations

import os
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import naive
from afa.config import AugmentConfig, Config, DataConfig, ScheduleConfig, TrainConfig
from afa.data.dataset import TaggedImages
from afa.data.loader import resolve_workers, train_batches, whole_views
from afa.data.order import Order, class_repeats, visits
from afa.data.pixel_cache import PixelCache
from afa.runtime import Processes
from afa.types import Batch
from mistakes import refused
from tiny import start_python

NUM_IMAGES = 7
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    yield
    assert not workers_alive()


def step_indices(num_images: int, *, step: int, batch_size: int, **settings: Any) -> np.ndarray:
    return visits(num_images, range(step * batch_size, (step + 1) * batch_size), **settings)


def workers_alive() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("afa-read")]


@pytest.fixture
def images(tmp_path: Path) -> TaggedImages:
    paths = []
    for seed in range(NUM_IMAGES):
        pixels = np.random.default_rng(seed).integers(1, 256, (30 + seed, 40, 3), dtype=np.uint8)
        paths.append(tmp_path / f"{seed}.png")
        Image.fromarray(pixels).save(paths[-1])
    names = tuple(path.stem for path in paths)
    tags = np.eye(NUM_IMAGES, 3, dtype=bool)
    tags[3:, 0] = True
    return TaggedImages(classes=("x", "y", "z"), names=names, paths=paths, tags=tags)


def settings(*, end: int = 5, workers: int = 0, seed: int = 0, class_balance: float = 0.0, **augment: Any) -> Config:
    return Config(
        data=DataConfig(workers=workers),
        augment=AugmentConfig(crop_size=32, **augment),
        schedule=ScheduleConfig(max_steps=end, batch_size=4),
        train=TrainConfig(seed=seed, class_balance=class_balance),
    )


def stream(
    images: TaggedImages, *, end: int = 5, workers: int = 0, seed: int = 0, class_balance: float = 0.0, **options: Any
) -> Generator[Batch, None, None]:
    config = settings(end=end, workers=workers, seed=seed, class_balance=class_balance)
    return train_batches(images, config, **options)


def batches(images: TaggedImages, **options: Any) -> list[Batch]:
    return list(stream(images, **options))


def assert_equal(ours: list[Batch], theirs: list[Batch]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.names == other.names
        assert one.image.equal(other.image)
        assert one.tags.equal(other.tags)
        assert one.valid_box.equal(other.valid_box)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Which images are decoded, in order."""
    indices: list[int] = []
    read = TaggedImages.image
    monkeypatch.setattr(TaggedImages, "image", lambda self, index: indices.append(index) or read(self, index))
    return indices


def test_each_epoch_is_a_permutation() -> None:
    order = np.concatenate([step_indices(10, step=step, batch_size=4, seed=0) for step in range(10)])
    epochs = order.reshape(4, 10)
    assert [sorted(epoch) for epoch in epochs.tolist()] == [list(range(10))] * 4
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4


def made_tags(seed: int) -> np.ndarray:
    """(60, 6): class 0 on every other image, others ever rarer, class 5 nowhere; some images have no tag."""
    tagged = np.random.default_rng(seed).random((60, 6)) < [0.5, 0.3, 0.1, 0.05, 0.05, 0.0]
    tagged[seed, 3] = True
    return tagged


@pytest.mark.parametrize("balance", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_repeats_are_those_of_the_equation(balance: float, seed: int) -> None:
    tagged = made_tags(seed)
    expected = naive.repeat_factors(tagged, balance)
    repeats = class_repeats(tagged, balance)
    assert expected == pytest.approx(repeats.factors.tolist(), abs=2**-20)
    assert 0 <= repeats.extra - (sum(expected) - 60) < 1 + 1e-4
    assert repeats.extra <= tagged.sum()


def epochs(tagged: np.ndarray, balance: float, count: int, *, seed: int = 0) -> np.ndarray:
    """(count, length of an epoch): the images of the first epochs, read in batches of 4."""
    repeats = class_repeats(tagged, balance)
    length = len(tagged) + repeats.extra
    steps = range(-(-count * length // 4))
    order = [step_indices(len(tagged), step=step, batch_size=4, seed=seed, repeats=repeats) for step in steps]
    return np.concatenate(order)[: count * length].reshape(count, length)


@pytest.mark.parametrize("balance", [0.3, 1.0])
def test_an_epoch_visits_each_image_as_often_as_its_tags_ask_for(balance: float) -> None:
    tagged = made_tags(0)
    factors = np.array(naive.repeat_factors(tagged, balance))
    visits = np.array([np.bincount(epoch, minlength=60) for epoch in epochs(tagged, balance, 400)])
    # All extra visits are stretched a little, so that they are a whole number.
    expected = 1 + (factors - 1) * np.ceil((factors - 1).sum()) / (factors - 1).sum()
    assert (visits >= np.floor(expected)).all()
    assert (visits <= np.ceil(expected)).all()
    assert (visits[:, factors == 1] == 1).all()
    deviation = np.sqrt((expected % 1) * (1 - expected % 1) / 400)
    assert (np.abs(visits.mean(axis=0) - expected) <= 4 * deviation).all()


def test_rare_classes_are_seen_more_often_the_larger_the_balance() -> None:
    tagged = made_tags(1)
    counts = tagged.sum(axis=0)[:5]
    shares, fewest = [], []
    for balance in (0.0, 0.5, 1.0):
        order = epochs(tagged, balance, 20)
        seen = tagged[order].sum(axis=(0, 1))[:5] / 20
        shares.append(seen[counts.argmin()] / order.shape[1])
        fewest.append(seen.min())
    assert shares[0] < shares[1] < shares[2]
    assert fewest[0] == counts.min()
    assert fewest[2] >= 0.9 * counts.mean()


def test_repeated_images_come_anywhere_in_an_epoch_and_in_a_new_order_each_time() -> None:
    tagged = np.zeros((100, 2), dtype=bool)
    tagged[:2, 0] = True
    tagged[2:, 1] = True
    places = [np.flatnonzero(epoch < 2) / len(epoch) for epoch in epochs(tagged, 1.0, 50)]
    assert {len(place) for place in places} == {50}
    assert len({tuple(place) for place in places}) == 50
    assert abs(np.concatenate(places).mean() - 0.5) < 0.03


@pytest.mark.parametrize("balance", [0.0, 0.7])
def test_order_is_a_function_of_the_seed_and_not_of_the_batch_size(balance: float) -> None:
    tagged = made_tags(2)
    first = epochs(tagged, balance, 3, seed=1)
    assert first.dtype == np.int64
    assert not np.array_equal(epochs(tagged, balance, 3, seed=2), first)
    np.testing.assert_array_equal(epochs(tagged, balance, 3, seed=1), first)
    repeats = class_repeats(tagged, balance)
    for size in (1, 3, first.size):  # the last batch spans three epochs
        steps = range(first.size // size)
        order = [step_indices(60, step=step, batch_size=size, seed=1, repeats=repeats) for step in steps]
        np.testing.assert_array_equal(np.concatenate(order), first.ravel())


@pytest.mark.parametrize("step", [0, 7, 33])
def test_balance_0_changes_no_order(step: int) -> None:
    """The order that afa has always had: one permutation an epoch."""
    rngs = [np.random.default_rng(np.random.SeedSequence(3, spawn_key=(0, epoch))) for epoch in range(3)]
    always = np.concatenate([rng.permutation(60) for rng in rngs])[4 * step : 4 * step + 4]
    repeats = class_repeats(made_tags(0), 0.0)
    np.testing.assert_array_equal(step_indices(60, step=step, batch_size=4, seed=3, repeats=repeats), always)
    np.testing.assert_array_equal(step_indices(60, step=step, batch_size=4, seed=3), always)


def test_batches_are_in_the_repeated_order(images: TaggedImages) -> None:
    repeats = class_repeats(images.tagged, 1.0)
    assert repeats.extra == 3  # 5, 1 and 1 images: twice 7/3 - 1, rounded up
    shown = [name for batch in batches(images, end=5, class_balance=1.0) for name in batch.names]
    order = [step_indices(NUM_IMAGES, step=step, batch_size=4, seed=0, repeats=repeats) for step in range(5)]
    assert shown == [str(index) for index in np.concatenate(order)]
    assert {"1", "2"} == {name for name in shown if shown.count(name) > 2}


def test_batch(images: TaggedImages) -> None:
    batch = batches(images, end=1)[0]
    assert (batch.image.shape, batch.image.dtype) == ((4, 3, 32, 32), torch.uint8)
    assert batch.image.is_contiguous()
    assert (batch.tags.shape, batch.tags.dtype) == ((4, 3), torch.float32)
    assert (batch.valid_box.shape, batch.valid_box.dtype) == ((4, 4), torch.int64)
    indices = step_indices(NUM_IMAGES, step=0, batch_size=4, seed=0)
    assert batch.names == tuple(str(index) for index in indices)
    for index, picture, tags, box in zip(indices, batch.image, batch.tags, batch.valid_box, strict=True):
        assert tags.tolist() == images.tags(index).tolist()
        top, bottom, left, right = box.tolist()
        assert (picture[:, top:bottom, left:right] > 0).all()
        assert picture.count_nonzero() == 3 * (bottom - top) * (right - left)


@pytest.mark.parametrize("balance", [0.0, 1.0])
def test_restart_continues_exactly(images: TaggedImages, balance: float) -> None:
    whole = batches(images, end=6, class_balance=balance)
    assert_equal(batches(images, start=3, end=6, class_balance=balance), whole[3:])


def test_same_image_is_augmented_anew_each_time_and_by_each_seed(images: TaggedImages) -> None:
    seen = [picture for batch in batches(images, end=10) for picture in batch.image]
    seen += batches(images, end=1, seed=1)[0].image
    assert len({picture.numpy().tobytes() for picture in seen}) == 44


@pytest.mark.parametrize("balance", [0.0, 1.0])
@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_global_batch(images: TaggedImages, count: int, balance: float) -> None:
    shares = [batches(images, processes=Processes(rank, count), class_balance=balance) for rank in range(count)]
    for whole, *parts in zip(batches(images, class_balance=balance), *shares, strict=True):
        tensors = (torch.cat([getattr(part, name) for part in parts]) for name in ("image", "tags", "valid_box"))
        assert_equal([Batch(*tensors, names=tuple(name for part in parts for name in part.names))], [whole])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("balance", [0.0, 1.0])
def test_workers_and_cache_change_nothing(images: TaggedImages, workers: int, cached: bool, balance: float) -> None:
    cache = PixelCache(NUM_IMAGES, 2**20) if cached else None
    ours = batches(images, end=20, workers=workers, cache=cache, class_balance=balance)
    assert_equal(ours, batches(images, end=20, class_balance=balance))


def test_cached_images_are_decoded_once(images: TaggedImages, decoded: list[int]) -> None:
    cache = PixelCache(NUM_IMAGES, 2**20)
    batches(images, end=20, cache=cache)
    assert sorted(decoded) == list(range(NUM_IMAGES))
    assert cache.used_bytes == sum(3 * 40 * (30 + index) for index in range(NUM_IMAGES))


@pytest.mark.parametrize("workers", [0, 2])
def test_resampling_on_the_device_gives_the_same_crops(images: TaggedImages, workers: int) -> None:
    ours = batches(images, end=10, workers=workers, device=CPU)
    differences = []
    for one, other in zip(ours, batches(images, end=10), strict=True):
        assert one.names == other.names
        assert one.tags.equal(other.tags)
        assert one.valid_box.equal(other.valid_box)
        differences.append((one.image.int() - other.image.int()).abs())
    assert torch.cat(differences).max() <= 1
    assert torch.cat(differences).float().mean() < 0.01


def test_resampling_on_the_device_continues_and_shares_exactly(images: TaggedImages) -> None:
    whole = batches(images, end=6, device=CPU)
    assert_equal(batches(images, start=3, end=6, device=CPU), whole[3:])
    second = batches(images, end=6, device=CPU, processes=Processes(1, 2))
    for part, batch in zip(second, whole, strict=True):
        assert part.image.equal(batch.image[2:])
        assert part.names == batch.names[2:]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_batches_on_a_gpu_are_those_of_the_cpu(images: TaggedImages) -> None:
    """And nothing waits for the device: copies and kernels are only queued."""
    gpu = torch.device("cuda")
    batches(images, end=1, device=gpu)
    started = stream(images, end=8, workers=2, device=gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = list(started)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(found, batches(images, end=8), strict=True):
        assert (one.image.device.type, one.valid_box.device.type, one.tags.is_pinned()) == ("cuda", "cuda", True)
        assert one.valid_box.cpu().equal(other.valid_box)
        difference = (one.image.cpu().int() - other.image.int()).abs()
        assert difference.max() <= 2
        assert (difference > 1).float().mean() <= 0.001


def test_global_random_state_is_left_alone(images: TaggedImages) -> None:
    """Else a resumed run, which starts the loader anew, would draw other dropout masks."""
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    for workers in (0, 1):
        batches(images, end=2, workers=workers)
        assert torch.random.get_rng_state().equal(before)


@pytest.mark.parametrize("device", [None, CPU])
@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_is_one_line(images: TaggedImages, workers: int, device: torch.device | None) -> None:
    images.image_path(5).write_bytes(b"garbage")
    with refused(images.image_path(5), "not an image", "replace"):
        batches(images, workers=workers, device=device, cache=PixelCache(NUM_IMAGES, 2**20))
    assert not workers_alive()


def test_batch_size_must_divide(images: TaggedImages) -> None:
    with refused("schedule.batch_size is 4; ", "multiple", "3"):
        stream(images, processes=Processes(0, 3))


@pytest.mark.parametrize("device", [None, CPU])
def test_leaving_early_stops_the_workers(images: TaggedImages, device: torch.device | None) -> None:
    started = stream(images, end=1000, workers=1, device=device)
    next(started)
    assert workers_alive()
    del started
    assert not workers_alive()


CTRL_C = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
import numpy as np
from pathlib import Path
from afa.config import load_config
from afa.data.loader import train_batches
from afa.data.dataset import TaggedImages

paths = [Path(path) for path in sys.argv[1:]]
names = tuple(path.stem for path in paths)
images = TaggedImages(classes=("x",), names=names, paths=paths, tags=np.ones((len(paths), 1), dtype=bool))
keys = {"data.workers": 2, "schedule.batch_size": 4, "schedule.max_steps": 10**6}
try:
    for batch in train_batches(images, load_config(None, keys)):
        print("batch", flush=True)
except KeyboardInterrupt:
    print("stopped", flush=True)
"""


def test_ctrl_c_ends_the_workers_quietly(images: TaggedImages) -> None:
    process = start_python(["-c", CTRL_C, *(str(images.image_path(index)) for index in range(NUM_IMAGES))])
    assert process.stdout is not None
    assert process.stdout.readline() == "batch\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert out.splitlines()[-1] == "stopped"
    assert err == ""
    assert process.returncode == 0


def test_workers_prepare_few_batches_ahead(images: TaggedImages, decoded: list[int]) -> None:
    """Else a slow step would let batches pile up in memory."""
    started = stream(images, end=1000, workers=2)
    for _ in range(3):
        next(started)
    del started
    assert len(decoded) <= 4 * (3 + 2 * 2)


def test_no_steps_left(images: TaggedImages) -> None:
    assert batches(images, start=5, end=5) == []


def test_resolve_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_workers(0) == 0
    assert resolve_workers(3) == 3
    for cores, processes, expected in [(1, 1, 1), (2, 1, 1), (16, 1, 8), (16, 4, 3), (2, 4, 1)]:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: range(cores), raising=False)
        assert resolve_workers(-1, processes=processes) == expected


class Noted:
    """Stands for the feature cache: what it is asked for comes back."""

    patch = 4

    def read(self, indices: Sequence[int], flips: Sequence[bool]) -> tuple[torch.Tensor, ...]:
        return (torch.tensor([[index, int(flip)] for index, flip in zip(indices, flips, strict=True)]),)


@pytest.mark.parametrize(("workers", "device"), [(0, None), (2, None), (2, CPU)])
def test_features_are_read_for_the_images_as_they_are_shown(
    images: TaggedImages, workers: int, device: torch.device | None
) -> None:
    """In the top left corner of the canvas, mirrored where it is; in the cache unmirrored and without canvas."""
    config = settings(end=6, workers=workers, whole_images=True)
    views = [view for batch in whole_views(images, config, 4, range(NUM_IMAGES), batch_size=3) for view in batch]
    assert len(views) == NUM_IMAGES
    flips = []
    for batch in train_batches(images, config, start=2, features=Noted(), device=device):
        (rows,) = batch.frozen
        for canvas, box, name, (index, flip) in zip(
            batch.image, batch.valid_box.tolist(), batch.names, rows.tolist(), strict=True
        ):
            assert name == str(index)
            view = views[index].flip(-1) if flip else views[index]
            assert box == [0, view.shape[1], 0, view.shape[2]]
            assert all(side % 4 == 0 for side in view.shape[1:])
            assert (canvas[:, : box[1], : box[3]].int() - view.int()).abs().max() <= 1
            flips.append(flip)
    assert set(flips) == {0, 1}


def test_whole_views_are_of_the_images_that_are_asked_for(images: TaggedImages) -> None:
    every = [view for batch in whole_views(images, settings(), 4, range(NUM_IMAGES), batch_size=2) for view in batch]
    cache = PixelCache(NUM_IMAGES, 2**20)
    some = list(whole_views(images, settings(workers=1), 4, [5, 0, 3], batch_size=2, cache=cache))
    assert [len(batch) for batch in some] == [2, 1]
    assert all(view.equal(every[i]) for view, i in zip([*some[0], *some[1]], [5, 0, 3], strict=True))


def make_tagged(tags: NDArray[np.bool_]) -> TaggedImages:
    names = tuple(str(index) for index in range(len(tags)))
    classes = tuple(f"class {index}" for index in range(tags.shape[1]))
    return TaggedImages(classes=classes, names=names, paths=[Path(name) for name in names], tags=tags)


def test_a_limit_takes_rare_classes_first_and_negatives_by_their_share() -> None:
    tags = np.zeros((90, 3), dtype=bool)
    tags[:54, 0], tags[54:60, 1] = True, True  # of 60 images, 6 have the rare class; 30 more have none
    images = make_tagged(tags)
    rare = []
    for seed in range(20):
        config = Config(train=TrainConfig(seed=seed, max_images=20, class_balance=1.0))
        taken = np.array(Order(images, config).taken(1000))
        assert (taken < 60).sum() == 20
        assert (taken >= 60).sum() == 10
        rare.append(((taken >= 54) & (taken < 60)).sum())
        assert sorted(Order(images, config).taken(500)) == sorted(taken.tolist())
        batches = np.concatenate([Order(images, config).indices(step) for step in range(24)])
        assert (batches >= 60).mean() == pytest.approx(30 / 90, abs=0.01)  # as often as without a limit
    assert np.mean(rare) > 4  # 2 without regard to classes
    assert len(Order(images, Config(train=TrainConfig(max_images=60))).taken(1000)) == 90


@pytest.mark.parametrize(("limit", "kept"), [(10, [1, 1, 1, 1]), (2, [1, 1, 1, 1]), (1, [1, 0, 1, 1])])
def test_a_limit_leaves_an_image_of_each_class(limit: int, kept: list[int]) -> None:
    """All of 1000 images have the first class, two the second, one the third and the fourth, none the last."""
    tags = np.zeros((1000, 5), dtype=bool)
    tags[:, 0], tags[[300, 301], 1], tags[302, 2:4] = True, True, True
    for seed in range(5):
        order = Order(make_tagged(tags), Config(train=TrainConfig(seed=seed, max_images=limit)))
        taken = order.taken(2000)
        assert len(taken) == limit
        assert tags[taken].any(axis=0).tolist() == [*map(bool, kept), False]
        assert order.lost.tolist() == [*(not each for each in kept), False]


def test_a_draw_that_has_all_classes_stays_as_it_is() -> None:
    """Runs of before go on with the images that they took."""
    images = make_tagged(np.eye(2, dtype=bool)[np.arange(1000) % 2])
    order = Order(images, Config(train=TrainConfig(seed=7, max_images=20)))
    assert sorted(order.taken(2000)) == sorted(visits(1000, range(20), seed=7, stream=(2,)).tolist())


@pytest.mark.parametrize("num_steps", [0, 1, 3, 1000])
def test_images_taken_are_those_of_the_batches(images: TaggedImages, num_steps: int) -> None:
    config = settings(end=num_steps)
    names = [name for batch in train_batches(images, config) for name in batch.names] if num_steps < 10 else None
    taken = Order(images, config).taken(num_steps)
    assert len(taken) == len(set(taken)) <= NUM_IMAGES
    if names is None:
        assert len(taken) == NUM_IMAGES
    else:
        assert [images.names[index] for index in taken] == list(dict.fromkeys(names))
