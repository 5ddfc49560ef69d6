"""Whole training steps against recorded steps of the published implementation: part of `bench/parity.py`.

The file holds a batch, the weights of a tiny MiT in the published layout, and losses, labels, CAM and gradients of the
published loop at several steps: `published/N/...`, and `exact/N/...` of the same loop with an image for PAR that was
not truncated. Nothing in the step is random: it has neither stochastic depth nor dropout.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Final, Literal

import torch
from torch import Tensor

from afa.config import Config, LossConfig, PseudoConfig
from afa.errors import AfaError
from afa.model.families import MitSize
from afa.model.mit import MixTransformer, convert_original_keys
from afa.model.network import AfaNetwork
from afa.model.weights import load_state
from afa.pseudo.affinity import affinity_label, token_label
from afa.pseudo.cam import multi_scale_cam
from afa.training.schedule import phase
from afa.training.step import StepLosses, compute_losses
from afa.types import Batch
from vectors import Check, Vectors  # type: ignore[import-not-found]

WEIGHT: Final = "weight/"
SIZE: Final = MitSize((16, 32, 64, 64), (1, 1, 1, 2), (1, 2, 4, 8))
TOKEN_STRIDE: Final = 16

ParImage = Literal["truncated", "exact"]

_TINY_NORM: Final = 1e-6
"""Gradients of a smaller norm are rounding."""
_NAMES: Final = {
    "decoder.linear_fuse.conv.": "decoder.fuse.",
    "decoder.linear_fuse.bn.": "decoder.norm.",
    "decoder.linear_pred.": "decoder.classify.",
    "attn_proj.": "affinity_head.mix.",
    "classifier.": "classifier.",
}


def our_layout(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights of the published network, or their gradients, to afa's.

    Args:
        tensors: Any of them by their published names.

    Returns:
        The same numbers; joint layers for keys and values become two, and the fusing convolution takes the finest level
        first instead of last.

    Raises:
        AfaError: A name has no counterpart.
    """
    encoder = {name.removeprefix("encoder."): each for name, each in tensors.items() if name.startswith("encoder.")}
    ours = {f"backbone.encoder.{name}": each for name, each in convert_original_keys(encoder).items()}
    for name, each in tensors.items():
        if level := re.fullmatch(r"decoder\.linear_c([1-4])\.proj\.(weight|bias)", name):
            renamed = f"decoder.projections.{int(level[1]) - 1}.{level[2]}"
            ours[renamed] = each[:, :, None, None] if each.ndim == 2 else each
        elif start := next((start for start in _NAMES if name.startswith(start)), None):
            turned = torch.cat(each.chunk(4, 1)[::-1], 1) if start == "decoder.linear_fuse.conv." else each
            ours[_NAMES[start] + name.removeprefix(start)] = turned
        elif not name.startswith("encoder."):
            raise AfaError(f"unmatched key {name!r} among the published weights; record them again")
    return ours


@dataclass(frozen=True)
class Step:
    """What afa computes at a step.

    Attributes:
        losses: Losses and labels.
        gradients: Gradient of the total loss for each weight, 0 where there is none.
    """

    losses: StepLosses
    gradients: dict[str, Tensor]


class Steps:
    """Steps of the recorded network on the recorded batch.

    Args:
        vectors: Recorded weights and inputs.

    Raises:
        AfaError: A key is missing or of another shape.
    """

    def __init__(self, vectors: Vectors) -> None:
        names = vectors.keys_like(WEIGHT, such_as="classifier.weight")
        state = our_layout({name.removeprefix(WEIGHT): vectors[name] for name in names})
        state["decoder.norm.num_batches_tracked"] = torch.tensor(0)
        self.batch = Batch(vectors["image"], vectors["tags"].float(), vectors["box"], ("",) * len(vectors["image"]))
        width = len(vectors[f"{WEIGHT}decoder.linear_fuse.bn.weight"])
        # The published norms have this epsilon; the running statistics of the decoder's do not enter a step.
        encoder = MixTransformer(SIZE, drop_path=0.0, norm_eps=1e-6)
        self.network = AfaNetwork(encoder, self.batch.tags.shape[1], decoder_width=width, decoder_dropout=0.0)
        load_state(self.network, state, vectors.path)
        self.network.train()

    @cache  # noqa: B019
    def at(self, number: int, par_image: ParImage, name: str = "") -> Step:
        """Take a step.

        Args:
            number: Number of the step.
            par_image: `pseudo.par_image`.
            name: What a phase other than that of the step computes.
        """
        config = Config(pseudo=PseudoConfig(par_image=par_image), loss=LossConfig(energy_weight=0))
        kind = phase(config.schedule.refined_steps if name == "initial" else number, config)
        network = self.network
        network.zero_grad()
        losses = compute_losses(
            lambda image, segmentation, affinity: network(image, segmentation=segmentation, affinity=affinity),
            network.score,
            self.batch,
            config=config,
            phase=kind,
        )
        losses.total.backward()  # type: ignore[no-untyped-call]
        weights = network.named_parameters()
        return Step(losses, {key: torch.zeros_like(each) if each.grad is None else each.grad for key, each in weights})

    def loss(self, _: Vectors, *, number: int, par_image: ParImage, name: str) -> Tensor:
        """One loss; afa does not compute those that the first phase weighs with 0, so these are of the second phase."""
        value: Tensor | None = getattr(self.at(number, par_image).losses, name)
        other: Tensor = getattr(self.at(number, par_image, "initial").losses, name) if value is None else value
        return other

    def label(self, _: Vectors, *, number: int, par_image: ParImage, name: str) -> Tensor:
        """One pseudo label, or the affinity label, (B, hw, hw)."""
        labels = self.at(number, par_image).losses.labels
        label = labels.refined_label if name == "refined_label" else labels.initial_label
        assert label is not None
        if name != "affinity_label":
            return label
        height, width = (side // TOKEN_STRIDE for side in self.batch.image.shape[2:])
        return affinity_label(token_label(label, (height, width)), radius=PseudoConfig().affinity_radius)

    def cam(self, _: Vectors) -> Tensor:
        """(B, C, H, W) CAM of all classes."""
        config = PseudoConfig()
        return multi_scale_cam(self.network.score, self.batch.image.float() / 255, scales=config.scales).cam

    def gradient(self, vectors: Vectors, *, key: str, number: int, par_image: ParImage, recorded: bool) -> Tensor:
        """Gradient of a published weight in afa's layout, flat: the recorded one, or afa's."""
        theirs = our_layout({key.split("/grad/")[1]: vectors[key]})
        ours = self.at(number, par_image).gradients
        return torch.cat([(theirs if recorded else ours)[name].flatten() for name in theirs])


def step_checks(vectors: Vectors) -> Iterator[Check]:
    """Compare everything that the file has of the published steps.

    Args:
        vectors: Recorded weights, inputs and outputs.

    Yields:
        The checks, in the order of the file.

    Raises:
        AfaError: A key is missing, or is none that the published step has.
    """
    steps = Steps(vectors)
    vectors.keys_like("published/", such_as="4000/cls_loss")
    for key in vectors.arrays:
        found = re.fullmatch(
            r"(published|exact)/(\d+)/(grad/.+|cam|(cls|seg|aff)_loss|(initial|affinity|refined)_label)", key
        )
        if not found:
            if key.startswith(("published/", "exact/")):
                raise AfaError(f"{vectors.path}: key {key} is unknown; record losses, labels, cam and gradients")
            continue
        name, number = found[3], int(found[2])
        at: dict[str, Any] = {"number": number, "par_image": "truncated" if found[1] == "published" else "exact"}
        if found[4]:
            compute = partial(steps.loss, **at, name=found[4])
            yield Check(key, "loss", 1e-5, compute, "relative")
        elif found[5]:
            check = Check(key, "label", 2, partial(steps.label, **at, name=name), "pixels")
            yield check
            if found[1] == "published" and name != "affinity_label":
                compute = partial(steps.label, **at | {"par_image": "exact"}, name=name)
                yield replace(
                    check, what="label, image not truncated", tolerance=0.1, measure="percent", compute=compute
                )
        elif name == "cam":
            yield Check(key, "CAM, half precision", 2e-3, steps.cam)
        else:
            ours, theirs = (partial(steps.gradient, **at, key=key, recorded=each) for each in (False, True))
            silent = float(vectors[key].norm()) <= _TINY_NORM
            check = Check(key, "gradient", 1e-4, ours, "relative", theirs)
            yield replace(check, what="no gradient", tolerance=_TINY_NORM, measure="difference") if silent else check
