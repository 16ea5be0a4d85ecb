"""PEFT's layers in one model: put in by PEFT itself, switched by it, and taken out again without a trace."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..errors import InputError
from ..linalg import precise
from ..site import Site
from ..update import Update
from . import _adalora
from ._kept import Kept
from ._peft_config import brief, make

# What PEFT raises for a configuration that does not suit a model, or for what a type cannot do.
FAULTS = (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, RuntimeError, ImportError)


class Injected:
    """PEFT in one model. Everything that it replaces or writes is remembered; meanwhile the model is copied once.

    model: the PeftModel around `root`. layers: {module name before: (the module, what stands in its place)}.
    kept: base tensors that train (biases) or that the start has rewritten (PiSSA), with their base values.
    fresh: False where saved tensors will be loaded, of which the settings may say more.
    """

    def __init__(self, root: nn.Module, settings: dict[str, Any], name: str, seed: int, fresh: bool = True):
        self.root, self.name, self.kind = root, name, settings["peft_type"]
        self._flags = [(p, p.requires_grad) for p in root.parameters()]
        self._places = [(m, key, child, path) for path, m in root.named_modules() for key, child in m._modules.items()]
        self._own = [(m, key, p) for m in root.modules() for key, p in m._parameters.items()]
        self._base = root.state_dict(keep_vars=True)
        before = {key: t.detach().clone() for key, t in self._base.items()}  # until it is known what has changed
        self.kept = Kept(self._base, before)
        self.layers: dict[str, tuple[nn.Module, nn.Module]] = {}
        self._aside: list[tuple[Tensor, Tensor]] = []
        try:
            with torch.random.fork_rng({p.device for p in root.parameters() if p.device.type == "cuda"}):
                torch.manual_seed(seed)
                self.model: PeftModel = get_peft_model(root, make(_completed(settings)), adapter_name=name)
            pattern = None if fresh else settings.get("rank_pattern")
            self.schedule = _adalora.Schedule(self.model, name, pattern) if self.kind == "ADALORA" else None
        except FAULTS as error:
            self.remove()
            if isinstance(error, InputError):
                raise
            raise InputError("peft_config", f"{self.kind}: {brief(error)}", "mend the configuration") from None
        for module, key, child, path in self._places:
            if module._modules[key] is not child:
                self.layers[f"{path}.{key}" if path else key] = (child, module._modules[key])
        moved = {k: t for k, t in self._base.items() if t.requires_grad or not torch.equal(t, before[k])}
        self.kept = Kept(moved, {k: before[k] for k in moved})

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name in the root, tensor) of everything that PEFT brought, and of base tensors that are not as they were."""
        seen = {id(t) for t in self._base.values()} - {id(t) for t in self.kept.live.values()}
        for key, tensor in self.model.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))  # a shared tensor stands under its first name
                yield key.removeprefix("base_model.").removeprefix("model."), tensor

    def base(self, path: str) -> Tensor | None:
        """The base value of a replaced module's weight, None where it has none of floating point."""
        name = f"{path}.weight"
        weight = self.kept.value(name) if name in self.kept.live else self._base.get(name)
        return weight.detach() if weight is not None and weight.is_floating_point() else None

    def changes(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(module name, base weight, W_adapted - W_base), float32 or float64, of every replaced matrix.

        A copy of one layer after another is merged by PEFT. Raises InputError for a type that cannot be merged.
        """
        for path, (_, layer) in self.layers.items():
            base = self.base(path)
            if base is None or base.dim() < 2:
                continue
            base = precise(base)
            if isinstance(layer, AuxiliaryTrainingWrapper):
                weight = layer.modules_to_save[self.name].weight
            elif layer.merged:
                weight = layer.get_base_layer().weight
            else:
                twin = copy.deepcopy(layer)
                twin = twin if base.dtype == torch.float64 else twin.float()
                self._merge(twin, path)
                weight = twin.get_base_layer().weight
            yield path, base, weight.detach().to(base.dtype) - base

    def _merge(self, layer: nn.Module, path: str) -> None:
        try:
            layer.merge()
        except FAULTS as error:
            wrong = f"{self.kind} cannot be merged into {path} ({brief(error)})"
            raise InputError("merge", wrong, "use it unmerged") from None

    def _tuned(self) -> Iterator[tuple[str, nn.Module]]:
        return ((path, layer) for path, (_, layer) in self.layers.items() if isinstance(layer, BaseTunerLayer))

    def merge(self) -> None:
        """Fold by PEFT's own merge, the base's tensors set aside. Raises InputError and leaves them as they were."""
        if self.kind == "OSF":
            raise InputError("merge", "PEFT's OSF is another one after it has been unmerged", "use it unmerged")
        for path, layer in self._tuned():
            self._aside += [(p, p.detach().clone()) for p in layer.get_base_layer().parameters(recurse=False)]
            try:
                self._merge(layer, path)
            except InputError:
                self.unmerge()
                raise

    def unmerge(self) -> None:
        """Tell PEFT's layers to unmerge, then put back what was set aside: their own way is not exact."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # which is what they warn of
            for _, layer in self._tuned():
                if layer.merged:
                    layer.unmerge()
        for parameter, value in self._aside:
            parameter.data = value
        self._aside = []

    @contextlib.contextmanager
    def disabled(self):
        """PEFT's own switch, and base values for base tensors that were rewritten or train."""
        for _, layer in self.layers.values():
            layer.enable_adapters(False)
        try:
            with self.kept.base_shown():
                yield
        finally:
            for _, layer in self.layers.values():
                layer.enable_adapters(True)

    @contextlib.contextmanager
    def hidden(self):
        """Inside, the modules stand where they stood before, and nothing tells of PEFT."""
        config = self.root.peft_config
        self._put(0)
        del self.root.peft_config
        try:
            yield
        finally:
            self._put(1)
            self.root.peft_config = config

    def _put(self, which: int) -> None:
        for path, both in self.layers.items():
            parent, _, key = path.rpartition(".")
            setattr(self.root.get_submodule(parent), key, both[which])

    def remove(self, keep: bool = False) -> None:
        """Take PEFT out. keep: leave in the base's modules what `merge` has folded into them, and what trained."""
        for child, layer in self.layers.values() if keep else ():
            wrapped = isinstance(layer, AuxiliaryTrainingWrapper)
            trained = layer.modules_to_save[self.name] if wrapped else layer.get_base_layer()
            if trained is not child:
                child.load_state_dict(trained.state_dict())
        for module, key, child, _ in self._places:
            if module._modules.get(key) is not child:
                setattr(module, key, child)
        for module, key, parameter in self._own:
            if module._parameters.get(key) is not parameter:
                module._parameters[key] = parameter
        if not keep:
            self.kept.restore()
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        if "peft_config" in self.root.__dict__:
            del self.root.peft_config

    def unplain(self, component: str) -> str | None:
        """Why this is not LoRA as diffusers' file holds it, or None if it is. DoRA is, but in text encoders."""
        dora = False
        for path, (child, layer) in self.layers.items():
            if type(layer) is not LoraLinear or type(child) is not nn.Linear or layer.lora_bias[self.name]:
                return f"{self.kind} in {path} is no plain LoRA of a linear layer"
            variant = layer.lora_variant.get(self.name)
            if variant is not None and not isinstance(variant, DoraLinearVariant):
                return f"{type(variant).__name__} is no plain LoRA"
            dora = variant is not None
        if self.kept.live:
            return "it trains biases or has rewritten the base's weights"
        return "diffusers drops DoRA's magnitudes in text encoders" if dora and component != "unet" else None

    @torch.no_grad()
    def updates(self) -> list[Update]:
        """The Update of every layer, for a plain LoRA or DoRA (see `unplain`): up (m, r) has PEFT's scale in it."""
        made = []
        for site in self.sites:
            layer = self.layers[site.path][1]
            up, down = layer.lora_B[self.name].weight.detach(), layer.lora_A[self.name].weight.detach()
            magnitude = None
            if self.name in layer.lora_magnitude_vector:
                magnitude = layer.lora_magnitude_vector[self.name].weight.detach()
            update = Update(float(layer.scaling[self.name]) * up, down, magnitude=magnitude)
            made.append(update.with_row_scale(site.weight()))
        return made

    __call__ = updates  # as a Part is called, which is how `export` reads it

    @property
    def sites(self) -> list[Site]:
        """A site for every replaced module, on the module itself."""
        return [Site(path, path, child) for path, (child, _) in self.layers.items()]


def _completed(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with what PEFT cannot do without on models that it does not know."""
    if settings["peft_type"] == "IA3":
        return {"feedforward_modules": [], **settings}
    return _adalora.completed(settings) if settings["peft_type"] == "ADALORA" else settings
