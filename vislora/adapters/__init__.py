"""The methods, one file each. The folder is the registry: a new file is a new method."""

from __future__ import annotations

import importlib
import pkgutil

from ..errors import InputError, near
from ._method import Method, Pair

__all__ = ["Method", "Pair", "get", "names"]


def names() -> list[str]:
    """Every method's name, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def get(name: str) -> type[Method]:
    """The method class called `name`. Raises InputError for an unknown name."""
    if name not in names():
        raise InputError("adapter", f"{name!r} is no method{near(name, names())}", f"take one of {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    (cls,) = [
        c for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, Method) and c.__module__ == module.__name__
    ]
    return cls
