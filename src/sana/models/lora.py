"""LoRA (arXiv 2106.09685) on a Linear DiT, through peft: y = W x + s B A x at linear layers.

The network that is given is never changed: the adapted one is a copy of its modules that shares
its weights, made for one request. Adapters come from `sana.weights.lora`, with our module names.
Start reading at `adapted`.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sana.errors import CheckpointError, MissingExtra

if TYPE_CHECKING:
    from sana.models.dit import LinearDiT


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """One LoRA: for each linear layer, by our name, A [r, in] and B [out, r], alpha / r in B."""

    source: str
    layers: Mapping[str, tuple[Tensor, Tensor]]


def adapted(dit: LinearDiT, adapters: Sequence[Adapter], scales: Sequence[float]) -> LinearDiT:
    """A network with the weights of `dit` and the adapters beside them, each times its scale.

    Raises `CheckpointError` if an adapter was made for other widths.
    """
    peft = _peft()
    needs_gradient = next(dit.parameters()).requires_grad
    network = _sharing(dit)
    names = [f"lora{index}" for index in range(len(adapters))]
    for name, adapter, scale in zip(names, adapters, scales, strict=True):
        check_fit(dit, adapter)
        ranks = {f"^{re.escape(layer)}": len(a) for layer, (a, _) in adapter.layers.items()}
        config = peft.LoraConfig(
            target_modules="|".join(map(re.escape, adapter.layers)),
            rank_pattern=ranks,
            alpha_pattern={layer: scale * rank for layer, rank in ranks.items()},
            init_lora_weights=False,
        )
        with warnings.catch_warnings():
            # Several adapters are what is meant.
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            peft.inject_adapter_in_model(config, network, adapter_name=name, low_cpu_mem_usage=True)
        for layer, pair in adapter.layers.items():
            _fill(network.get_submodule(layer), name, pair)
    for module in network.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_adapter([name for name in names if name in module.lora_A])
    # torch takes another path, with other last bits, for weights that need no gradient.
    return network.eval().requires_grad_(needs_gradient)


def check_fit(dit: LinearDiT, adapter: Adapter) -> None:
    """`CheckpointError` that says both widths, unless every layer of the adapter fits."""
    for layer, (a, b) in adapter.layers.items():
        weight = dit.get_submodule(layer).weight
        assert isinstance(weight, Tensor)
        got, wanted = (b.shape[0], a.shape[1]), tuple(weight.shape)
        if got != wanted:
            raise CheckpointError(
                f"{adapter.source} was made for another model: its {layer} is {got[1]} wide in and "
                f"{got[0]} out, and this one's {wanted[1]} and {wanted[0]} (width "
                f"{dit.config.width}); use a LoRA trained on this model"
            )


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise MissingExtra("peft is not installed; pip install 'sana-torch[lora]'") from None
    return peft


def _sharing(dit: LinearDiT) -> LinearDiT:
    """The same modules anew around the same parameters, so that they move together (offload)."""
    tensors = (*dit.parameters(), *dit.buffers())
    return copy.deepcopy(dit, {id(tensor): tensor for tensor in tensors})


def _fill(module: Any, name: str, pair: tuple[Tensor, Tensor]) -> None:
    base = module.base_layer.weight
    for part, tensor in zip((module.lora_A, module.lora_B), pair, strict=True):
        part[name].weight = nn.Parameter(
            tensor.to(base.device, base.dtype).contiguous(), requires_grad=False
        )
