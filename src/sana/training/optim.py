"""AdamW parameter groups, the learning-rate schedule, and averaged weights."""

from __future__ import annotations

import torch
from torch import nn

from sana.training.config import OptimizerConfig


def make_adamw(parameters: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019); matrices and kernels decay, vectors and tables do not."""
    decayed = [p for p in parameters if p.dim() >= 2]
    plain = [p for p in parameters if p.dim() < 2]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def rate_factor(step: int, steps: int, config: OptimizerConfig) -> float:
    """Warm-up, constant, then linear to zero: the factor on `rate` at `step`, in 0..1."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    tail = max(1, round(steps * config.decay))
    return warm * min(1.0, (steps - step) / tail)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


class Average:
    """Exponential moving average of a module's parameters, kept in fp32.

    The decay warms up as min(decay, (1 + n) / (10 + n)), so early weights are forgotten quickly.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.shadow = {n: p.detach().float().clone() for n, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        current = [p.detach().float() for _, p in module.named_parameters()]
        shadow = list(self.shadow.values())
        torch._foreach_lerp_(shadow, current, 1 - decay)
