"""The classification script, whole: a random BERT on pairs of words, a random Llama, GLUE's columns, a scale."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from script_runs import compiles, lines, opened, refused, state
from tiny_lm import folder, write_rows
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)  # fmt: skip

import vislora
from vislora.baselines import BASELINES
from vislora.errors import run_script
from vislora.formats import peft as layout
from vislora.io import read
from vislora.language.classification import load_head

WORDS = ["red", "green", "blue", "hot", "cold", "wet"]


@pytest.fixture(scope="module")
def script():
    return opened("train_scripts/sequence_classification.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    place = tmp_path_factory.mktemp("bert")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS])}
    tok = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    tok.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=tok, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(place)  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForSequenceClassification(BertConfig(
            vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=24, max_position_embeddings=32, initializer_range=0.2,
        )).save_pretrained(place)  # fmt: skip
    return place


def pairs(count: int, scale: bool = False) -> list[dict]:
    """Do two lists of words begin alike? Or: how alike are they, from 0 to 5?"""
    rng, rows = random.Random(3), []
    for _ in range(count):
        one, two = (rng.choices(WORDS[:3], k=3) for _ in range(2))
        alike = 5.0 * sum(a == b for a, b in zip(one, two, strict=True)) / 3 + 0.25
        rows.append({"sentence1": " ".join(one), "sentence2": " ".join(two),
                     "label": alike if scale else int(one[0] == two[0])})  # fmt: skip
    return rows


@pytest.fixture
def run(script, model, tmp_path, monkeypatch):
    write_rows(tmp_path / "train.jsonl", pairs(40))
    write_rows(tmp_path / "validation.jsonl", pairs(60)[40:])
    monkeypatch.chdir(tmp_path)

    def call(*flags: str) -> None:
        AcceleratorState._reset_state()
        PartialState._reset_state()
        random_state = torch.random.get_rng_state()
        usual = {"--model_name_or_path": str(model), "--train_file": ".", "--max_train_steps": "3", "--rank": "2",
                 "--logging_steps": "1", "--report_to": "none", "--max_length": "16", "--learning_rate": "0.01",
                 "--task_name": "rte"}  # fmt: skip
        given = {flag for flag in flags if flag.startswith("--")}
        if BASELINES.keys() & set(flags):
            del usual["--rank"]
        argv = [word for flag, value in usual.items() if flag not in given for word in (flag, value)]
        try:
            run_script(script.main, [*argv, *flags])
        finally:
            torch.random.set_rng_state(random_state)

    return call


def test_adapter_and_head_are_saved_and_merged(run, model):
    run("--adapter", "lora", "--output_dir", "out", "--merge", "--learning_rate", "0.05")
    assert {f.name for f in Path("out/adapter").iterdir()} == {"adapter.safetensors", "head.safetensors"}
    assert set(read(Path("out/adapter/head.safetensors"))[0]) == {"classifier.weight", "classifier.bias"}
    batch = {"input_ids": torch.tensor([[1, 4, 5, 2, 6, 2]]), "token_type_ids": torch.tensor([[0, 0, 0, 0, 1, 1]])}
    ours = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2).eval()
    before = ours(**batch).logits
    vislora.load(ours, "out/adapter")
    load_head(ours, "out/adapter")
    merged = AutoModelForSequenceClassification.from_pretrained("out/model").eval()
    assert torch.allclose(merged(**batch).logits, ours(**batch).logits, atol=1e-5)
    assert (ours(**batch).logits - before).abs().max() > 1e-2
    metrics = json.loads(Path("out/metrics.json").read_text())
    assert 0 <= metrics["eval_accuracy"] <= metrics["best_eval_accuracy"] <= 1


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_peft_scores_as_we_do_head_and_all(run, model, tmp_path, kind, caplog):
    from peft import PeftModel

    base = model if kind == "bert" else folder(tmp_path / "llama")
    run("--adapter", "nb_lora", "--output_dir", "out", "--learning_rate", "0.05", "--model_name_or_path", str(base))
    batch = {"input_ids": torch.tensor([[1, 4, 5, 2, 6, 2]])}
    heads = ("classifier.weight", "score.weight")
    ours, theirs, read_back = (AutoModelForSequenceClassification.from_pretrained(base, num_labels=2).eval()
                               for _ in range(3))  # fmt: skip
    for one in (ours, theirs, read_back):
        one.config.pad_token_id = 1
        for name, tensor in one.named_parameters():
            if name in heads:
                tensor.data.fill_(7.0)  # whatever was drawn must not stay
    vislora.load(ours, "out/adapter")
    load_head(ours, "out/adapter")
    theirs = PeftModel.from_pretrained(theirs, "out/export/peft").eval()
    with torch.no_grad():
        assert torch.allclose(theirs(**batch).logits, ours(**batch).logits, atol=1e-5)
        vislora.load(read_back, "out/export/peft")
        assert torch.allclose(read_back(**batch).logits, ours(**batch).logits, atol=1e-5)
    found = layout.read(Path("out/export/peft"))  # the command vislora's view: updates alone
    assert len(found.layers) == len([key for key in found.stored[""].tensors if key.endswith("lora_A.weight")]) > 5
    assert "is a module of its own and no update" in caplog.text
    card = Path("out/README.md").read_text()
    assert "load_head(model, " in card and "num_labels=2" in card


@pytest.mark.parametrize("flags", [("--adapter", "lora_sb", "--head_learning_rate", "0.02"), ("--adapter", "none"),
                                   ("--adapter", "full"), ("--adapter", "sorsa")])  # fmt: skip
def test_resuming_is_exact(run, flags):
    common = (*flags, "--save_steps", "1", "--max_train_steps", "4", "--gradient_accumulation_steps", "2")
    run(*common, "--output_dir", "whole")
    run(*common, "--output_dir", "parts", "--resume_from_checkpoint", "whole/checkpoints/checkpoint-2")
    whole, parts = state("whole", 4), state("parts", 4)
    assert whole.keys() == parts.keys() and all(torch.equal(t, parts[k]) for k, t in whole.items())
    assert any("classifier" in k for k in whole)


def test_a_task_is_learned(run, tmp_path):
    rng = random.Random(1)
    texts = [rng.choices(WORDS, k=2) for _ in range(40)]
    write_rows(tmp_path / "easy.jsonl", [{"sentence": " ".join(t), "label": int("hot" in t)} for t in texts])
    run("--task_name", "sst2", "--train_file", "easy.jsonl", "--validation_split_percentage", "25", "--adapter", "lora",
        "--rank", "8", "--max_train_steps", "30", "--per_device_train_batch_size", "30", "--learning_rate", "0.03",
        "--output_dir", "out", "--eval_steps", "99")  # fmt: skip
    losses = [entry["loss"] for entry in lines("out") if "loss" in entry]
    assert losses[-1] < losses[0] / 3


def test_a_scale_is_correlated(run, tmp_path):
    write_rows(tmp_path / "scale.jsonl", pairs(30, scale=True))
    run("--task_name", "stsb", "--train_file", "scale.jsonl", "--validation_split_percentage", "30",
        "--output_dir", "a", "--adapter", "lora")  # fmt: skip
    assert {"eval_pearson", "eval_spearman"} <= json.loads(Path("a/metrics.json").read_text()).keys()


def test_any_csv_without_a_task(script, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"text": row["sentence1"], "kind": "same" if row["label"] else "other"} for row in pairs(30)]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "kind"])
        writer.writeheader()
        writer.writerows(rows)
    AcceleratorState._reset_state()
    PartialState._reset_state()
    random_state = torch.random.get_rng_state()
    run_script(script.main, [
        "--model_name_or_path", str(model), "--train_file", "rows.csv", "--label_column", "kind", "--adapter", "lora",
        "--validation_split_percentage", "20", "--max_train_steps", "2", "--output_dir", "out", "--merge",
        "--report_to", "none", "--rank", "2",
    ])  # fmt: skip
    torch.random.set_rng_state(random_state)
    config = json.loads(Path("out/model/config.json").read_text())
    assert "eval_accuracy" in json.loads(Path("out/metrics.json").read_text())
    assert (tmp_path / "out/model/model.safetensors").is_file()
    assert config["architectures"] == ["BertForSequenceClassification"]


def test_a_decoder_classifies_by_its_last_token(run, tmp_path):
    run("--model_name_or_path", str(folder(tmp_path / "llama")), "--adapter", "lora", "--output_dir", "out")
    assert set(read(Path("out/adapter/head.safetensors"))[0]) == {"score.weight"}
    assert all(np.isfinite(entry["loss"]) for entry in lines("out") if "loss" in entry)


def test_bad_input_gets_one_line(run, tmp_path, capsys):
    write_rows(tmp_path / "odd.jsonl", [{"sentence1": "a", "label": i} for i in range(4)])
    for flags, words in (
        (("--task_name", "rt"), ("rt", "rte")), (("--train_file", "gone.csv"), ("gone.csv",)),
        (("--train_file", "train.jsonl"), ("--validation_file",)),
        (("--label_column", "gone"), ("gone", "sentence1")),
        (("--train_file", "odd.jsonl", "--validation_file", "odd.jsonl"), ("sentence2",)),
        (("--task_name", "mnli", "--text_columns", "sentence1", "sentence2", "--label_column", "sentence1"), ("3",)),
    ):  # fmt: skip
        line = refused(run, capsys, *flags)
        assert all(word in line for word in words), line


def test_the_gradient_probe_is_logged_and_changes_neither_adapter_nor_head(run):
    for place, more in (("plain", ()), ("probed", ("--probe_steps", "1"))):
        run("--adapter", "sorsa", "--output_dir", place, *more)
    for file in ("adapter.safetensors", "head.safetensors"):
        plain, probed = (read(Path(place) / "adapter" / file)[0] for place in ("plain", "probed"))
        assert all(torch.equal(t, probed[k]) for k, t in plain.items())
    assert [line["step"] for line in lines("probed") if "cosine" in line] == [1, 2]


def test_compiled_graphs(run, place, monkeypatch):
    compiles(run, monkeypatch, "--adapter", "sorsa")
