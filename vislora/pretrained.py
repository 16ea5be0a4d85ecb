"""Models that transformers loads: with all of their weights, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from vislora.errors import InputError


def whole(auto: Any, name: str, fresh: Callable[[nn.Module], Iterable[str]] = lambda model: (), **words: Any) -> Any:
    """`auto.from_pretrained(name, **words)`. InputError where the files lack weights, or hold others by their names:
    transformers would draw them by chance and only warn.

    fresh: the names of the modules that may be drawn, a new head's; a pooler may be too, for many checkpoints of
    encoders have none.
    """
    model, told = auto.from_pretrained(name, output_loading_info=True, **words)
    may = tuple(f"{module}." for module in fresh(model))

    def of_the_base(keys: Iterable[Any]) -> list[str]:
        found = (key if isinstance(key, str) else key[0] for key in keys)
        return sorted(key for key in found if not key.startswith(may) and ".pooler." not in key)

    for keys, wrong in (("missing_keys", "lacks"), ("mismatched_keys", "has other shapes in")):
        off = of_the_base(told[keys])
        if off:
            said = f"{wrong} {len(off)} weights of {type(model).__name__}, first {off[0]}"
            raise InputError(name, said, "copy the model again, or take its own configuration")
    return model
