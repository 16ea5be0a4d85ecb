"""Checkpoints: safetensors and JSON only, written so that a kill at any moment loses nothing that was complete.

    root/checkpoint-120/adapter.safetensors  optimizer.safetensors  state.json  manifest.json

`save` writes a hidden folder beside the target, fsyncs every file, writes the manifest (sha256 and size of each file)
last, and only then renames. Readers accept a folder whose manifest is there and whose hashes agree. No pickle is
written or read; a file that the manifest does not name is never opened.

One process writes under a root at a time (the run folder's lock sees to it; of several ranks, rank 0).
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import file_digest
from importlib.metadata import version
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vislora.errors import EnvironmentFault, InputError, near, printable

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"
_FINAL = re.compile(r"checkpoint-(\d+)")
_HIDDEN = re.compile(r"\.(checkpoint-(\d+))\.(tmp|old)-(\d+)")  # old: the one that a second save of its step replaces
log = logging.getLogger("vislora")


@dataclass(frozen=True)
class Checkpoint:
    """What `load` returns: `tensors` maps a file's stem to its named tensors on the CPU, `state` is the JSON state."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict
    path: Path


def sync_folder(path: Path) -> None:
    """fsync a folder, so that the names in it survive a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_synced(path: Path, text: str, mode: str = "w") -> None:
    """Write `text` as UTF-8 ("a": behind what is there) and fsync the file."""
    with path.open(mode, encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def require_space(path: Path, size: int) -> None:
    """EnvironmentFault unless the filesystem of `path` (or of its nearest existing parent) has `size` bytes free."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < size:
        raise EnvironmentFault(str(path), f"{free / 2**20:.1f} MiB are free, {size / 2**20:.1f} MiB are needed",
                               "free some space or choose another --output_dir")


def save(root: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: dict, limit: int | None) -> Path:
    """Commit root/checkpoint-<step> and return its path; afterwards keep the `limit` newest (None: all).

    `tensors` maps file stems to named tensors of any shape, dtype and device; `state` must be JSON-able (its tuples
    come back as lists). A complete checkpoint of the same step is replaced and stays readable until then.
    EnvironmentFault when the disk refuses; what was complete before is then still there.
    """
    if limit is not None and limit < 1:
        raise InputError("--checkpoints_total_limit", f"{limit} keeps no checkpoint", "give 1 or more, or leave it out")
    text = json.dumps(state, indent=1)  # a state that JSON cannot hold fails here, before anything is written
    target = Path(root) / f"checkpoint-{step}"
    temporary, parked = (target.parent / f".{target.name}.{kind}-{os.getpid()}" for kind in ("tmp", "old"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clean(target.parent)
        _write(temporary, step, tensors, text)
        if target.exists():
            os.rename(target, parked)
        os.rename(temporary, target)
        sync_folder(target.parent)
        _clean(target.parent)
        for _, old in _candidates(target.parent)[limit:] if limit else ():
            if old != target:  # the new one stays even where a folder of a later step is still about
                shutil.rmtree(old)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if parked.exists() and not target.exists():
            with suppress(OSError):  # if this fails too, readers find the parked folder by itself
                os.rename(parked, target)
        reason = getattr(error, "strerror", None) or str(error)
        raise EnvironmentFault(str(target), f"could not be written ({reason})",
                               "make room or restore write access; the older checkpoints are intact") from error
    return target


def _write(folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: str) -> None:
    folder.mkdir()
    for stem, named in tensors.items():
        save_file(_plain(named), folder / f"{stem}.safetensors")
    write_synced(folder / STATE, state)
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
            files[path.name] = {"sha256": file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}
    sync_folder(folder)
    libraries = {name: version(name) for name in ("torch", "safetensors")}
    manifest = {"format": FORMAT, "step": step, "files": files, "libraries": libraries}
    write_synced(folder / MANIFEST, json.dumps(manifest, indent=1))
    sync_folder(folder)


def _plain(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPU, contiguous, each in storage of its own: safetensors refuses tensors that share one (tied weights, views)."""
    seen, plain = set(), {}
    for name, tensor in named.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        plain[name] = tensor
    return plain


def _clean(root: Path) -> None:
    """Remove temporary folders of this process's number or of dead ones; put a parked checkpoint back or drop it."""
    for path in root.iterdir():
        match = _HIDDEN.fullmatch(path.name)
        if not match:
            continue
        final, kind, pid = root / match[1], match[3], int(match[4])
        if kind == "old" and not final.exists():
            os.rename(path, final)  # killed between the two renames of `save`
        elif kind == "old" or pid == os.getpid() or not _alive(pid):
            shutil.rmtree(path)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's process
        return True
    return True


def listed(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint under `root`, oldest first, whole or not: `load` tells."""
    return sorted((step, path) for step, path in _candidates(root) if _FINAL.fullmatch(path.name))


def _candidates(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint under `root`, newest first; a parked one where its step has no other."""
    found: dict[int, Path] = {}
    for path in sorted(root.iterdir() if root.is_dir() else (), reverse=True):  # "checkpoint-…" before ".checkpoint-…"
        final, hidden = _FINAL.fullmatch(path.name), _HIDDEN.fullmatch(path.name)
        if final and path.is_dir():
            found[int(final[1])] = path
        elif hidden and hidden[3] == "old":
            found.setdefault(int(hidden[2]), path)
    return sorted(found.items(), reverse=True)


def _read_manifest(path: Path) -> tuple[dict, str | None]:
    """The manifest of `path` and the first thing wrong with the folder (None: whole, every hash agrees)."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, f"no {MANIFEST} (the save was cut short)"
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"{MANIFEST} cannot be read ({error})"
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return {}, f"{MANIFEST} is not of format {FORMAT}"
    files, step = manifest.get("files"), manifest.get("step")
    if not isinstance(files, dict) or STATE not in files or not isinstance(step, int):
        return {}, f"{MANIFEST} lists no files or no step"
    for name, entry in files.items():
        if Path(name).name != name or not isinstance(entry, dict):
            return {}, f"{MANIFEST} names {printable(name)}, which is not a file of the folder"
        try:
            with (path / name).open("rb") as file:
                digest = file_digest(file, "sha256").hexdigest()
        except OSError as error:
            return {}, f"{name} cannot be read ({error.strerror})"
        if digest != entry.get("sha256"):
            return {}, f"{name} is not the file that was saved (its sha256 differs)"
    return manifest, None


def load(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU, every dtype as it was saved. InputError when it is missing or damaged."""
    path = Path(path)
    manifest, fault = _read_manifest(path)
    if fault is None:
        stems = [Path(name).stem for name in manifest["files"] if name.endswith(".safetensors")]
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            tensors = {stem: load_file(path / f"{stem}.safetensors") for stem in stems}
        except (OSError, ValueError, RecursionError, SafetensorError) as error:  # no damage: it was written so
            fault = f"a file of it cannot be read ({error})"
        else:
            if isinstance(state, dict):
                return Checkpoint(manifest["step"], tensors, state, path)
            fault = f"{STATE} holds no object"
    raise InputError(str(path), fault, "resume from another checkpoint, or --resume_from_checkpoint latest")


def locate(root: Path, which: str) -> Path:
    """The folder that `--resume_from_checkpoint which` names, its content unchecked: a path, or a name under `root`.

    For "latest" the newest. InputError when there is none.
    """
    root, flag = Path(root), "--resume_from_checkpoint"
    names = [path.name for _, path in _candidates(root)]
    if which == "latest":
        if not names:
            raise InputError(f"{flag} latest", f"{root} holds no checkpoint",
                             "start anew in another --output_dir, or name a checkpoint's folder")
        return root / names[0]
    for path in (Path(which), root / which):
        if path.is_dir() and _candidates(path):
            raise InputError(f"{flag} {which}", "is a folder of checkpoints, not one checkpoint",
                             f"name one of {', '.join(p.name for _, p in _candidates(path)[:5])}")
        if path.is_dir():
            return path
    holds = f"{root} holds {', '.join(names[:5])}" if names else f"{root} holds no checkpoint"
    raise InputError(f"{flag} {which}", f"no such folder{near(Path(which).name, names)}", f"{holds}; or give latest")


def resolve(root: Path, which: str) -> Path:
    """The whole checkpoint that `--resume_from_checkpoint which` means (see `locate`), its hashes checked.

    For "latest" a damaged newest gives way, with one warning, to the next older whole one. InputError when the one
    that was named is missing or damaged, or when none is whole.
    """
    named = locate(root, which)
    faults = []
    for path in [path for _, path in _candidates(Path(root))] if which == "latest" else [named]:
        fault = _read_manifest(path)[1]
        if fault is None:
            if faults:
                log.warning("%s -> resuming from %s instead", printable("; ".join(faults)), path.name)
            return path
        faults.append(f"{path}: {fault}")
    raise InputError(f"--resume_from_checkpoint {which}", "no whole checkpoint: " + "; ".join(faults),
                     "name another one, or leave the flag out to start anew")
