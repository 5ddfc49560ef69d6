"""A whole training step with everything that it changes: weights, optimizer, batch statistics.

A step does not synchronize the GPU, but for the one that calibrates the affinity. On a single GPU a step of each kind
is recorded once as a CUDA graph and replayed from then on, so that the host's pace never limits it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from afa.config import Config
from afa.errors import AfaError
from afa.model.backbone import Encoded
from afa.model.network import AfaNetwork
from afa.pseudo.affinity import affinity_label, token_label
from afa.pseudo.cam import ScoreFunction
from afa.runtime import ALONE, Processes, autocast, seed_step
from afa.training.feature_cache import CachedScore, FeatureReader, encoded
from afa.training.optimizer import build_optimizer, set_learning_rate, trained_parameters
from afa.training.schedule import Phase, phase
from afa.training.step import ForwardFunction, LossFunction, StepLosses, compute_losses, gradient_norm
from afa.types import IGNORE_INDEX, Batch, NetworkOutput, inside_box, normalize_image

if TYPE_CHECKING:
    from afa.training.shard import Shards

MAX_SKIPPED_STEPS = 50
"""A run gives up after this many steps in a row with gradients that are not finite."""

_EAGER_STEPS = 2
"""Steps of each kind that run before one is recorded: they create optimizer state and fill caches."""


@dataclass
class _Recording:
    """A recorded step: where its batch goes, and what it leaves."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    losses: StepLosses


class _ByName(torch.nn.Module):
    """A network whose output is a dictionary: DistributedDataParallel averages nothing if it finds no tensor in it."""

    def __init__(self, network: AfaNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor | Encoded, **wanted: bool) -> dict[str, Any]:
        output: NetworkOutput = self.network(image, **wanted)
        return vars(output)


class TrainingEngine:
    """Takes training steps.

    Args:
        network: On `device`.
        config: Settings.
        device: Where to train.
        processes: Processes that train together.
        compute: What a step computes.

    Attributes:
        features: Feature cache that the batches are read from; None: steps start from pixels.
        network: The whole network; with `train.shard`, as of the last `collect`.
        trained: The network that steps change.
    """

    def __init__(
        self,
        network: AfaNetwork,
        config: Config,
        *,
        device: torch.device,
        processes: Processes = ALONE,
        compute: LossFunction = compute_losses,
    ) -> None:
        self.network = network
        self.config = config
        self.device = device
        self.processes = processes
        self.compute = compute
        self.features: FeatureReader | None = None
        self.optimizer = build_optimizer(network, config.schedule)
        self.trained = network
        self.shards: Shards | None = None
        if config.train.shard and processes.count > 1:
            self._shard()
        self.parameters = trained_parameters(self.optimizer)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16")
        self._affinity_is_set = config.model.affinity_init == "published"
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.module: torch.nn.Module = self.trained
        if config.train.compile:
            network.backbone.compile(dynamic=False)
            network.decoder.compile(dynamic=False)
        self._joined: tuple[bool, bool] | None = None
        # The dense CRF synchronizes the GPU, and a recording has no place for masks.
        recordable = config.pseudo.refinement != "crf" and config.train.supervision == "tags"
        recordable = recordable and processes.count == 1 and not self.scaler.is_enabled()
        self.records = config.train.cuda_graphs and device.type == "cuda" and recordable
        self._stream: Any = torch.cuda.Stream(device) if self.records else None  # type: ignore[no-untyped-call]
        self._pool: Any = None
        self._eager_steps: dict[tuple[Phase, int, int], int] = {}
        self._recordings: dict[tuple[Phase, int, int], _Recording] = {}

    def _shard(self) -> None:
        """Train a copy of the network that is spread over the processes; `network` is on the CPU meanwhile."""
        from afa.training.shard import Shards  # here, as it takes a second to import

        train = self.config.train
        if train.compile or train.precision == "fp16":
            what = "train.compile is true" if train.compile else "train.precision is fp16"
            raise AfaError(f"{what}, which train.shard does not know; change one of them")
        names = {id(weight): name for name, weight in self.network.named_parameters()}
        self.shards = shards = Shards(self.network, self.device, self.processes)
        self.trained = shards.network
        self._names = [names[id(weight)] for weight in trained_parameters(self.optimizer)]
        for group in self.optimizer.param_groups:
            group["params"] = [shards.parameters[names[id(weight)]] for weight in group["params"]]
        self.network.to("cpu")

    def collect(self) -> None:
        """Bring `network` up to date, on the device; every process calls this at the same time."""
        if self.shards is not None:
            self.shards.copy_to(self.network.to(self.device))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the network; every process calls this at the same time."""
        optimizer = self.optimizer.state_dict()
        if self.shards is not None:
            optimizer = self.shards.whole_state(optimizer, self._names)
        return {"optimizer": optimizer, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict` of any device and any number of processes, and from the weights of `network`."""
        optimizer = state["optimizer"]
        if self.shards is not None:
            self.shards.copy_from(self.network)
            optimizer = self.shards.own_state(optimizer, self._names)
        self.optimizer.load_state_dict(optimizer)
        for group in self.optimizer.param_groups:
            group["capturable"] = self.device.type == "cuda"
        self.scaler.load_state_dict(state["scaler"])

    def take_step(self, step: int, batch: Batch) -> StepLosses:
        """Learn from one batch.

        Args:
            step: Number of the step, from 0.
            batch: This process's share of the batch; its tags are still on the host, so that counting them does not
                synchronize the GPU.

        Returns:
            The losses, detached. With recorded steps they are overwritten by the next step.
        """
        config = self.config
        kind = phase(step, config)
        num_slots = self._num_slots(batch.tags)
        if kind.affinity and not self._affinity_is_set:
            self.start_affinity(batch.to(self.device))
        if self.processes.count > 1 and self.shards is None:
            self._join(kind)
        seed_step(config.train.seed, step, self.processes.rank)
        set_learning_rate(self.optimizer, step, config.schedule)
        if self._stream is None:
            return self._step(batch.to(self.device, non_blocking=True), kind, num_slots)
        # Gradients are summed up on the stream that first used a weight, so every step uses the recorder's stream.
        outer = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(outer)
        with torch.cuda.stream(self._stream):
            losses = self._recorded_step(batch.to(self.device, non_blocking=True), kind, num_slots)
        outer.wait_stream(self._stream)
        return losses

    def _join(self, kind: Phase) -> None:
        """Let the processes average gradients. Each phase leaves other weights out, and its first step shows which."""
        used = (kind.segmentation, kind.affinity)
        if used != self._joined:
            self.module = DistributedDataParallel(_ByName(self.network), static_graph=True)
            self._joined = used

    def check(self, step: int) -> None:
        """Give up on a run whose gradients are not finite for many steps up to the last one. Waits for the device.

        Raises:
            AfaError: The last `MAX_SKIPPED_STEPS` steps changed nothing.
        """
        skipped = int(self.skipped)
        if skipped > MAX_SKIPPED_STEPS:
            raise AfaError(
                f"the gradients of the last {skipped} steps up to step {step} were not finite; the weights are "
                "still those before them; lower schedule.learning_rate or use --precision fp32"
            )

    def start_affinity(self, batch: Batch) -> None:
        """Calibrate the affinity head by the first images that it learns from; weights that are not 0 stay.

        Images that say nothing leave the weights at 0, and the next step tries again: whether it does depends on the
        weights alone, so that a resumed run does the same. `batch` is on the device.
        """
        self.collect()
        output, pairs = self.attend(batch)
        assert output.attention is not None
        head, scale = self.network.affinity_head, self.network.attention_factor
        head.calibrate(output.attention, pairs, scale=scale, total=self.processes.total)
        if self.shards is not None:
            self.shards.copy_from(self.network)
        self._affinity_is_set = bool(head.mix.weight.any())

    def attend(self, batch: Batch) -> tuple[NetworkOutput, Tensor]:
        """Affinity and attention that `network` gives a batch, and which pairs of its tokens the loss could count.

        Args:
            batch: On the device.

        Returns:
            Output of a CAM pass; (B, hw, hw) bool, both tokens in the valid box and within the radius.
        """
        image = encoded(batch) if batch.frozen else normalize_image(batch.image.float() / 255)
        with autocast(self.device, self.config.train.precision):
            output = self.network.score(image, True)
        inside = inside_box(batch.valid_box, batch.image.shape[2], batch.image.shape[3])  # (B, H, W)
        grid = (output.class_scores.shape[2], output.class_scores.shape[3])
        tokens = token_label(torch.where(inside, 0, IGNORE_INDEX), grid)  # (B, h, w)
        return output, affinity_label(tokens, radius=self.config.pseudo.affinity_radius) != IGNORE_INDEX

    def _num_slots(self, tags: Tensor) -> int:
        """1 + the largest number of tags of an image; recorded steps share a few round numbers."""
        num_slots = 1 + max(1, int((tags > 0).sum(1).max()))
        if not self.records:
            return num_slots
        return min(1 << (num_slots - 1).bit_length(), 1 + tags.shape[1])

    def _recorded_step(self, batch: Batch, kind: Phase, num_slots: int) -> StepLosses:
        key = (kind, num_slots, batch.num_negatives)
        if key not in self._recordings:
            if self._eager_steps.get(key, 0) < _EAGER_STEPS:
                self._eager_steps[key] = self._eager_steps.get(key, 0) + 1
                return self._step(batch, kind, num_slots)
            self._recordings[key] = self._record(batch, kind, num_slots)
        recording = self._recordings[key]
        for kept, new in (
            (recording.batch.image, batch.image),
            (recording.batch.tags, batch.tags),
            (recording.batch.valid_box, batch.valid_box),
            *zip(recording.batch.frozen, batch.frozen, strict=True),
        ):
            kept.copy_(new)
        recording.graph.replay()
        return recording.losses

    def _record(self, batch: Batch, kind: Phase, num_slots: int) -> _Recording:
        kept = replace(batch.map(torch.clone), names=())
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        # Threads that prepare batches use the device at the same time.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            losses = self._step(kept, kind, num_slots)
        self._pool = graph.pool()
        return _Recording(graph, kept, losses)

    def _step(self, batch: Batch, kind: Phase, num_slots: int) -> StepLosses:
        schedule = self.config.schedule
        buffers = list(self.trained.buffers())
        before = [buffer.clone() for buffer in buffers]
        if self.shards is not None:
            self.network.to("cpu")
            self.shards.gather()
        forward, score = self._passes(batch)
        losses = self.compute(
            forward,
            score,
            batch,
            config=self.config,
            phase=kind,
            num_slots=num_slots,
            processes=self.processes,
        )
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(losses.total).backward()  # type: ignore[no-untyped-call]
        if self.shards is not None:
            self.shards.take_gradients()
        self.scaler.unscale_(self.optimizer)
        norm = gradient_norm(self.parameters) if self.shards is None else self.shards.norm()
        if schedule.grad_clip > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, schedule.grad_clip, norm)
        finite = norm.isfinite()
        if self.scaler.is_enabled():
            # fp16's scaler skips an overflowing step itself and lowers its scale; in other precisions we skip it.
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            # The fused optimizer leaves everything as it is where this is 1.
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        for buffer, old in zip(buffers, before, strict=True):
            # The forward pass may have put the same NaN into the batch statistics.
            buffer.copy_(torch.where(finite, buffer, old))
        self.skipped.copy_(torch.where(finite, 0, self.skipped + 1))
        return replace(losses, total=losses.total.detach())

    def _passes(self, batch: Batch) -> tuple[ForwardFunction, ScoreFunction]:
        if not batch.frozen:
            return self._forward, self._score
        kept = encoded(batch)

        def forward(_: Tensor, segmentation: bool, affinity: bool) -> NetworkOutput:
            return self._forward(kept, segmentation, affinity)

        return forward, CachedScore(self._score, kept.first(len(batch.tags) - batch.num_negatives))

    def _forward(self, image: Tensor | Encoded, segmentation: bool, affinity: bool) -> NetworkOutput:
        with autocast(self.device, self.config.train.precision):
            output = self.module(image, segmentation=segmentation, affinity=affinity)
        return NetworkOutput(**output) if isinstance(output, dict) else output

    def _score(self, image: Tensor | Encoded, affinity: bool) -> NetworkOutput:
        with autocast(self.device, self.config.train.precision):
            return self.trained.score(image, affinity)
