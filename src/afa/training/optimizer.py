"""AdamW with the method's parameter groups (paper section 4.1)."""

from __future__ import annotations

import torch
from torch import nn

from afa.config import ScheduleConfig
from afa.model.network import AfaNetwork
from afa.training.schedule import learning_rate_factor


def build_optimizer(network: AfaNetwork, schedule: ScheduleConfig) -> torch.optim.AdamW:
    """Group the parameters and build the optimizer, AdamW whose groups carry their full rate as `base_lr`.

    Encoder layers get the base learning rate, everything else `head_lr_factor` times as much. The encoder's norm
    layers never decay, and with `freeze_norms` they stop asking for gradients: that is what learning rate 0 means.
    """
    norms = network.backbone.norm_parameters()
    for parameter in norms:
        parameter.requires_grad_(not schedule.freeze_norms)
    norm_ids = {id(parameter) for parameter in norms}
    encoder = [p for p in network.backbone.parameters() if id(p) not in norm_ids and p.requires_grad]
    encoder_ids = {id(parameter) for parameter in network.backbone.parameters()}
    heads = [parameter for parameter in network.parameters() if id(parameter) not in encoder_ids]
    base, decay = schedule.learning_rate, schedule.weight_decay
    groups = [
        {"params": encoder, "base_lr": base, "weight_decay": decay},
        {"params": heads, "base_lr": base * schedule.head_lr_factor, "weight_decay": decay},
    ]
    if not schedule.freeze_norms:
        groups.append({"params": norms, "base_lr": base, "weight_decay": 0.0})
    groups = [group for group in groups if group["params"]]
    on_gpu = next(network.parameters()).device.type == "cuda"
    for group in groups:
        group["lr"] = torch.tensor(group["base_lr"])
    return torch.optim.AdamW(groups, betas=schedule.betas, fused=True, capturable=on_gpu)


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, schedule: ScheduleConfig) -> None:
    """Set each group's learning rate to that of a step.

    The rate is a tensor beside the group's weights and is written in place: a recorded step reads the new value.
    """
    factor = learning_rate_factor(step, schedule)
    for group in optimizer.param_groups:
        device = group["params"][0].device
        if group["lr"].device != device:
            group["lr"] = group["lr"].to(device)
        group["lr"].fill_(group["base_lr"] * factor)


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """All parameters that the optimizer moves."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
