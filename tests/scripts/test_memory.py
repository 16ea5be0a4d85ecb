"""--dry_run's estimate of memory against what runs take: the growth of the process over one that is warm already.

The estimate counts what tensors hold. A process also grows by kernels' workspaces and the allocator's rounding, which
the 15 % have room for, and by libraries that a first run loads, which a small run before the measured one loads here.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from script_runs import REPOSITORY, opened, photograph
from tiny_lm import tokenizer
from tiny_sd import tiny_sd
from transformers import LlamaConfig, LlamaForCausalLM

WORLD = str(REPOSITORY / "assets/world/tiny-sd")


def said(text: str) -> dict[str, float]:
    """MiB by phase, and the peak, of a dry run's line on memory."""
    line = [line for line in text.splitlines() if line.startswith("memory: ")][-1]
    named = re.findall(r"(training|encoding photos|drawing images|scoring) ([\d.,]+) MiB", line)
    found = {name: float(size.replace(",", "")) for name, size in named}
    return found | {"peak": float(re.match(r"memory: ([\d.,]+) MiB at its peak", line)[1].replace(",", ""))}


def test_the_estimate_follows_what_a_step_is_made_of(run, capsys):
    def of(*flags: str) -> dict[str, float]:
        run("--dry_run", *flags)
        return said(capsys.readouterr().out)

    usual = of("--train_batch_size", "8")
    assert usual["peak"] == max(usual["training"], usual["encoding photos"])
    double = of("--train_batch_size", "16")
    assert 1.5 * usual["training"] < double["training"] < 2 * usual["training"]
    assert of("--train_batch_size", "8", "--gradient_checkpointing")["training"] < 0.8 * usual["training"]
    assert of("--train_batch_size", "8", "--mixed_precision", "bf16")["training"] < 0.8 * usual["training"]
    assert of("--train_batch_size", "8", "--use_ema")["training"] >= usual["training"]
    prior = of("--train_batch_size", "8", "--with_prior_preservation", "--class_prompt", "b")
    assert prior["training"] == pytest.approx(double["training"], rel=0.05) and prior["drawing images"] > 0
    twice = of("--train_batch_size", "8", "--with_prior_preservation", "--class_prompt", "b", "--prior_source",
               "base_output", "--train_text_encoder")  # fmt: skip
    assert twice["training"] > double["training"]


USUAL = ["--adapter", "nb_lora", "--report_to", "none", "--max_train_steps", "3", "--rank", "4"]
PHOTOS = ["--instance_data_dir", "photos", "--instance_prompt", "a b"]
ROWS = ["--dataset_name", "rows.jsonl", "--prompt_template", "qa", "--validation_split_percentage", "10",
        "--num_samples", "0"]  # fmt: skip
TEXTS = ["--train_file", "rows.jsonl", "--text_columns", "prompt", "--label_column", "label",
         "--validation_split_percentage", "10"]  # fmt: skip
DIGITS = ["--dataset_name", str(REPOSITORY / "assets/world/digits"), "--max_eval_samples", "128", "--eval_steps", "3"]
SD, VIT, LM = "--pretrained_model_name_or_path", "--model_name_or_path", "--model_name_or_path"
# script, flags of the run that is measured, of the small one before it
SIZES = {
    "tiny-sd, batch 16": ("dreambooth", [*PHOTOS, SD, WORLD, "--train_batch_size", "16"], [*PHOTOS, SD, "tiny"]),
    "tiny-sd, batch 48": ("dreambooth", [*PHOTOS, SD, WORLD, "--train_batch_size", "48"], [*PHOTOS, SD, "tiny"]),
    "a UNet of 33 M parameters, batch 8": (
        "dreambooth", [*PHOTOS, SD, "wide", "--train_batch_size", "8"], [*PHOTOS, SD, "tiny"]),
    "ViT-small, batch 16": (
        "classification", [*DIGITS, VIT, "vit_small_patch16_224", "--pretrained", "random", "--train_batch_size", "16"],
        [*DIGITS, VIT, str(REPOSITORY / "assets/world/tiny-vit")]),
    "ViT-small whole, batch 8, an average": (
        "classification", [*DIGITS, VIT, "vit_small_patch16_224", "--pretrained", "random", "--train_batch_size", "8",
                           "--adapter", "full", "--ema_decay", "0.9"],
        [*DIGITS, VIT, str(REPOSITORY / "assets/world/tiny-vit")]),
    "a Llama of 20 M parameters, batch 8": (
        "causal_lm", [*ROWS, LM, "llama", "--per_device_train_batch_size", "8", "--max_length", "256"],
        [*ROWS, LM, "small"]),
    "the same, packed and checkpointed": (
        "causal_lm", [*ROWS, LM, "llama", "--per_device_train_batch_size", "8", "--max_length", "512", "--packing",
                      "--gradient_checkpointing"], [*ROWS, LM, "small"]),
    "the same, to classify": (
        "sequence_classification", [*TEXTS, LM, "llama", "--per_device_train_batch_size", "16", "--max_length", "256"],
        [*TEXTS, LM, "small"]),
}  # fmt: skip


def test_a_classifier_s_and_a_language_model_s_estimates_follow_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def of(script: str, *flags: str) -> dict[str, float]:
        fresh()
        load(script).main(["--adapter", "nb_lora", "--report_to", "none", "--dry_run", *flags])
        return said(capsys.readouterr().out)

    size = {"classification": "--train_batch_size", "causal_lm": "--per_device_train_batch_size",
            "sequence_classification": "--per_device_train_batch_size"}  # fmt: skip
    for script, batch in size.items():
        usual, double = of(script, batch, "16"), of(script, batch, "32")
        assert usual["peak"] == max(usual["training"], usual["scoring"])
        assert 1.3 * usual["training"] < double["training"] < 2 * usual["training"]
        assert of(script, batch, "32", "--gradient_checkpointing")["training"] < 0.8 * double["training"]
        assert of(script, batch, "16", "--adapter", "full")["training"] > usual["training"]
    assert not list(tmp_path.iterdir())


def rows(path: Path) -> None:
    """200 questions of 8 to 24 numbers, with a label each."""
    lines = [{"prompt": " ".join(f"{n} and" for n in range(i, i + 8 + i // 12)), "completion": str(i), "label": i % 2}
             for i in range(200)]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_measured_peaks_are_within_15_percent(tmp_path, size):
    script, flags, small = SIZES[size]
    photograph(tmp_path / "photos")
    rows(tmp_path / "rows.jsonl")
    tiny_sd(tmp_path / "tiny")
    if "wide" in flags:
        tiny_sd(tmp_path / "wide", channels=(128, 256), sample_size=32)
    llama(tmp_path / "small", hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    if "llama" in flags:
        llama(tmp_path / "llama", hidden_size=512, intermediate_size=1376, num_hidden_layers=6)
    # Large blocks go back to the system when they are freed.
    limits = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    paths = os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "tests")))
    environment = {**os.environ, **limits, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    both = json.dumps([small, flags])
    done = subprocess.run([sys.executable, __file__, script, both], cwd=tmp_path, env=environment, check=True,
                          capture_output=True, text=True)  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    estimated = said(done.stdout)["peak"]
    print(f"\n{size}: {estimated:.0f} MiB estimated, {found['peak']:.0f} measured ({found['step']:.0f} of it the step)")
    assert estimated == pytest.approx(found["peak"], rel=0.15)


def llama(folder: Path, **words) -> None:
    """A random Llama with a byte-level tokenizer."""
    config = LlamaConfig(vocab_size=400, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024,
                         **words)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def resident(key: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def settled() -> float:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return resident("VmRSS")


def load(script: str):
    return opened(f"train_scripts/{script}.py")


def fresh() -> None:
    """As in a new process: accelerate keeps its settings."""
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state()
    PartialState._reset_state()


def measure(name: str, small: list[str], argv: list[str]) -> None:
    """A small run, then the dry run and the run of `argv`; prints the process's growth by the latter."""
    script, found = load(name), {}
    train = script.Run.train

    def watched(self, *arguments):
        found["before"] = settled()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        train(self, *arguments)
        found["most"] = resident("VmHWM")

    script.Run.train = watched
    for flags in ([*small, "--dry_run"], small, [*argv, "--dry_run"], argv):
        fresh()
        found["start"] = settled()
        whole = "full" in flags
        script.main([*(USUAL[:-2] if whole else USUAL), *flags])
    print(json.dumps({"peak": found["most"] - found["start"], "step": found["most"] - found["before"]}))


if __name__ == "__main__":
    measure(sys.argv[1], *json.loads(sys.argv[2]))
