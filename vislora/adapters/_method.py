"""The protocol that every method follows: two functions to write, the rest has defaults."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import InputError, near
from ..update import Update

if TYPE_CHECKING:
    from ..adapter import Adapter
    from ..site import Site


class Bound(SimpleNamespace):
    """A promise about singular values: the Schatten `p`-norm of the update is at most `delta` (a scalar tensor)."""

    p: float
    delta: Tensor


@dataclass(frozen=True)
class Pair:
    """The two factors of a LoRA-shaped update: dW = scale * up @ down, minus a fixed start where there is one."""

    down: nn.Parameter  # (r, n)
    up: nn.Parameter  # (m, r)
    scale: float


@dataclass(frozen=True)
class Method:
    """A method is a frozen dataclass: its fields are the options, in the same words as on the command line. It holds no
    state: what trains, and what must be kept, are the tensors that `init` returns for each site."""

    batched: ClassVar[bool] = False  # True: `factors` runs once for a stack of sites of equal shape
    identity_at_init: ClassVar[bool] = True  # False must be argued in the method's docstring
    needs_prepare: ClassVar[bool] = False  # the start is made of data: training before `prepare` is refused
    rank_fits_layers: ClassVar[bool] = True  # a rank above a layer's smaller side is refused
    drops_tail: ClassVar[bool] = False  # of what its factors can hold, only the leading rank lasts
    quick: ClassVar[Mapping[str, Any]] = {}  # options that keep the conformance suite quick
    exact_identity: ClassVar[bool] = True  # the start is the base model bit for bit, not only to rounding
    input_dropout: ClassVar[float] = 0.0  # on the input of the update, during training; LoRA's is an option
    roles: ClassVar[Mapping[str, str]] = {}  # tensor name -> "up" | "down" | "core" | "scale" | "magnitude"

    def check(self) -> None:
        """Raise InputError for options that no model could satisfy. Runs before anything is loaded."""

    def for_models(self, models: Sequence[nn.Module]) -> Method:
        """This method with the options set that were left to the models' architecture; `attach` asks once."""
        return self

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """This site's tensors: an nn.Parameter trains, a plain tensor is kept with it and does not.

        site: has m (out), n (in), name, and weight(), the base weight (m, n) in float32.
        generator: a CPU generator of this site's own; nothing else may be drawn from."""
        raise TypeError(f"{type(self).__name__} does not define init")

    def shared(self, sites: Sequence[Site], generator: torch.Generator) -> dict[str, Tensor]:
        """Fixed tensors that all sites share: a function of the sites' shapes and the seed, so they are not saved."""
        return {}

    def share_of(self, shared: Mapping[str, Tensor], site: Site) -> dict[str, Tensor]:
        """What `factors` sees of the shared tensors at one site; views, not copies."""
        return dict(shared)

    def factors(self, t: SimpleNamespace) -> Update:
        """The Update of the tensors of `init` and `share_of`, as attributes of t; stacked (L, ...) if `batched`."""
        raise TypeError(f"{type(self).__name__} does not define factors")

    def bound(self, t: SimpleNamespace) -> Bound | None:
        """The norm bound that holds by construction at one site, or None."""
        return None

    def bases(self, t: SimpleNamespace) -> dict[str, Tensor]:
        """{name: tensor (k, r)} whose columns the method makes orthonormal, or pulls there, at one site."""
        return {}

    def pair(self, t: SimpleNamespace) -> Pair | None:
        """The trained factors at one site, for optimizers that treat them together; None: not LoRA-shaped."""
        return None

    def penalty(self, sites: Sequence[SimpleNamespace], max_lr: float) -> Tensor:
        """The regulariser over the tensors of all sites (a scalar), weighted, to be added once per optimizer step."""
        return torch.zeros(())

    def prepare(self, adapter: Adapter, closure: Callable[[], Tensor]) -> None:
        """A start that needs data. closure() runs one forward and backward and returns the loss."""

    def on_step(self, adapter: Adapter, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Runs after optimizer step number `step` (from 1), gradients still present."""

    def acts_on_steps(self) -> bool:
        """Whether the method, with these options, does anything after the optimizer's steps."""
        return type(self).on_step is not Method.on_step

    def lr_ratio(self, role: str) -> float:
        """The learning rate of tensors of a role, over the adapter's."""
        return 1.0

    def has_penalty(self) -> bool:
        """Whether the method, with these options, has a penalty at all. Where not, it costs nothing."""
        return type(self).penalty is not Method.penalty

    @classmethod
    def is_lora_shaped(cls) -> bool:
        """Whether optimizers that treat two factors together can train it."""
        return cls.pair is not Method.pair

    def options(self) -> dict[str, Any]:
        """The options as plain JSON data, infinity as "inf"; `from_options` is its inverse."""
        return {k: "inf" if v == math.inf else v for k, v in asdict(self).items()}

    @classmethod
    def from_options(cls, name: str, options: Mapping[str, Any]) -> Method:
        """An instance from plain data. Raises InputError for an option that the method does not have."""
        known = [f.name for f in fields(cls)]
        for option in [word for word in options if word not in known]:
            raise InputError(option, f"{name} has no such option{near(option, known)}", f"it has {', '.join(known)}")
        method = cls(**{k: math.inf if v == "inf" else v for k, v in options.items()})
        method.check()
        return method


def require(condition: bool, option: str, wrong: str, remedy: str) -> None:
    """Raise InputError(option, wrong, remedy) unless `condition` holds."""
    if not condition:
        raise InputError(option, wrong, remedy)


def require_rank(rank: int) -> None:
    """Raise InputError unless rank is a positive whole number."""
    require(type(rank) is int and rank >= 1, "rank", f"{rank!r} is not a positive whole number", "take 1 or more")


def require_fit(rank: int, site: Site) -> None:
    """Raise InputError unless `rank` fits the site's matrix."""
    limit, wrong = min(site.m, site.n), f"{rank} is larger than {site.name} ({site.m} x {site.n})"
    require(rank <= limit, "rank", wrong, f"take {limit} or less, or leave that layer out of the targets")
