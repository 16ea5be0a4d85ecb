"""Models that other libraries load: with all of their weights, or not at all. They draw what a file lacks by chance."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from vislora.errors import InputError


def whole(auto: Any, name: str, fresh: Callable[[nn.Module], Iterable[str]] = lambda model: (), **words: Any) -> Any:
    """transformers' `auto.from_pretrained(name, **words)`. InputError where the files lack weights, or hold others by
    their names.

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


def require_weights(model: nn.Module, folder: Path) -> None:
    """Raise InputError where the safetensors files of `folder`, which `model` was loaded from, lack weights of it.

    By names alone: libraries rename the keys of older files, so what is lacking counts only beyond the keys that the
    model does not know. Tied weights are one.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return
    there: set[str] = set()
    for file in files:
        with safe_open(file, "pt") as opened:
            there.update(opened.keys())
    own = model.state_dict()
    held = {t.data_ptr() for key, t in own.items() if key in there}
    lacking = [key for key, t in own.items() if key not in there and t.data_ptr() not in held]
    if len(lacking) > len(there - own.keys()):
        wrong = f"lacks {len(lacking)} weights of {type(model).__name__}, first {lacking[0]}"
        raise InputError(str(folder), wrong, "save or download it again")
