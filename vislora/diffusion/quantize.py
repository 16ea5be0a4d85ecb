"""A frozen base in 4 or 8 bits by bitsandbytes, linear by linear, on any device that it computes on.

diffusers' own quantization on loading refuses a machine without a GPU; this also runs where tests do.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from vislora.baselines import Baseline
from vislora.errors import InputError

KINDS = ("nf4", "int8")


def require_quantizable(kind: str, method) -> None:
    """Raise InputError where bitsandbytes is missing, or the base's own weights would train."""
    if kind == "none":
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("--base_quantization", f"{kind} needs the package bitsandbytes", "pip install bitsandbytes")
    if isinstance(method, Baseline) and method.trains_base:
        wrong = f"{kind} beside --adapter {method.word}, which trains the weights themselves"
        raise InputError("--base_quantization", wrong, "leave it out, or take an adapter")


def quantize(model: nn.Module, kind: str, device: torch.device) -> int:
    """Put every linear of a frozen `model` into `kind`, nf4 (Dettmers et al. 2023) or int8 (Dettmers et al. 2022), on
    `device`. Biases, and layers of other kinds, stay as they are. Returns how many linears there are."""
    import bitsandbytes as bnb  # seconds

    count = 0
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear:
            continue
        shape = module.in_features, module.out_features, module.bias is not None
        if kind == "int8":
            made = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False)
            made.weight = bnb.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
        else:
            made = bnb.nn.Linear4bit(*shape, compute_dtype=module.weight.dtype, quant_type=kind)
            made.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type=kind, module=made)
        made.bias = module.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made.to(device).eval())
        count += 1
    return count
