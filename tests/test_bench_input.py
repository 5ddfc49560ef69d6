"""The input benchmark runs, and its memory watch notices growth."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest

import input as bench


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["input.py", *arguments])
    bench.main()


def test_table_and_ratio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--images", "8", "--crop", "32", "--batch", "4", "--device", "cpu", "--step-images-per-second", "10"]
    run(monkeypatch, *flags)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("8 images (generated), crops of 32 px, batches of 4")
    rates = {line.split()[0]: [float(rate) for rate in line.split()[1:]] for line in lines[2:4]}
    assert rates.keys() == {"workers", "cpu"}
    assert min(min(pair) for pair in rates.values()) > 0
    words = lines[-1].replace(",", "").split()
    assert words[::2] == ["decoded", "cached"]
    assert [float(word.rstrip("x")) for word in words[1::2]] == pytest.approx([r / 10 for r in rates["cpu"]], abs=0.2)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read the way Linux tells it")
def test_memory_does_not_grow_with_steps_and_images(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "RSS_FILES", 20)
    run(monkeypatch, "--rss", "--crop", "32", "--batch", "2", "--workers", "1")
    assert "to step 500, list of 20,000 images" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read the way Linux tells it")
def test_growing_memory_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[mmap.mmap] = []
    make = bench.make_batches

    def leaking(*arguments: object, **options: object) -> object:
        for batch in make(*arguments, **options):
            # Pages of its own: what the process freed earlier would hide what comes from the heap.
            kept.append(mmap.mmap(-1, 200_000))
            kept[-1].write(b"x" * 200_000)
            yield batch

    monkeypatch.setattr(bench, "make_batches", leaking)
    monkeypatch.setattr(bench, "RSS_FILES", 20)
    with pytest.raises(SystemExit, match="memory grew by more than 16 MiB"):
        run(monkeypatch, "--rss", "--crop", "32", "--batch", "2", "--workers", "0")
