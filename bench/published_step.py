"""A training step, organized as in the published code: the plain side of `bench/step.py`.

The whole network always runs: every CAM pass goes through the decoder and the affinity head, too, and every block forms
its attention matrix. The six CAM passes (three scales, plain and flipped together) come on top of the training forward,
whose scores at scale 1 are not reused. Labels are made image by image and background score by background score, each
with its own refinement of the classes that `nonzero` finds. Losses are read with `.item()` at every step, and AdamW is
not fused. A Python loop makes the mask of the radius once, outside the step.

This version, too, leaves out what a phase does not use, although the published code computes it.

CAM passes run in training mode, so they move the running statistics of the decoder's BatchNorm. No result of a step
depends on those: the training forward normalizes by the statistics of its batch. With stochastic depth and dropout
at 0, which `PublishedStep` asserts, labels and losses equal those of `afa.training.step.compute_losses`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, SegformerModel

from afa.config import Config
from afa.model.decoder import MlpDecoder
from afa.model.network import AfaNetwork
from afa.training.schedule import Phase, learning_rate_factor
from afa.types import IGNORE_INDEX, Batch, NetworkOutput, normalize_image, truncate_levels
from published_par import PublishedRefinement  # type: ignore[import-not-found]

TOKEN_STRIDE: Final = 16
ATTENTION_NAME: Final = "published"

Stage = Callable[[str], AbstractContextManager[None]]
"""Name of a stage -> context that measures what happens inside it."""


def unmeasured(name: str) -> AbstractContextManager[None]:
    return nullcontext()


def materialized_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float,
    raw_maps: list[Tensor],
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention as two matrix products around a softmax; every block leaves its raw Q K^T in `raw_maps`."""
    raw = query @ key.transpose(-2, -1)
    raw_maps.append(raw)
    weights = (raw * scaling).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(ATTENTION_NAME, materialized_attention)


class PublishedDecoder(nn.Module):
    """SegFormer's decoder as in its paper: project, upsample and concatenate the levels, then fuse.

    Args:
        decoder: Decoder whose weights are copied.
    """

    def __init__(self, decoder: MlpDecoder) -> None:
        super().__init__()
        self.projections = nn.ModuleList()
        for convolution in decoder.projections:
            assert isinstance(convolution, nn.Conv2d)
            assert convolution.bias is not None
            linear = nn.Linear(convolution.in_channels, convolution.out_channels)
            linear.load_state_dict({"weight": convolution.weight[:, :, 0, 0], "bias": convolution.bias})
            self.projections.append(linear)
        self.fuse = copy.deepcopy(decoder.fuse)
        self.norm = nn.BatchNorm2d(decoder.width)
        self.norm.load_state_dict(decoder.norm.state_dict())
        self.dropout = nn.Dropout2d(decoder.dropout.p)
        self.classify = copy.deepcopy(decoder.classify)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Decode a feature pyramid, finest level first, to (B, K, h_0, w_0) logits."""
        size = features[0].shape[2:]
        levels = []
        for projection, feature in zip(self.projections, features, strict=True):
            tokens = projection(feature.flatten(2).transpose(1, 2))
            level = tokens.transpose(1, 2).reshape(len(feature), -1, *feature.shape[2:])
            levels.append(F.interpolate(level, size=size, mode="bilinear", align_corners=False))
        fused = F.relu(self.norm(self.fuse(torch.cat(levels, 1))))
        logits: Tensor = self.classify(self.dropout(fused))
        return logits


class PublishedNetwork(nn.Module):
    """The network with copies of another network's weights; every part runs in every pass.

    Args:
        network: Network whose weights are copied.
    """

    def __init__(self, network: AfaNetwork) -> None:
        super().__init__()
        encoder: Any = network.backbone.encoder
        config = copy.deepcopy(encoder.config)
        config._attn_implementation = ATTENTION_NAME
        assert config.drop_path_rate == network.decoder.dropout.p == 0, "results are compared: nothing may be random"
        assert network.pooling == "gmp"
        assert network.attention_factor == 1
        self.encoder = SegformerModel(config)
        self.encoder.load_state_dict(encoder.state_dict())
        for module, copied in zip(self.encoder.modules(), encoder.modules(), strict=True):
            if isinstance(module, nn.LayerNorm):
                module.eps = copied.eps
        self.num_maps = network.backbone.num_attention_maps
        self.classifier = copy.deepcopy(network.classifier)
        self.decoder = PublishedDecoder(network.decoder)
        self.mix = copy.deepcopy(network.affinity_head.mix)

    def forward(self, image: Tensor) -> NetworkOutput:
        """Run everything on (B, 3, H, W) normalized images."""
        raw_maps: list[Tensor] = []
        features: list[Tensor] = []
        hidden = image
        for stage in self.encoder.stages:
            hidden = stage(hidden, raw_maps=raw_maps)
            features.append(hidden)
        seg_logits = self.decoder(features)
        last_blocks = self.num_maps // raw_maps[-1].shape[1]
        maps = torch.cat(raw_maps[-last_blocks:], 1)
        affinity = torch.sigmoid(self.mix(maps + maps.transpose(2, 3)))[:, 0]
        pooled = F.adaptive_max_pool2d(features[-1], 1)
        return NetworkOutput(
            image_logits=self.classifier(pooled).flatten(1),
            class_scores=F.conv2d(features[-1], self.classifier.weight).detach(),
            seg_logits=seg_logits,
            affinity=affinity,
        )


@dataclass(frozen=True)
class PublishedLosses:
    """Total to differentiate, the losses of the phase by name, and the labels that the step learned from."""

    total: Tensor
    values: dict[str, Tensor]
    initial_label: Tensor | None
    refined_label: Tensor | None


class PublishedStep:
    """A network, its optimizer and one training step.

    Args:
        network: Network whose weights are copied.
        config: Settings; the `paper` preset's but for sizes.
        device: Where to train.
    """

    def __init__(self, network: AfaNetwork, config: Config, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.network = PublishedNetwork(network).to(device).train()
        self.optimizer = self._build_optimizer()
        self.refinement = PublishedRefinement(config.pseudo.dilations, iterations=config.pseudo.iterations).to(device)
        crop, radius = config.augment.crop_size, config.pseudo.affinity_radius
        largest = int(crop * max(config.pseudo.scales))
        self.label_mask = radius_mask(crop // TOKEN_STRIDE, radius).to(device)
        self.walk_mask = radius_mask(largest // TOKEN_STRIDE, radius).to(device)
        self.logged: dict[str, float] = {}

    def __call__(self, batch: Batch, phase: Phase, step: int, stage: Stage = unmeasured) -> None:
        """Learn from a batch."""
        factor = learning_rate_factor(step, self.config.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        losses = self.losses(batch, phase, stage)
        with stage("losses"):
            self.logged = {name: value.item() for name, value in losses.values.items()}
        self.optimizer.zero_grad()
        with stage("backward"):
            losses.total.backward()  # type: ignore[no-untyped-call]
        with stage("optimizer"):
            self.optimizer.step()

    def losses(self, batch: Batch, phase: Phase, stage: Stage = unmeasured) -> PublishedLosses:
        """Pseudo labels, then the training forward and its losses."""
        boxes = batch.valid_box.tolist()
        batch = batch.to(self.device)
        image = batch.image.float() / 255
        normalized = normalize_image(image)
        if self.config.pseudo.par_image == "truncated":
            image = truncate_levels(image)
        initial = refined = None
        if phase.want_initial or phase.want_refined:
            with torch.no_grad():
                with stage("CAM passes"):
                    cam, affinity = self._cam(normalized)
                with stage("labels and walk"):
                    initial = self._initial_label(image, cam, batch.tags, boxes, stage)
                    if phase.want_refined:
                        refined = self._refined_label(image, cam, affinity, batch.tags, boxes, stage)
        with stage("training forward"):
            output = self.network(normalized)
        with stage("losses"):
            values = {"cls": F.multilabel_soft_margin_loss(output.image_logits, batch.tags)}
            target = refined if phase.want_refined else initial
            if phase.segmentation:
                assert target is not None
                values["seg"] = self._segmentation_loss(output.seg_logits, target)
            if phase.affinity:
                assert initial is not None
                values["aff"] = self._affinity_loss(output.affinity, initial)
            weights = {
                "cls": 1.0,
                "seg": self.config.loss.segmentation_weight,
                "aff": self.config.loss.affinity_weight,
            }
            total = torch.stack([weights[name] * value for name, value in values.items()]).sum()
        return PublishedLosses(total, {name: value.detach() for name, value in values.items()}, initial, refined)

    def _build_optimizer(self) -> torch.optim.AdamW:
        """Three groups; the encoder's norms have gradients and learning rate 0."""
        schedule = self.config.schedule
        encoder, norms, heads = [], [], []
        for name, parameter in self.network.named_parameters():
            if not name.startswith("encoder."):
                heads.append(parameter)
            elif "norm" in name:
                norms.append(parameter)
            else:
                encoder.append(parameter)
        base, decay = schedule.learning_rate, schedule.weight_decay
        groups = [
            {"params": encoder, "base_lr": base, "weight_decay": decay},
            {"params": norms, "base_lr": 0.0, "weight_decay": 0.0},
            {"params": heads, "base_lr": base * schedule.head_lr_factor, "weight_decay": decay},
        ]
        return torch.optim.AdamW(groups, lr=base, betas=schedule.betas, fused=False)

    def _cam(self, normalized: Tensor) -> tuple[Tensor, Tensor]:
        """CAM (B, C, H, W) over all scales and flips, and the affinity (B, hw, hw) at the largest."""
        batch, size = len(normalized), normalized.shape[2:]
        scales = self.config.pseudo.scales
        maps, affinities = [], []
        for scale in scales:
            view = normalized
            if scale != 1:
                scaled = (int(size[0] * scale), int(size[1] * scale))
                view = F.interpolate(normalized, size=scaled, mode="bilinear", align_corners=False)
            output = self.network(torch.cat([view, view.flip(3)]))
            scores = F.interpolate(output.class_scores, size=size, mode="bilinear", align_corners=False)
            maps.append(F.relu(torch.maximum(scores[:batch], scores[batch:].flip(3))))
            affinities.append(output.affinity[:batch])
        cam = torch.stack(maps).sum(0)
        cam = cam + F.adaptive_max_pool2d(-cam, 1)
        cam = cam / (F.adaptive_max_pool2d(cam, 1) + 1e-5)
        return cam, affinities[scales.index(max(scales))]

    def _initial_label(self, image: Tensor, cam: Tensor, tags: Tensor, boxes: list[list[int]], stage: Stage) -> Tensor:
        """CAM and a constant background, at half size, through one refinement an image and background score."""
        size = image.shape[2:]
        half = (size[0] // 2, size[1] // 2)
        small_image = F.interpolate(image, size=half, mode="bilinear", align_corners=False)
        pseudo = self.config.pseudo
        labels = []
        for background in (pseudo.background_low, pseudo.background_high):
            scores = torch.cat([torch.full_like(cam[:, :1], background), cam], 1)
            scores = F.interpolate(scores, size=half, mode="bilinear", align_corners=False)
            label = torch.full((len(image), *size), IGNORE_INDEX, dtype=torch.int64, device=image.device)
            for i in range(len(image)):
                classes = present_classes(tags[i])
                competing = scores[i : i + 1, classes].softmax(1)
                with stage("PAR"):
                    refined = self.refinement(small_image[i : i + 1], competing)
                refined = F.interpolate(refined, size=size, mode="bilinear", align_corners=False)
                top, bottom, left, right = boxes[i]
                label[i, top:bottom, left:right] = classes[refined.argmax(1)[0]][top:bottom, left:right]
            labels.append(label)
        return merge(*labels)

    def _refined_label(
        self, image: Tensor, cam: Tensor, affinity: Tensor, tags: Tensor, boxes: list[list[int]], stage: Stage
    ) -> Tensor:
        """CAM through the walk, then a refinement inside each image's box for each background score."""
        pseudo = self.config.pseudo
        side = int(affinity.shape[1] ** 0.5)
        small_cam = F.interpolate(cam, size=(side, side), mode="bilinear", align_corners=False)
        labels = []
        for background in (pseudo.background_low, pseudo.background_high):
            walked = self._walk(small_cam, affinity, tags, background)
            walked = F.interpolate(walked, size=image.shape[2:], mode="bilinear", align_corners=False)
            label = torch.full((len(image), *image.shape[2:]), IGNORE_INDEX, dtype=torch.int64, device=image.device)
            for i in range(len(image)):
                classes = present_classes(tags[i])
                top, bottom, left, right = boxes[i]
                size = (bottom - top, right - left)
                crop = image[i : i + 1, :, top:bottom, left:right]
                half = (size[0] // 2, size[1] // 2)
                small_crop = F.interpolate(crop, size=half, mode="bilinear", align_corners=False)
                inside = walked[i : i + 1, classes, top:bottom, left:right]
                with stage("PAR"):
                    refined = self.refinement(small_crop, inside)
                refined = F.interpolate(refined, size=size, mode="bilinear", align_corners=False)
                label[i, top:bottom, left:right] = classes[refined.argmax(1)[0]]
            labels.append(label)
        return merge(*labels)

    def _walk(self, cam: Tensor, affinity: Tensor, tags: Tensor, background: float) -> Tensor:
        """(B, K, h, w) scores after one step; absent classes 0."""
        pseudo = self.config.pseudo
        scores = torch.cat([torch.full_like(cam[:, :1], background), cam], 1)
        near = affinity.masked_fill(self.walk_mask == 0, 0) ** pseudo.affinity_power
        walk = near / (near.sum(1, keepdim=True) + pseudo.walk_epsilon)
        walked = torch.zeros_like(scores)
        for i in range(len(cam)):
            classes = present_classes(tags[i])
            competing = scores[i, classes].softmax(0).flatten(1)
            walked[i, classes] = (competing @ walk[i]).view(len(classes), *cam.shape[2:])
        return walked

    def _segmentation_loss(self, logits: Tensor | None, target: Tensor) -> Tensor:
        assert logits is not None
        full = F.interpolate(logits, size=target.shape[1:], mode="bilinear", align_corners=False)
        background, foreground = target.clone(), target.clone()
        background[target != 0] = IGNORE_INDEX
        foreground[target == 0] = IGNORE_INDEX
        halves = [
            # The published mean over an empty set is NaN; here it is 0.
            F.cross_entropy(full, part, ignore_index=IGNORE_INDEX, reduction="sum")
            / (part != IGNORE_INDEX).sum().clamp(min=1)
            for part in (background, foreground)
        ]
        return 0.5 * halves[0] + 0.5 * halves[1]

    def _affinity_loss(self, affinity: Tensor | None, label: Tensor) -> Tensor:
        assert affinity is not None
        side = int(affinity.shape[1] ** 0.5)
        tokens = F.interpolate(label[:, None].float(), size=(side, side), mode="nearest").flatten(1)
        pairs = []
        for one in tokens:
            pair = (one[:, None] == one[None, :]).float()
            pair[self.label_mask == 0] = IGNORE_INDEX
            pair[one == IGNORE_INDEX, :] = IGNORE_INDEX
            pair[:, one == IGNORE_INDEX] = IGNORE_INDEX
            pairs.append(pair)
        known = torch.stack(pairs)
        same, different = (known == 1).float(), (known == 0).float()
        same_loss = (same * (1 - affinity)).sum() / (same.sum() + 1)
        different_loss = (different * affinity).sum() / (different.sum() + 1)
        return 0.5 * same_loss + 0.5 * different_loss


def present_classes(tags: Tensor) -> Tensor:
    """Class indices of the background and of an image's tags (C,)."""
    return torch.cat([torch.ones_like(tags[:1]), tags]).nonzero()[:, 0]


def merge(low: Tensor, high: Tensor) -> Tensor:
    """The cautious label where it is foreground, background where both labels are background, else 255."""
    label = high.clone()
    label[high == 0] = IGNORE_INDEX
    label[(low + high) == 0] = 0
    return label


def radius_mask(side: int, radius: int) -> Tensor:
    """(side^2, side^2), 1 where two tokens of a square grid lie within the radius."""
    mask = torch.zeros(side * side, side * side)
    for row in range(side):
        for column in range(side):
            for other_row in range(max(0, row - radius), min(side, row + radius + 1)):
                for other_column in range(max(0, column - radius), min(side, column + radius + 1)):
                    mask[row * side + column, other_row * side + other_column] = 1
    return mask
