"""Speed of a whole training step against one that is organized as in the published code.

    python bench/step.py [--device cuda --crop 512 --batch 8 --precision bf16] [--phase refined] [--roofline]

Both sides start from the same random weights and learn from the same batches: smooth random images of 375 x 500 pixels,
rescaled by 0.5 to 2 and cropped as in training (a crop larger than its image has an empty margin), each with one to
three tags. Stochastic depth and dropout are off, so that nothing is random. Before it times anything, the command
compares the pseudo labels and losses of the chosen phases in fp32; if they differ, it ends with status 1. Then both
sides take whole steps in turn: transfer, learning rate, labels, losses, backward, optimizer. The times of the stages
come from further steps, measured one stage at a time. At the end stand the ratios of each phase: of the medians, of the
fastest steps and, on a CPU, of the medians of processor time, which other jobs on the machine move least. The last line
is the ratio of the medians of the last phase, such as `5.1x`; with `--phase all` this is the refined phase.

Our side computes in `--precision`, the published side in fp32. On a GPU, fp32 on both sides may use TF32.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from afa.config import Config, load_config
from afa.errors import AfaError
from afa.model.families import MIT_SIZES
from afa.model.network import AfaNetwork
from afa.runs.network import build_network
from afa.runtime import autocast, pick_device
from afa.training.engine import TrainingEngine
from afa.training.optimizer import set_learning_rate
from afa.training.schedule import Phase, phase
from afa.training.step import StepLosses, compute_losses, gradient_norm
from afa.types import IGNORE_INDEX, Batch, NetworkOutput
from published_step import PublishedStep, Stage, unmeasured  # type: ignore[import-not-found]

STEPS: Final = {"cls": 1_999, "initial": 6_000, "refined": 10_000}
"""A training step of each phase."""

STAGES: Final = (
    "training forward",
    "CAM passes",
    "PAR",
    "labels and walk",
    "losses",
    "backward",
    "optimizer",
    "other",
)

OUR_STAGES: Final = {
    "afa.training.step.training_labels": "labels and walk",
    "afa.pseudo.pipeline.multi_scale_cam": "CAM passes",
    "afa.pseudo.refiner.refinement_kernel": "PAR",
    "afa.pseudo.refiner.refine": "PAR",
}
"""What is measured inside our step, by where its caller looks it up."""

WARMUPS: Final = 4
"""Rounds over the batches before timing where steps are recorded or compiled."""

PHOTOGRAPH: Final = (375, 500)
LARGEST_LABEL_DIFFERENCE: Final = 1e-3
LARGEST_LOSS_DIFFERENCE: Final = 1e-4


class OurStep:
    """A network and one training step as in `afa.training.loop`.

    Args:
        network: Network to train.
        config: Settings.
        device: Where to train.
    """

    def __init__(self, network: AfaNetwork, config: Config, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.engine = TrainingEngine(network.to(device).train(), config, device=device)
        # A recorded step has no separate stages. A second step that is never recorded gives the times of stages and the
        # memory.
        plain = dataclasses.replace(config, train=dataclasses.replace(config.train, cuda_graphs=False))
        self.plain = (
            TrainingEngine(copy.deepcopy(self.engine.network), plain, device=device)
            if self.engine.records
            else self.engine
        )
        self.network = self.plain.network
        self.optimizer = self.plain.optimizer
        self.precision: str = config.train.precision

    def __call__(self, batch: Batch, phase: Phase, step: int, stage: Stage = unmeasured) -> None:
        """Learn from a batch."""
        if stage is unmeasured:
            self.engine.take_step(step, batch)
            return
        set_learning_rate(self.optimizer, step, self.config.schedule)
        losses = self.losses(batch, phase, stage)
        self.optimizer.zero_grad(set_to_none=True)
        with stage("backward"):
            losses.total.backward()  # type: ignore[no-untyped-call]
        with stage("optimizer"):
            self.optimizer.found_inf = (~gradient_norm(self.plain.parameters).isfinite()).float()  # type: ignore[attr-defined]
            self.optimizer.step()

    def unrecorded(self, batch: Batch, step: int) -> None:
        """Learn from a batch without a recording, so that the memory of a step can be seen."""
        self.plain.take_step(step, batch)

    def losses(self, batch: Batch, phase: Phase, stage: Stage = unmeasured) -> StepLosses:
        """Pseudo labels and losses of a batch."""

        def forward(image: Tensor, segmentation: bool, affinity: bool) -> NetworkOutput:
            with stage("training forward"), autocast(self.device, self.precision):
                output: NetworkOutput = self.network(image, segmentation=segmentation, affinity=affinity)
            return output

        def score(image: Tensor, affinity: bool) -> NetworkOutput:
            with stage("CAM passes"), autocast(self.device, self.precision):
                return self.network.score(image, affinity)

        num_slots = 1 + max(1, int(batch.tags.sum(1).max()))
        batch = batch.to(self.device, non_blocking=True)
        with stage("losses"):
            return compute_losses(forward, score, batch, config=self.config, phase=phase, num_slots=num_slots)


class StageMeter:
    """Adds up what each stage takes, minus what the stages inside it take.

    Args:
        read: Reading of the meter, such as seconds or operations since some start.
    """

    def __init__(self, read: Callable[[], float]) -> None:
        self.read = read
        self.totals: dict[str, float] = {}
        self._open: list[str] = []
        self._last = 0.0

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._settle()
        self._open.append(name)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def _settle(self) -> None:
        reading = self.read()
        if self._open:
            self.totals[self._open[-1]] = self.totals.get(self._open[-1], 0.0) + reading - self._last
        self._last = reading


@contextlib.contextmanager
def our_stages(meter: StageMeter) -> Iterator[None]:
    """Measure the functions of `OUR_STAGES`."""
    with contextlib.ExitStack() as stack:
        for place, name in OUR_STAGES.items():
            patch = mock.patch(place)
            original, _ = patch.get_original()
            stack.enter_context(mock.patch(place, _measured(original, meter, name)))
        yield


def _measured(function: Callable[..., Any], meter: StageMeter, name: str) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        with meter(name):
            return function(*arguments, **keywords)

    return call


def step_config(
    *, backbone: str, crop: int, batch: int, precision: str = "fp32", keys: dict[str, Any] | None = None
) -> Config:
    """The `paper` preset at these sizes with nothing random in the network."""
    return load_config(
        None,
        {
            "model.backbone": backbone,
            "model.weights": "",
            "model.drop_path": 0.0,
            "model.decoder_dropout": 0.0,
            "loss.energy_weight": 0.0,  # the published side has none
            # The CAMs of an untrained network are faint after the walk. With these scores both labels contain all kinds
            # of pixels.
            "pseudo.background_low": 0.3,
            "pseudo.background_high": 0.4,
            "augment.crop_size": crop,
            "schedule.batch_size": batch,
            "train.precision": precision,
        }
        | (keys or {}),
    )


def make_batch(
    seed: int, *, crop: int, batch: int, num_classes: int, photograph: tuple[int, int] = PHOTOGRAPH
) -> Batch:
    """Smooth random images on a zero canvas at random offsets, one to three tags each."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    image = torch.zeros(batch, 3, crop, crop, dtype=torch.uint8)
    tags = torch.zeros(batch, num_classes)
    boxes = []
    for i in range(batch):
        # Spread the scales of each batch over the range of the augmentation, so that few batches represent many.
        scale = 0.5 + 1.5 * (i + float(torch.rand((), generator=generator))) / batch
        height, width = (min(crop, int(scale * side)) for side in photograph)
        top, left = draw(0, crop - height), draw(0, crop - width)
        boxes.append((top, top + height, left, left + width))
        cells = torch.rand(1, 3, draw(6, 16), draw(6, 16), generator=generator)
        smooth = F.interpolate(cells, size=(height, width), mode="bilinear")[0]
        noise = torch.rand(3, height, width, generator=generator)
        image[i, :, top : top + height, left : left + width] = (255 * (0.9 * smooth + 0.1 * noise)).to(torch.uint8)
        tags[i, torch.randperm(num_classes, generator=generator)[: draw(1, min(3, num_classes))]] = 1
    return Batch(image, tags, torch.tensor(boxes), tuple(f"{seed}-{i}" for i in range(batch)))


def find_difference(ours: OurStep, published: PublishedStep, batch: Batch, phase: Phase) -> tuple[str, str]:
    """Compare labels and losses of a batch.

    Returns:
        What was found, and which differences are too large (empty if none is).
    """
    theirs = published.losses(batch, phase)
    losses = ours.losses(batch, phase)
    found, wrong = [], []
    for name in ("initial_label", "refined_label"):
        label, other = getattr(losses.labels, name), getattr(theirs, name)
        # Our side makes a label only if something learns from it; the published side always makes the initial label.
        if label is None:
            continue
        share = float((label != other).float().mean())
        kinds = [float(kind.float().mean()) for kind in (label == 0, label == IGNORE_INDEX)]
        found.append(
            f"{name} differs in {100 * share:.3f} % of pixels (background {100 * kinds[0]:.0f} %, "
            f"ignored {100 * kinds[1]:.0f} %)"
        )
        if not share <= LARGEST_LABEL_DIFFERENCE:
            wrong.append(found[-1])
    for name, value in theirs.values.items():
        difference = float((getattr(losses, name) - value).abs() / value.abs())
        found.append(f"{name}_loss by {difference:.1e}")
        if not difference <= LARGEST_LOSS_DIFFERENCE:
            wrong.append(f"{name}_loss is {float(getattr(losses, name)):.6g}, published {float(value):.6g}")
    return ", ".join(found), "; ".join(wrong)


@contextlib.contextmanager
def exact(ours: OurStep) -> Iterator[None]:
    """Compute in true fp32: neither bf16 nor TF32."""
    precision, tf32 = ours.precision, torch.backends.cudnn.allow_tf32
    matmul = torch.get_float32_matmul_precision()
    ours.precision, torch.backends.cudnn.allow_tf32 = "fp32", False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        ours.precision, torch.backends.cudnn.allow_tf32 = precision, tf32
        torch.set_float32_matmul_precision(matmul)


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Time a call; on a GPU from event to event."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(end)) / 1000


def stages_of(step: OurStep | PublishedStep, batch: Batch, phase: Phase, device: torch.device) -> dict[str, float]:
    """Seconds of each stage of a step; waits for the device between stages."""

    def read() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    meter = StageMeter(read)
    with our_stages(meter), meter("other"):
        step(batch, phase, STEPS[phase.name], meter)
    return meter.totals


def flops_of(step: OurStep | PublishedStep, batch: Batch, phase: Phase) -> dict[str, float]:
    """Floating-point operations of each stage: matrix products and convolutions."""

    counter = flop_counter()
    meter = StageMeter(lambda: float(counter.get_total_flops()))
    with counter, our_stages(meter), meter("other"):
        step(batch, phase, STEPS[phase.name], meter)
    return meter.totals


def flop_counter() -> FlopCounterMode:
    """PyTorch's counter, with what is only on a CPU added and the backward pass of grouped convolutions corrected."""
    operators = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            operators._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
            operators._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
            operators.convolution_backward: _convolution_backward_flops,
            torch.ops.mkldnn._linear_pointwise: _linear_flops,
            torch.ops.mkldnn._convolution_pointwise: _linear_flops,
        },
    )


# Operations from the shapes of an operator's arguments.
def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward_flops(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))  # type: ignore[no-untyped-call]


def _linear_flops(tokens: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    """Of linear layers and of convolutions that are not strided or dilated otherwise."""
    return 2 * int(math.prod(out_shape)) * int(math.prod(weight[1:]))


def _convolution_backward_flops(gradient: Any, image: Any, weight: Any, *rest: Any, **_: Any) -> int:
    wanted = rest[-1]
    return 2 * int(math.prod(gradient)) * int(math.prod(weight[1:])) * (int(wanted[0]) + int(wanted[1]))


def refinement_floor(config: Config, batch: Batch, phase: Phase) -> tuple[float, float]:
    """The fewest operations and bytes that the refinement of a batch needs, in fp32.

    One kernel of n neighbors per image, written once; each iteration reads it and the scores of both background
    scores, and writes the scores. Crops are taken as full.
    """
    pseudo = config.pseudo
    pixels = len(batch.image) * (config.augment.crop_size // pseudo.refinement_stride) ** 2
    neighbors = 8 * len(pseudo.dilations)
    channels = 2 * (1 + int(batch.tags.sum(1).max()))
    rounds = pseudo.iterations * (phase.want_initial + phase.want_refined)
    kernels = int(phase.want_initial or phase.want_refined)
    # Mean, deviation and distance of three colors take about 21 operations a neighbor, the softmax about 4.
    operations = pixels * neighbors * (25 * kernels + 2 * channels * rounds)
    numbers = pixels * ((3 + neighbors) * kernels + (neighbors + 2 * channels) * rounds)
    return float(operations), 4.0 * numbers


def held_bytes(step: OurStep | PublishedStep) -> int:
    """Bytes of weights, gradients, buffers and optimizer state."""
    tensors = [*step.network.parameters(), *step.network.buffers()]
    tensors += [parameter.grad for parameter in step.network.parameters() if parameter.grad is not None]
    tensors += [value for state in step.optimizer.state.values() for value in state.values()]
    return sum(tensor.nbytes for tensor in tensors)


def peak_bytes(step: OurStep | PublishedStep, batch: Batch, phase: Phase, device: torch.device) -> int:
    """Peak memory of a step on a GPU, without what the other side holds at the time."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before, own = torch.cuda.memory_allocated(device), held_bytes(step)
    if isinstance(step, OurStep):
        step.unrecorded(batch, STEPS[phase.name])
    else:
        step(batch, phase, STEPS[phase.name])
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before + own


def measure(
    ours: OurStep, published: PublishedStep, batches: Sequence[Batch], phase: Phase, device: torch.device
) -> dict[str, Any]:
    """Medians of whole steps in turn, of their stages, and peak memory."""
    sides: dict[str, OurStep | PublishedStep] = {"published": published, "ours": ours}
    number = STEPS[phase.name]
    published(batches[0], phase, number)
    # Compiling and recording happen here.
    for _ in range(WARMUPS if device.type == "cuda" or ours.config.train.compile else 1):
        for batch in batches:
            ours(batch, phase, number)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    processor: dict[str, list[float]] = {side: [] for side in sides}
    for batch in batches:
        for side, step in sides.items():
            start = time.process_time()
            seconds[side].append(seconds_of(functools.partial(step, batch, phase, number), device))
            processor[side].append(time.process_time() - start)
    stages: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for batch in batches:
        for side, step in sides.items():
            stages[side].append(stages_of(step, batch, phase, device))
    medians = {side: statistics.median(times) for side, times in seconds.items()}
    found: dict[str, Any] = {
        "seconds": medians,
        "ratio": medians["published"] / medians["ours"],
        "fastest_ratio": min(seconds["published"]) / min(seconds["ours"]),
        "stages": {
            side: {name: statistics.median(times.get(name, 0.0) for times in runs) for name in STAGES}
            for side, runs in stages.items()
        },
    }
    shares = [times.get("PAR", 0.0) / sum(times.values()) for times in stages["ours"]]
    found["par_share"] = statistics.median(shares)
    if device.type == "cpu":
        found["processor_ratio"] = statistics.median(processor["published"]) / statistics.median(processor["ours"])
    else:
        found["peak_bytes"] = {side: peak_bytes(step, batches[0], phase, device) for side, step in sides.items()}
    return found


def print_ratios(phases: dict[str, dict[str, Any]]) -> None:
    """Print how many times as fast our steps of each phase are."""
    kinds = {"ratio": "medians", "fastest_ratio": "fastest steps", "processor_ratio": "processor time"}
    print("\nratios" + "".join(f"{name:>10}" for name in phases))
    for kind, words in kinds.items():
        if all(kind in found for found in phases.values()):
            print("".join(f"{found[kind]:>9.2f}x" for found in phases.values()).rjust(6 + 10 * len(phases)), words)


def print_phase(name: str, found: dict[str, Any], num_steps: int) -> None:
    stages = found["stages"]
    print(f"\nphase {name}: seconds, medians of {num_steps} steps")
    print(f"{'':<18}{'published':>11}{'ours':>11}{'ratio':>9}")
    for stage in STAGES:
        theirs, our = stages["published"][stage], stages["ours"][stage]
        ratio = f"{theirs / our:8.1f}x" if our and theirs and stage != "other" else ""
        print(f"{stage:<18}{theirs:>11.4f}{our:>11.4f}{ratio:>9}")
    seconds = found["seconds"]
    print(f"{'whole step':<18}{seconds['published']:>11.4f}{seconds['ours']:>11.4f}{found['ratio']:>8.1f}x")
    print(f"PAR is {100 * found['par_share']:.1f} % of our step")
    if "peak_bytes" in found:
        peaks = {side: f"{peak / 2**30:.2f} GiB" for side, peak in found["peak_bytes"].items()}
        print(f"peak memory: published {peaks['published']}, ours {peaks['ours']}")


def product_rate(device: torch.device, side: int = 2048, repeats: int = 10) -> float:
    """Operations a second of a product of two square fp32 matrices, the best of several."""
    matrix = torch.rand(side, side, device=device)
    product = torch.empty_like(matrix)
    multiply = functools.partial(torch.mm, matrix, matrix, out=product)
    return 2 * side**3 / min(seconds_of(multiply, device) for _ in range(repeats))


def roofline(
    ours: OurStep, published: PublishedStep, batch: Batch, phase: Phase, stages: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Print the operations of each stage, and operations and bytes of the refinement, over the time that they took."""
    print(f"\nroofline, phase {phase.name}: GFLOP of matrix products and convolutions, and GFLOP/s")
    flops = {side: flops_of(step, batch, phase) for side, step in (("published", published), ("ours", ours))}
    for stage in ("training forward", "CAM passes", "labels and walk", "backward"):
        cells = []
        for side in ("published", "ours"):
            count, seconds = flops[side].get(stage, 0.0), stages[side][stage]
            cells.append(f"{side} {count / 1e9:10.2f}  {count / 1e9 / seconds if seconds else 0:10.1f}/s")
        print(f"{stage:<18}" + "   ".join(cells))
    rate = product_rate(ours.device)
    least = sum(flops["ours"].values()) / rate
    print(f"large products in fp32 run at {rate / 1e9:.0f} GFLOP/s; at that speed our step would take {least:.3f} s")
    operations, moved = refinement_floor(ours.config, batch, phase)
    seconds = stages["ours"]["PAR"]
    reached = (
        f"; at our time {operations / 1e9 / seconds:.1f} GFLOP/s, {moved / 1e9 / seconds:.1f} GB/s" if seconds else ""
    )
    print(f"PAR needs at least {operations / 1e9:.2f} GFLOP, {moved / 1e9:.3f} GB in fp32{reached}")
    return {"flops": flops, "product_rate": rate, "par_flops": operations, "par_bytes": moved}


def compile_keys(config: Config) -> dict[str, Any]:
    """The key that switches torch.compile on; only this function names it."""
    if not hasattr(config.train, "compile"):
        raise AfaError("--compile: this version has no train.compile; leave the option out")
    return {"train.compile": True}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="mit_b1", choices=tuple(MIT_SIZES), help="encoder (default mit_b1)")
    parser.add_argument("--crop", type=int, default=320, help="side of the crop, pixels (default 320)")
    parser.add_argument("--batch", type=int, default=2, help="images per step (default 2)")
    parser.add_argument("--classes", type=int, default=20, help="foreground classes (default 20)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side and phase (default 5)")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch (default: all cores)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where (default cpu)")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="of our side (default fp32)")
    parser.add_argument("--phase", default="refined", choices=(*STEPS, "all"), help="what is timed (default refined)")
    parser.add_argument("--compile", action="store_true", help="our side with torch.compile")
    parser.add_argument("--roofline", action="store_true", help="also count operations and bytes by stage")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    return parser


def run(arguments: argparse.Namespace) -> None:
    device = pick_device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    sizes = {"backbone": arguments.backbone, "crop": arguments.crop, "batch": arguments.batch}
    config = step_config(**sizes, precision=arguments.precision)
    if arguments.compile:
        config = step_config(**sizes, precision=arguments.precision, keys=compile_keys(config))
    torch.manual_seed(0)
    network = build_network(config.model, arguments.classes)
    published = PublishedStep(network, config, device)
    ours = OurStep(network, config, device)
    batches = [
        make_batch(seed, crop=arguments.crop, batch=arguments.batch, num_classes=arguments.classes)
        for seed in range(arguments.steps)
    ]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    if device.type == "cuda":
        batches = [batch.pin_memory() for batch in batches]
        torch.set_float32_matmul_precision("high")
    print(
        f"{arguments.backbone}, {arguments.batch} crops of {arguments.crop} px, {arguments.classes} classes, "
        f"ours in {arguments.precision}{', compiled' if arguments.compile else ''}, on {name}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    names = list(STEPS) if arguments.phase == "all" else [arguments.phase]
    phases = {name: phase(STEPS[name], config) for name in names}
    full = [0, arguments.crop, 0, arguments.crop]
    with_margin = (batch for batch in batches if any(box != full for box in batch.valid_box.tolist()))
    checked = next(with_margin, batches[0])
    with exact(ours):
        for name, one in phases.items():
            found, wrong = find_difference(ours, published, checked, one)
            if wrong:
                raise AfaError(f"phase {name}: results differ, so nothing is timed: {wrong}")
            print(f"phase {name}, ours against published: {found}")
    figures: dict[str, Any] = {
        "arguments": {key: value for key, value in vars(arguments).items() if key != "json"},
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "phases": {},
    }
    for name, one in phases.items():
        found_phase = measure(ours, published, batches, one, device)
        print_phase(name, found_phase, arguments.steps)
        if arguments.roofline:
            found_phase["roofline"] = roofline(ours, published, batches[0], one, found_phase["stages"])
        figures["phases"][name] = found_phase
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    print_ratios(figures["phases"])
    print(f"\n{figures['phases'][names[-1]]['ratio']:.1f}x")


def main(words: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(words)
    try:
        run(arguments)
    except AfaError as error:
        print(f"bench/step.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
