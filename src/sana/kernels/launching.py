"""A kernel's Python side as an op that torch.compile knows, and as a plain function for all others.

An op made by `torch.library.custom_op` imports torch._dynamo at its first call, with sympy and the
compiler behind it: seconds at the start of a process, and tens of microseconds at every call after.
Neither buys anything where nobody compiles and no gradient is asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

Differentiate: TypeAlias = Callable[..., Any]
"""(ctx, gradients of the results) -> those of the inputs, one for each, a list for a list."""


class Op:
    """A launching function; torch knows it as an op, and only a compiler meets that."""

    def __init__(self, name: str, launch: Callable[..., Any], mutates: Iterable[str]) -> None:
        self.launch = launch
        self.known = torch.library.custom_op(f"sana::{name}", launch, mutates_args=tuple(mutates))
        self.register_fake = self.known.register_fake
        self.keep: Callable[..., None] | None = None
        self.differentiate: Differentiate | None = None

    def register_autograd(
        self, differentiate: Differentiate, *, setup_context: Callable[..., None] | None = None
    ) -> None:
        """As `torch.library.register_autograd`."""
        self.known.register_autograd(differentiate, setup_context=setup_context)
        self.keep, self.differentiate = setup_context, differentiate

    def __call__(self, *inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.known(*inputs)
        if not asks_gradient(inputs):
            return self.launch(*inputs)
        if self.keep is None:
            return self.known(*inputs)
        counts = [len(value) if isinstance(value, list) else -1 for value in inputs]
        return _Direct.apply(self, counts, *_flat(inputs))  # type: ignore[no-untyped-call]

    def behind(self, ctx: Any) -> Callable[..., Any]:
        """How the gradient of another op calls this one: as that was called itself."""
        return self.launch if getattr(ctx, "is_direct", False) else self.known


class _Direct(torch.autograd.Function):
    """An op's function and gradient without the op, whose way through torch takes longer."""

    @staticmethod
    def forward(ctx: Any, op: Op, counts: list[int], *flat: Any) -> Any:
        assert op.keep is not None
        ctx.op, ctx.is_direct = op, True
        rest = iter(flat)
        inputs = [
            next(rest) if count < 0 else list(itertools.islice(rest, count)) for count in counts
        ]
        output = op.launch(*inputs)
        op.keep(ctx, tuple(inputs), output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None, None, *_flat(ctx.op.differentiate(ctx, *gradients))


def op(name: str, *, mutates: Iterable[str] = ()) -> Callable[[Callable[..., Any]], Op]:
    """Makes a function of tensors the op sana::`name`, which writes into the inputs `mutates`."""
    return lambda launch: Op(name, launch, mutates)


def asks_gradient(inputs: tuple[Any, ...]) -> bool:
    """Whether autograd has to see what is made of these, tensors in lists among them."""
    if not torch.is_grad_enabled():
        return False
    return any(isinstance(part, Tensor) and part.requires_grad for part in _flat(inputs))


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """The values, and what is in those that are lists."""
    for value in values:
        if isinstance(value, list):
            yield from value
        else:
            yield value
