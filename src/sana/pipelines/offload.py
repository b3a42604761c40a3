"""Does what a memory plan says: networks come to the device for their phase and leave after it.

Weights never change while drawing, so leaving costs nothing: every network that moves keeps one
copy on the host, and its parameters point there again. What comes next is copied on a stream of its
own while the device still works. Streaming keeps two blocks on the
device: one that runs and one that arrives. Only storage moves: results are the same, bit for bit.
Start reading at `Offload.enter`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sana.pipelines.memory import NEEDED, MemoryPlan, Part, Phase
from sana.pipelines.moving import Movable, Unit, tensors_of

CHUNK = 2**29
LARGE_TABLE = 2**24
"""Values from which on an embedding stays on the host while its network streams."""


class Offload:
    """The networks of one pipeline, each where the plan wants it in the phase that is on."""

    def __init__(self, networks: Mapping[Part, nn.Module], device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.plan = MemoryPlan()
        self._networks = dict(networks)
        self._seats: dict[Part, Seat | Stream] = {}
        self._side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def follow(self, plan: MemoryPlan) -> None:
        """Go by `plan` from the next `enter` on."""
        changed = [p for p in self._seats if getattr(plan, p) != getattr(self.plan, p)]
        if changed and self._side is not None:
            self._side.synchronize()  # a copy may still read the host memory that goes now
        for part in changed:
            self._seats.pop(part).leave()
        self.plan = plan

    def enter(self, phase: Phase) -> None:
        """Bring the networks of `phase` to the device, after those that must leave have left.

        Costs nothing if they are there, so it may be called before every use.
        """
        present = self.plan.present(phase)
        seats = {part: self._seat(part) for part in self._networks}
        for part, seat in seats.items():
            if part not in present:
                seat.leave()
        for part in sorted(seats, key=lambda part: part != NEEDED[phase]):
            if part in present:
                seats[part].begin()
        if NEEDED[phase] in seats:
            seats[NEEDED[phase]].arrive()

    def rest(self) -> None:
        """Everything that moves goes to the host; what stays, stays."""
        for seat in self._seats.values():
            seat.leave()

    def _seat(self, part: Part) -> Seat | Stream:
        if part not in self._seats:
            network, placement = self._networks[part], getattr(self.plan, part)
            if placement == "stays":
                network.to(self.device)
                self._seats[part] = Seat([])
            elif placement == "visits":
                chunks = _chunks(tensors_of(network))
                self._seats[part] = Seat([Unit(chunk, self.device, self._side) for chunk in chunks])
            else:
                self._seats[part] = Stream(network, self.device, self._side)
        return self._seats[part]


class Seat:
    """A network that comes and goes as a whole, in a few large pieces; one that stays has none."""

    def __init__(self, units: list[Unit]) -> None:
        self._units = units

    def begin(self) -> None:
        """Start to come, if not here."""
        for unit in self._units:
            unit.fetch()

    def arrive(self) -> None:
        """Be here for all work from now on."""
        for unit in self._units:
            unit.use()

    def leave(self) -> None:
        """Be on the host, taking nothing of the device."""
        for unit in self._units:
            unit.drop()


class Stream:
    """A network whose blocks pass through the device two at a time, and whose large tables stay.

    Blocks are the modules of its longest ModuleList. Any order of running them is right; in turn is
    fast.
    """

    def __init__(
        self, network: nn.Module, device: torch.device, side: torch.cuda.Stream | None
    ) -> None:
        self._modules = list(longest_list(network))
        tables = [
            module
            for module in network.modules()
            if isinstance(module, nn.Embedding) and module.weight.numel() >= LARGE_TABLE
        ]
        apart = {
            id(tensor) for module in (*self._modules, *tables) for _, tensor in tensors_of(module)
        }
        rest = [entry for entry in tensors_of(network) if id(entry[1]) not in apart]
        self._rest = Seat([Unit(rest, device, side)])
        self._blocks = [
            Unit(tensors_of(module), device, side, comes_often=True) for module in self._modules
        ]
        self._tables = [Table(table, device) for table in tables]
        self._device = device
        self._slots: list[Tensor] = []
        self._holders: list[int | None] = [None, None]
        self._hooks: list[Any] = []

    def begin(self) -> None:
        """Fetch what is outside the blocks, and the first block."""
        self._rest.begin()
        if self._slots:
            return
        size = max(unit.size for unit in self._blocks)
        with torch.inference_mode(False):
            both = torch.empty((2, size), dtype=torch.uint8, device=self._device)
            self._slots = list(both)
        for index, module in enumerate(self._modules):
            self._hooks.append(module.register_forward_pre_hook(self._before(index)))
            self._hooks.append(module.register_forward_hook(self._after(index)))
        for table in self._tables:
            table.begin()
        self._fetch(0)

    def arrive(self) -> None:
        """Have what is outside the blocks here."""
        self._rest.arrive()

    def leave(self) -> None:
        """Be on the host, hooks removed."""
        self._rest.leave()
        for unit in self._blocks:
            unit.drop()
        for table in self._tables:
            table.leave()
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._slots, self._holders = [], [], [None, None]

    def _fetch(self, index: int) -> None:
        """Into its slot; whoever is there still, after a run that was broken off, is sent away."""
        slot = index % 2
        holder = self._holders[slot]
        if holder is not None and holder != index:
            self._blocks[holder].drop()
        self._holders[slot] = index
        self._blocks[index].fetch(self._slots[slot])

    def _before(self, index: int) -> Callable[..., None]:
        following = (index + 1) % len(self._blocks)

        def arrive(module: nn.Module, _inputs: object) -> None:
            self._fetch(index)
            self._blocks[index].use()
            self._bring_strangers(module)
            if following % 2 != index % 2:
                self._fetch(following)

        return arrive

    def _bring_strangers(self, module: nn.Module) -> None:
        """What was added to a block later, such as a LoRA, comes once and stays."""
        for parameter in module.parameters():
            if parameter.device != self._slots[0].device:
                with torch.inference_mode(False), torch.no_grad():
                    parameter.data = parameter.data.to(self._device)

    def _after(self, index: int) -> Callable[..., Any]:
        def leave(_module: nn.Module, _inputs: object, output: Any) -> Any:
            own = kept(output, self._slots[index % 2])
            self._blocks[index].drop()
            return own

        return leave


class Table:
    """An embedding whose rows are looked up on the host and only those wanted are sent."""

    def __init__(self, module: nn.Embedding, device: torch.device) -> None:
        self._module = module
        self._device = device
        with torch.inference_mode(False), torch.no_grad():
            self._host = module.weight.detach().cpu()
            self._nothing = torch.empty(
                (0, self._host.shape[1]), dtype=self._host.dtype, device=device
            )
        self._hooks: list[Any] = []
        self._point(self._host)

    def begin(self) -> None:
        """Answer look-ups; between them the weight is an empty tensor on the device."""
        self._point(self._nothing)
        self._hooks = [
            self._module.register_forward_pre_hook(self._gather),
            self._module.register_forward_hook(self._forget),
        ]

    def leave(self) -> None:
        """Point to the host again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._point(self._host)

    def _gather(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with torch.inference_mode(False), torch.no_grad():
            rows, places = torch.unique(inputs[0].clone(), return_inverse=True)
            self._point(self._host[rows.cpu()].to(self._device))
        return (places, *inputs[1:])

    def _forget(self, _module: nn.Module, _inputs: object, _output: object) -> None:
        self._point(self._nothing)

    def _point(self, weight: Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._module.weight.data = weight


def kept(output: Any, slot: Tensor) -> Any:
    """A block's result without views of the slots, where others come, as of `Open`'s gate."""
    if isinstance(output, Tensor):
        start, here = (x.untyped_storage().data_ptr() for x in (output, slot))
        return output.clone() if start == here else output
    if not isinstance(output, tuple):
        return output
    parts = [kept(part, slot) for part in output]
    return type(output)(*parts) if hasattr(output, "_fields") else tuple(parts)


def longest_list(network: nn.Module) -> nn.ModuleList:
    """The longest ModuleList inside, which holds a transformer's blocks."""
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    assert lists, "only a network of blocks streams"
    return max(lists, key=len)


def _chunks(tensors: list[Movable]) -> list[list[Movable]]:
    """In their order, in pieces of about `CHUNK` bytes, so that host memory is never held twice."""
    chunks: list[list[Movable]] = [[]]
    size = 0
    for entry in tensors:
        if chunks[-1] and size + entry[1].nbytes > CHUNK:
            chunks.append([])
            size = 0
        chunks[-1].append(entry)
        size += entry[1].nbytes
    return chunks
