"""A kernel's Python side as an op that torch.compile knows, and as a plain function for all others.

An op made by `torch.library.custom_op` imports torch._dynamo at its first call, with sympy and the
compiler behind it: seconds at the start of a process, and tens of microseconds at every call after.
Neither buys anything where nobody compiles and no gradient is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Op:
    """A launching function; torch knows it as an op, and only a compiler or autograd meets that."""

    def __init__(self, name: str, launch: Callable[..., Any], mutates: Iterable[str]) -> None:
        self.launch = launch
        self.known = torch.library.custom_op(f"sana::{name}", launch, mutates_args=tuple(mutates))
        self.register_fake = self.known.register_fake
        self.register_autograd = self.known.register_autograd

    def __call__(self, *inputs: Any) -> Any:
        if torch.compiler.is_compiling() or asks_gradient(inputs):
            return self.known(*inputs)
        return self.launch(*inputs)


def op(name: str, *, mutates: Iterable[str] = ()) -> Callable[[Callable[..., Any]], Op]:
    """Makes a function of tensors the op sana::`name`, which writes into the inputs `mutates`."""
    return lambda launch: Op(name, launch, mutates)


def asks_gradient(inputs: tuple[Any, ...]) -> bool:
    """Whether autograd has to see what is made of these."""
    if not torch.is_grad_enabled():
        return False
    return any(
        part.requires_grad
        for value in inputs
        for part in (value if isinstance(value, list) else (value,))
        if isinstance(part, Tensor)
    )
