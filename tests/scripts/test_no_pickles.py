"""No pickle is written or read while scripts train, save, resume and export, by us or by what we call."""

from __future__ import annotations

import io
import pickle
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from reliability.forks import load
from reliability.plays import SCRIPTS, play, play_one_step, stage

_FOUND: list[str] = []  # what the interpreter itself reports of classes looked up, while a test listens
_LISTENS = [False]


def _hook(event: str, args: tuple) -> None:
    if _LISTENS[0] and event == "pickle.find_class":
        _FOUND.append(_caller(sys._getframe(1)) + f" finds {args[0]}.{args[1]}")


def _caller(frame) -> str:
    """The module that calls, past the serialisers themselves."""
    while frame and frame.f_globals.get("__name__", "") in (__name__, "pickle", "torch.serialization", "copyreg"):
        frame = frame.f_back
    return frame.f_globals.get("__name__", "?") if frame else "?"


@pytest.fixture
def calls(monkeypatch):
    """["module uses function"] for each use of pickle, and of torch's and numpy's own on top of it."""
    found: list[str] = []

    def watched(name, whole):
        def call(*args, **kwargs):
            found.append(f"{_caller(sys._getframe(1))} uses {name}")
            return whole(*args, **kwargs)

        return call

    own = ("load", "save")
    for module, names in ((pickle, ("load", "loads", "dump", "dumps")), (torch, own), (np, (*own, "savez"))):
        for name in names:
            monkeypatch.setattr(module, name, watched(f"{module.__name__}.{name}", getattr(module, name)))
    for name in ("Unpickler", "Pickler"):
        class Watched(getattr(pickle, name)):
            called = f"pickle.{name}"

            def __init__(self, *args, **kwargs):
                found.append(f"{_caller(sys._getframe(1))} uses {self.called}")
                super().__init__(*args, **kwargs)

        monkeypatch.setattr(pickle, name, Watched)
    _install()
    _FOUND.clear()
    _LISTENS[0] = True
    yield found
    _LISTENS[0] = False


@cache
def _install() -> None:
    sys.addaudithook(_hook)  # there is no way to take one out again


def require_no_pickled_files(place: Path) -> None:
    for file in place.rglob("*"):
        assert file.suffix not in (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt"), file


def test_the_audit_sees_every_way(calls, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "a")
    torch.load(tmp_path / "a")
    pickle.loads(pickle.dumps(Path))
    pickle.Unpickler(io.BytesIO())
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object))
    np.load(tmp_path / "a.npy", allow_pickle=True)
    used = {call.split()[-1] for call in calls}
    assert {"torch.save", "torch.load", "pickle.dumps", "pickle.loads", "pickle.Unpickler"} <= used
    assert {"numpy.save", "numpy.load", "pickle.dump", "pickle.load"} <= used
    assert any("pathlib.Path" in call for call in _FOUND)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return stage(tmp_path_factory.mktemp("stage"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_saves_resumes_and_exports_without_pickles(place, calls, tmp_path, monkeypatch, name):
    script, out = load(name), tmp_path / "out"
    monkeypatch.chdir(place)
    calls.clear()  # the models are made by other libraries, before the run
    _FOUND.clear()
    flags = ("--max_train_steps", "3", "--output_dir", str(out))
    assert play_one_step(script, monkeypatch, *flags) == 143
    play(script, *flags, "--resume_from_checkpoint", "latest")
    assert (out / "checkpoints" / "checkpoint-3").is_dir() and (out / "adapter").is_dir() and not calls + _FOUND
    require_no_pickled_files(out)
