"""AdamW, and the course of the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

Schedule = Literal["cosine", "inverse_sqrt", "linear", "constant"]
FLOOR = 0.01  # cosine and linear end at this fraction of the peak


def learning_rate_factor(step: int, schedule: Schedule, warmup_steps: int, total_steps: int) -> float:
    """The fraction of the peak rate for update ``step`` (from 0): a linear warm-up, then the schedule."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    if schedule == "inverse_sqrt":
        return math.sqrt(max(warmup_steps, 1) / max(step + 1, warmup_steps, 1))
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return FLOOR + (1 - FLOOR) * shape


def build_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """Fused AdamW; norms and biases, the relative ones too, are not decayed."""
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in parameters if p.dim() >= 2 and "relative_bias" not in name]
    kept = [p for name, p in parameters if p.dim() < 2 or "relative_bias" in name]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
