from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from afa.check import cost as cost_module
from afa.check.cost import measure_cache, measure_cost, phase_steps
from afa.config import Config, ScheduleConfig
from afa.errors import AfaError
from afa.training.schedule import phase
from afa.types import Batch
from tiny import tiny_config

CPU = torch.device("cpu")
TAGS = np.array([[1, 0, 0], [1, 1, 0]] * 10, dtype=bool)


@pytest.mark.parametrize("steps", [(6, 2, 3), (6, 0, 0), (4, 4, 4), (3, 9, 9), (5, 2, 4)])
def test_phases_are_those_of_the_schedule(steps: tuple[int, int, int]) -> None:
    max_steps, cls_steps, refined_steps = steps
    schedule = ScheduleConfig(max_steps=max_steps, cls_steps=cls_steps, refined_steps=refined_steps)
    config = Config(schedule=schedule)
    names = [phase(step, config).name for step in range(max_steps)]
    found = phase_steps(config)
    assert [phase(start, config).name for start, count in found for _ in range(count)] == names


def test_each_phase_is_timed_at_the_whole_batch_where_that_is_quick() -> None:
    began = time.perf_counter()
    cost = measure_cost(tiny_config(Path()), TAGS, device=CPU)
    gone = time.perf_counter() - began
    assert [(phase.name, phase.steps) for phase in cost.phases] == [("cls", 2), ("initial", 2), ("refined", 2)]
    assert (cost.steps, cost.measured_batch) == (6, 4)
    assert 0 < cost.seconds < 2 * gone
    assert cost.device == f"CPU with {torch.get_num_threads()} thread" + "s" * (torch.get_num_threads() > 1)
    assert cost.memory == 0 or 50e6 < cost.memory < 20e9


def test_a_slow_step_is_estimated_from_two_images(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def time_steps(engine: object, step: int, batch: Batch) -> float:
        sizes.append(len(batch.image))
        return 7.0

    monkeypatch.setattr(cost_module, "_time_steps", time_steps)
    cost = measure_cost(tiny_config(Path()), TAGS, device=CPU)
    assert (sizes, cost.measured_batch) == ([2, 2, 2], 2)
    assert [phase.step_seconds for phase in cost.phases] == [14.0] * 3


def test_too_little_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cost_module, "_time_steps", fail)
    with pytest.raises(AfaError, match=r"batch_size 4 .*crop_size 64; lower"):
        measure_cost(tiny_config(Path()), TAGS, device=CPU)


def test_cache_is_compared_with_all_training_images() -> None:
    config = tiny_config(Path(), {"data.cache_gib": 0.5})
    cache = measure_cache(config, np.array([[100, 200], [300, 200]], dtype=np.int32), num_images=1000)
    assert (cache.needed, cache.given) == (1000 * 40_000 * 3, 2**29)
