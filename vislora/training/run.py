"""Run folders: where a run's files stand, who may write there, and how it stops on a signal."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import signal
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

import yaml

from vislora.errors import EnvironmentFault, InputError, printable
from vislora.training import checkpoint

_LOCK = ".lock"
_OTHER = "choose another --output_dir, or --resume_from_checkpoint latest to go on with this one"
_held: set[int] = set()  # descriptors of this process's locks
log = logging.getLogger("vislora")


def _forget_locks() -> None:
    """In a forked child (a loader worker): it must not keep a lock alive after its parent's death."""
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_forget_locks)


@dataclass
class RunFolder:
    """The folder of one run. `RunFolder(path)` only names its files; `RunFolder.create` makes, checks and locks it.

    Of several ranks, rank 0 creates; the others use `RunFolder(path)` with the path that rank 0 sends them.
    """

    path: Path
    _handle: int | None = None
    _log_failed: bool = False

    @classmethod
    def create(cls, output_dir: str | None, resume: str | None, root: str | Path = "runs") -> RunFolder:
        """The folder to write into, locked for this process until `close` or its death.

        `output_dir` None: a fresh numbered folder under `root` (also when `resume` names a checkpoint elsewhere).
        `resume` is --resume_from_checkpoint: with a run in `output_dir` it must be "latest" or one of that run's own
        checkpoints. InputError when the folder holds another run or strangers' files, or nothing to resume;
        EnvironmentFault when a living process runs there or it cannot be made. A refusal writes nothing.
        """
        if output_dir is None:
            cls.check(output_dir, resume, root)
            return cls(_fresh(Path(root)))._lock()
        folder = cls(Path(output_dir))
        folder._check(resume)
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot(folder.path, error) from error
        folder._lock()
        try:
            folder._check(resume)  # again under the lock: another run may have moved in meanwhile
        except InputError:
            folder.close()
            raise
        return folder

    @classmethod
    def check(cls, output_dir: str | None, resume: str | None, root: str | Path = "runs",
              data: Iterable[str | Path | None] = ()) -> None:
        """Raise what `create` would, as far as it can be known without writing; InputError too where the run would
        write into one of the folders `data`, whose content is taken for data."""
        for place, folder in ((Path(output_dir or root), Path(name)) for name in data if name):
            if folder.is_dir() and place.resolve().is_relative_to(folder.resolve()):
                raise InputError(f"--output_dir {place}", f"lies in the data folder {folder}", "choose one outside")
        if output_dir is not None:
            cls(Path(output_dir))._check(resume)
        elif resume == "latest":
            raise InputError("--resume_from_checkpoint latest", "no run is named", "add its --output_dir")
        elif resume is not None:
            checkpoint.locate(Path(root), resume)

    def _check(self, resume: str | None) -> None:
        """InputError unless this folder may be written to by a run that starts, or resumes as `resume` says."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"--output_dir {self.path}", "is a file", "name a folder")
        try:
            present = sorted(p.name for p in self.path.iterdir() if not p.name.startswith("."))
        except FileNotFoundError:
            present = []
        except OSError as error:
            raise _cannot(self.path, error) from error
        holds_run = self.config_file.name in present or self.checkpoints.name in present
        if resume is not None:
            if resume == "latest" and not holds_run:
                raise InputError("--resume_from_checkpoint latest", f"--output_dir {self.path} holds no run",
                                 "name the --output_dir of the run to go on with, or leave the flag out")
            place = checkpoint.locate(self.checkpoints, resume)
            if holds_run and place.resolve().parent != self.checkpoints.resolve():
                raise InputError(f"--output_dir {self.path}", f"holds another run than the one of {resume}", _OTHER)
            if holds_run:
                return
        if holds_run:
            raise InputError(f"--output_dir {self.path}", "holds another run", _OTHER)
        if present:
            raise InputError(f"--output_dir {self.path}", f"is not empty ({', '.join(present[:3])})",
                             "choose a new or an empty folder, or leave the flag out for a numbered one under runs/")

    def _lock(self) -> RunFolder:
        try:
            handle = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise _cannot(self.path, error) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(handle, 200, 0).decode("utf-8", "replace").strip() or "another process"
            os.close(handle)
            raise EnvironmentFault(f"--output_dir {self.path}", f"is in use by {printable(owner)}",
                                   "wait until it ends, stop it, or choose another --output_dir") from None
        except OSError as error:  # some network filesystems have no locks
            log.warning("%s: no lock (%s) -> two runs in this folder would not notice each other",
                        printable(str(self.path)), error.strerror)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        _held.add(handle)
        self._handle = handle
        return self

    def close(self) -> None:
        """Release the lock. The lock file stays: removing it would let two processes lock two files of one name."""
        if self._handle in _held:
            _held.discard(self._handle)
            os.close(self._handle)
        self._handle = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.json"

    @property
    def lines_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def readme(self) -> Path:
        return self.path / "README.md"

    def write_config(self, config: Mapping) -> None:
        """Write config.yaml: plain values only (`config.to_dict` gives such)."""
        _replace(self.config_file, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))

    def read_config(self) -> dict:
        """The mapping in config.yaml. InputError when there is none or it is no YAML mapping."""
        try:
            config = yaml.safe_load(self.config_file.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise InputError(str(self.config_file), f"cannot be read ({reason})", "name a run's folder") from error
        if not isinstance(config, dict):
            raise InputError(str(self.config_file), "holds no mapping", "restore it from the run's start")
        return config

    def write_metrics(self, metrics: Mapping) -> None:
        """Replace metrics.json in one move. NaN and infinities become the strings "nan", "inf", "-inf"."""
        _replace(self.metrics_file, json.dumps(_finite(metrics), indent=1, allow_nan=False) + "\n")

    def log(self, step: int, values: Mapping) -> None:
        """Append {"step": step, **values} to metrics.jsonl. When it cannot be written: one warning, and on."""
        line = json.dumps({"step": step, **_finite(values)}, allow_nan=False) + "\n"
        try:
            checkpoint.write_synced(self.lines_file, line, "a")
        except OSError as error:
            if not self._log_failed:
                log.warning("%s: cannot be written (%s) -> the run goes on without it",
                            printable(str(self.lines_file)), error.strerror)
            self._log_failed = True

    def rewind(self, step: int, again: str | None = None) -> None:
        """Drop the logged lines after `step` (the resumed checkpoint's), a last line that a kill cut short, and of
        `step` itself those with a key that begins with `again`: they are made again."""
        if not self.lines_file.exists():
            return
        kept = []
        for line in self.lines_file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            with suppress(ValueError):
                entry = json.loads(line)
                at = entry.get("step", math.inf) if isinstance(entry, dict) and line.endswith("\n") else math.inf
                if at < step or (at == step and not (again and any(key.startswith(again) for key in entry))):
                    kept.append(line)
        _replace(self.lines_file, "".join(kept))


def _fresh(root: Path) -> Path:
    """Make and return the first free folder root/0001, 0002, …; mkdir decides between runs that start together."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        number = max((int(p.name) for p in root.iterdir() if p.name.isascii() and p.name.isdigit()), default=0)
        while True:
            number += 1
            path = root / f"{number:04d}"
            try:
                path.mkdir()
            except FileExistsError:
                continue
            return path
    except OSError as error:
        raise _cannot(root, error) from error


def _cannot(path: Path, error: OSError) -> EnvironmentFault:
    return EnvironmentFault(f"--output_dir {path}", f"cannot be used ({error.strerror})",
                            "choose a folder that can be written to")


def _replace(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader, or a kill, sees the old file or the new one and nothing between."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        checkpoint.write_synced(temporary, text)
        os.replace(temporary, path)
        checkpoint.sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise EnvironmentFault(str(path), f"could not be written ({error.strerror})",
                               "make room or restore write access") from error


def _finite(value):
    """`value` with non-finite floats as strings that float() reads back: JSON has no word for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


class InterruptFlag:
    """`with InterruptFlag() as stop:` turns SIGTERM and SIGINT into a flag, to be asked after each step.

    `bool(stop)` tells whether a signal came; `stop.status` is the exit status for it: 143 (SIGTERM), 130 (SIGINT) or
    None. A second signal ends the process at once with its status. Only the main thread may enter.
    """

    status: int | None = None
    agreed, sent = False, None  # of several processes: see `processes.ends_step`

    def __bool__(self) -> bool:
        return self.status is not None

    def __enter__(self) -> InterruptFlag:
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.status is not None:
            os._exit(128 + number)
        self.status = 128 + number
        # os.write, not print: the signal may have come in the middle of a print
        os.write(2, b"\nvislora: stopping after this step, with a checkpoint; a second signal stops at once\n")
