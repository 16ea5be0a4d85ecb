"""A part of an adapter: the trainable tensors of one root, by site, and the updates they make."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from .adapters import Method
from .linalg import without_autocast
from .site import Site
from .tap import tap_of
from .update import Update

# A stack of layers that outgrows the CPU's cache is slower than its layers one by one; about this many numbers fit.
_CPU_STACK = 400_000


class SiteTensors(nn.Module):
    """The tensors of one site: parameters train, buffers do not."""

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__()
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def all(self) -> dict[str, Tensor]:
        return {**self._parameters, **self._buffers}

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # A checkpoint of the base alone loads strictly into the adapted model.
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *args)


class Part(nn.Module):
    """What an adapter adds to one root: a module without input whose output is one Update for each site."""

    def __init__(
        self,
        root: nn.Module,
        sites: list[Site],
        method: Method,
        tensors: list[dict[str, Tensor]],
        shared: dict[str, Tensor],
        name: str,
    ):
        super().__init__()
        self.common = SiteTensors(shared).to(sites[0].parameter.device)
        self.method, self.sites, self.adapter_name = method, sites, name
        self.store = nn.ModuleDict()
        for site, t in zip(sites, tensors, strict=True):
            weight = site.parameter
            # Adapters stay in float32 on bf16 and fp16 bases: small steps would be rounded away.
            held = SiteTensors(t).to(weight.device)
            self.store[site.name.replace(".", "/")] = held.double() if weight.dtype == torch.float64 else held
        self.adapter_weight, self.call_scale, self.disabled = 1.0, 1.0, 0
        self.called: set[nn.Module] = set()
        self.inside = False  # the root's own forward is running, for which the updates were just computed
        self.prepared = not method.needs_prepare
        self.frozen: list[nn.Parameter] = []  # what attach froze, to be given back at detach
        self._updates: dict[nn.Module, list[tuple[Site, Update]]] | None = None
        self._made: tuple = ()

    @property
    def active(self) -> bool:
        return self.disabled == 0

    @property
    def strength(self) -> float:
        return self.adapter_weight * self.call_scale

    def own_tensors(self, site: Site) -> dict[str, Tensor]:
        """One site's own tensors by name: what trains and what is saved."""
        return self.store[site.name.replace(".", "/")].all()

    def tensors_of(self, site: Site) -> SimpleNamespace:
        """One site's tensors as the method sees them: its own and its share of the common ones."""
        return SimpleNamespace(**self.method.share_of(self.common.all(), site), **self.own_tensors(site))

    def forward(self) -> list[Update]:
        """One Update for each site, in the order of `sites`; differentiable."""
        with without_autocast(self.sites[0].parameter.device):
            updates: list[Update | None] = [None] * len(self.sites)
            for group in self._groups():
                if len(group) == 1:
                    updates[group[0]] = self.method.factors(self.tensors_of(self.sites[group[0]]))
                    continue
                each = [vars(self.tensors_of(self.sites[i])) for i in group]
                stacked = SimpleNamespace(**{name: torch.stack([t[name] for t in each]) for name in each[0]})
                for i, update in zip(group, self.method.factors(stacked).unbind(), strict=True):
                    updates[i] = update
            return [
                update if update.magnitude is None else update.with_row_scale(site.weight())
                for site, update in zip(self.sites, updates, strict=True)
            ]

    def _groups(self) -> Iterator[list[int]]:
        """Indices of sites that `factors` takes together: of equal shapes, few enough for the CPU's cache."""
        if not self.method.batched:
            yield from ([i] for i in range(len(self.sites)))
            return
        groups: dict[tuple, list[int]] = {}
        for i, site in enumerate(self.sites):
            t = vars(self.tensors_of(site))
            groups.setdefault(tuple((k, v.shape, v.dtype, v.device) for k, v in t.items()), []).append(i)
        for key, members in groups.items():
            size = sum(shape.numel() for _, shape, _, _ in key)
            limit = len(members) if key[0][3].type != "cpu" else max(1, _CPU_STACK // max(1, size))
            yield from (members[at : at + limit] for at in range(0, len(members), limit))

    def refresh(self, call_scale: float = 1.0) -> None:
        """Compute the updates for the coming forward, unless those at hand are of the same parameters."""
        self.call_scale = call_scale
        if not self.active:
            return
        if torch.is_grad_enabled() or self._updates is None or self._made != self._version():
            self._compute()

    def _compute(self) -> None:
        # Through __call__, because sharding libraries hang their hooks there.
        made: dict[nn.Module, list[tuple[Site, Update]]] = {}
        for site, update in zip(self.sites, self(), strict=True):
            made.setdefault(site.module, []).append((site, update))
        self._updates, self._made = made, self._version()

    def _version(self) -> tuple:
        return torch.is_grad_enabled(), *((t.data_ptr(), t._version) for t in self.parameters())

    def updates_of(self, module: nn.Module, tensor: str) -> list[tuple[Site, Update]]:
        """The updates of one weight. Computed now where the root was bypassed and those at hand do not fit."""
        stale = self._updates is None or (torch.is_grad_enabled() and not self._made[0])
        # Comparing every parameter's version at every tap would cost the square of the number of layers.
        if stale or (not self.inside and self._made[1:] != self._version()[1:]):
            self._compute()
        return [(site, update) for site, update in self._updates[module] if site.tensor == tensor]

    def clear(self) -> None:
        """Drop the computed updates; the next forward makes new ones."""
        self._updates = None

    def is_merged(self, site: Site) -> bool:
        return self in tap_of(*site.key).merged

    def __getstate__(self) -> dict:
        # Computed updates are graph nodes: they cannot be copied, and a copy makes its own.
        return {**self.__dict__, "_updates": None, "_made": (), "called": set(), "inside": False}
