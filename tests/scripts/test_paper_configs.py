"""configs/paper and configs/accelerate: every file is read by its script, and makes two steps on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from script_runs import REPOSITORY, lines, opened
from tiny_lm import folder, sums, write_rows

import vislora
from vislora.config import read_yaml
from vislora.errors import run_script
from vislora.sweep.plan import read as read_plan

# Those of language runs; a sweep's file names its script, and is read in tests/sweep.
FILES = sorted((REPOSITORY / "configs" / "paper").glob("*.yaml"))
PAPER = [file for file in FILES if "script" not in yaml.safe_load(file.read_text(encoding="utf-8"))]


def load(name: str):
    return opened(f"train_scripts/{name}.py")


@pytest.fixture(scope="module")
def scripts():
    return {name: load(name) for name in ("causal_lm", "sequence_classification")}


@pytest.mark.parametrize("file", PAPER, ids=lambda file: file.stem)
def test_a_paper_s_run_is_read_and_says_what_to_compare_with(scripts, file):
    text = file.read_text(encoding="utf-8")
    head = [line for line in text.splitlines() if line.startswith("#")]
    assert all(len(line) <= 120 for line in text.splitlines())
    said = " ".join(line.removeprefix("#").strip() for line in head).partition("To compare with")[2]
    figure = re.search(r"\b\d+\.\d+\b", said.partition("Hardware")[0])
    assert figure or file.stem in ("sorsa_analysis_llama2", "peft_bench"), said  # spectra; a table that goes on growing
    settings = yaml.safe_load(text)
    script = scripts["sequence_classification" if "task_name" in settings else "causal_lm"]
    options, method = script.parse(["--config", str(file)])
    assert options.adapter in vislora.methods() and options.model_name_or_path == settings["model_name_or_path"]
    own = method.options()
    assert own["rank"] == settings["adapter_options"]["rank"]


def test_every_row_of_the_recipes_is_there():
    names = {file.stem for file in PAPER}
    for model in ("llama2_7b", "mistral_7b", "gemma_7b", "rwkv6_7b"):
        assert {f"sorsa_{model}_metamath", f"sorsa_{model}_codefeedback"} <= names
    for data in ("metamath", "codefeedback", "commonsense"):
        assert {f"odlora_gemma2b_{data}", f"odlora_llama3_8b_{data}"} <= names
    tasks = ("cola", "rte", "mrpc", "stsb", "sst2", "qnli")
    assert {f"lorasb_roberta_large_{task}" for task in tasks} <= names


def test_od_lora_s_baselines_have_the_scale_that_it_states(scripts, tmp_path):
    """4 / sqrt(rank) for all but LoRA, on which the optimizers' own rows are no exception."""
    for data in ("math", "code"):
        for cell in read_plan(REPOSITORY / "configs/paper" / f"odlora_table5_{data}.yaml").cells({}):
            if cell.settings["adapter"] not in ("rslora", "lora_ga"):
                continue
            (tmp_path / "own.yaml").write_text(yaml.safe_dump(dict(cell.settings)))
            options, method = scripts["causal_lm"].parse(["--config", str(tmp_path / "own.yaml")])
            linear = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
            adapter = vislora.attach(linear, method, seed=0)
            with torch.no_grad():
                for tensor in (t for _, t in adapter.named_tensors()):
                    tensor.fill_(0.5 if tensor.requires_grad else 0)
            (delta,) = adapter.deltas().values()
            rank = method.options()["rank"]
            assert delta[0, 0].item() == pytest.approx(4 / rank**0.5 * rank * 0.25), cell.method


# Where a paper's number does not fit a model of 16 dimensions.
SMALL = {"rank": 2, "delta": 2, "init_rounds": 1, "init_steps": 2, "init_r": 4, "tinit": 0, "tfinal": 0, "tf32": False,
         "max_length": 200, "probe_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
         "dataset_split": "train", "dataset_field": ["query", "response"]}  # fmt: skip
ALWAYS = {"max_train_steps": 2, "logging_steps": 1, "save_steps": 100, "report_to": "none", "num_samples": 0}
LANGUAGE = ("causal_lm.py", "sequence_classification.py")
GRIDS = [file for file in FILES if file not in PAPER and read_plan(file).script.endswith(LANGUAGE)]
# What two runs may differ in and still go the same way through the script.
SIZES = {"rank", "init_r", "alpha", "delta", "learning_rate", "seed", "init_rounds", "init_steps", "num_train_epochs",
         "model_name_or_path", "trust_remote_code", "dataset_name", "dataset_field", "dataset_split", "task_name",
         "prompt_template", "init_noise", "gamma"}  # fmt: skip


def runs():
    """(name, settings): each file once at least, and of the grids each way that one of their methods goes."""
    found, ways = [pytest.param(file.stem, read_yaml(file), id=file.stem) for file in PAPER], set()
    for file in GRIDS:
        first = True
        for cell in read_plan(file).cells({}):
            way = repr(sorted((k, v) for k, v in cell.settings.items() if k not in SIZES))
            if way not in ways or first:
                name = f"{file.stem}, {cell.method}"
                found.append(pytest.param(name, dict(cell.settings), id=name))
            ways.add(way)
            first = False
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Rows and models that every run of the papers can do with: a Llama, and GLUE's columns."""
    place = tmp_path_factory.mktemp("small")
    write_rows(place / "rows.jsonl", [{"query": row["instruction"], "response": row["output"]} for row in sums()])
    columns = [{"sentence1": f"a b {i % 3}", "sentence2": "a b", "label": i % 2} for i in range(12)]
    write_rows(place / "glue.jsonl", columns)
    folder(place / "model")
    return place


def test_every_file_of_a_language_run_makes_two_steps():
    assert {param.id.partition(",")[0] for param in runs()} == {file.stem for file in [*PAPER, *GRIDS]}
    rest = [read_plan(file).script for file in FILES if file not in [*PAPER, *GRIDS]]
    assert set(rest) == {"train_scripts/dreambooth.py"}  # those are in test_paper_images.py


@pytest.mark.parametrize("name,settings", runs())
def test_two_steps_of_a_paper_s_run(scripts, small, name, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    glue = "task_name" in settings
    settings = settings | {key: value for key, value in SMALL.items() if key in settings} | ALWAYS
    settings |= {"model_name_or_path": str(small / "model"), "output_dir": "out"}
    if "targets" in settings and settings["targets"] != ["q_proj", "v_proj"]:
        settings["targets"] = ["q_proj", "down_proj"]
    if glue:
        data = {"task_name": None, "text_columns": ["sentence1", "sentence2"]}
        data |= dict.fromkeys(("train_file", "validation_file"), str(small / "glue.jsonl"))
        settings = {key: value for key, value in settings.items() if key != "num_samples"} | data
    else:
        settings |= {"dataset_name": str(small / "rows.jsonl"), "dataset_field": ["query", "response"]}
    Path("settings.yaml").write_text(yaml.safe_dump(settings))
    AcceleratorState._reset_state()
    PartialState._reset_state()
    state = torch.random.get_rng_state()
    try:
        run_script(scripts["sequence_classification" if glue else "causal_lm"].main, ["--config", "settings.yaml"])
    finally:
        torch.random.set_rng_state(state)
    losses = [line["loss"] for line in lines("out") if "loss" in line]
    assert len(losses) == 2 and all(loss > 0 for loss in losses)
    assert (Path("out/adapter") if settings["adapter"] != "full" else Path("out/model")).is_dir()
