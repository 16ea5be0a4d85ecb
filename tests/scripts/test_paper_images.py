"""configs/paper's grids of images, each method of each file for two steps on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pages
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from script_runs import REPOSITORY, photograph
from tiny_vit import image_folder, parquet_folder, save_timm

from vislora.errors import run_script
from vislora.sweep.plan import read

SMALL = {"rank": 2, "init_rounds": 1, "init_steps": 2, "num_class_images": 2, "resolution": 32, "train_batch_size": 2,
         "mixed_precision": "no", "dataloader_num_workers": 0, "eval_batch_size": 8, "max_source_samples": 8,
         "train_split": "train", "dataset_config_name": None}  # fmt: skip
ALWAYS = {"max_train_steps": 2, "logging_steps": 1, "checkpointing_steps": 100, "report_to": "none"}


def cells():
    """(script, settings): each method of each file, those apart in rank and bound alone once; quick: one a file."""
    found = []
    for file in sorted((REPOSITORY / "configs" / "paper").rglob("*.yaml")):
        raw = yaml.safe_load(file.read_text())
        if raw.get("script") not in ("train_scripts/dreambooth.py", "train_scripts/classification.py"):
            continue
        forms = {}
        for cell in read(file).cells({}):
            settings = dict(cell.settings)
            form = {k: v for k, v in settings.items() if k in ("adapter", "p", "optimizer", "with_prior_preservation")}
            forms.setdefault(str(form), (cell.method, settings))
        own = next(method for method, settings in forms.values() if settings["adapter"] in ("nb_lora", "od_lora"))
        for method, settings in forms.values():
            marks = [] if method == own else [pytest.mark.slow]
            found.append(pytest.param(raw["script"], settings, id=f"{file.stem}, {method}", marks=marks))
    return found


@pytest.fixture(scope="module")
def places(tmp_path_factory, model):
    place = tmp_path_factory.mktemp("images")
    photograph(place / "photos")
    save_timm(place / "vit")
    image_folder(place / "target", 3, seed=5)
    parquet_folder(place / "source")
    return {"pretrained_model_name_or_path": model, "instance_data_dir": place / "photos",
            "model_name_or_path": place / "vit", "dataset_name": place / "target",
            "source_dataset_name": place / "source"}  # fmt: skip


@pytest.mark.parametrize("script,settings", cells())
def test_two_steps(script, settings, places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = settings | {key: value for key, value in SMALL.items() if key in settings} | ALWAYS
    settings |= {key: str(value) for key, value in places.items() if key in settings}
    settings |= {"class_data_dir": "class"} if "class_data_dir" in settings else {}
    settings |= {"output_dir": "out"}
    settings |= {"eval_steps": 2} if "model_name_or_path" in settings else {"validation_inference_steps": 2}
    Path("settings.yaml").write_text(yaml.safe_dump(settings))
    AcceleratorState._reset_state()
    PartialState._reset_state()
    state = torch.random.get_rng_state()
    try:
        run_script(pages.script(script).main, ["--config", "settings.yaml"])
    finally:
        torch.random.set_rng_state(state)
    logged = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "loss" in line] == [1, 2]
    assert Path("out/metrics.json").is_file()
