"""Memory and seams of prediction in tiles.

    python bench/tiles.py RUN [--side 30000] [--formats png,tif] [--seams 2000]

For each format the command writes a square image of `side` pixels (8-bit RGB PNG; 16-bit RGB TIFF in tiles), runs
`afa predict RUN IMAGE --tiles auto` in a process of its own, and prints the largest memory that the process held. Then
it predicts a square image of `seams` pixels in tiles and as one view, and prints the share of pixels that differ: last
of all, and also apart for the ramps, where two tiles are blended. Images are mosaics of generated shapes.
"""

from __future__ import annotations

import argparse
import os
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import TiffImagePlugin

from afa.demo.shapes import draw_shapes
from afa.inference.predictor import Predictor
from afa.inference.tiles import cut


def mosaic(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """(height, width, 3) uint8 RGB: scenes of 128 pixels side by side, 64 different ones."""
    rng = np.random.default_rng(seed)
    scenes = np.stack([draw_shapes(rng, 128).image for _ in range(64)])
    order = rng.integers(0, len(scenes), (-(-height // 128), -(-width // 128)))
    rows = [np.concatenate(list(scenes[row]), 1) for row in order]
    return np.concatenate(rows)[:height, :width]


def write_image(path: Path, side: int) -> None:
    """Write a square image a few rows at a time: the same rows again and again."""
    rows = mosaic(512, side)
    blocks = [rows[: min(512, side - top)] for top in range(0, side, 512)]
    with path.open("wb") as file:
        if path.suffix == ".png":

            def chunk(name: bytes, data: bytes) -> None:
                file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)))

            pack = zlib.compressobj(1)
            file.write(b"\x89PNG\r\n\x1a\n")
            chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
            for block in blocks:
                filtered = np.pad(block.reshape(len(block), -1), ((0, 0), (1, 0)))
                filtered[1:, 1:] -= block.reshape(len(block), -1)[:-1]
                filtered[1:, 0] = 2
                chunk(b"IDAT", pack.compress(filtered.tobytes()))
            chunk(b"IDAT", pack.flush())
            chunk(b"IEND", b"")
            return
        file.write(b"II*\0\0\0\0\0")
        places, lengths = [], []
        for block in blocks:
            padded = np.zeros((512, -(-side // 512) * 512, 3), "<u2")
            padded[: len(block), :side] = block.astype(np.uint16) * 257
            for left in range(0, side, 512):
                places.append(file.tell())
                lengths.append(file.write(zlib.compress(padded[:, left : left + 512].tobytes(), 1)))
        start = file.tell() + file.write(b"\0" * (file.tell() % 2))
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[256], tags[257], tags[258], tags[259], tags[262], tags[277] = side, side, (16, 16, 16), 8, 2, 3
        tags.tagtype[324] = tags.tagtype[325] = 4
        tags[322], tags[323], tags[324], tags[325] = 512, 512, tuple(places), tuple(lengths)
        file.write(tags.tobytes(start))
        file.seek(4)
        file.write(struct.pack("<I", start))


def peak_memory(run: Path, image: Path, out: Path) -> tuple[float, float]:
    """Largest resident memory in GB and seconds of a prediction."""
    began = time.monotonic()
    command = [sys.executable, "-m", "afa", "predict", str(run), str(image), "--out", str(out), "--tiles", "auto"]
    process = subprocess.Popen([*command, "--device", "cpu"])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"prediction failed with status {status}")
    return usage.ru_maxrss * 1024 / 1e9, time.monotonic() - began


def seams(run: Path, side: int) -> tuple[float, float]:
    """Share of the pixels of another class than in one view, in percent: of all, and of those in ramps."""
    image = mosaic(side, side, seed=1)
    tiled = Predictor.from_run(run, device="cpu", tiles="auto")
    whole = Predictor(tiled.network, tiled.classes, config=tiled.config, max_side=side)
    differs = tiled(image).label != whole(image).label
    ramp = np.zeros(side, bool)
    for span in cut(side, tiled.tiling.side, grid=tiled.tiling.grid):
        ramp[span.low : span.low + span.rise] = True
    ramps = ramp[:, None] | ramp
    return 100 * float(differs.mean()), 100 * float(differs[ramps].mean())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--side", type=int, default=30_000)
    parser.add_argument("--formats", default="png,tif")
    parser.add_argument("--seams", type=int, default=2_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for suffix in filter(None, arguments.formats.split(",")):
            image = Path(folder) / f"big.{suffix}"
            write_image(image, arguments.side)
            gigabytes, seconds = peak_memory(arguments.run, image, Path(folder) / suffix)
            print(f"{suffix}: {arguments.side} x {arguments.side}, peak memory {gigabytes:.2f} GB, {seconds:.0f} s")
    of_all, of_ramps = seams(arguments.run, arguments.seams)
    print(
        f"{arguments.seams} x {arguments.seams}: other than one view: {of_ramps:.3f} % of ramps, {of_all:.3f} % of all"
    )


if __name__ == "__main__":
    main()
