"""What can be analysed: a run with its checkpoints and final adapter, or adapter files in a row, each read when asked.

A run's checkpoints of our methods, its full fine-tunings included, need no model: their tensors and the method's own
`factors` say what is added. Of PEFT's methods the final adapter alone is read.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import io
from ..adapters import get
from ..baselines import BASELINES
from ..errors import InputError
from ..formats import Base, LoraFile, Stored, ours, read
from ..formats.lora import Names, split_component
from ..formats.spectrum import stated_base
from ..training.checkpoint import MANIFEST, STATE, resolve
from ..training.run import RunFolder
from .measures import Change

log = logging.getLogger("vislora")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# The file of a checkpoint that holds an adapter, and what leads its tensors' names there: beside them may be a head's.
_FILES = {"adapter.safetensors": "", "tuned.safetensors": "adapter."}
_HEAD = re.compile(r"head\..*\b(weight|bias)")  # no method's tensors are called so
_MODEL_KEYS = ("pretrained_model_name_or_path", "model_name_or_path", "model")


@dataclass(frozen=True)
class Point:
    """What a run had after `step` steps. key: changes with the file's content. file: of tensors, or PEFT's folder."""

    step: int
    key: str
    file: Path
    header: Mapping[str, str] | None = None  # of a checkpoint, whose file has none


@dataclass
class Series:
    """One curve: points by step. cosines: {step: {layer: cosine}} that the run's log holds."""

    label: str
    points: list[Point]
    method: str = ""
    base: Base | None = None
    cosines: dict[int, dict[str, float]] = field(default_factory=dict)
    run: RunFolder | None = None

    def with_steps(self, steps: list[int]) -> Series:
        """Of these steps alone. Raises InputError for one that is not there."""
        have = {point.step: point for point in self.points}
        for step in steps:
            if step not in have:
                wrong = f"{self.label} has no step {step}"
                raise InputError("--steps", wrong, f"it has {', '.join(map(str, have))}")
        return replace(self, points=[have[step] for step in sorted(set(steps))])


def of_run(folder: Path, base: Base | None = None) -> Series:
    """A run's series. Raises InputError for a folder that holds no run, or a run without anything to read."""
    run = RunFolder(folder)
    if not folder.is_dir():
        raise InputError(f"--run {folder}", "is no folder", "name a run's folder")
    config = run.read_config()
    method = str(config.get("adapter", ""))
    points = [] if method == "peft" else [_checkpoint(path) for path in _checkpoints(run)]
    last = _final_step(run, config)
    if run.adapter.is_dir() and last not in {point.step for point in points}:
        points.append(_file(run.adapter, last))
    if not points:
        raise InputError(f"--run {folder}", "holds no checkpoint and no adapter", "train it, or name another run")
    if base is None:
        named = next((str(config[key]) for key in _MODEL_KEYS if config.get(key)), "")
        base = Base(Path(named)) if named and Path(named).is_dir() else None
    return Series(folder.name, sorted(points, key=lambda p: p.step), method, base, _logged(run), run)


def of_files(files: list[Path], base: Base | None = None) -> Series:
    """Adapter files or folders in a row, at the steps that end their names, else numbered from 1."""
    numbers = [re.findall(r"\d+", file.name.removesuffix(".safetensors")) for file in files]
    steps = [int(found[-1]) for found in numbers if found]
    if len(set(steps)) < len(files):
        steps = list(range(1, len(files) + 1))
    points = [_file(file, step) for file, step in zip(files, steps, strict=True)]
    return Series(files[0].stem, sorted(points, key=lambda p: p.step), "", base)


def _checkpoints(run: RunFolder) -> list[Path]:
    found = run.checkpoints.iterdir() if run.checkpoints.is_dir() else ()
    return [path for path in found if path.is_dir() and _CHECKPOINT.fullmatch(path.name)]


def _checkpoint(path: Path) -> Point:
    """A whole checkpoint, its hashes checked. Raises InputError for a damaged one."""
    try:
        resolve(path.parent, str(path))
    except InputError as error:
        raise InputError(str(path), error.wrong, "delete it, or bring it back from a copy") from None
    held = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
    name = next((name for name in _FILES if name in held), None)
    if name is None:
        raise InputError(str(path), f"holds no adapter, but {', '.join(held)}", "analyse the run's adapter folder")
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    try:
        config, base = state["config"], state["base"]
        header = {
            "format": ours.VERSION, "method": config["adapter"], "options": config["adapter_options"],
            "seed": config["seed"], "components": list(base["classes"]), "base": base,
        }  # fmt: skip
    except KeyError as error:
        raise InputError(str(path), f"its state lacks {error}", "analyse the run's adapter folder instead") from None
    return Point(int(path.name.split("-")[1]), held[name]["sha256"], path / name, {ours.HEADER: json.dumps(header)})


def own_tensors(point: Point) -> dict[str, Tensor]:
    """The adapter's tensors, as our own files name them, without a head's that a checkpoint has beside them."""
    lead, tensors = _FILES.get(point.file.name, ""), io.read(point.file)[0]
    if lead:
        return {key.removeprefix(lead): tensor for key, tensor in tensors.items() if key.startswith(lead)}
    return {key: tensor for key, tensor in tensors.items() if not _HEAD.fullmatch(key)}


def _file(path: Path, step: int) -> Point:
    """An adapter's file or folder, not opened yet. Raises InputError where there is none."""
    file = path if path.is_dir() and list(path.glob(f"**/{io.PEFT_CONFIG}")) else io.locate(path)
    stamps = [f.stat() for f in ([file] if file.is_file() else sorted(file.rglob("*.safetensors")))]
    return Point(step, f"{file.resolve()} {[(s.st_size, s.st_mtime_ns) for s in stamps]}", file)


def _final_step(run: RunFolder, config: Mapping) -> int:
    """After which the run's adapter was written: metrics.json says, else the configuration."""
    try:
        return int(json.loads(run.metrics_file.read_text(encoding="utf-8"))["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return int(config.get("max_train_steps") or 0)


def _logged(run: RunFolder) -> dict[int, dict[str, float]]:
    """The gradient probe's cosines, where the run had one. A line that a kill cut short is passed over."""
    found: dict[int, dict[str, float]] = {}
    try:
        lines = run.lines_file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return found
    for line in lines:
        try:
            entry = json.loads(line)
            cosines = {name: float(m["cosine"]) for name, m in entry.get("layers", {}).items() if "cosine" in m}
        except (ValueError, AttributeError, TypeError):
            continue
        if cosines:
            found[int(entry["step"])] = cosines
    return found


# ---- what a point adds to each layer


def changes(point: Point, base: Base | None) -> dict[str, tuple[Names, Callable[[], Change]]]:
    """{layer: ((component, path), call that makes its Change)}. Raises InputError for a file that does not fit."""
    header = point.header if point.header is not None else _header(point.file)
    if ours.HEADER in header and json.loads(header[ours.HEADER])["method"] in BASELINES:
        return dict(_dense(point.file, base, _FILES.get(point.file.name, "")))
    if point.header is None:
        file = read(point.file, base)
    else:
        tensors = own_tensors(point)
        config = json.loads(point.header[ours.HEADER])
        config["tensors"] = dict.fromkeys(sorted({key.rpartition(".")[2] for key in tensors}), True)
        file = ours.read(point.file, Stored(tensors, {ours.HEADER: json.dumps(config)}))
    if base is not None:
        base.require(file.path, file.layers, stated_base(file))
    method, by_site = _method(file)
    return {
        layer.name: ((layer.component, layer.path), partial(_change, layer, file, method, site))
        for layer, site in zip(file.layers, by_site, strict=True)
    }


def _header(file: Path) -> Mapping[str, str]:
    if file.is_dir():
        return {}
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(str(file), f"is no whole safetensors file ({error})", "copy or train it again") from None


def _method(file: LoraFile) -> tuple[object, list[SimpleNamespace | None]]:
    """The method of our own file, and its tensors layer by layer; (None, nothing) of others."""
    if ours.HEADER not in file.header:
        return None, [None] * len(file.layers)
    config = ours.header_of(file.path, next(iter(file.stored.values())))
    tensors = next(iter(file.stored.values())).tensors
    sites = [SimpleNamespace(**{kind: tensors[f"{name}.{kind}"] for kind in config["kinds"]})
             for name in config["shapes"]]  # fmt: skip
    return get(config["method"]).from_options(config["method"], config["options"]), sites


@torch.no_grad()
def _change(layer, file: LoraFile, method, tensors: SimpleNamespace | None) -> Change:
    up, down = layer.factors()
    magnitude = None if layer.magnitude is None else layer.magnitude.flatten().double()
    rank = getattr(method, "rank", layer.rank)
    bases = {} if method is None else method.bases(tensors)
    return Change(up, down, magnitude, rank=rank, bound=file.bounds.get(layer.name), bases=bases)


def _dense(file: Path, base: Base | None, lead: str) -> Iterator[tuple[str, tuple[Names, Callable[[], Change]]]]:
    """Full fine-tuning keeps the weights themselves; every matrix that the base has is compared, and what it lacks, a
    head that came with the task, is told of. `lead`: what the names begin with in the file."""
    if base is None:
        raise InputError(str(file), "holds whole weights", "name the base's folder by --base")
    opened, found, lacking = safe_open(file, framework="pt"), [], None
    for key in opened.keys():
        if not (key.startswith(lead) and key.endswith(".weight") and len(opened.get_slice(key).get_shape()) > 1):
            continue
        component, path = split_component(key.removeprefix(lead).removesuffix(".weight"))
        try:
            base.place(component, path)
        except InputError as error:
            lacking = lacking or error
            continue
        make = partial(_difference, opened, key, base, component, path)
        found.append((f"{component}.{path}".lstrip("."), ((component, path), make)))
    if lacking and not found:
        raise lacking
    if lacking:
        log.warning("%s; it is left out", lacking)
    yield from found


def _difference(opened, key: str, base: Base, component: str, path: str) -> Change:
    return Change(dense=opened.get_tensor(key).flatten(1).double() - base.weight(component, path).double())
