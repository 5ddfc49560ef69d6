"""A training step computes what its phase needs, once, and stays finite whatever the batch shows."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate, multilabel_soft_margin_loss
from torch.utils._python_dispatch import TorchDispatchMode

from afa.config import Config, ModelConfig, load_config
from afa.losses.energy import energy_loss
from afa.model.network import AfaNetwork
from afa.pseudo import pipeline, refiner
from afa.runs.network import build_network
from afa.runtime import Processes, autocast
from afa.training import step as step_module
from afa.training.schedule import phase
from afa.training.step import StepLosses, compute_losses, gradient_norm
from afa.types import IGNORE_INDEX, Batch, NetworkOutput

SIZE = 64
CLS_STEP, INITIAL_STEP, REFINED_STEP = 0, 3000, 7000
BASE = {"model.backbone": "mit_tiny", "model.weights": "", "model.decoder_width": 8, "pseudo.dilations": "1,2,4"}
FULL = (0, SIZE, 0, SIZE)


def config_with(**keys: Any) -> Config:
    return load_config(None, BASE | {key.replace("__", "."): value for key, value in keys.items()})


def make_batch(*boxes: tuple[int, int, int, int], num_classes: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(1)
    image = torch.zeros(len(boxes), 3, SIZE, SIZE, dtype=torch.uint8)
    for index, (top, bottom, left, right) in enumerate(boxes):
        shape = (3, bottom - top, right - left)
        image[index, :, top:bottom, left:right] = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    tags = torch.zeros(len(boxes), num_classes)
    tags[:, 0] = 1
    tags[0, 2] = 1
    return Batch(image, tags, torch.tensor(boxes), tuple(f"image{index}" for index in range(len(boxes))))


@dataclass
class Recorder:
    """A real small network whose calls are counted."""

    network: AfaNetwork
    forwards: list[tuple[bool, bool]] = field(default_factory=list)
    scores: list[tuple[int, int, bool]] = field(default_factory=list)

    def forward(self, image: Tensor, segmentation: bool, affinity: bool) -> NetworkOutput:
        self.forwards.append((segmentation, affinity))
        output: NetworkOutput = self.network(image, segmentation=segmentation, affinity=affinity)
        return output

    def score(self, image: Tensor, affinity: bool) -> NetworkOutput:
        self.scores.append((image.shape[0], image.shape[2], affinity))
        return self.network.score(image, affinity)

    def losses(self, batch: Batch, config: Config, step: int, **settings: Any) -> StepLosses:
        wanted = phase(step, config)
        return compute_losses(self.forward, self.score, batch, config=config, phase=wanted, **settings)


@pytest.fixture
def recorder() -> Recorder:
    torch.manual_seed(0)
    model = ModelConfig(backbone="mit_tiny", weights="", decoder_width=8, drop_path=0.0, decoder_dropout=0.0)
    network = build_network(model, 3)
    # A classifier of random weights tells nothing apart; a larger one gives CAMs with structure.
    torch.nn.init.normal_(network.classifier.weight, std=1.0)
    return Recorder(network.train())


class CastCounter(TorchDispatchMode):
    """Counts the copies in bfloat16 that are made of chosen tensors."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.places = {tensor.data_ptr() for tensor in tensors}
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        low = kwargs.get("dtype") == torch.bfloat16
        if func is torch.ops.aten._to_copy.default and low and args[0].data_ptr() in self.places:
            self.count += 1
        return func(*args, **kwargs)


def test_passes_share_the_casts_of_weights_and_lose_no_gradient(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With contexts of their own, as without `one_cast`, passes compute the same from more casts."""
    network, batch = recorder.network, make_batch(FULL, FULL)
    kind = phase(REFINED_STEP, config_with())
    weights = [module.weight for module in network.backbone.modules() if isinstance(module, torch.nn.Conv2d)]

    def forward(image: Tensor, segmentation: bool, affinity: bool) -> NetworkOutput:
        with autocast(torch.device("cpu"), "bf16"):
            return recorder.forward(image, segmentation, affinity)

    def score(image: Tensor, affinity: bool) -> NetworkOutput:
        with autocast(torch.device("cpu"), "bf16"):
            return recorder.score(image, affinity)

    def learn() -> tuple[int, list[Tensor]]:
        network.zero_grad()
        with CastCounter(weights) as counter:
            losses = compute_losses(forward, score, batch, config=config_with(), phase=kind)
        losses.total.backward()  # type: ignore[no-untyped-call]
        return counter.count, [parameter.grad for parameter in network.parameters() if parameter.grad is not None]

    count, gradients = learn()
    assert count == len(weights)
    monkeypatch.setattr(step_module, "one_cast", lambda device: nullcontext())
    separate, expected = learn()
    assert separate == (1 + len(recorder.scores) // 2) * len(weights)
    torch.testing.assert_close(gradients, expected, rtol=0, atol=0)


@dataclass
class Scripted:
    """A network whose class scores and affinity are given, and whose other outputs can learn."""

    class_scores: Tensor
    seg_logits: Tensor
    image_logits: Tensor
    affinity_logits: Tensor

    @classmethod
    def of(cls, class_scores: Tensor) -> Scripted:
        """Everything but the (B, C, 4, 4) class scores starts at 0."""
        count, num_classes = class_scores.shape[:2]
        shapes = ((count, num_classes + 1, 16, 16), (count, num_classes), (count, 16, 16))
        return cls(class_scores, *(torch.zeros(shape, requires_grad=True) for shape in shapes))

    @property
    def leaves(self) -> list[Tensor]:
        return [self.seg_logits, self.image_logits, self.affinity_logits]

    def forward(self, image: Tensor, segmentation: bool, affinity: bool) -> NetworkOutput:
        return NetworkOutput(
            image_logits=self.image_logits,
            class_scores=self.class_scores,
            seg_logits=self.seg_logits if segmentation else None,
            affinity=self.affinity_logits.sigmoid() if affinity else None,
        )

    def score(self, image: Tensor, affinity: bool) -> NetworkOutput:
        """The same scores whatever the scale; flipped images give flipped scores only if symmetric."""
        repeats = image.shape[0] // self.class_scores.shape[0]
        scores = self.class_scores.repeat(repeats, 1, 1, 1)
        tokens = torch.eye(16).expand(image.shape[0], -1, -1) if affinity else None
        return NetworkOutput(self.image_logits, scores, affinity=tokens)

    def losses(self, batch: Batch, config: Config, step: int) -> StepLosses:
        wanted = phase(step, config)
        return compute_losses(self.forward, self.score, batch, config=config, phase=wanted)


def assert_finite_with_gradients(losses: StepLosses, leaves: list[Tensor]) -> None:
    losses.total.backward()  # type: ignore[no-untyped-call]
    assert losses.total.isfinite()
    for leaf in leaves:
        assert leaf.grad is None or leaf.grad.isfinite().all()


# --- Only what the phase needs ---


def test_classification_phase_runs_one_forward_and_no_decoder(recorder: Recorder) -> None:
    batch = make_batch(FULL, FULL)
    losses = recorder.losses(batch, config_with(), CLS_STEP)
    assert (recorder.forwards, recorder.scores) == ([(False, False)], [])
    assert (losses.seg, losses.aff, losses.labels.initial_label, losses.labels.refined_label) == (None,) * 4
    assert torch.equal(losses.total.detach(), losses.cls)
    losses.total.backward()  # type: ignore[no-untyped-call]
    touched = {name.split(".")[0] for name, p in recorder.network.named_parameters() if p.grad is not None}
    assert touched == {"backbone", "classifier"}


# (images, side, with affinity) of each CAM pass of two images of 64 pixels
REUSED = [(2, 64, False), (4, 32, False), (4, 96, False)]
REUSED_WALK = [(2, 64, False), (4, 32, False), (2, 96, True), (2, 96, False)]


@pytest.mark.parametrize(
    ("step", "reuse", "passes"),
    [
        (INITIAL_STEP, True, REUSED),
        (INITIAL_STEP, False, [(4, 64, False), *REUSED[1:]]),
        (REFINED_STEP, True, REUSED_WALK),
        (REFINED_STEP, False, [(4, 64, False), *REUSED_WALK[1:]]),
    ],
)
def test_cam_passes(recorder: Recorder, step: int, reuse: bool, passes: list[tuple[int, int, bool]]) -> None:
    recorder.losses(make_batch(FULL, FULL), config_with(pseudo__reuse_training_pass=reuse), step)
    assert recorder.forwards == [(True, True)]
    assert recorder.scores == passes


def test_reused_pass_is_the_training_forward(recorder: Recorder) -> None:
    batch = make_batch(FULL, FULL)
    labels = [
        recorder.losses(batch, config_with(pseudo__reuse_training_pass=reuse), REFINED_STEP).labels
        for reuse in (True, False)
    ]
    # Without stochastic depth the training forward and a CAM pass say the same, up to rounding.
    for kind in ("initial_label", "refined_label"):
        one, other = getattr(labels[0], kind), getattr(labels[1], kind)
        assert (one == other).float().mean() > 0.999
        assert len(one.unique()) > 1


def test_no_pass_with_affinity_without_a_walk(recorder: Recorder) -> None:
    losses = recorder.losses(make_batch(FULL), config_with(pseudo__propagation="none"), REFINED_STEP)
    assert not any(affinity for _, _, affinity in recorder.scores)
    assert losses.labels.initial_label is not None
    assert losses.labels.refined_label is losses.labels.initial_label


@pytest.mark.parametrize(
    ("step", "boxes", "keys", "kernels"),
    [
        (INITIAL_STEP, (FULL, FULL), {}, 1),
        (REFINED_STEP, (FULL, FULL), {}, 1),
        # A crop with padding is refined inside its box, whose kernel is another one.
        (REFINED_STEP, (FULL, (0, 40, 8, 64)), {}, 2),
        (REFINED_STEP, (FULL, (0, 40, 8, 64)), {"pseudo__refinement_region": "canvas"}, 1),
        (REFINED_STEP, (FULL, (0, 40, 8, 64)), {"pseudo__refinement": "none"}, 0),
        (CLS_STEP, (FULL, FULL), {}, 0),
    ],
)
def test_refinement_kernels_are_computed_once(
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    boxes: tuple[tuple[int, int, int, int], ...],
    keys: dict[str, Any],
    kernels: int,
) -> None:
    calls = []
    compute = refiner.refinement_kernel

    def counted(image: Tensor, **settings: Any) -> Tensor:
        calls.append(image.shape)
        return compute(image, **settings)

    monkeypatch.setattr(refiner, "refinement_kernel", counted)
    recorder.losses(make_batch(*boxes), config_with(**keys), step)
    assert len(calls) == kernels


def test_only_the_wanted_labels_are_made(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = []
    make = step_module.training_labels

    def recorded(*arguments: Any, want: tuple[str, ...], **settings: Any) -> Any:
        wanted.append(want)
        return make(*arguments, want=want, **settings)

    monkeypatch.setattr(step_module, "training_labels", recorded)
    batch = make_batch(FULL)
    for step in (CLS_STEP, INITIAL_STEP, REFINED_STEP):
        recorder.losses(batch, config_with(), step)
    recorder.losses(batch, config_with(loss__affinity_weight=0), REFINED_STEP)
    assert wanted == [("initial_label",), ("initial_label", "refined_label"), ("refined_label",)]


def test_weights_of_zero_leave_parts_of_the_network_out(recorder: Recorder) -> None:
    batch = make_batch(FULL)
    without_affinity = recorder.losses(batch, config_with(loss__affinity_weight=0), REFINED_STEP)
    without_segmentation = recorder.losses(batch, config_with(loss__segmentation_weight=0), REFINED_STEP)
    neither = config_with(loss__segmentation_weight=0, loss__affinity_weight=0)
    assert recorder.forwards == [(True, False), (False, True)]
    assert without_affinity.aff is None
    assert without_affinity.seg is not None
    assert without_segmentation.seg is None
    assert without_segmentation.aff is not None
    recorder.scores.clear()
    alone = recorder.losses(batch, neither, REFINED_STEP)
    assert recorder.scores == []
    assert torch.equal(alone.total.detach(), alone.cls)


def test_cam_passes_leave_every_buffer_and_flag_alone(recorder: Recorder) -> None:
    network = recorder.network
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    flags = [module.training for module in network.modules()]
    network.score(torch.randn(2, 3, SIZE, SIZE), affinity=True)
    assert buffers
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in network.named_buffers())
    assert [module.training for module in network.modules()] == flags


# --- What the losses are ---


def test_total_is_the_weighted_sum(recorder: Recorder) -> None:
    config = config_with(loss__segmentation_weight=0.3, loss__affinity_weight=0.7, loss__energy_weight=1000)
    losses = recorder.losses(make_batch(FULL, FULL), config, INITIAL_STEP)
    assert losses.seg is not None
    assert losses.aff is not None
    assert losses.reg is not None
    weighted = losses.cls + 0.3 * losses.seg + 0.7 * losses.aff + 1000 * losses.reg
    assert float(losses.total.detach()) == pytest.approx(float(weighted))
    assert min(float(losses.seg), float(losses.aff)) > 0
    assert 1000 * float(losses.reg) < -1e-3


def test_the_energy_is_that_of_what_the_segmentation_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Scripted.of(centered_scores())
    torch.nn.init.normal_(network.seg_logits, generator=torch.Generator().manual_seed(0))
    batch = make_batch((0, SIZE, 0, 56))
    initial, refined = torch.zeros(2, 1, SIZE, SIZE, dtype=torch.int64)
    initial[:, :16] = refined[:, :40] = IGNORE_INDEX  # only where labels are missing is what counts
    labels = pipeline.TrainingLabels(initial, refined)
    monkeypatch.setattr(step_module, "training_labels", lambda *_, **__: labels)
    energies = []
    for label, step in ((initial, INITIAL_STEP), (refined, REFINED_STEP)):
        found = network.losses(batch, config_with(), step).reg
        expected = energy_loss(network.seg_logits, batch.image / 255, label, batch.valid_box)
        torch.testing.assert_close(found, expected.detach())
        energies.append(float(expected.detach()))
    assert energies[0] != pytest.approx(energies[1])


@pytest.mark.parametrize(("weights", "step"), [((0.1, 0), REFINED_STEP), ((0, 0.01), REFINED_STEP), ((0.1, 0.01), 0)])
def test_without_weight_or_segmentation_no_energy_is_computed(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, weights: tuple[float, float], step: int
) -> None:
    monkeypatch.delattr(step_module, "energy_loss")
    config = config_with(loss__segmentation_weight=weights[0], loss__energy_weight=weights[1])
    assert recorder.losses(make_batch(FULL), config, step).reg is None


def centered_scores(count: int = 1, score: float = 4.0) -> Tensor:
    """(B, 3, 4, 4), symmetric: class 0 in the middle, nothing elsewhere."""
    scores = torch.full((count, 3, 4, 4), -1.0)
    scores[:, 0, 1:3, 1:3] = score
    return scores


def test_losses_are_those_of_the_labels() -> None:
    network = Scripted.of(centered_scores())
    torch.manual_seed(3)
    for leaf in network.leaves:
        torch.nn.init.normal_(leaf)
    batch = make_batch((0, SIZE, 0, 56))
    losses = network.losses(batch, config_with(), INITIAL_STEP)
    label = losses.labels.initial_label
    assert label is not None
    assert set(label.unique().tolist()) == {0, 1, IGNORE_INDEX}
    assert (label[:, :, 56:] == IGNORE_INDEX).all()
    assert label[0, 32, 32] == 1
    cls = multilabel_soft_margin_loss(network.image_logits, batch.tags)
    assert float(losses.cls) == pytest.approx(float(cls.detach()))
    # The segmentation loss is that of the logits at the size of the label.
    logits = interpolate(network.seg_logits, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    background, foreground = (
        cross_entropy(logits.movedim(1, 3)[part], label[part]) for part in (label == 0, (label > 0) & (label < 255))
    )
    assert float(losses.seg or 0) == pytest.approx(float((background + foreground).detach()) / 2, rel=1e-5)
    # Affinity pairs are those of the label at every 16th pixel.
    tokens = label[:, ::16, ::16].flatten(1)[0]
    known = (tokens[:, None] != IGNORE_INDEX) & (tokens[None] != IGNORE_INDEX)
    same = tokens[:, None] == tokens[None]
    affinity = network.affinity_logits[0].sigmoid()
    positive = (1 - affinity)[known & same].sum() / ((known & same).sum() + 1)
    negative = affinity[known & ~same].sum() / ((known & ~same).sum() + 1)
    assert float(losses.aff or 0) == pytest.approx(float((positive + negative).detach()) / 2, rel=1e-5)


def different_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Initial label: background left, class 1 right. Refined label: background everywhere."""
    initial = torch.zeros(1, SIZE, SIZE, dtype=torch.int64)
    initial[:, :, SIZE // 2 :] = 1

    def scripted(*_: Any, want: tuple[str, ...], **__: Any) -> pipeline.TrainingLabels:
        made = {"initial_label": initial, "refined_label": torch.zeros_like(initial)}
        return pipeline.TrainingLabels(**{kind: made[kind] for kind in want})

    monkeypatch.setattr(step_module, "training_labels", scripted)


@pytest.mark.parametrize(("target", "unlike_pairs"), [("initial", True), ("segmentation", False)])
def test_what_supervises_the_affinity_after_refinement(
    monkeypatch: pytest.MonkeyPatch, target: str, unlike_pairs: bool
) -> None:
    different_labels(monkeypatch)
    network = Scripted.of(centered_scores())
    losses = network.losses(make_batch(FULL), config_with(schedule__affinity_target=target), REFINED_STEP)
    losses.total.backward()  # type: ignore[no-untyped-call]
    assert network.affinity_logits.grad is not None
    # A gradient above 0 pushes a pair apart: there are such pairs only where the label has two classes.
    assert bool((network.affinity_logits.grad > 0).any()) == unlike_pairs
    # The segmentation learns the refined label in both cases: background everywhere.
    assert network.seg_logits.grad is not None
    assert (network.seg_logits.grad[:, 0] < 0).all()


def test_affinity_follows_the_segmentation_before_refinement_too(monkeypatch: pytest.MonkeyPatch) -> None:
    different_labels(monkeypatch)
    aff = [
        Scripted.of(centered_scores())
        .losses(make_batch(FULL), config_with(schedule__affinity_target=target), INITIAL_STEP)
        .aff
        for target in ("initial", "segmentation")
    ]
    assert aff[0] is not None
    assert torch.equal(aff[0], aff[1])  # type: ignore[arg-type]


# --- Crops that lost something ---


@pytest.mark.parametrize("step", [INITIAL_STEP, REFINED_STEP])
@pytest.mark.parametrize(
    ("score", "boxes", "present"),
    [
        (-1.0, (FULL, FULL), {0}),
        # Inside a box in the middle of the object there is no background.
        (4.0, ((28, 36, 28, 36), (28, 36, 28, 36)), {1, IGNORE_INDEX}),
        (4.0, ((0, 1, 0, 1), (63, 64, 63, 64)), {0, IGNORE_INDEX}),
        (4.0, ((32, 33, 32, 33), (32, 33, 32, 33)), {IGNORE_INDEX}),
    ],
    ids=["no foreground", "no background", "one pixel of background", "one uncertain pixel"],
)
def test_missing_foreground_or_background_stays_finite(
    step: int, score: float, boxes: tuple[tuple[int, int, int, int], ...], present: set[int]
) -> None:
    network = Scripted.of(centered_scores(2, score))
    losses = network.losses(make_batch(*boxes), config_with(), step)
    label = losses.labels.initial_label
    assert label is not None
    assert set(label.unique().tolist()) == present
    assert_finite_with_gradients(losses, network.leaves)


@pytest.mark.parametrize("seg_form", ["balanced", "plain"])
@pytest.mark.parametrize("aff_form", ["balanced", "paper"])
def test_a_batch_without_any_label_adds_exactly_nothing(
    monkeypatch: pytest.MonkeyPatch, seg_form: str, aff_form: str
) -> None:
    ignored = torch.full((1, SIZE, SIZE), IGNORE_INDEX)
    monkeypatch.setattr(step_module, "training_labels", lambda *_, **__: pipeline.TrainingLabels(ignored, ignored))
    network = Scripted.of(centered_scores())
    # The energy loss is what goes on learning from pixels without label.
    config = config_with(loss__segmentation_form=seg_form, loss__affinity_form=aff_form, loss__energy_weight=0)
    losses = network.losses(make_batch(FULL), config, REFINED_STEP)
    assert float(losses.seg or 0) == float(losses.aff or 0) == 0.0
    assert losses.seg is not None
    losses.total.backward()  # type: ignore[no-untyped-call]
    for leaf in (network.seg_logits, network.affinity_logits):
        assert leaf.grad is not None
        assert not leaf.grad.any()


def test_an_image_without_tags_beside_others_is_all_background(recorder: Recorder) -> None:
    batch = make_batch(FULL, FULL)
    batch.tags[1] = 0
    losses = recorder.losses(batch, config_with(), REFINED_STEP)
    assert losses.labels.refined_label is not None
    assert not losses.labels.refined_label[1].any()
    assert_finite_with_gradients(losses, list(recorder.network.parameters()))


# --- Ablations ---


@pytest.mark.parametrize(
    "keys",
    [
        {"pseudo__propagation": "none"},
        {"pseudo__propagation": "attention"},
        {"pseudo__propagation": "affinity"},
        {"pseudo__refinement": "none"},
        {"pseudo__refinement": "par_color"},
        {"pseudo__refinement": "pamr"},
        {"pseudo__refinement": "crf"},
        {"pseudo__refinement": "crf", "pseudo__propagation": "none", "pseudo__softmax_scores": False},
        {"loss__energy_weight": 0},
        {"pseudo__label_rule": "threshold"},
        {"pseudo__softmax_scores": False},
        {"pseudo__refinement_region": "canvas"},
        {"pseudo__walk_epsilon": 0.0},
        {"loss__affinity_weight": 0},
        {"loss__segmentation_weight": 0},
        {"loss__segmentation_form": "plain", "loss__affinity_form": "paper"},
        {"schedule__affinity_target": "segmentation"},
    ],
    ids=lambda keys: " ".join(f"{key.split('__')[1]}={value}" for key, value in keys.items()),
)
@pytest.mark.parametrize("step", [INITIAL_STEP, REFINED_STEP])
def test_ablations_run(recorder: Recorder, keys: dict[str, Any], step: int) -> None:
    losses = recorder.losses(make_batch(FULL, (8, 64, 0, 40)), config_with(**keys), step)
    assert_finite_with_gradients(losses, list(recorder.network.parameters()))
    for label in (losses.labels.initial_label, losses.labels.refined_label):
        if label is not None:
            assert set(label.unique().tolist()) <= {0, 1, 3, IGNORE_INDEX}  # the tags of the two images


# --- Several processes ---


def test_shares_of_two_processes_add_up_to_the_whole_batch() -> None:
    """Averaged over processes, as DistributedDataParallel does, the gradient is that of the whole batch."""
    scores = centered_scores(2)
    scores[1] = -1.0  # all foreground is in the first image: plain means per process would differ
    config = config_with(loss__energy_weight=1000, loss__reduction="batch")
    whole = Scripted.of(scores)
    batch = make_batch(FULL, (0, SIZE, 0, 32))
    expected = whole.losses(batch, config, INITIAL_STEP)
    expected.total.backward()  # type: ignore[no-untyped-call]
    wanted = phase(INITIAL_STEP, config)

    def parts(totals: list[Tensor] | None) -> tuple[list[StepLosses], list[Scripted], list[list[Tensor]]]:
        """Run both shares; `totals` holds the counts over both, None only records each share's own."""
        results, networks, counts = [], [], []
        for index in (0, 1):
            own: list[Tensor] = []

            class Two(Processes):
                def total(self, count: Tensor, own: list[Tensor] = own) -> Tensor:
                    own.append(count)
                    return count if totals is None else totals[len(own) - 1]

            one = Batch(
                *(tensor[index : index + 1] for tensor in (batch.image, batch.tags, batch.valid_box)), names=("x",)
            )
            network = Scripted.of(scores[index : index + 1])
            results.append(
                compute_losses(
                    network.forward, network.score, one, config=config, phase=wanted, processes=Two(index, 2)
                )
            )
            networks.append(network)
            counts.append(own)
        return results, networks, counts

    _, _, (first, second) = parts(None)
    results, networks, _ = parts([a + b for a, b in zip(first, second, strict=True)])
    assert sum(float(r.seg or 0) for r in results) == pytest.approx(float(expected.seg or 0), rel=1e-6)
    assert sum(float(r.aff or 0) for r in results) == pytest.approx(float(expected.aff or 0), rel=1e-6)
    assert sum(float(r.reg or 0) for r in results) / 2 == pytest.approx(float(expected.reg or 0), rel=1e-6)
    assert sum(float(r.cls) for r in results) / 2 == pytest.approx(float(expected.cls), rel=1e-6)
    for result in results:
        result.total.backward()  # type: ignore[no-untyped-call]
    for index, network in enumerate(networks):
        for leaf, of_whole in zip(network.leaves, whole.leaves, strict=True):
            assert leaf.grad is not None
            assert of_whole.grad is not None
            torch.testing.assert_close(leaf.grad[0] / 2, of_whole.grad[index], rtol=1e-5, atol=1e-9)


# --- Gradients ---


@pytest.mark.parametrize(("value", "finite"), [(1.0, True), (float("nan"), False), (float("inf"), False)])
def test_gradients_are_finite(value: float, finite: bool) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad = torch.zeros(2)
    parameters[1].grad = torch.tensor([0.0, value])
    assert bool(gradient_norm(parameters).isfinite()) is finite
