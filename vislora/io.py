"""Adapters on disk: one safetensors file that carries its own configuration, read strictly both ways."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .adapter import Adapter
from .adapters import Method, get
from .attach import build, components, shared_tensors
from .baselines import full
from .distributed import whole
from .errors import EnvironmentFault, InputError, near
from .fit import place, require_base, require_modest
from .handle import Handle
from .linalg import precise
from .measure import fingerprint
from .quantized import is_quantized
from .site import Site, candidates, find_named, qualified

log = logging.getLogger("vislora")
FILE = "adapter.safetensors"
PEFT_CONFIG = "adapter_config.json"
PEFT_FILE = "adapter_model.safetensors"
LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "lora.safetensors"
_FORMAT = 1


def save(adapter: Adapter, folder: Path) -> Path:
    """Write folder/adapter.safetensors: every tensor as "<site>.<tensor>", the configuration in the header.

    Of a model in shards every process must call it.
    """
    header = header_of(adapter, components=list(adapter.parts), tensors=_kinds(adapter), kernels=_kernels(adapter))
    tensors = {name: whole(t.detach()).cpu().contiguous() for name, t in adapter.named_tensors()}
    require_finite(tensors, "adapter")
    return write(tensors, header, folder / FILE)


def header_of(handle: Handle, **more: Any) -> dict[str, str]:
    """The header of a handle's safetensors file: method, options, seed and the base's fingerprint; `more` beside it."""
    config = {
        "format": _FORMAT,
        "method": handle.method_name,
        "options": handle.method.options(),
        "seed": handle.seed,
        **more,
        "base": fingerprint(handle),
    }
    return {"format": "pt", "vislora": json.dumps(config)}


def _kernels(adapter: Adapter) -> dict[str, list[int]]:
    """{site: its weight's shape but for the outputs} of convolutions, for readers that have no model at hand."""
    return {
        qualified(component, site.name): list(site.shape[1:])
        for component, part in adapter.parts.items() for site in part.sites if len(site.shape) > 2
    }  # fmt: skip


def _kinds(adapter: Adapter) -> dict[str, bool]:
    """{tensor name: whether it trains}, the same for every site."""
    sites = [part.own_tensors(site) for part in adapter.parts.values() for site in part.sites]
    kinds = [{name: isinstance(t, nn.Parameter) for name, t in tensors.items()} for tensors in sites]
    if any(kind != kinds[0] for kind in kinds):
        raise InputError(adapter.method_name, "gives its sites different tensors", "give each the same names")
    return kinds[0]


def write(tensors: dict[str, Tensor], header: dict[str, str], path: Path) -> Path:
    """Write a safetensors file through a temporary one and a rename, so that no half-written file bears the name."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        try:
            save_file(tensors, temporary, metadata=header)
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.chmod(temporary, 0o644)  # mkstemp's own mode hides the file from other users
            os.rename(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        wrong = f"cannot be written ({error})"
        raise EnvironmentFault(str(path), wrong, "free space or choose another folder") from None
    return path


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file's tensors, on the CPU, and header. Raises InputError naming the file for a damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise InputError(str(path), f"is no whole safetensors file ({error})", "copy or train it again") from None


def load(
    model: Any, path: str | Path, name: str = "default", weight: float = 1.0, allow_other_base: bool = False
) -> Handle:
    """Attach a saved adapter to `model`: our own folder or file, a run's folder, or a LoRA of diffusers or kohya.

    What `save` of full fine-tuning and of PEFT's methods wrote is read back too, as is any folder in PEFT's layout.
    model: a module, a pipeline or {component: module}, as for `attach`.
    weight: the adapter's strength. allow_other_base: skip the comparison with the base it was trained on.
    Every layer of the file must be found in the model, by name and shape, and every tensor be finite.
    Raises InputError for a file of which nothing, or only a part, fits; the model is then untouched.
    """
    if folders := _peft_folders(Path(path)):
        from .baselines import _peft_handle  # PEFT takes seconds to import

        return _weighted(_peft_handle.load(model, folders, name, allow_other_base), weight)
    file = locate(Path(path))
    tensors, header = read(file)
    if not tensors:
        raise InputError(str(file), "holds no tensors", "train or copy it again")
    require_finite(tensors, str(file))
    if "vislora" in header:
        config = _config(file, header["vislora"])
        read_in = full.load if config["method"] == full.Full.word else _load_own
        adapter = read_in(model, file, tensors, config, name, allow_other_base)
    else:
        from . import foreign
        from .formats import Stored

        adapter = foreign.load(model, file, Stored(tensors, header), name)
    log.info("%s: all of its %d layers are matched", file, len(adapter.sites))
    return _weighted(adapter, weight)


def _weighted(handle: Handle, weight: float) -> Handle:
    try:
        handle.weight = weight
        return handle
    except InputError:
        handle.detach()
        raise


def _peft_folders(path: Path) -> dict[str, Path]:
    """{component: folder} where `path`, or a run's adapter folder in it, is in PEFT's layout; else nothing."""
    if path.name == PEFT_FILE and (path.parent / PEFT_CONFIG).is_file():
        return {"": path.parent}
    for folder in (path, path / "adapter"):
        if (folder / PEFT_CONFIG).is_file():
            return {"": folder}
        found = {file.parent.name: file.parent for file in sorted(folder.glob(f"*/{PEFT_CONFIG}"))}
        if found and not (folder / FILE).exists():
            return found
    return {}


def locate(path: Path) -> Path:
    """The adapter's file in a folder, or `path` itself. Raises InputError for pickles, and where it is not clear."""
    if path.is_dir():
        for candidate in (path / FILE, path / "adapter" / FILE, path / LORA_FILE, path / KOHYA_FILE):
            if candidate.is_file():
                return candidate
        held = sorted(path.glob("*.safetensors"))
        if len(held) == 1:
            return held[0]
        wrong = f"holds no adapter: it holds {len(held)} safetensors files, none of a known name"
        raise InputError(str(path), wrong, f"name the file, or give a folder with {FILE} or {LORA_FILE}")
    if not path.is_file():
        raise InputError(str(path), "does not exist", "give an adapter's folder or file")
    if path.suffix != ".safetensors":
        wrong = f"is a {path.suffix or 'nameless'} file, which may run code when read"
        raise InputError(str(path), wrong, "convert it to .safetensors with the tool that made it")
    return path


def _config(file: Path, text: str) -> dict[str, Any]:
    """Our header, of a format that this version reads."""
    try:
        config = dict(json.loads(text))
        version, _ = config["format"], config["method"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(str(file), f"has a damaged header ({error!r})", "copy it again") from None
    if version != _FORMAT:
        raise InputError(str(file), f"is of format {version}, this vislora reads {_FORMAT}", "update vislora")
    return config


def _load_own(model, file: Path, tensors: dict[str, Tensor], config: dict, name: str, other_base: bool) -> Adapter:
    try:
        method_name, options = str(config["method"]), dict(config["options"])
        shapes = {name: [int(m), int(n)] for name, (m, n) in config["base"]["shapes"].items()}
        kinds = {str(name): bool(trains) for name, trains in config["tensors"].items()}
        saved_norms = {name: float(norm) for name, norm in config["base"]["norms"].items() if shapes[name]}
        seed, prefixes = int(config["seed"]), [str(prefix) for prefix in config["components"]]
        on_quantized = bool(config["base"].get("quantized"))
        method = get(method_name).from_options(method_name, options)
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(str(file), f"has a damaged header ({error!r})", "copy it again") from None
    roots = place(components(model), prefixes, lambda root: len(find_named(root, shapes)) == len(shapes), file)
    found: dict[str, tuple[nn.Module, list[Site]]] = {}
    values: dict[str, list[dict[str, Tensor]]] = {}
    renamed = {}
    for prefix, (component, root) in roots.items():
        names = [n.removeprefix(prefix + ".") if prefix else n for n in shapes if _has_prefix(n, prefix, prefixes)]
        sites = find_named(root, names)
        require_all(names, sites, root, file)
        for site in sites:
            saved = qualified(prefix, site.name)
            if shapes[saved] != [site.m, site.n]:
                wrong = f"{saved} is {shapes[saved]} in the adapter, {[site.m, site.n]} in the model"
                raise InputError(str(file), wrong, "load it into the model it was trained on")
            renamed[saved] = site
        found[component] = (root, sites)
        values[component] = [{} for _ in sites]
        for site, tensors_of_site in zip(sites, values[component], strict=True):
            for key, trains in kinds.items():
                stored = tensors.pop(f"{qualified(prefix, site.name)}.{key}", None)
                if stored is None or not stored.is_floating_point():
                    held = "missing" if stored is None else f"of {stored.dtype}"
                    raise InputError(str(file), f"tensor {key} of {site.name} is {held}", "train or copy it again")
                stored = precise(stored)
                tensors_of_site[key] = nn.Parameter(stored) if trains else stored
    if not renamed:
        raise InputError(str(file), "adapts no layer", "train or copy it again")
    require_modest(method, shapes, file)
    shared = shared_tensors(method, found, seed)
    for component, (_, sites) in found.items():
        for site, own in zip(sites, values[component], strict=True):
            _require_fit(method, site, {**method.share_of(shared, site), **own}, file)
    if tensors:
        wrong = f"{len(tensors)} tensors belong to no layer: {', '.join(sorted(tensors)[:5])}"
        raise InputError(str(file), wrong, "copy it again")
    if not other_base:
        rounded = on_quantized or any(is_quantized(site.module) for site in renamed.values())
        require_base(saved_norms, {saved: site.weight for saved, site in renamed.items()}, file, rounded)
    adapter = build(name, method_name, method, found, values, seed)
    for part in adapter.parts.values():
        part.prepared = True
    return adapter


@torch.no_grad()
def _require_fit(method: Method, site: Site, tensors: dict[str, Tensor], file: Path) -> None:
    """Raise InputError unless the tensors make an update of the site's shape."""
    try:
        update = method.factors(SimpleNamespace(**tensors))
        shape = tuple(update.product().shape)
    except (RuntimeError, IndexError, ValueError, AttributeError):
        shape = None
    if shape != (site.m, site.n):
        shown = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
        wrong = f"the tensors of {site.name} do not fit its {site.m} x {site.n} weight ({shown})"
        raise InputError(str(file), wrong, "train or copy it again")


def _has_prefix(name: str, prefix: str, prefixes: list[str]) -> bool:
    return prefixes == [""] or name.startswith(prefix + ".")


def require_all(names: list[str], sites: list[Site], root: nn.Module, file: Path) -> None:
    """Raise InputError, with their number and what is near, for names that no site has."""
    have = {site.name for site in sites}
    missing = [n for n in names if n not in have]
    if missing:
        known = list(candidates(root))
        wrong = f"{len(missing)} of its {len(names)} layers are not in {type(root).__name__}: {', '.join(missing[:5])}"
        raise InputError(str(file), wrong + near(missing[0], known), "load it into the model it was trained on")


def require_finite(tensors: dict[str, Tensor], subject: str) -> None:
    """Raise InputError naming the first tensor that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(subject, f"{name} holds NaN or infinity", "go back to an earlier checkpoint")


def require_same_tensors(own: dict[str, Tensor], given: dict[str, Tensor], subject: str) -> None:
    """Raise InputError unless both hold the same names with the same shapes."""
    if own.keys() != given.keys():
        odd = sorted(own.keys() ^ given.keys())
        wrong = f"{len(odd)} tensors are on one side only: {', '.join(odd[:5])}"
        raise InputError(subject, wrong, "use the targets and options it was saved with")
    for name, tensor in own.items():
        if tensor.shape != given[name].shape:
            wrong = f"{name} is {tuple(given[name].shape)}, {tuple(tensor.shape)} is needed"
            raise InputError(subject, wrong, "use the rank and options it was saved with")
