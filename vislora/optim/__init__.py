"""Gradient methods, as optimizers over the factors of any LoRA-shaped adapter; AdamW for every adapter."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch

from .. import adapters
from ..adapter import Adapter
from ..adapters import Method
from ..errors import InputError, near
from ._paired import PairedAdamW, pairs_of
from .alt_lora import AltLoRA
from .lora_pro import LoRAPro
from .scaled_adamw import ScaledAdamW

__all__ = ["AltLoRA", "LoRAPro", "PairedAdamW", "ScaledAdamW", "build", "from_options", "names", "own_options",
           "pairs_of", "require_fit"]  # fmt: skip

log = logging.getLogger("vislora")
_PAIRED: dict[str, type[PairedAdamW]] = {"scaled_adamw": ScaledAdamW, "lora_pro": LoRAPro, "alt_lora": AltLoRA}

_PACKAGES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}  # of other people's optimizers, for any adapter
_ADAM = ("adamw", *_PACKAGES)

# A script's option -> (the constructor's word, the optimizers that have it)
_OWN = {
    "optimizer_damping": ("damping", ("scaled_adamw", "lora_pro", "alt_lora")),
    "lora_pro_moments": ("moments", ("lora_pro",)),
    "alt_lora_plus": ("plus", ("alt_lora",)),
    "alt_lora_alternate": ("alternate", ("alt_lora",)),
    "prodigy_beta3": ("beta3", ("prodigy",)),
    "prodigy_decouple": ("decouple", ("prodigy",)),
    "prodigy_use_bias_correction": ("use_bias_correction", ("prodigy",)),
    "prodigy_safeguard_warmup": ("safeguard_warmup", ("prodigy",)),
}


def names() -> list[str]:
    """Every optimizer's name, AdamW first."""
    return [*_ADAM, *_PAIRED]


def require_fit(name: str, method: Method) -> None:
    """Raise InputError for an unknown optimizer, one whose package is missing, and one that cannot train the method's
    tensors."""
    if name not in names():
        wrong = f"{name!r} is no optimizer{near(name, names())}"
        raise InputError("optimizer", wrong, f"take one of {', '.join(names())}")
    package = _PACKAGES.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        raise InputError("optimizer", f"{name} needs the package {package}", f"pip install {package}")
    if name not in _ADAM and not method.is_lora_shaped():
        own = type(method).__module__.rpartition(".")[2]
        wrong = f"{name} treats LoRA's two factors together, and {own} has others"
        fitting = [n for n in adapters.names() if adapters.get(n).is_lora_shaped()]
        raise InputError("optimizer", wrong, f"take adamw, or one of the methods {', '.join(fitting)}")


def build(
    name: str, adapter: Adapter, lr: float, component_lr: dict[str, float] | None = None, fused: bool = True,
    **settings: Any,
) -> torch.optim.Optimizer:
    """The optimizer called `name` over an adapter's parameters, ready for `adapter.bind`.

    lr, component_lr: as `Adapter.param_groups` takes them. fused: whether AdamW steps by torch's one kernel for all
    parameters; not under a loss scale, whose skipped steps that hides. settings: betas, eps and weight_decay, as
    torch's AdamW has them, and the optimizer's own keywords. Raises InputError where the optimizer does not fit the
    adapter's method.
    """
    require_fit(name, adapter.method)
    if name == "prodigy":
        return _prodigy(adapter.param_groups(lr), settings)
    groups = adapter.param_groups(lr, component_lr)
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=fused, **settings)
    if name == "adamw8bit":
        import bitsandbytes  # seconds

        return bitsandbytes.optim.AdamW8bit(groups, **settings)
    return _PAIRED[name](groups, pairs_of(adapter), **settings)


def _prodigy(groups: list[dict[str, Any]], settings: dict[str, Any]) -> torch.optim.Optimizer:
    """Prodigy (Mishchenko and Defazio 2023, arXiv 2306.06101) by its authors' package: it estimates one rate for all
    parameters, which `lr` (1 is usual) multiplies; components have no rate of their own."""
    from prodigyopt import Prodigy

    rates = sorted({group["lr"] for group in groups})
    if len(rates) > 1:
        wrong = f"prodigy has one rate for all, the adapter asks for {len(rates)}: {', '.join(map(str, rates))}"
        raise InputError("optimizer", wrong, "take a method with one rate, or adamw")
    if rates[0] < 0.1:
        log.warning("--learning_rate %g: prodigy multiplies the rate that it finds by it; 1 is usual", rates[0])
    return Prodigy(groups, lr=rates[0], **settings)


def own_options(options: Any) -> dict[str, Any]:
    """The keywords that a script's options give the chosen optimizer; those left at None are its own defaults.

    Raises InputError for an option of another optimizer.
    """
    found = {}
    for option, (word, owners) in _OWN.items():
        value = getattr(options, option, None)
        if value is not None:
            if options.optimizer not in owners:
                wrong = f"is an option of {', '.join(owners)}, and the optimizer is {options.optimizer}"
                raise InputError(f"--{option}", wrong, f"leave it out, or give --optimizer {owners[0]}")
            found[word] = value
    return found


def from_options(
    options: Any, adapter: Adapter, component_lr: dict[str, float] | None = None, fused: bool = True
) -> torch.optim.Optimizer:
    """The optimizer of a script's options: optimizer, learning_rate, the adam_* ones, and the optimizer's own.

    fused: as `build` takes it."""
    return build(
        options.optimizer, adapter, options.learning_rate, component_lr, fused,
        betas=(options.adam_beta1, options.adam_beta2), eps=options.adam_epsilon,
        weight_decay=options.adam_weight_decay, **own_options(options),
    )  # fmt: skip
