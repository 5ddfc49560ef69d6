"""What each action on the page of the explorer costs on this machine, without the browser.

python bench/explore.py RUN [--data DIR] [--images N] [--threads N]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from afa.explore.encoded import look_from, make_stages
from afa.explore.explorer import ExploredRun, change_settings
from afa.explore.panes import show_look, show_stages
from afa.explore.scores import explain

REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--data")
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run = ExploredRun.open(arguments.run, arguments.data, torch.device("cpu"))
    assert run.images is not None, run.note
    times: dict[str, list[tuple[float, float]]] = {}
    for index in range(min(arguments.images, len(run.images))):
        measure(run, index, times)
    print(f"{'action':34}  wall ms   CPU ms  (medians; {arguments.threads} threads)")
    for action, pairs in times.items():
        wall, cpu = (1000 * statistics.median(each) for each in zip(*pairs, strict=True))
        print(f"{action:34} {wall:8.0f} {cpu:8.0f}")


def measure(run: ExploredRun, index: int, times: dict[str, list[tuple[float, float]]]) -> None:
    def timed(action: str, call: Callable[[], Any], repeats: int = REPEATS) -> Any:
        for _ in range(repeats):
            wall, cpu = time.perf_counter(), time.process_time()
            made = call()
            times.setdefault(action, []).append((time.perf_counter() - wall, time.process_time() - cpu))
        return made

    seen = timed("open an image (encode)", lambda: run.encode(index), 2)
    tags = seen.tags

    def draw(**keys: Any) -> str:
        config = change_settings(run.config, {key.replace("__", "."): value for key, value in keys.items()})
        stages = make_stages(seen, config, tags)
        explain(seen, stages, run.classes, tags)
        return json.dumps(show_stages(seen, stages, config, run.classes, tags))

    def look() -> str:
        shown = show_look(
            seen, look_from(seen, 0.4, 0.6), blocks=run.config.model.affinity_blocks, which=0, learned=True
        )
        return json.dumps(shown)

    timed("click a point", look)
    timed("move beta_l", lambda: draw(pseudo__background_low=0.3))
    timed("walk along the affinity, 4 steps", lambda: draw(pseudo__propagation="affinity", pseudo__walk_steps=4))
    timed("20 iterations of PAR", lambda: draw(pseudo__iterations=20))
    timed("dense CRF on", lambda: draw(crf=True), 2)


if __name__ == "__main__":
    main()
