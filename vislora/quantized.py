"""Weights kept in a few bits: the 4-bit and 8-bit linears of bitsandbytes, read in float32 and never written.

bitsandbytes is not imported here: where nothing has imported it, no module can be one of its own.
"""

from __future__ import annotations

import copy
import sys

import torch
from torch import Tensor, nn

from .errors import InputError


def is_quantized(module: nn.Module) -> bool:
    """Whether the module is a linear of bitsandbytes, in whatever type its weight is stored: packed 4-bit weights may
    pass for bfloat16 ones, and 8-bit layers compute with a copy that a changed weight would not reach."""
    library = sys.modules.get("bitsandbytes")
    return library is not None and isinstance(module, (library.nn.Linear4bit, library.nn.Linear8bitLt))


def require_readable(name: str, weight: Tensor, module: nn.Module) -> None:
    """Raise InputError for a module's weight of whole numbers whose scales are not known here."""
    if not weight.is_floating_point() and not is_quantized(module):
        wrong = f"a {type(module).__name__} with a weight of {weight.dtype}"
        raise InputError(name, wrong, "quantize the base by bitsandbytes, or load it in bf16")


@torch.no_grad()
def dequantized(module: nn.Module) -> Tensor:
    """The weight (out, in), float32, that a module of bitsandbytes computes with; its own tensors stay as they are.

    Scales and codes are multiplied in float32, whatever type the weight was quantized from.
    """
    weight = module.weight
    state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
    if state is not None:
        return _from_4bit(weight.detach().data, copy.copy(state))
    if weight.dtype == torch.int8:
        scales = module.state.SCB if getattr(weight, "SCB", None) is None else weight.SCB
        return weight.detach().float() * (scales.float()[:, None] / 127)
    return weight.detach().float()  # 8-bit layers that keep 16-bit weights


def _from_4bit(packed: Tensor, state) -> Tensor:
    """Dequantise by bitsandbytes itself; `state`, a copy of the module's, is changed."""
    functional = sys.modules["bitsandbytes"].functional
    if getattr(state, "packing_format_for_cpu", False):
        # A CPU with bf16 products gets another layout at the first inference, its scales transposed and in bfloat16.
        state.original_nested = False  # the nested scales are unfolded already
        packed, state = functional._convert_weight_packed_for_cpu_inverse(packed, state)
        state.absmax = state.absmax.T.reshape(-1).float()
    state.dtype = torch.float32
    return functional.dequantize_4bit(packed, state)
