"""Weights that accelerate's or diffusers' hooks keep elsewhere while their module does not run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling

from .errors import InputError

_REMEDY = "do it before offloading, or offload to memory by pipe.enable_model_cpu_offload"


def is_hooked(module: nn.Module) -> bool:
    """Whether such a library wraps the module's forward: what its parameters hold outside of it may be nothing.

    diffusers' pipelines leave registries that hold no hook: those wrap nothing. Asked for every site at every forward,
    so by the dictionary: a miss of nn.Module's own look-up takes microseconds.
    """
    if is_compiling():
        return False
    held = module.__dict__
    return "_hf_hook" in held or ("_diffusers_hook" in held and bool(held["_diffusers_hook"].hooks))


def kept(module: nn.Module, tensor: str) -> Tensor | None:
    """The parameter of which accelerate left a shell without storage in the module; None where it did not."""
    for hook in _accelerates(getattr(module, "_hf_hook", None)):
        weights = getattr(hook, "weights_map", None)
        if weights is not None:
            return weights[tensor]
    return None


def _accelerates(hook: Any) -> Iterator[Any]:
    """The hook, or those in it."""
    yield from getattr(hook, "hooks", [hook])


def require_weights(root: nn.Module, what: str) -> None:
    """Raise InputError if weights of a model are where `what` cannot write them (or read them, from a disk)."""
    for name, module in root.named_modules():
        hooks = _accelerates(vars(module).get("_hf_hook"))
        if any(getattr(hook, "weights_map", None) is not None for hook in hooks) or _group(module) is not None:
            raise InputError(what, f"{name or type(root).__name__} is offloaded", _REMEDY)


def require_readable(root: nn.Module, what: str) -> None:
    """Raise InputError if diffusers keeps weights of a model on a disk, which `what` must read at every forward."""
    for name, module in root.named_modules():
        if getattr(_group(module), "offload_to_disk_path", None) is not None:
            raise InputError(what, f"{name or type(root).__name__} is offloaded to a disk", _REMEDY)


def _group(module: nn.Module) -> Any:
    """diffusers' group of modules that are moved together with this one."""
    registry = vars(module).get("_diffusers_hook")
    hook = None if registry is None else registry.get_hook("group_offloading")
    return getattr(hook, "group", None)
