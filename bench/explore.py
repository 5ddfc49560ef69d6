"""What each action on the page of the explorer costs on this machine.

python bench/explore.py RUN [--data DIR] [--images N] [--threads N] [--browser]

Without `--browser` it is the time of the program alone. With it, the page is used in Chromium (playwright and
chromium must be installed): times go from the event to the changed picture.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import statistics
import subprocess
import sys
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
    parser.add_argument("--browser", action="store_true")
    arguments = parser.parse_args()
    if arguments.browser:
        use_page(arguments.run, arguments.data)
        return
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
        return json.dumps(show_look(seen, look_from(seen, 0.4, 0.6), block=0, head=0, learned=True))

    timed("click a point", look)
    timed("move beta_l", lambda: draw(pseudo__background_low=0.3))
    timed("walk along the affinity, 4 steps", lambda: draw(pseudo__propagation="affinity", pseudo__walk_steps=4))
    timed("20 iterations of PAR", lambda: draw(pseudo__iterations=20))
    timed("dense CRF on", lambda: draw(crf=True), 2)


def use_page(run: str, data: str | None) -> None:
    from playwright.sync_api import sync_playwright

    folder = [] if data is None else ["--data", data]
    command = [sys.executable, "-m", "afa", "explore", run, *folder, "--port", "0", "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, sync_playwright() as driver:
        assert server.stdout is not None
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.goto(server.stdout.readline().strip())
        page.wait_for_selector("#board .panes figure", timeout=60_000)
        low = page.get_by_label(re.compile("number input for beta_l"))
        picture = page.locator("[data-key=image] .stack")

        def move(value: float) -> None:
            low.fill(str(value))
            low.press("Enter")

        actions: dict[str, tuple[str, Callable[[int], Any]]] = {
            "click a point": ("attention", lambda n: picture.click(position={"x": 20 + 15 * n, "y": 40})),
            "move beta_l": ("pseudo", lambda n: move(0.05 + 0.02 * n)),
        }
        for action, (key, act) in actions.items():
            print(f"{action:34} {sorted(round(wait_for(page, key, act, n)) for n in range(8))} ms")
        browser.close()
        server.send_signal(signal.SIGINT)


def wait_for(page: Any, key: str, act: Callable[[int], Any], number: int) -> float:
    """Milliseconds until a picture is another one."""
    read = f"document.querySelector('[data-key={key}] .layer')?.src"
    before, start = page.evaluate(read), time.perf_counter()
    act(number)
    page.wait_for_function(f"(before) => ({read}) && ({read}) !== before", arg=before)
    return 1000 * (time.perf_counter() - start)


if __name__ == "__main__":
    main()
