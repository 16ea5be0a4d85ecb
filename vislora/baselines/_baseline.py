"""The protocol of a baseline: like a method a frozen dataclass of options, but it makes its own handle."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from ..errors import InputError, near
from ..site import Site

if TYPE_CHECKING:
    from ..handle import Handle

Found = dict[str, tuple[nn.Module, list[Site]]]  # {component: (root, the sites that targets name)}


@dataclass(frozen=True)
class Baseline:
    """A word of --adapter that is no method of `vislora.methods()`."""

    word: ClassVar[str]
    trains_base: ClassVar[bool] = False  # the base's own weights train, so they must be float32
    trains: ClassVar[bool] = True  # False: there is nothing to optimize

    def check(self) -> None:
        """Raise InputError for options that no model could satisfy."""

    def options(self) -> dict[str, Any]:
        """The options as plain JSON data."""
        return {}

    def has_penalty(self) -> bool:
        """Whether the handle's penalty is anything but 0."""
        return False

    def bound(self, t) -> None:
        """No norm is promised."""

    @classmethod
    def is_lora_shaped(cls) -> bool:
        """Whether optimizers that treat two factors together can train it."""
        return False

    def find(self, root: nn.Module, targets) -> list[Site]:
        """The sites that `targets` names in `root`; empty where targets are None and the baseline needs none."""
        raise TypeError(f"{type(self).__name__} does not define find")

    def build(self, found: Found, name: str, seed: int) -> Handle:
        """Let it train: the handle. Raises InputError, the models untouched, for what it cannot train."""
        raise TypeError(f"{type(self).__name__} does not define build")

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Baseline:
        """An instance from keyword options. Raises InputError for an option it lacks, or lacks the value of."""
        known = [f.name for f in dataclasses.fields(cls) if f.init]
        for option in options:
            if option not in known:
                has = f"it has {', '.join(known)}" if known else "it has no options"
                raise InputError(option, f"{cls.word} has no such option{near(option, known)}", has)
        for option in known:
            if option not in options:
                raise InputError(option, f"{cls.word} needs it", f"give {option}=")
        made = cls(**options)
        made.check()
        return made
