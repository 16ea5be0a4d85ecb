"""The handle of a PEFT method in one or several components, and its files, which are PEFT's own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft.functional import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from ..errors import EnvironmentFault, InputError
from ..handle import Dense, require_no_rank
from ..linalg import precise
from ..site import Site, qualified
from ..update import Update
from ._injected import FAULTS, Injected
from ._peft_config import brief
from .peft import Peft

log = logging.getLogger("vislora")
Chosen = dict[str, tuple[nn.Module, dict[str, Any]]]  # {component: (root, PEFT's settings there)}


class PeftHandle(Dense):
    """PEFT's own layers, its penalties and its schedules, behind the handle that scripts know.

    parts: {component name: Injected}.
    """

    def __init__(self, name: str, method: Peft, chosen: Chosen, seed: int, fresh: bool = True):
        super().__init__(name, method.word, method, {component: root for component, (root, _) in chosen.items()}, seed)
        self.parts: dict[str, Injected] = {}
        try:
            for component, (root, settings) in chosen.items():
                digest = hashlib.sha256(f"{seed}/{component}".encode()).digest()
                start = int.from_bytes(digest[:8], "little") >> 1
                self.parts[component] = Injected(root, settings, name, start, fresh)
        except InputError:
            for part in self.parts.values():
                part.remove()
            raise
        self.hold()

    # ---- what trains

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        self._require_enabled()
        for component, part in self.parts.items():
            for name, tensor in part.tensors():
                # A Parameter that PEFT has frozen is a fixed tensor.
                yield qualified(component, name), tensor if tensor.requires_grad else tensor.detach()
            for name, tensor in part.schedule.state() if part.schedule else ():
                yield qualified(component, f"schedule.{name}"), tensor

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        super().load_tensors(tensors)
        for component, part in self.parts.items():
            lead = qualified(component, "schedule.")
            if part.schedule:
                part.schedule.load({k.removeprefix(lead): t for k, t in tensors.items() if k.startswith(lead)})

    def bind(self, optimizer: torch.optim.Optimizer, total_steps: int, first_lr: float | None = None) -> None:
        for part in self.parts.values():
            if part.schedule:
                part.schedule.bind(total_steps)
        super().bind(optimizer, total_steps, first_lr)

    def _stepped(self, optimizer: torch.optim.Optimizer) -> None:
        super()._stepped(optimizer)
        for part in self.parts.values():
            if part.schedule:
                part.schedule.step(self.step)

    def penalty(self) -> Tensor:
        """What PEFT adds to a loss that its model computes: AdaLoRA's orthogonality, KaSA's two terms."""
        total = super().penalty()
        for part in self.parts.values():
            if part.schedule:
                total = total + part.schedule.penalty()
            elif self.method.has_penalty():
                total = total + part.model.base_model._get_kasa_loss()
        return total

    # ---- what it does to the model

    def changes(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        self._require_enabled()
        for component, part in self.parts.items():
            for path, base, delta in part.changes():
                yield qualified(component, path), base, delta

    def base_weights(self) -> Iterator[tuple[str, list[int], Callable[[], Tensor]]]:
        for component, part in self.parts.items():
            for path in part.layers:
                base = part.base(path)
                if base is not None:
                    yield qualified(component, path), list(base.shape), lambda base=base: precise(base)

    @cached_property
    def measurable(self) -> bool:
        try:
            next(self.changes(), None)
        except InputError as error:
            log.warning("no norms are measured: %s", error.wrong)
            return False
        return True

    def site_updates(self) -> Iterator[tuple[str, Site, SimpleNamespace, Update]]:
        """As an adapter's, for a plain LoRA or DoRA: (qualified name, site, no tensors, Update)."""
        for component, part in self.parts.items():
            for site, update in zip(part.sites, part.updates(), strict=True):
                yield qualified(component, site.path), site, SimpleNamespace(), update

    @contextlib.contextmanager
    def disabled(self):
        """Inside, the model computes what the base computes, by PEFT's own switch."""
        self._require_unmerged("disabled")
        with contextlib.ExitStack() as stack:
            for part in self.parts.values():
                stack.enter_context(part.disabled())
            yield

    def _require_enabled(self) -> None:
        if any(part.kept.shows_base for part in self.parts.values()):
            raise InputError("peft", "is disabled", "leave `with disabled()` first")

    @contextlib.contextmanager
    def hidden(self):
        """Inside, loaders that walk the model see the base alone."""
        with contextlib.ExitStack() as stack:
            for part in self.parts.values():
                stack.enter_context(part.hidden())
            yield

    def _fold(self) -> None:
        folded = []
        try:
            for part in self.parts.values():
                part.merge()
                folded.append(part)
        except InputError:
            for part in folded:
                part.unmerge()
            raise

    def _unfold(self) -> None:
        for part in self.parts.values():
            part.unmerge()

    def detach(self, merge: bool = False) -> None:
        if merge and not self._is_merged:
            self.merge()
        elif self._is_merged and not merge:
            self.unmerge()
        for part in self.parts.values():
            part.remove(keep=merge)
        self.parts = {}
        self.release()

    # ---- files

    def save(self, folder: str | Path) -> Path:
        """Write PEFT's own two files, configuration and tensors, to `folder`/<component> for each. Returns `folder`."""
        from ..io import header_of, require_finite, write

        self._require_enabled()
        for component, part in self.parts.items():
            tensors = {key: t.detach().cpu().clone().contiguous() for key, t in _state(part).items()}
            require_finite(tensors, "peft")
            place = Path(folder) / component
            write(tensors, header_of(self), place / SAFETENSORS_WEIGHTS_NAME)
            config = part.model.peft_config[self.name]
            training, config.inference_mode = config.inference_mode, True  # as PEFT saves it
            try:
                config.save_pretrained(str(place))
            except OSError as error:
                raise EnvironmentFault(str(place), f"cannot be written ({error})", "free space") from None
            finally:
                config.inference_mode = training
        return Path(folder)

    def check_exportable(self, rank: int | None = None) -> None:
        """What has no LoRA file goes without one, and then there is nothing to squeeze."""
        if any(part.unplain(component or "unet") for component, part in self.parts.items()):
            require_no_rank(self, rank)

    def export(self, folder: str | Path, format: str = "diffusers", rank: int | None = None) -> Path | None:
        from ..export import export

        for component, part in self.parts.items():
            # in PEFT's own layout a text encoder's magnitudes have their place, as a UNet's have in diffusers'
            reason = part.unplain("unet" if format == "peft" else component or "unet")
            if reason is not None:
                log.warning("peft: %s: no LoRA file for %s is written -> use the adapter's own folder", reason, format)
                return None
        return export(self, Path(folder), format, rank)

    @property
    def sites(self) -> list[str]:
        return [qualified(component, path) for component, part in self.parts.items() for path in part.layers]

    def summary(self) -> str:
        lines = []
        for component, part in self.parts.items():
            for path, (_, layer) in part.layers.items():
                count = sum(p.numel() for p in layer.parameters() if p.requires_grad)
                lines.append(f"{qualified(component, path)}  {type(layer).__name__}  {count:,}")
        return "\n".join(lines)

    @property
    def base_copy(self) -> int:
        return sum(part.kept.bytes for part in self.parts.values())


def load(model: Any, folders: dict[str, Path], name: str, other_base: bool) -> PeftHandle:
    """Inject what {component: folder in PEFT's layout} holds. The base is compared where the file tells of it.

    Raises InputError, the model untouched, unless every tensor of the files is finite and has its place, and every
    place its tensor.
    """
    from ..attach import components
    from ..fit import place, require_base
    from ..io import read, require_finite

    files = {prefix: folder / SAFETENSORS_WEIGHTS_NAME for prefix, folder in folders.items()}
    chosen: Chosen = {}
    tensors: dict[str, dict[str, Tensor]] = {}
    norms: dict[str, dict[str, float]] = {}
    roots = {}
    first = next(iter(files.values()))
    for prefix, file in files.items():
        tensors[prefix], header = read(file)
        require_finite(tensors[prefix], str(file))
        try:
            told = json.loads(header["vislora"])["base"]["norms"] if "vislora" in header else {}
            norms[prefix] = {str(key): float(norm) for key, norm in told.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(str(file), f"has a damaged header ({error!r})", "copy it again") from None
    roots = place(components(model), list(files), lambda root: _fits(root, tensors[""]), first)
    for prefix, (component, root) in roots.items():
        chosen[component] = (root, Peft(folders[prefix] / CONFIG_NAME).settings)
    method = Peft(folders[next(iter(roots))] / CONFIG_NAME)
    handle = PeftHandle(name, method, chosen, 0, fresh=False)
    try:
        for prefix, (component, _) in roots.items():
            _fill(handle.parts[component], tensors[prefix], files[prefix])
            if not other_base:
                base = {qualified(prefix, p): handle.parts[component].base(p) for p in handle.parts[component].layers}
                lead = f"{prefix}." if prefix else ""
                own = {k: norm for k, norm in norms[prefix].items() if k.startswith(lead)}
                strange = sorted(own.keys() - base.keys())
                if strange:
                    wrong = f"tells of {strange[0]}, which it does not adapt"
                    raise InputError(str(files[prefix]), wrong, "copy it again")
                require_base(own, {k: lambda k=k, base=base: precise(base[k]) for k in own}, files[prefix])
    except InputError:
        handle.detach()
        raise
    return handle


def _state(part: Injected) -> dict[str, Tensor]:
    """{name in PEFT's file: tensor}. The state is given, or PEFT would warn of layers that AdaLoRA has pruned away."""
    return get_peft_model_state_dict(
        part.model, part.model.state_dict(), adapter_name=part.name, save_embedding_layers=False
    )


def _fits(root: nn.Module, tensors: dict[str, Tensor]) -> bool:
    names = tuple(f"base_model.model.{name}." for name, _ in root.named_modules() if name)
    return any(key.startswith(names) for key in tensors)


def _fill(part: Injected, tensors: dict[str, Tensor], file: Path) -> None:
    """Overwrite what PEFT put in by a file's tensors, which must be the same by name and shape."""
    own = _state(part)
    odd = sorted(own.keys() ^ tensors.keys())
    if odd:
        wrong = f"{len(odd)} tensors are in the file or in {type(part.root).__name__} alone: {odd[0]}"
        raise InputError(str(file), wrong, "load it into the model it was trained on")
    for key, tensor in own.items():
        if tensor.shape != tensors[key].shape or tensor.is_floating_point() != tensors[key].is_floating_point():
            given = f"{key} is {tuple(tensors[key].shape)} {tensors[key].dtype}"
            wrong = f"{given}, {tuple(tensor.shape)} {tensor.dtype} is needed"
            raise InputError(str(file), wrong, "train or copy it again")
    try:
        set_peft_model_state_dict(part.model, tensors, adapter_name=part.name)
    except FAULTS as error:
        raise InputError(str(file), f"does not fit ({brief(error)})", "load it into its own model") from None
