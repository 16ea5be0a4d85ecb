"""Weights that are read rather than called: whoever reads the attribute gets the adapted weight.

A module's class is exchanged for a subclass of the same name whose weights are properties. The parameters stay where
they are, so state-dict keys, optimizers and `parameters()` see the base, and torch's fused paths, which take weights
and call no module, see the adapted one. Pickles and copies rebuild the subclass.
"""

from __future__ import annotations

from functools import cache

from torch import Tensor, nn

_TENSORS = ("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_TAPS = "vislora_taps"


class _Read:
    """The base of every exchanged class."""

    def __reduce_ex__(self, protocol: int):
        return _blank, (type(self).vislora_own,), self.__dict__


def _property(tensor: str) -> property:
    def read(module: nn.Module) -> Tensor | None:
        weight, tap = module._parameters[tensor], module.vislora_taps.get(tensor)
        return weight if tap is None else tap.adapted(weight)

    return property(read)


@cache
def _reading(own: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a module's own class, whose weights ask the taps that stand in `vislora_taps`."""
    members = {tensor: _property(tensor) for tensor in _TENSORS}
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own.__name__, (_Read, own), {**members, **names, "vislora_own": own})


def _blank(own: type[nn.Module]) -> nn.Module:
    kind = _reading(own)
    return kind.__new__(kind)


def taps(module: nn.Module) -> dict:
    """{tensor: its tap} of a module; empty where its class was not exchanged."""
    return module.__dict__.get(_TAPS, {})


def put(module: nn.Module, tensor: str, tap) -> None:
    """Let readers of `module`'s tensor get tap.adapted(the parameter)."""
    if _TAPS not in module.__dict__:
        module.__dict__[_TAPS] = {}
        module.__class__ = _reading(type(module))
    taps(module)[tensor] = tap


def take(module: nn.Module, tensor: str) -> None:
    """Undo `put`; with the last tap the module has its own class again."""
    del taps(module)[tensor]
    if not taps(module) and isinstance(module, _Read) and type(module) is _reading(module.vislora_own):
        module.__class__ = module.vislora_own
        del module.__dict__[_TAPS]
