"""AdamW with the method's parameter groups (method.md section 7)."""

from __future__ import annotations

import torch
from torch import nn

from afa.config import ScheduleConfig
from afa.model.network import AfaNetwork
from afa.training.schedule import learning_rate_factor


def build_optimizer(network: AfaNetwork, schedule: ScheduleConfig) -> torch.optim.AdamW:
    """Group the parameters and build the optimizer.

    Encoder layers get the base learning rate, everything else `head_lr_factor` times as much. The encoder's norm
    layers never decay, and with `freeze_norms` they stop asking for gradients: that is what learning rate 0 means.

    Args:
        network: Network; the flag `requires_grad` of its encoder's norm layers is set.
        schedule: Settings.

    Returns:
        AdamW whose groups carry their full rate as `base_lr`.
    """
    norms = network.backbone.norm_parameters()
    for parameter in norms:
        parameter.requires_grad_(not schedule.freeze_norms)
    norm_ids = {id(parameter) for parameter in norms}
    encoder = [parameter for parameter in network.backbone.parameters() if id(parameter) not in norm_ids]
    encoder_ids = {id(parameter) for parameter in network.backbone.parameters()}
    heads = [parameter for parameter in network.parameters() if id(parameter) not in encoder_ids]
    base, decay = schedule.learning_rate, schedule.weight_decay
    groups = [
        {"params": encoder, "base_lr": base, "weight_decay": decay},
        {"params": heads, "base_lr": base * schedule.head_lr_factor, "weight_decay": decay},
    ]
    if not schedule.freeze_norms:
        groups.append({"params": norms, "base_lr": base, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=base, betas=schedule.betas)


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, schedule: ScheduleConfig) -> None:
    """Set each group's learning rate to that of a step."""
    factor = learning_rate_factor(step, schedule)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """All parameters that the optimizer moves."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
