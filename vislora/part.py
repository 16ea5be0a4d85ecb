"""A part of an adapter: the trainable tensors of one root, by site, and the updates they make."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .adapters import Method
from .distributed import whole
from .errors import InputError
from .linalg import without_autocast
from .lowrank import Pieces, cast_all, pieces
from .offload import is_hooked
from .site import Site
from .tap import tap_of
from .update import Update

# A stack of layers that outgrows the CPU's cache is slower than its layers one by one; about this many numbers fit.
# A stack of two or three saves less than stacking them costs.
_CPU_STACK, _CPU_FEWEST = 400_000, 4


class Tensors:
    """Tensors by name, as attributes: a SimpleNamespace that torch.compile can trace before torch 2.15 too."""

    def __init__(self, **named: Tensor):
        for name, tensor in named.items():
            setattr(self, name, tensor)


class Share(NamedTuple):
    """One site's update, and the same as a plain linear layer takes it, in its dtype; None for other layers."""

    site: Site
    update: Update
    pieces: Pieces | None


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
        """By a call where offloading hooks bring the tensors here and take them away; views of them stay."""
        return self() if is_hooked(self) else {**self._parameters, **self._buffers}

    def forward(self) -> dict[str, Tensor]:
        return {name: t.view_as(t) for name, t in {**self._parameters, **self._buffers}.items()}

    def apply(self, fn: Callable[[nn.Module], None]) -> nn.Module:
        # How diffusers' fuse_lora walks a model; it would leave the adapter out without a word.
        if getattr(getattr(fn, "func", fn), "__name__", "") == "_fuse_lora_apply":
            raise InputError("fuse_lora", "knows nothing of vislora's adapters", "call adapter.merge()")
        return super().apply(fn)

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
        self.compiled = False  # graphs were made of adapted modules, which take no such notes
        self.traced = False  # the root's own forward is being made into a graph
        self.inside = False  # the root's own forward is running, for which the updates were just computed
        self.prepared = not method.needs_prepare
        self.frozen: list[nn.Parameter] = []  # what attach froze, to be given back at detach
        self._updates: dict[nn.Module, list[Share]] | None = None
        self._with_graph = False  # whether those updates can be differentiated
        self._versions: tuple = ()  # of the parameters that they were made from

    @property
    def active(self) -> bool:
        return self.disabled == 0

    @property
    def strength(self) -> float:
        return self.adapter_weight * self.call_scale

    def own_tensors(self, site: Site) -> dict[str, Tensor]:
        """One site's own tensors by name: what trains and what is saved."""
        return self.store[site.name.replace(".", "/")].all()

    def tensors_of(self, site: Site) -> Tensors:
        """One site's tensors as the method sees them: its own and its share of the common ones."""
        return self._seen(site, self.common.all())

    def _seen(self, site: Site, common: dict[str, Tensor]) -> Tensors:
        own = {name: whole(tensor) for name, tensor in self.own_tensors(site).items()}
        return Tensors(**self.method.share_of(common, site), **own) if common else Tensors(**own)

    def forward(self) -> list[Update]:
        """One Update for each site, in the order of `sites`; differentiable."""
        with without_autocast(self.sites[0].parameter.device):
            common = self.common.all()
            each = [self._seen(site, common) for site in self.sites]
            updates: list[Update | None] = [None] * len(self.sites)
            for group in self._groups(each):
                if len(group) == 1:
                    updates[group[0]] = self.method.factors(each[group[0]])
                    continue
                names = vars(each[group[0]])
                stacked = Tensors(**{name: torch.stack([getattr(each[i], name) for i in group]) for name in names})
                for i, update in zip(group, self.method.factors(stacked).unbind(), strict=True):
                    updates[i] = update
            return [self._of(site, update) for site, update in zip(self.sites, updates, strict=True)]

    def _of(self, site: Site, update: Update) -> Update:
        """The update with what it must know of its site's weight."""
        return update if update.magnitude is None else update.with_row_scale(site.weight())

    def groups(self) -> list[list[int]]:
        """Indices of sites whose updates are made together."""
        common = self.common.all()
        return list(self._groups([self._seen(site, common) for site in self.sites]))

    def _groups(self, each: list[Tensors]) -> Iterator[list[int]]:
        """Indices of sites that `factors` takes together: of equal shapes, few enough for the CPU's cache."""
        if not self.method.batched:
            yield from ([i] for i in range(len(each)))
            return
        groups: dict[tuple, list[int]] = {}
        for i, t in enumerate(each):
            groups.setdefault(tuple((k, v.shape, v.dtype, v.device) for k, v in vars(t).items()), []).append(i)
        for key, members in groups.items():
            size = sum(shape.numel() for _, shape, _, _ in key)
            limit = len(members)
            if key[0][3].type == "cpu":
                limit = _CPU_STACK // max(1, size)
                limit = limit if limit >= _CPU_FEWEST else 1
            yield from (members[at : at + limit] for at in range(0, len(members), limit))

    def refresh(self, call_scale: float = 1.0) -> None:
        """Compute the updates for the coming forward, unless those at hand are of the same parameters."""
        self.call_scale = call_scale
        if self.active:
            self._renew()

    def _renew(self) -> None:
        if is_compiling() or torch.is_grad_enabled() or self._updates is None or self._with_graph:
            self._compute()
        elif self._versions != self._version():
            self._compute()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, the updates are those of the parameters as they are on entering, and no tap compares them again."""
        with torch.no_grad():
            self._renew()
        self.inside = True
        try:
            yield
        finally:
            self.inside = False

    def _compute(self) -> None:
        # Through __call__, because sharding libraries hang their hooks there.
        made: dict[nn.Module, list[Share]] = {}
        updates = self()
        for site, update, piece in zip(self.sites, updates, self._pieces(updates), strict=True):
            made.setdefault(site.module, []).append(Share(site, update, piece))
        self._updates, self._with_graph = made, torch.is_grad_enabled()
        if not is_compiling():  # a graph that knew of versions would be compiled anew at every step
            self._versions = self._version()

    def _pieces(self, updates: list[Update]) -> list[Pieces | None]:
        """What plain linear layers take of the updates, in their own dtypes: cast together, once a forward."""
        if is_compiling() or (self.method.input_dropout and self.training):
            return [None] * len(updates)
        found = [
            pieces(site.rows, update) if type(site.module) is nn.Linear and not is_hooked(site.module) else None
            for site, update in zip(self.sites, updates, strict=True)
        ]
        return cast_all(found, [site.parameter for site in self.sites])

    def _version(self) -> tuple:
        held = (self.common, *self.store._modules.values())  # not by parameters(), which walks and compares names
        return tuple([(t.data_ptr(), t._version) for own in held for t in own._parameters.values()])

    def updates_of(self, module: nn.Module, tensor: str) -> list[Share]:
        """The updates of one weight. Computed now where the root was bypassed and those at hand do not fit."""
        if is_compiling() and not self.inside:  # nothing may stay behind in a graph of a part of the model
            own = [site for site in self.sites if site.key == (module, tensor)]
            return [Share(site, self._of(site, self.method.factors(self.tensors_of(site))), None) for site in own]
        stale = self._updates is None or (torch.is_grad_enabled() and not self._with_graph)
        # Comparing every parameter's version at every tap would cost the square of the number of layers. Inside a
        # backward, activations are computed again with what their forward had.
        known = self.inside or torch._C._current_graph_task_id() != -1
        if stale or (not known and self._versions != self._version()):
            self._compute()
        return [share for share in self._updates[module] if share.site.tensor == tensor]

    def defer(self, call_scale: float = 1.0) -> None:
        """Leave the updates of the coming forward to its first tap: inside it offloaded tensors are at hand."""
        self.call_scale, self._updates = call_scale, None

    def saw(self, module: nn.Module) -> None:
        """Note that the running forward reached an adapted module. A graph that read its notes would be made anew."""
        if not is_compiling():
            self.called.add(module)
        elif not self.traced:  # where it is, the root has noted it: not in here, which may be a checkpoint's region
            self.compiled = True

    def clear(self) -> None:
        """Drop the computed updates; the next forward makes new ones."""
        self._updates = None

    def is_merged(self, site: Site) -> bool:
        return self in tap_of(*site.key).merged

    def __getstate__(self) -> dict:
        # Computed updates are graph nodes: they cannot be copied, and a copy makes its own.
        return {**self.__dict__, "_updates": None, "_versions": (), "called": set(), "inside": False}
