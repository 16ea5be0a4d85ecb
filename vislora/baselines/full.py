"""Full fine-tuning: the model's own parameters train; with targets, those of the targeted modules alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..distributed import whole
from ..errors import EnvironmentFault, InputError
from ..handle import Dense, require_no_rank
from ..linalg import precise
from ..site import Site, find, qualified
from ._baseline import Baseline, Found
from ._kept import Kept


@dataclass(frozen=True)
class Full(Baseline):
    """All parameters of a component, or with targets the weight and bias of the modules that they name.

    The base must be in float32 (or float64): an optimizer's small steps are lost in half precision. Mixed precision
    comes by autocast, as in diffusers' scripts, which load what trains in float32 too.
    """

    word: ClassVar[str] = "full"
    trains_base: ClassVar[bool] = True

    def find(self, root: nn.Module, targets) -> list[Site]:
        sites = [] if targets is None else find(root, targets)
        for site in sites:
            if site.rows is not None:
                wrong = f"{site.name} is a block of rows, which has no parameter of its own"
                raise InputError("targets", wrong, f"name the whole matrix, {site.path}")
        return sites

    def build(self, found: Found, name: str, seed: int) -> FullHandle:
        handle = FullHandle(name, self, found, seed)
        for key, tensor in handle.named_parameters():
            if tensor.dtype not in (torch.float32, torch.float64):
                handle.detach()
                wrong = f"{key} is {tensor.dtype}, in which small steps are lost"
                raise InputError("full", wrong, "load the model in float32 and compute under autocast")
        return handle


def tensors_of(root: nn.Module, sites: list[Site]) -> dict[str, Tensor]:
    """{name in the root: live tensor}: the sites' weights and biases; without sites every parameter and saved buffer.
    Of a parameter that a site names by itself (nn.MultiheadAttention's), that one alone.

    A tied parameter stands under its first name.
    """
    if sites:
        whole = [s for s in sites if s.tensor == "weight"]
        live = {f"{s.path}.{n}": p for s in whole for n, p in s.module.named_parameters(recurse=False)}
        return live | {s.path: s.parameter for s in sites if s.tensor != "weight"}
    first: dict[int, str] = {}
    state = root.state_dict(keep_vars=True)
    for name, tensor in state.items():
        first.setdefault(id(tensor), name)
    return {name: state[name] for name in first.values()}


class FullHandle(Dense):
    """Training of the model's own tensors, with a copy of their base values: their memory once more.

    `disabled` swaps the storages, so it is the base exactly; `detach` leaves the base as it was found.
    """

    def __init__(self, name: str, method: Full, found: Found, seed: int):
        super().__init__(name, method.word, method, {component: root for component, (root, _) in found.items()}, seed)
        self.whole = {component: not sites for component, (_, sites) in found.items()}
        self._flags = [(p, p.requires_grad) for root in self.roots.values() for p in root.parameters()]
        live = {
            qualified(component, key): tensor
            for component, (root, sites) in found.items()
            for key, tensor in tensors_of(root, sites).items()
        }
        self.kept = Kept(live)
        for parameter, _ in self._flags:
            parameter.requires_grad_(False)
        for tensor in live.values():
            if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                tensor.requires_grad_(True)
        self.hold()

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        if self.kept.shows_base:
            raise InputError("full", "is disabled: its tensors hold the base", "leave `with disabled()` first")
        return iter(self.kept.live.items())

    def bind(self, optimizer: torch.optim.Optimizer, total_steps: int, first_lr: float | None = None) -> None:
        """As every handle's. Raises InputError for tensors that are no longer the model's: they would train unseen."""
        held = {id(p) for root in self.roots.values() for p in root.parameters()}
        for name, tensor in self.kept.live.items():
            if isinstance(tensor, nn.Parameter) and id(tensor) not in held:
                wrong = f"{name} was replaced in the model after attach, as fully_shard does"
                raise InputError("full", wrong, "attach full after that")
        super().bind(optimizer, total_steps, first_lr)

    def changes(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        for name, base in self._matrices():
            wide = precise(base)
            yield name.removesuffix(".weight"), wide, self.kept.trained(name).to(wide.dtype) - wide

    def _matrices(self) -> Iterator[tuple[str, Tensor]]:
        matrices = [name for name, base in self.kept.base.items() if base.dim() > 1 and base.is_floating_point()]
        return ((name, self.kept.value(name)) for name in matrices)

    def base_weights(self) -> Iterator[tuple[str, list[int], Callable[[], Tensor]]]:
        for name, base in self.kept.base.items():
            yield name, list(base.shape), lambda name=name: precise(whole(self.kept.value(name)))

    def disabled(self) -> AbstractContextManager[None]:
        self._require_unmerged("disabled")
        return self.kept.base_shown()

    def _fold(self) -> None:
        """The weights are the trained ones already."""

    def _unfold(self) -> None:
        """They stay the trained ones; the base is shown by `disabled`."""

    def detach(self, merge: bool = False) -> None:
        if not merge:
            self.kept.restore()
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        self.kept, self._flags = Kept({}), []
        self.release()

    # ---- files

    def save(self, folder: str | Path) -> Path:
        from ..io import FILE, header_of, require_finite, write

        tensors = {name: whole(t.detach()).cpu().contiguous() for name, t in self.named_tensors()}
        require_finite(tensors, "full")
        return write(tensors, header_of(self, whole=self.whole), Path(folder) / FILE)

    def check_exportable(self, rank: int | None = None) -> None:
        require_no_rank(self, rank)
        self._folders(Path())

    def _folders(self, folder: Path) -> dict[str, Path]:
        from ..export import component_name

        return {component: folder / component_name(component, root) for component, root in self.roots.items()}

    def export(self, folder: str | Path, format: str = "diffusers", rank: int | None = None) -> Path:
        """Write folder/<component> for each trained component, whole, as its library's `from_pretrained` reads it.

        Returns the first component's folder.
        """
        if format != "diffusers":
            raise InputError("format", f"{format!r} is not written for full", "take diffusers")
        require_no_rank(self, rank)
        folders = self._folders(Path(folder))
        self.named_tensors()  # refuses while the base is shown
        for component, place in folders.items():
            try:
                self.roots[component].save_pretrained(place)
            except OSError as error:
                raise EnvironmentFault(str(place), f"cannot be written ({error})", "free space") from None
        return next(iter(folders.values()))

    @property
    def sites(self) -> list[str]:
        return list(dict.fromkeys(name.rpartition(".")[0] or name for name, _ in self.named_parameters()))

    def summary(self) -> str:
        return "\n".join(f"{n}  {' x '.join(map(str, p.shape))}  {p.numel():,}" for n, p in self.named_parameters())

    @property
    def base_copy(self) -> int:
        return self.kept.bytes


def load(model: Any, file: Path, tensors: dict[str, Tensor], config: dict, name: str, other_base: bool) -> FullHandle:
    """Put a saved full fine-tune into `model`; its base comes back at `detach`. The model may be in half precision.

    Raises InputError, the model untouched, unless names and shapes agree both ways and the base is the file's.
    """
    from ..attach import components
    from ..fit import place, require_base

    try:
        whole = {str(component): bool(flag) for component, flag in config["whole"].items()}
        norms = {str(key): float(norm) for key, norm in config["base"]["norms"].items()}
        seed = int(config["seed"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(str(file), f"has a damaged header ({error!r})", "copy it again") from None
    roots = place(components(model), list(whole), lambda root: _fits(root, tensors), file)
    live: dict[str, Tensor] = {}
    found: Found = {}
    for prefix, (component, root) in roots.items():
        state = tensors_of(root, [])
        lead = f"{prefix}." if prefix else ""
        own = [key.removeprefix(lead) for key in tensors if key.startswith(lead)]
        missing = sorted(set(own) - state.keys()) + (sorted(state.keys() - set(own)) if whole[prefix] else [])
        if missing:
            wrong = f"{len(missing)} tensors are in the file or in {type(root).__name__} alone: {missing[0]}"
            raise InputError(str(file), wrong, "load it into the model it was trained on")
        for key in own:
            saved, there = tensors[qualified(prefix, key)], state[key]
            if saved.shape != there.shape or saved.is_floating_point() != there.is_floating_point():
                wrong = f"{key} is {tuple(saved.shape)} {saved.dtype}, {tuple(there.shape)} {there.dtype} in the model"
                raise InputError(str(file), wrong, "load it into the model it was trained on")
            live[qualified(prefix, key)] = there
        modules = dict(root.named_modules())
        raw = {key: modules[key.rpartition(".")[0]] for key in own if key.endswith("proj_weight")}
        paths = dict.fromkeys(key.rpartition(".")[0] for key in own if key not in raw)
        sites = [Site(path, path, modules[path]) for path in paths]
        sites += [Site(key, key, module, tensor=key.rpartition(".")[2]) for key, module in raw.items()]
        found[component] = (root, [] if whole[prefix] else sites)
    strange = tensors.keys() - live.keys()
    if strange:
        raise InputError(str(file), f"{len(strange)} tensors belong to no component: {min(strange)}", "copy it again")
    if not other_base:
        require_base(norms, {key: lambda t=t: precise(t.detach()) for key, t in live.items()}, file)
    handle = FullHandle(name, Full(), found, seed)
    with torch.no_grad():
        for key, there in live.items():
            there.copy_(tensors[key])
    return handle


def _fits(root: nn.Module, tensors: dict[str, Tensor]) -> bool:
    return tensors.keys() <= root.state_dict().keys()
