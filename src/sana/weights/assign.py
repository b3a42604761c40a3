"""Putting tensors into networks, strictly: every one, with its shape, and no other.

A network is built without memory, checked against what the files hold by name and shape, and only
then filled, each tensor read into the memory it stays in. Start reading at `fill`.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from sana.errors import CheckpointError
from sana.kernels.reference import FP8
from sana.models.rounding import Dtype, both, narrow, narrow_names, scaled_weight
from sana.weights.keys import Layout, NetworkConfig, from_ours, kind_of, rename, surplus
from sana.weights.tensors import PIECE, Stored, blank, read_into

Network = TypeVar("Network", bound=nn.Module)
SHOWN = 10
READERS = 4
# torch goes through its hooks without a lock, so that one thread must not add any meanwhile.
_building = threading.RLock()
# A numbered block, in any layout.
MODULE = re.compile(r"[a-z_.]*?\.\d+(?=\.)")


def fill(
    make: Callable[[], Network],
    stored: Mapping[str, Stored],
    source: str,
    *,
    names: tuple[Layout, NetworkConfig] | None = None,
    device: str | torch.device = "cpu",
    dtype: Dtype = torch.float32,
) -> Network:
    """A network in eval mode with the tensors of a file, cast to `dtype`, on `device`.

    `names` says in which layout the file has a network of which config, where the names are not
    ours; errors use the file's own. Memory is needed for the network and little more.
    """
    with meta_parameters():
        module = make()
    expected = module.state_dict()
    _require_stored(expected, stored, names, source)
    wide, products = both(dtype)
    narrow_ones = narrow_names(module, products)

    def read(mine: list[str]) -> dict[str, Tensor]:
        buffer = torch.empty(PIECE, dtype=torch.uint8)
        tensors = {}
        for name in mine:
            like = expected[name]
            parts = rename(name, *names).theirs if names is not None else (name,)
            is_scaled = products == FP8 and name in narrow_ones
            kept = products if name in narrow_ones and not is_scaled else wide
            kept = kept if like.is_floating_point() else like.dtype
            tensors[name] = torch.empty(like.shape, dtype=kept, device=device)
            # Parts follow one another along the first dimension, so also in memory.
            flat = tensors[name].reshape(-1)
            for part, piece in zip(parts, flat.chunk(len(parts)), strict=True):
                read_into(stored[part], piece, buffer)
            if is_scaled:
                beside = f"{name.removesuffix('weight')}scale"
                tensors[name], tensors[beside] = scaled_weight(tensors[name])
        return tensors

    order = list(expected)
    tensors: dict[str, Tensor] = {}
    with ThreadPoolExecutor(READERS) as pool:
        for part in pool.map(read, [order[first::READERS] for first in range(READERS)]):
            tensors.update(part)
    if products == FP8:
        # A product's results have the dtype that its layer had before.
        narrow(module.to(wide), FP8)
    assign(module, tensors, source)
    return module.to(device).eval()


def _require_stored(
    expected: Mapping[str, Tensor],
    stored: Mapping[str, Stored],
    names: tuple[Layout, NetworkConfig] | None,
    source: str,
) -> None:
    """`require_fit` of what is stored, under its own names."""
    dropped: set[str] = set()
    theirs: Mapping[str, Tensor] = expected
    if names is not None:
        theirs = from_ours(expected, *names)
        dropped = surplus(stored, names[0], kind_of(names[1])) - theirs.keys()
    given = {name: tensor for name, tensor in blank(stored).items() if name not in dropped}
    require_fit(theirs, given, source)


def require_fit(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    """CheckpointError unless both have the same names and shapes."""
    _raise_misfits(
        source,
        missing=[name for name in expected if name not in given],
        extra=[name for name in given if name not in expected],
        misshapen=[
            f"{name} {tuple(given[name].shape)} for {tuple(value.shape)}"
            for name, value in expected.items()
            if name in given and given[name].shape != value.shape
        ],
    )


def assign(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Put `tensors` into `module`, all of them and nothing else; `source` names them in errors.

    A network on the meta device takes over the tensors as they are, dtype and device included; one
    that has memory is overwritten in place, so that its optimizer keeps its parameters. Raises
    `CheckpointError` listing missing, unexpected and misshapen keys, by module where many.
    """
    require_fit(module.state_dict(), tensors, source)
    takes_over = any(parameter.is_meta for parameter in module.parameters())
    module.load_state_dict(dict(tensors), strict=True, assign=takes_over)


@contextmanager
def meta_parameters() -> Iterator[None]:
    """Networks built inside have parameters without memory, while buffers keep their values.

    Plain `torch.device("meta")` would also lose tables and statistics that no file holds.
    """
    with _building:
        yield from _registered(threading.get_ident())


def _registered(thread: int) -> Iterator[None]:
    def replace(_module: nn.Module, _name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if threading.get_ident() != thread:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    register: Any = register_module_parameter_registration_hook  # typed as if it returned nothing
    hook = register(replace)
    try:
        with _NormalSkipsMeta():
            yield
    finally:
        hook.remove()


class _NormalSkipsMeta(TorchFunctionMode):
    """Leaves out `nn.init.normal_` on the meta device, where torch imports its compiler for it.

    That import takes seconds, and there is nothing to fill. Holds for one thread, as the hook does.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is nn.init.normal_ and kwargs["tensor"].is_meta:
            return kwargs["tensor"]
        return func(*args, **kwargs)


def _raise_misfits(
    source: str, *, missing: list[str], extra: list[str], misshapen: list[str]
) -> None:
    groups = {"missing": missing, "unexpected": extra, "misshapen": misshapen}
    parts = [f"{len(keys)} {kind}: {_grouped(keys)}" for kind, keys in groups.items() if keys]
    if parts:
        raise CheckpointError(
            f"{source} does not fit the network: {'; '.join(parts)}. Every tensor must be there "
            "with its shape and no other; use weights saved for this config"
        )


def _grouped(keys: list[str]) -> str:
    """All of a few keys; of many, each module with its number of keys and the first of them."""
    if len(keys) <= SHOWN:
        return ", ".join(keys)
    modules: dict[str, list[str]] = {}
    for key in keys:
        module = MODULE.match(key)
        modules.setdefault(module[0] if module else key.split(".")[0], []).append(key)
    listed = [
        f"{module} ({len(inside)}, first {inside[0]})" if len(inside) > 1 else inside[0]
        for module, inside in modules.items()
    ]
    more = f" and {len(listed) - SHOWN} more modules" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more
