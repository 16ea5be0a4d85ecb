"""No pickle is written or read while scripts train, save, resume and export, by us or by what we call."""

from __future__ import annotations

import importlib.util
import io
import pickle
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from script_runs import REPOSITORY
from tiny_lm import folder, sums, write_rows

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
    """["module uses function"] for each use of pickle, and of torch's own on top of it."""
    found: list[str] = []

    def watched(name, whole):
        def call(*args, **kwargs):
            found.append(f"{_caller(sys._getframe(1))} uses {name}")
            return whole(*args, **kwargs)

        return call

    for module, names in ((pickle, ("load", "loads", "dump", "dumps")), (torch, ("load", "save"))):
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
    used = {call.split()[-1] for call in calls}
    assert {"torch.save", "torch.load", "pickle.dumps", "pickle.loads", "pickle.Unpickler"} <= used
    assert any("pathlib.Path" in call for call in _FOUND)


def test_dreambooth_saves_resumes_and_exports_without_pickles(run, calls, place):
    usual = ("--output_dir", "out", "--checkpointing_steps", "1")
    run(*usual, "--max_train_steps", "1")
    run(*usual, "--max_train_steps", "2", "--resume_from_checkpoint", "latest")
    assert (place / "out" / "checkpoints" / "checkpoint-2").is_dir() and not calls + _FOUND
    require_no_pickled_files(place / "out")


def test_causal_lm_saves_and_resumes_without_pickles(calls, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("causal_lm", REPOSITORY / "train_scripts" / "causal_lm.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    model = folder(tmp_path / "llama")
    calls.clear()  # the model is made by transformers, before the run
    _FOUND.clear()
    write_rows(tmp_path / "rows.jsonl", sums())
    monkeypatch.chdir(tmp_path)
    for steps, more in ((1, ()), (2, ("--resume_from_checkpoint", "latest"))):
        AcceleratorState._reset_state()
        PartialState._reset_state()
        with torch.random.fork_rng():
            script.main([
                "--model_name_or_path", str(model), "--dataset_name", "rows.jsonl", "--prompt_template", "qa",
                "--per_device_train_batch_size", "2", "--rank", "2", "--report_to", "none", "--max_length", "128",
                "--output_dir", "out", "--checkpointing_steps", "1", "--max_train_steps", str(steps), *more,
            ])  # fmt: skip
    assert (tmp_path / "out" / "checkpoints" / "checkpoint-2").is_dir() and not calls + _FOUND
    require_no_pickled_files(tmp_path / "out")
