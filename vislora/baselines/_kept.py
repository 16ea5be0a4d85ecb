"""The base values of tensors that training overwrites, and the way back to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Kept:
    """Live tensors of a model with a copy of the values that they had; it costs their memory once more.

    live: {name: parameter or buffer}; base: {name: its base value}, by default what it holds now.
    """

    def __init__(self, live: dict[str, Tensor], base: dict[str, Tensor] | None = None):
        self.live = live
        self.base = {name: t.detach().clone() for name, t in live.items()} if base is None else base
        self._trained: dict[str, Tensor] | None = None  # set aside while the base is shown
        self._depth = 0

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.base.values())

    @property
    def shows_base(self) -> bool:
        return self._depth > 0

    def value(self, name: str) -> Tensor:
        """The base value, where and in what type the live tensor is by now."""
        self.base[name] = self.base[name].to(self.live[name])
        return self.base[name]

    def trained(self, name: str) -> Tensor:
        """The trained value, also while the base is shown."""
        return self.live[name].detach() if self._trained is None else self._trained[name]

    @contextmanager
    def base_shown(self) -> Iterator[None]:
        """Inside, the live tensors have the base's storage; afterwards their own again. May be nested."""
        self._depth += 1
        torch.clear_autocast_cache()  # an open autocast keeps what it cast of the trained values
        if self._depth == 1:
            self._trained = {name: t.data for name, t in self.live.items()}
            for name, t in self.live.items():
                t.data = self.value(name)
        try:
            yield
        finally:
            self._depth -= 1
            torch.clear_autocast_cache()
            if self._depth == 0:
                for name, t in self.live.items():
                    t.data = self._trained[name]
                self._trained = None

    @torch.no_grad()
    def restore(self) -> None:
        """Give the live tensors their base values for good."""
        for name, t in self.live.items():
            t.data = self.value(name)
