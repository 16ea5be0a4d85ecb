"""attach: from a model and a method's name to an adapter."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .adapters import Method, get
from .baselines import BASELINES, Baseline
from .distributed import is_sharded
from .errors import InputError, near
from .handle import Handle, require_free
from .layer import is_read
from .part import Part
from .root import part_holder, parts_of
from .site import Site, find, qualified

Search = Callable[[nn.Module, Any], list[Site]]
Place = tuple[str, nn.Module, list[Site]]  # component, root, sites


def attach(
    model: Any,
    method: str | Method | Baseline,
    *,
    targets: str | Iterable[str] | Mapping[str, Any] | None = None,
    name: str = "default",
    seed: int = 0,
    **options: Any,
) -> Handle:
    """Freeze `model` and let it train by `method`. The adapted model starts as the base model.

    method: a name of `vislora.methods()` gives an `Adapter`. "full" trains the model's own parameters (in float32;
    targets: those of the modules named), "none" nothing; "peft" takes a method of PEFT (`peft_config=`, a mapping or
    a file).

    model: a module, a diffusers pipeline, or {component name: module}. Of a pipeline with no targets given, the
    denoiser is adapted; with targets, every denoiser and text encoder where they match.
    targets: a preset, a list of name suffixes, or a regex; None is the model's own preset. A mapping gives each
    component its own, and adapts those that it names.
    seed: the random start is a function of it and of each site's name alone; no global state is drawn from.
    Raises InputError for an unknown method, option or target, or a name already taken; the model is then untouched.
    """
    if isinstance(method, Method | Baseline):
        if options:
            raise InputError("attach", f"options {sorted(options)} beside a Method", "set them on the Method")
        method.check()
        method_name = type(method).__module__.rpartition(".")[2]
    elif method in BASELINES:
        method_name, method = method, BASELINES[method].from_options(options)
    else:
        method_name, method = method, get(method).from_options(method, options)
    search = method.find if isinstance(method, Baseline) else find
    if isinstance(targets, Mapping):
        places = _named_places(model, targets, search)
    else:
        places = _places(model, targets if targets is None or isinstance(targets, str) else list(targets), search)
    found = {component: (root, sites) for component, root, sites in places}
    for root, _ in found.values():
        require_free(root)
    if isinstance(method, Baseline):
        _require_bare(found, method.word)
        return method.build(found, name, seed)
    method = method.for_models([root for root, _ in found.values()])
    tensors = {
        component: [method.init(s, _generator(seed, qualified(component, s.name))) for s in sites]
        for component, (_, sites) in found.items()
    }
    return build(name, method_name, method, found, tensors, seed)


def build(
    name: str,
    method_name: str,
    method: Method,
    found: dict[str, tuple[nn.Module, list[Site]]],
    tensors: dict[str, list[dict[str, Tensor]]],
    seed: int,
) -> Adapter:
    """An installed Adapter from sites and their tensors. Raises InputError for a name already taken."""
    if not name or "." in name:
        raise InputError("name", f"{name!r} is no adapter name", "take a word without dots")
    for root, sites in found.values():
        require_free(root)
        if f"vislora_{name}" in part_holder(root, sites[0].module)._modules:
            wrong = f"{name!r} is taken on this model"
            raise InputError("name", wrong, "give another name=, or detach that adapter first")
        _require_unsharded(root)
        _require_inputs(method, sites)
    shared = shared_tensors(method, found, seed)
    parts = {c: (root, Part(root, sites, method, tensors[c], shared, name)) for c, (root, sites) in found.items()}
    return Adapter(name, method_name, method, parts, seed)


def _require_unsharded(root: nn.Module) -> None:
    """Raise InputError for a model that is in shards, since what is added to it later would be in none."""
    if any(is_sharded(parameter) for parameter in root.parameters()):
        wrong = f"{type(root).__name__} is in shards already"
        raise InputError("attach", wrong, "attach first, then fully_shard the model")


def _require_inputs(method: Method, sites: list[Site]) -> None:
    """Raise InputError for dropout on the inputs of a weight that is read, since they are not seen there."""
    read = [site.name for site in sites if is_read(site.module)] if method.input_dropout else []
    if read:
        wrong = f"{method.input_dropout} beside {read[0]}, a weight that is read without its inputs"
        raise InputError("dropout", wrong, "set it to 0, or leave that weight out of the targets")


def _require_bare(found: dict[str, tuple[nn.Module, list[Site]]], word: str) -> None:
    """Raise InputError if an adapter is attached to one of the models."""
    for root, _ in found.values():
        if parts_of(root):
            wrong = f"{parts_of(root)[0].adapter_name!r} is on {type(root).__name__}, and {word} needs it to itself"
            raise InputError("attach", wrong, "detach that adapter first")


def shared_tensors(method: Method, found: dict[str, tuple[nn.Module, list[Site]]], seed: int) -> dict[str, Tensor]:
    """What all sites of all components share, on the CPU."""
    return method.shared([site for _, sites in found.values() for site in sites], _generator(seed, "shared"))


def components(model: Any) -> dict[str, nn.Module]:
    """{component: module}: a bare module under the empty name, a pipeline's denoiser and text encoders, or a dict.

    Raises InputError for anything else.
    """
    if isinstance(model, nn.Module):
        return {"": model}
    if isinstance(model, dict):
        wrong = [k for k, v in model.items() if not isinstance(v, nn.Module) or "." in str(k) or not k]
        if not model or wrong:
            raise InputError("model", f"components {wrong or 'none'} are no named modules", "give {name: module}")
        return dict(model)
    if isinstance(getattr(model, "components", None), dict):
        known = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
        parts = {k: model.components.get(k) for k in known}
        parts = {k: v for k, v in parts.items() if isinstance(v, nn.Module)}
        if parts:
            return parts
    raise InputError("model", f"a {type(model).__name__}", "give a module, a diffusers pipeline or {name: module}")


def _named_places(model: Any, targets: Mapping[str, Any], search: Search) -> Iterator[Place]:
    parts = components(model)
    for component, words in targets.items():
        if component not in parts:
            wrong = f"{component!r} is no component{near(component, parts)}"
            raise InputError("targets", wrong, f"name some of {', '.join(parts)}")
        yield component, parts[component], search(parts[component], words)


def _places(model: Any, targets, search: Search) -> Iterator[Place]:
    parts = components(model)
    if len(parts) == 1 or (targets is None and isinstance(model, dict)):
        for component, root in parts.items():
            yield component, root, search(root, targets)
    elif targets is None:
        component = next(iter(parts))  # a pipeline's denoiser comes first
        yield component, parts[component], search(parts[component], None)
    else:
        hits, refused = [], None
        for component, root in parts.items():
            try:
                hits.append((component, root, search(root, targets)))
            except InputError as error:  # targets may belong to one component alone
                refused = refused or error
        if not hits:
            raise refused
        yield from hits


def _generator(seed: int, site: str) -> torch.Generator:
    """A generator that depends on the seed and the site's name alone, not on order or global state."""
    digest = hashlib.sha256(f"{seed}/{site}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
