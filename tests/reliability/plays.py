"""The four training scripts on the smallest models and data, in this process: what faults and resumes are tried on."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import ModuleType

import torch
from accelerate.state import AcceleratorState, PartialState
from reliability.forks import load
from safetensors.torch import load_file
from script_runs import photograph
from tiny_lm import folder, sums, write_rows
from tiny_sd import tiny_sd
from tiny_vit import image_folder, save_timm

from vislora.errors import run_script

# Eleven steps are two epochs and one step more.
USUAL = {
    "dreambooth": {
        "--pretrained_model_name_or_path": "sd", "--instance_data_dir": "photos", "--instance_prompt": "a b",
        "--max_train_steps": "11", "--train_batch_size": "1", "--rank": "2", "--report_to": "none",
        "--logging_steps": "1", "--checkpointing_steps": "1", "--learning_rate": "0.01",
    },
    "classification": {
        "--model_name_or_path": "vit", "--dataset_name": "colours", "--max_train_steps": "11",
        "--train_batch_size": "3", "--train_val_split": "0.2", "--eval_steps": "20", "--rank": "2",
        "--report_to": "none", "--logging_steps": "1", "--checkpointing_steps": "1", "--learning_rate": "0.01",
        "--head_lr": "0.02", "--checkpoints_total_limit": "20",
    },
    "causal_lm": {
        "--model_name_or_path": "llama", "--dataset_name": "rows.jsonl", "--prompt_template": "qa",
        "--max_train_steps": "11", "--per_device_train_batch_size": "2", "--rank": "2", "--report_to": "none",
        "--max_length": "128", "--logging_steps": "1", "--save_steps": "1", "--learning_rate": "0.01",
    },
    "sequence_classification": {
        "--model_name_or_path": "llama", "--train_file": "pairs", "--task_name": "rte", "--max_train_steps": "11",
        "--per_device_train_batch_size": "2", "--rank": "2", "--report_to": "none", "--max_length": "64",
        "--logging_steps": "1", "--save_steps": "1", "--eval_steps": "20", "--learning_rate": "0.01",
    },
}  # fmt: skip
SCRIPTS = list(USUAL)


def stage(place: Path) -> Path:
    """The models and data that `USUAL` names, in a folder to start the scripts in."""
    folder(place / "llama")
    tiny_sd(place / "sd")
    save_timm(place / "vit")
    image_folder(place / "colours", 3, train=6, test=2)  # of which 15 train, 5 batches
    photograph(place / "photos", 5)
    write_rows(place / "rows.jsonl", sums(10))
    (place / "pairs").mkdir()
    pairs = [{"sentence1": f"{a} is", "sentence2": f"{a * 7 % 5}", "label": a % 2} for a in range(10)]
    write_rows(place / "pairs" / "train.jsonl", pairs)
    write_rows(place / "pairs" / "validation.jsonl", pairs[:4])
    return place


def words(name: str, *flags: str) -> list[str]:
    """The command line of a script: the usual flags, but for those given."""
    given = {flag for flag in flags if flag.startswith("--")}
    return [word for flag, value in USUAL[name].items() if flag not in given for word in (flag, value)] + list(flags)


def play(script: ModuleType, *flags: str) -> None:
    """Run a script here, and leave torch's global generator as it was."""
    AcceleratorState._reset_state()
    PartialState._reset_state()
    state = torch.random.get_rng_state()
    try:
        run_script(script.main, words(script.__name__, *flags))
    finally:
        torch.random.set_rng_state(state)


def play_one_step(script: ModuleType, monkeypatch, *flags: str) -> int:
    """The same, with a signal in its first step: it ends after that step, with a checkpoint. Returns the status."""
    train, backward = script.Run.train, script.Run.backward

    def watched(self, *arguments):
        def last(own, *more):
            os.kill(os.getpid(), signal.SIGTERM)
            return backward(own, *more)

        patch.setattr(script.Run, "backward", last)
        return train(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "train", watched)  # not before: a data-driven start runs backwards too
        try:
            play(script, *flags)
        except SystemExit as stop:
            return stop.code
    return 0


def state(out: str | Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: adapter, head, optimizers' states, averages."""
    files = sorted((Path(out) / "checkpoints" / f"checkpoint-{step}").glob("*.safetensors"))
    assert files, f"{out} has no checkpoint-{step}"
    return {f"{file.stem}.{key}": t for file in files for key, t in load_file(file).items()}


def require_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """To the bit, and the same names."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


def scripts() -> dict[str, ModuleType]:
    """The modules by name."""
    return {name: load(name) for name in SCRIPTS}
