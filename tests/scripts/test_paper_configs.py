"""configs/paper and configs/accelerate: every file is read by its script, and a few make two steps."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from script_runs import REPOSITORY, lines
from tiny_lm import folder, sums, write_rows

import vislora
from vislora.errors import run_script

# Those of language runs; a sweep's file names its script, and is read in tests/sweep.
FILES = sorted((REPOSITORY / "configs" / "paper").glob("*.yaml"))
PAPER = [file for file in FILES if "script" not in yaml.safe_load(file.read_text(encoding="utf-8"))]


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "train_scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scripts():
    return {name: load(name) for name in ("causal_lm", "sequence_classification")}


@pytest.mark.parametrize("file", PAPER, ids=lambda file: file.stem)
def test_a_paper_s_run_is_read_and_says_what_to_compare_with(scripts, file):
    text = file.read_text(encoding="utf-8")
    head = [line for line in text.splitlines() if line.startswith("#")]
    assert any("To compare with" in line for line in head) and all(len(line) <= 120 for line in text.splitlines())
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
    assert {f"lorasb_roberta_large_{task}" for task in tasks} <= names and len(names) >= 40


@pytest.mark.parametrize("name", [
    "sorsa_llama2_7b_metamath", "odlora_gemma2b_metamath", "nblora_llama2_7b_metamath", "lorasb_mistral_7b_metamath",
    "odlora_gradbaselines_lora_pro", "adalora_baseline", "peft_bench",
])  # fmt: skip
def test_two_steps_of_a_paper_s_run(scripts, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"query": row["instruction"], "response": row["output"]} for row in sums()]
    write_rows(tmp_path / "rows.jsonl", rows)
    AcceleratorState._reset_state()
    PartialState._reset_state()
    state = torch.random.get_rng_state()
    run_script(scripts["causal_lm"].main, [
        "--config", str(REPOSITORY / "configs/paper" / f"{name}.yaml"), "--rank", "2", "--max_train_steps", "2",
        "--model_name_or_path", str(folder(tmp_path / "model")), "--dataset_name", "rows.jsonl", "--max_length", "200",
        "--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "2", "--logging_steps", "1",
        "--report_to", "none", "--output_dir", "out", "--no_tf32",
        *(("--delta", "2") if name.startswith("nblora") else ()),
        *(("--init_rounds", "1", "--init_steps", "2") if name.startswith("odlora_gemma") else ()),
        *(("--init_r", "4", "--tinit", "0", "--tfinal", "0") if name.startswith("adalora") else ()),
    ])  # fmt: skip
    torch.random.set_rng_state(state)
    assert len(lines("out")) == 2 and Path("out/adapter").is_dir()
