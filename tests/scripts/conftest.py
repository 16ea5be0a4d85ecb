"""The DreamBooth script in this process, on a random Stable Diffusion of 32 pixels and three photos of noise."""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from metric_world import root, small_world  # noqa: F401
from script_runs import opened, photograph
from tiny_sd import tiny_sd

from vislora.baselines import BASELINES
from vislora.errors import run_script


@pytest.fixture(scope="module")
def script():
    return opened("train_scripts/dreambooth.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture
def place(tmp_path, monkeypatch):
    photograph(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(script, model, place):
    """Run the script in this process. Flags given here stand beside a model, photos and three steps."""

    def call(*flags: str) -> None:
        AcceleratorState._reset_state()
        PartialState._reset_state()
        state = torch.random.get_rng_state()
        usual = {
            "--pretrained_model_name_or_path": str(model), "--instance_data_dir": "photos", "--instance_prompt": "a b",
            "--max_train_steps": "3", "--train_batch_size": "2", "--logging_steps": "1", "--rank": "2",
            "--report_to": "none",
        }  # fmt: skip
        given = {flag for flag in flags if flag.startswith("--")}
        if BASELINES.keys() & set(flags):
            del usual["--rank"]
        if "--concepts_list" in flags:
            del usual["--instance_data_dir"], usual["--instance_prompt"]
        argv = [word for flag, value in usual.items() if flag not in given for word in (flag, value)]
        try:
            run_script(script.main, [*argv, *flags])
        finally:
            torch.random.set_rng_state(state)

    return call
