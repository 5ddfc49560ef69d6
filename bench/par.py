"""Speed of the refinement (PAR) on a CPU against a plain version built the published way.

    python bench/par.py [--size 512] [--batch 4] [--repeats 3] [--threads 1]

Both refine the same batch for both background scores: crops of `size` pixels, refined at half of that size, with one to
three of 20 classes tagged per image. Our side is what training calls: one kernel per image for all scores at once. The
plain version is called once per image and background score, with the present classes only. The command checks that the
results are equal, times both in turn, and prints the ratio of the medians last. It uses one thread by default; with
more, the figure depends on what else the machine is doing.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from afa.config import PseudoConfig
from afa.kernels.par import refine, refinement_kernel
from afa.pseudo.scores import PresentClasses, mask_scores, present_classes, with_background
from published_par import PublishedRefinement  # type: ignore[import-not-found]

NUM_CLASSES = 20
CONFIG = PseudoConfig()
BACKGROUNDS = (CONFIG.background_low, CONFIG.background_high)


def make_inputs(size: int, batch: int) -> tuple[Tensor, PresentClasses, Tensor]:
    """Smooth random images and CAMs (seeded): image (B, 3, h, w), slots, scores (B, 2P, h, w)."""
    generator = torch.Generator().manual_seed(0)
    half = (size // 2, size // 2)

    def smooth(channels: int, cells: int) -> Tensor:
        coarse = torch.rand(batch, channels, cells, cells, generator=generator)
        return torch.nn.functional.interpolate(coarse, size=half, mode="bilinear")

    noise = torch.rand(batch, 3, *half, generator=generator)
    image = 0.9 * smooth(3, 24) + 0.1 * noise
    cam = smooth(NUM_CLASSES, 8)
    tags = torch.zeros(batch, NUM_CLASSES)
    for i in range(batch):
        order = torch.randperm(NUM_CLASSES, generator=generator)
        tags[i, order[: (1, 2, 1, 3)[i % 4]]] = 1
    present = present_classes(tags)
    groups = [
        mask_scores(present.gather(with_background(cam, background)), present.valid, softmax=True)
        for background in BACKGROUNDS
    ]
    return image, present, torch.cat(groups, 1)


def run_ours(image: Tensor, scores: Tensor) -> Tensor:
    kernel = refinement_kernel(image, dilations=CONFIG.dilations)
    return refine(scores, kernel, dilations=CONFIG.dilations, iterations=CONFIG.iterations)


@torch.no_grad()
def run_published(image: Tensor, present: PresentClasses, scores: Tensor) -> Tensor:
    plain = PublishedRefinement(CONFIG.dilations, iterations=CONFIG.iterations)
    refined = torch.zeros_like(scores)
    slots = present.valid.shape[1]
    for i in range(len(image)):
        count = int(present.valid[i].sum())
        for start in range(0, scores.shape[1], slots):
            channels = slice(start, start + count)
            refined[i, channels] = plain(image[i : i + 1], scores[i : i + 1, channels])[0]
    return refined


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="side of the crop, pixels (default 512)")
    parser.add_argument("--batch", type=int, default=4, help="images (default 4)")
    parser.add_argument("--repeats", type=int, default=3, help="timed repeats of each (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    image, present, scores = make_inputs(arguments.size, arguments.batch)
    print(
        f"{arguments.batch} crops of {arguments.size} px refined at {image.shape[3]} px, "
        f"{present.valid[:, 1:].sum(1).tolist()} tags, {len(BACKGROUNDS)} background scores, "
        f"{CONFIG.iterations} iterations, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    # The comparison also warms up both sides.
    difference = (run_ours(image, scores) - run_published(image, present, scores)).abs().max().item()
    print(f"largest difference {difference:.1e}")
    if not difference <= 1e-4:
        raise SystemExit("results differ by more than 1e-4: no timing")
    seconds: dict[str, list[float]] = {"published": [], "afa": []}
    for _ in range(arguments.repeats):
        start = time.perf_counter()
        run_published(image, present, scores)
        middle = time.perf_counter()
        run_ours(image, scores)
        seconds["published"].append(middle - start)
        seconds["afa"].append(time.perf_counter() - middle)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        print(f"{name:<9} {median:8.3f} s per batch (median of {arguments.repeats})")
    print(f"{medians['published'] / medians['afa']:.1f}x")


if __name__ == "__main__":
    main()
