"""AdamW and Muon, the learning-rate schedule, and averaged weights.

Both optimizers take the rate of the same order: Muon's update is scaled to the size of AdamW's.
Either leaves its weights and its state alone where `found_inf` (a scalar on the device) is 1, so
that the host need not wait to skip a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sana.training.config import OptimizerConfig

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic that pulls singular values towards 1 (Jordan et al. 2024)."""
ROUNDS = 5
UPDATE_SIZE = 0.2
"""Root mean square of Muon's update at rate 1, which is about AdamW's (Liu et al. 2025, eq. 4)."""


def make_optimizers(module: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """One or two optimizers that share the trained parameters of `module` between them.

    "muon" takes the hidden matrices and leaves the rest (vectors, tables, depthwise kernels, first
    and last layers) to AdamW.
    """
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    hidden = [p for n, p in named if config.kind == "muon" and is_hidden_matrix(n, p)]
    taken = {id(p) for p in hidden}
    rest = [p for _, p in named if id(p) not in taken]
    made: list[torch.optim.Optimizer] = [make_adamw(rest, config)] if rest else []
    if hidden:
        made.append(
            Muon(
                hidden,
                rate=config.rate,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
            )
        )
    return made


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether it is a matrix (or dense kernel) of a layer in a stack: `blocks.3.output.weight`.

    Layers outside stacks read the input or write the output, where Muon is known to do worse.
    """
    if parameter.dim() < 2 or min(parameter.shape[:2]) < 2:
        return False
    return any(part.isdigit() for part in name.split("."))


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


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized (Jordan et al. 2024), with decoupled weight decay.

    m = mu m + (1 - mu) g;  u = NewtonSchulz((1 - mu) g + mu m), which has singular values near 1;
    w = (1 - rate decay) w - rate 0.2 sqrt(max(rows, columns)) u. A kernel counts as a matrix of
    (outputs, inputs x taps). Matrices of one shape are handled as one batch.
    """

    def __init__(
        self, parameters: list[nn.Parameter], *, rate: float, momentum: float, weight_decay: float
    ) -> None:
        defaults = {"lr": rate, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(parameters, defaults)
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "the loop computes its own losses"
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(tuple(parameter.shape), []).append(parameter)
            for alike in shapes.values():
                self._step_alike(alike, group)

    def _step_alike(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        states = [self.state[p] for p in parameters]
        for state, parameter in zip(states, parameters, strict=True):
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
        gradient = torch.stack([p.grad for p in parameters if p.grad is not None])
        before = torch.stack([state["momentum"] for state in states])
        after = before.lerp(gradient, 1 - group["momentum"])
        update = orthogonalize(gradient.lerp(after, group["momentum"]).flatten(2))
        rows, columns = update.shape[-2:]
        size = group["lr"] * UPDATE_SIZE * max(rows, columns) ** 0.5
        kept = 1 - group["lr"] * group["weight_decay"]
        weights = torch.stack([p.detach() for p in parameters])
        moved = weights * kept - size * update.to(weights.dtype).reshape(weights.shape)
        if self.found_inf is not None:
            is_bad = self.found_inf.to(weights.device) > 0
            after, moved = torch.where(is_bad, before, after), torch.where(is_bad, weights, moved)
        torch._foreach_copy_([state["momentum"] for state in states], list(after.unbind()))
        torch._foreach_copy_(list(parameters), list(moved.unbind()))


def orthogonalize(matrices: Tensor) -> Tensor:
    """The matrices (K, rows, columns) with all singular values moved to about 0.7..1.2.

    Five rounds of X = a X + (b A + c A^2) X with A = X X^T, in bf16 on a GPU and fp32 on a CPU.
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / x.flatten(1).norm(dim=1).clamp_min(1e-7)[:, None, None]
    x = x.bfloat16() if x.is_cuda else x.float()
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


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
