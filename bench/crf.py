"""Labels and speed of the dense CRF on a CPU against pydensecrf2 (pip install pydensecrf2: needs a C++ compiler).

    python bench/crf.py [--data VOC_DIR] [--images 8] [--threads 1]
    python bench/crf.py --device cuda [--data VOC_DIR] [--images 8]

Both refine the same class probabilities of the same images (500 x 375 pixels, 10 iterations, default settings). The
images are generated, or with --data photographs from JPEGImages with the masks of SegmentationClassAug. The
probabilities are coarse, noisy versions of the masks, once with 21 classes and once with only the classes that the
image shows. The last line has the lowest agreement of labels and the ratio of the times with all 21 classes. A line
above it has the time without negligible classes, which is what users get. Times are medians over the images, the best
of `--repeats` each, from probabilities to probabilities. pydensecrf2 always uses one thread, whatever --threads says.

With --device cuda the script compares afa on the GPU with afa on the CPU and does not need pydensecrf2. The last line
has the agreement of their labels and the milliseconds for an image on the GPU, with all 21 classes.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, one_hot

from afa.demo.shapes import draw_shapes
from afa.filtering.crf import CrfSettings, dense_crf

NUM_CLASSES = 21
WIDTH, HEIGHT = 500, 375
ITERATIONS = 10
SETTINGS = CrfSettings(iterations=ITERATIONS)
DEFAULT_DROP = 0.1  # of 1 / K


def generated_image(index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    scene = draw_shapes(np.random.default_rng(index), WIDTH)
    return scene.image[:HEIGHT], scene.mask[:HEIGHT]


def read_image(root: Path, name: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    image = Image.open(root / "JPEGImages" / f"{name}.jpg").convert("RGB").resize((WIDTH, HEIGHT))
    labels = Image.open(root / "SegmentationClassAug" / f"{name}.png").resize((WIDTH, HEIGHT), Image.Resampling.NEAREST)
    mask = np.array(labels)
    mask[mask == 255] = 0
    return np.array(image), mask


def coarse_probabilities(
    mask: NDArray[np.uint8], num_classes: int, *, seed: int, margin: float, noise: float
) -> Tensor:
    """(1, K, H, W) class probabilities as a network with tokens of 16 pixels might give them."""
    planes = one_hot(torch.from_numpy(mask.astype(np.int64)), num_classes).permute(2, 0, 1)[None].float()
    tokens = interpolate(planes, size=(HEIGHT // 16, WIDTH // 16), mode="area")
    logits = margin * tokens + noise * torch.randn(tokens.shape, generator=torch.Generator().manual_seed(seed))
    return interpolate(logits, size=(HEIGHT, WIDTH), mode="bilinear").softmax(1)


def few_classes(mask: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], int]:
    values, places = np.unique(mask, return_inverse=True)
    return places.reshape(mask.shape).astype(np.uint8), max(len(values), 2)


def run_pydensecrf(densecrf: Any, image: NDArray[np.uint8], probabilities: Tensor) -> NDArray[np.float32]:
    _, num_classes, height, width = probabilities.shape
    crf = densecrf.DenseCRF2D(width, height, num_classes)
    unary = -probabilities[0].clamp(min=1e-5).log().reshape(num_classes, -1)
    crf.setUnaryEnergy(np.ascontiguousarray(unary.numpy()))
    crf.addPairwiseGaussian(sxy=3, compat=3)
    crf.addPairwiseBilateral(sxy=64, srgb=5, rgbim=np.ascontiguousarray(image), compat=4)
    return np.array(crf.inference(ITERATIONS)).reshape(num_classes, height, width)


def best_of(run: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


def on_gpu(samples: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]], arguments: argparse.Namespace) -> None:
    """Print labels and time of the GPU against the CPU."""
    agreements, seconds = [], []
    for i, (image, mask) in enumerate(samples):
        probabilities = coarse_probabilities(mask, NUM_CLASSES, seed=i, margin=arguments.margin, noise=arguments.noise)
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
        expected = dense_crf(probabilities, pixels, SETTINGS, negligible=0.0)
        there = probabilities.cuda(), pixels.cuda()

        def run(there: tuple[Tensor, Tensor] = there) -> Tensor:
            refined = dense_crf(*there, SETTINGS, negligible=0.0)
            torch.cuda.synchronize()
            return refined

        run()  # compiles, loads, and keeps the kernel of positions
        spent, refined = best_of(run, arguments.repeats)
        seconds.append(spent)
        agreements.append(float((refined.argmax(1).cpu() == expected.argmax(1)).float().mean()))
    print(f"{torch.cuda.get_device_name()} against the CPU")
    print(f"agreement {100 * min(agreements):.3f} %, {1000 * statistics.median(seconds):.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="VOC folder (default: generated images)")
    parser.add_argument("--list", type=Path, help="text file of image names (default: the masks of the folder)")
    parser.add_argument("--images", type=int, default=8, help="number of images (default 8)")
    parser.add_argument("--repeats", type=int, default=2, help="timed repeats of each (default 2)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument("--margin", type=float, default=8.0, help="between the logits of classes (default 8)")
    parser.add_argument("--noise", type=float, default=0.5, help="of the logits (default 0.5)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where afa's runs (default cpu)")
    arguments = parser.parse_args()
    densecrf: Any = None
    if arguments.device == "cpu":
        try:
            densecrf = importlib.import_module("pydensecrf.densecrf")
        except ImportError:
            raise SystemExit("pydensecrf2 is missing: pip install pydensecrf2") from None
    torch.set_num_threads(arguments.threads)
    if arguments.data:
        if arguments.list:
            names = arguments.list.read_text(encoding="utf-8").split()
        else:
            names = sorted(path.stem for path in (arguments.data / "SegmentationClassAug").glob("*.png"))
        names = names[:: max(len(names) // arguments.images, 1)][: arguments.images]
        samples = [read_image(arguments.data, name) for name in names]
    else:
        samples = [generated_image(i) for i in range(arguments.images)]
    print(
        f"{len(samples)} {'photographs' if arguments.data else 'generated images'} of {WIDTH} x {HEIGHT} px, "
        f"{ITERATIONS} iterations, {arguments.threads} threads, torch {torch.__version__}"
    )

    if arguments.device == "cuda":
        on_gpu(samples, arguments)
        return
    agreements, ratios = [], []
    for label, reduce in ((f"{NUM_CLASSES} classes", None), ("few classes", few_classes)):
        seconds: dict[str, list[float]] = {"pydensecrf2": [], "afa": [], "afa, negligible left out": []}
        same: dict[str, list[float]] = {"afa": [], "afa, negligible left out": []}
        changed, classes = [], []
        for i, (image, mask) in enumerate(samples):
            labels, num_classes = reduce(mask) if reduce else (mask, NUM_CLASSES)
            probabilities = coarse_probabilities(
                labels, num_classes, seed=i, margin=arguments.margin, noise=arguments.noise
            )
            pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
            spent, reference = best_of(lambda: run_pydensecrf(densecrf, image, probabilities), arguments.repeats)  # noqa: B023
            seconds["pydensecrf2"].append(spent)
            winners = reference.argmax(0)
            for name, negligible in (("afa", 0.0), ("afa, negligible left out", DEFAULT_DROP)):
                spent, refined = best_of(
                    lambda: dense_crf(probabilities, pixels, SETTINGS, negligible=negligible),  # noqa: B023
                    arguments.repeats,
                )
                seconds[name].append(spent)
                same[name].append(float((refined[0].argmax(0).numpy() == winners).mean()))
            changed.append(float((probabilities[0].argmax(0).numpy() != winners).mean()))
            classes.append(int((probabilities.amax((0, 2, 3)) > DEFAULT_DROP / num_classes).sum()))
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        print(f"{label}: the CRF changes {100 * statistics.mean(changed):.2f} % of the labels")
        for name, median in medians.items():
            agreement = f", agreement {100 * statistics.mean(same[name]):.3f} %" if name in same else ""
            kept = f", keeps {statistics.mean(classes):.1f} classes" if name.endswith("left out") else ""
            print(f"  {name:<24} {median:7.3f} s an image{agreement}{kept}")
        agreements += [statistics.mean(values) for values in same.values()]
        ratios.append(medians["afa"] / medians["pydensecrf2"])
    print(f"agreement {100 * min(agreements):.1f} %, time ratio {ratios[0]:.2f}")


if __name__ == "__main__":
    main()
