"""One cell of a sweep: its folder, its commands, and whether it is done."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from vislora import __version__
from vislora.sweep.plan import Cell, Plan

STATE, LOG, TRAINED = "cell.json", "log.txt", "trained"
_GRACE = 20  # seconds a child has to write its checkpoint after SIGTERM


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: `ok`, its seconds, for a failed one the last line that it printed, and of which code."""

    ok: bool
    seconds: float
    last: str = ""
    made_by: str = ""


def made_by(root: Path) -> str:
    """The code that runs: the commit of `root`, "dirty" where tracked files differ from it, and torch's version.

    Without a repository or git it is the package's version.
    """
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    ceiling = {"GIT_CEILING_DIRECTORIES": str(root.resolve().parent)}  # of `root` itself, none around it
    try:
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ceiling})
        commit = done.stdout.strip() if done.returncode == 0 else ""
    except OSError:
        commit = ""
    return f"{commit or 'vislora ' + __version__}, torch {metadata.version('torch')}"


class Place:
    """A cell's folder under the sweep's: the run, the settings file, the log and the state."""

    def __init__(self, sweep: Path, cell: Cell):
        self.cell, self.path = cell, sweep / "cells" / cell.folder
        self.run = self.path / "run"

    def outcome(self) -> Outcome | None:
        """How it ended; None where it never ran, was cut, or its state cannot be read."""
        try:
            state = json.loads((self.path / STATE).read_text())
            words = (str(state.get(key, "")) for key in ("last", "made_by"))
            return Outcome(bool(state["ok"]), float(state["seconds"]), *words)
        except (OSError, ValueError, KeyError):
            return None

    def value(self, where: str) -> float | None:
        """A number of the run: `where` is file:dotted.path; None where it is missing.

        Of a .jsonl it is the last line that has it, and with mean(path) the mean over all lines that have it.
        """
        file, _, path = where.partition(":")
        mean = file.endswith(".jsonl") and path.startswith("mean(") and path.endswith(")")
        steps = (path[5:-1] if mean else path).split(".")
        try:
            text = (self.run / file).read_text()
        except OSError:
            return None
        found = [_number(line, steps) for line in (text.splitlines() if file.endswith(".jsonl") else [text])]
        held = [value for value in found if value is not None]
        return math.fsum(held) / len(held) if mean and held else held[-1] if held else None


def _number(text: str, steps: list[str]) -> float | None:
    """The number in a JSON text that the steps lead to; None where there is none."""
    try:
        found: Any = json.loads(text)
        for step in steps:
            found = found[int(step)] if isinstance(found, list) else found[step]
        return float(found)
    except (ValueError, KeyError, IndexError, TypeError):
        return None


def commands(plan: Plan, place: Place, root: Path) -> list[list[str]]:
    """The training command (going on from a checkpoint where a cut run left one), then those that evaluate: these
    alone where training has come to its end before."""
    train = [sys.executable, str(root / plan.script), "--config", str(place.path / "settings.yaml"),
             "--output_dir", str(place.run)]  # fmt: skip
    checkpoints = place.run / "checkpoints"
    if checkpoints.is_dir() and any(checkpoints.iterdir()):
        train += ["--resume_from_checkpoint", "latest"]
    after = [shlex.split(command.format(run=shlex.quote(str(place.run)))) for command in plan.evaluate]
    whole = (place.path / TRAINED).is_file()
    return [*([] if whole else [train]), *([sys.executable, str(root / words[0]), *words[1:]] for words in after)]


class Runner:
    """Runs cells as child processes, each in a session of its own, and can stop them all."""

    def __init__(self, plan: Plan, sweep: Path, root: Path):
        self.plan, self.sweep, self.root = plan, sweep, root
        self.children: set[subprocess.Popen] = set()
        self.stopped = False

    def run(self, cell: Cell, environment: Mapping[str, str]) -> Outcome | None:
        """Run a cell to its end and write its state; None where the sweep was stopped meanwhile."""
        place = Place(self.sweep, cell)
        place.path.mkdir(parents=True, exist_ok=True)
        (place.path / STATE).unlink(missing_ok=True)
        (place.path / "settings.yaml").write_text(yaml.safe_dump(dict(cell.settings), sort_keys=False))
        trained = place.path / TRAINED
        if not place.run.is_dir():
            trained.unlink(missing_ok=True)  # somebody has taken the run away
        if not trained.is_file() and not (place.run / "checkpoints").is_dir():
            shutil.rmtree(place.run, ignore_errors=True)  # nothing to go on from
        begun, code, code_of = time.monotonic(), 0, made_by(self.root)
        with (place.path / LOG).open("w") as log:
            for command in commands(self.plan, place, self.root):
                code = self._child(command, log, environment)
                if code or self.stopped:
                    break
                trained.touch()  # now, if not before: it is the first command
        if self.stopped:
            return None
        last = "" if code == 0 else _last_line(place.path / LOG, code)
        outcome = Outcome(code == 0, time.monotonic() - begun, last, code_of)
        state = {"ok": outcome.ok, "seconds": round(outcome.seconds, 1), "last": last, "label": cell.label,
                 "made_by": code_of}  # fmt: skip
        state |= {"tuning": cell.tuning} if cell.tuning else {}
        part = place.path / (STATE + ".part")
        part.write_text(json.dumps(state, indent=1) + "\n")
        part.replace(place.path / STATE)
        return outcome

    def _child(self, command: list[str], log, environment: Mapping[str, str]) -> int:
        log.write(f"$ {shlex.join(command)}\n")
        log.flush()
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=self.root, start_new_session=True,
                                 env={**os.environ, **environment})  # fmt: skip
        self.children.add(child)
        try:
            if self.stopped:  # between the last look and the start
                _signal(child, signal.SIGTERM)
            return child.wait()
        finally:
            self.children.discard(child)

    def stop(self) -> None:
        """End every child: they may write their checkpoints first."""
        self.stopped = True
        for child in list(self.children):
            _signal(child, signal.SIGTERM)
        end = time.monotonic() + _GRACE
        while self.children and time.monotonic() < end:
            time.sleep(0.05)
        for child in list(self.children):
            _signal(child, signal.SIGKILL)


def _signal(child: subprocess.Popen, number: int) -> None:
    try:
        os.killpg(child.pid, number)
    except ProcessLookupError:
        pass


def _last_line(log: Path, code: int) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"exit {code}: {lines[-1][:300] if lines else ''}"
