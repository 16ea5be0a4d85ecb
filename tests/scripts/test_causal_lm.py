"""The causal LM script, whole, on a random Llama of two layers and a dozen sums."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from script_runs import REPOSITORY, compiles, lines, opened, refused, state
from tiny_lm import folder, rwkv, sums, write_rows
from transformers import AutoModelForCausalLM

import vislora
from vislora.baselines import BASELINES
from vislora.errors import run_script
from vislora.io import read

SCRIPT = REPOSITORY / "train_scripts" / "causal_lm.py"


@pytest.fixture(scope="module")
def script():
    return opened("train_scripts/causal_lm.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def place(tmp_path, monkeypatch):
    write_rows(tmp_path / "rows.jsonl", sums())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(script, model, place):
    """Run the script in this process. Flags given here stand beside a model, data and three steps."""

    def call(*flags: str) -> None:
        AcceleratorState._reset_state()
        PartialState._reset_state()
        random = torch.random.get_rng_state()
        usual = {
            "--model_name_or_path": str(model), "--dataset_name": "rows.jsonl", "--prompt_template": "qa",
            "--max_train_steps": "3", "--per_device_train_batch_size": "2", "--logging_steps": "1", "--rank": "2",
            "--report_to": "none", "--max_length": "128", "--learning_rate": "0.01",
        }  # fmt: skip
        given = {flag for flag in flags if flag.startswith("--")}
        if BASELINES.keys() & set(flags):
            del usual["--rank"]
        argv = [word for flag, value in usual.items() if flag not in given for word in (flag, value)]
        try:
            run_script(script.main, [*argv, *flags])
        finally:
            torch.random.set_rng_state(random)

    return call


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(40)[None]).logits


def base_of(model) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def test_a_run_leaves_everything_and_can_be_run_again(run, place, model):
    flags = ("--adapter", "nb_lora", "--p", "1", "--delta", "6", "--validation_split_percentage", "20", "--merge",
             "--eval_answers", "2", "--eval_steps", "2", "--max_new_tokens", "4", "--report_to", "tensorboard",
             "--sample_prompt", "How many?", "Why?", "--rank", "4")  # fmt: skip
    run(*flags)
    run("--config", "runs/0001/config.yaml", "--adapter", "nb_lora", "--rank", "4")
    one, two = Path("runs/0001"), Path("runs/0002")
    for name in ("config.yaml", "adapter/adapter.safetensors", "export/peft/adapter_model.safetensors",
                 "model/model.safetensors", "samples/step-000000.jsonl", "samples/step-000002.jsonl", "metrics.json",
                 "samples/step-000003.jsonl", "metrics.jsonl", "README.md"):  # fmt: skip
        assert (one / name).is_file(), name
    assert any((one / "logs").iterdir())
    first, second = (read(folder / "adapter" / "adapter.safetensors")[0] for folder in (one, two))
    assert all(torch.equal(t, second[k]) for k, t in first.items())
    logged = [entry for entry in lines("runs/0001") if "loss" in entry]
    assert [entry["step"] for entry in logged] == [1, 2, 3]
    assert all(np.isfinite(e["loss"]) and e["tokens_per_second"] > 0 and e["memory_mib"] > 0 for e in logged)
    evaluated = [entry for entry in lines("runs/0001") if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluated] == [0, 2, 3]
    assert math.isclose(evaluated[-1]["eval_perplexity"], math.exp(evaluated[-1]["eval_loss"]), rel_tol=1e-6)
    metrics = json.loads((one / "metrics.json").read_text())
    assert metrics["largest_share"] <= 1 and metrics["eval_loss"] == evaluated[-1]["eval_loss"]
    asked = [json.loads(line)["prompt"] for line in (one / "samples/step-000003.jsonl").read_text().splitlines()]
    assert asked == ["Question: How many?\nAnswer:\n", "Question: Why?\nAnswer:\n"]
    assert "vislora.load" in (one / "README.md").read_text() and "PeftModel" in (one / "README.md").read_text()


@pytest.mark.parametrize("method", ["sorsa", "nb_lora", "dora", "full"])
def test_what_is_written_computes_what_the_adapter_computes(run, model, method):
    from peft import PeftModel

    run("--adapter", method, "--output_dir", "out", "--merge", "--learning_rate", "0.05")
    ours = base_of(model)
    before = logits(ours)
    vislora.load(ours, "out/adapter")
    expected = logits(ours)
    assert (expected - before).abs().max() > 1e-2
    merged = logits(AutoModelForCausalLM.from_pretrained("out/model").eval())
    assert torch.allclose(merged, expected, atol=1e-4)
    if method != "full":
        theirs = PeftModel.from_pretrained(base_of(model), "out/export/peft").eval()
        assert torch.allclose(logits(theirs), expected, atol=1e-4)


EVERYTHING = ("--adapter", "lora", "--dropout", "0.3", "--gradient_accumulation_steps", "2", "--packing",
              "--max_length", "100", "--lr_scheduler_type", "cosine", "--warmup_steps", "2", "--save_steps", "1",
              "--gradient_checkpointing", "--adam_weight_decay", "0.1")  # fmt: skip


@pytest.mark.parametrize("flags", [EVERYTHING, ("--adapter", "sorsa", "--save_steps", "1"),
                                   ("--adapter", "lora_sb", "--save_steps", "1")])  # fmt: skip
def test_resuming_is_exact(run, place, flags):
    steps = ("--max_train_steps", "4")
    run(*flags, *steps, "--output_dir", "whole")
    run(*flags, *steps, "--output_dir", "parts", "--resume_from_checkpoint", "whole/checkpoints/checkpoint-2")
    whole, parts = state("whole", 4), state("parts", 4)
    assert whole.keys() == parts.keys() and all(torch.equal(t, parts[k]) for k, t in whole.items())
    keep = ("step", "loss", "lr", "layers")
    assert [{k: e[k] for k in keep} for e in lines("whole")[2:]] == [{k: e[k] for k in keep} for e in lines("parts")]


def test_a_signal_ends_the_run_with_a_checkpoint(run, script, place, monkeypatch):
    run("--output_dir", "whole")
    original = script.Run.backward

    def kill(self, step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "backward", kill)
        with pytest.raises(SystemExit) as stop:
            run("--output_dir", "cut")
    assert stop.value.code == 143 and not (place / "cut/adapter").exists()
    run("--output_dir", "cut", "--resume_from_checkpoint", "latest")
    whole, cut = (read(Path(f) / "adapter/adapter.safetensors")[0] for f in ("whole", "cut"))
    assert all(torch.equal(t, cut[k]) for k, t in whole.items())


@pytest.mark.parametrize("normalization", ["tokens", "means"])
def test_accumulation_changes_nothing_but_memory(run, normalization):
    """1 x 8 equals 8 x 1 where tokens count alike; by means of means it cannot, as lengths differ."""
    common = ("--loss_normalization", normalization, "--adapter", "lora")
    run(*common, "--output_dir", "split", "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "8")
    run(*common, "--output_dir", "whole", "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1")
    same = [math.isclose(a["loss"], b["loss"], rel_tol=1e-5)
            for a, b in zip(lines("split"), lines("whole"), strict=True)]  # fmt: skip
    assert all(same) if normalization == "tokens" else not any(same)
    split, whole = (read(Path(f) / "adapter/adapter.safetensors")[0] for f in ("split", "whole"))
    close = all(torch.allclose(t, whole[k], atol=1e-4) for k, t in split.items())
    assert close == (normalization == "tokens")


def test_packing_and_checkpointing_train_alike(run):
    """One step over all rows is the same sum, however the rows are laid out."""
    one = ("--adapter", "lora", "--max_train_steps", "1")
    run(*one, "--output_dir", "plain", "--per_device_train_batch_size", "12")
    run(*one, "--output_dir", "again", "--per_device_train_batch_size", "12", "--gradient_checkpointing")
    from vislora.language.batches import Plan
    from vislora.language.encode import encode
    from vislora.language.models import load_tokenizer
    from vislora.language.records import records

    config = yaml.safe_load(Path("plain/config.yaml").read_text())
    tok = load_tokenizer(config["model_name_or_path"])
    made = encode(records(sums(), tok, prompt_template="qa"), tok, 128).examples
    rows = Plan([len(e) for e in made], 0, True, 128).rows(1)
    run(*one, "--output_dir", "packed", "--per_device_train_batch_size", str(rows), "--packing")
    assert rows < 12
    losses = [lines(name)[0]["loss"] for name in ("plain", "again", "packed")]
    assert all(math.isclose(loss, losses[0], rel_tol=1e-5) for loss in losses)
    norms = [lines(name)[0]["grad_norm"] for name in ("plain", "again", "packed")]
    assert all(math.isclose(norm, norms[0], rel_tol=1e-4) for norm in norms)


@pytest.mark.parametrize("method", vislora.methods())
def test_every_method_in_bf16(run, method):
    run("--adapter", method, "--mixed_precision", "bf16", "--output_dir", "out", "--max_train_steps", "2")
    assert all(np.isfinite(entry["loss"]) for entry in lines("out"))
    tensors = read(Path("out/adapter/adapter.safetensors"))[0].values()
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in tensors)


def test_a_recurrent_model(run, place, capsys):
    """RWKV: its linears but the head, merged and exported; rows that would run into each other are refused."""
    base = str(folder(place / "rwkv", rwkv))
    run("--model_name_or_path", base, "--adapter", "sorsa", "--output_dir", "out", "--merge", "--learning_rate", "0.05",
        "--eval_answers", "2", "--max_new_tokens", "3", "--validation_split_percentage", "20")  # fmt: skip
    found = {name.rpartition(".")[0] for name in read(Path("out/adapter/adapter.safetensors"))[0]}
    assert len(found) == 14 and not any("head" in name for name in found)
    ours = base_of(base)
    before = logits(ours)
    vislora.load(ours, "out/adapter")
    assert (logits(ours) - before).abs().max() > 1e-2
    assert torch.allclose(logits(base_of("out/model")), logits(ours), atol=1e-4)
    assert "takes no positions" in refused(run, capsys, "--model_name_or_path", base, "--packing")


def test_baselines(run, place):
    (place / "oft.yaml").write_text("peft_type: OFT\noft_block_size: 4\n")
    run("--adapter", "peft", "--peft_config", "oft.yaml", "--output_dir", "peft")
    run("--adapter", "none", "--output_dir", "none", "--validation_split_percentage", "20")
    run("--adapter", "full", "--output_dir", "full", "--targets", "q_proj", "--mixed_precision", "bf16")
    assert any(Path("peft/adapter").iterdir()) and not Path("none/adapter").exists()
    assert json.loads(Path("none/metrics.json").read_text())["eval_loss"] > 0
    assert (place / "full/model/model.safetensors").is_file() and not (place / "full/export").exists()


def test_a_base_of_four_bits_trains_and_merges_into_the_whole_one(run, model):
    pytest.importorskip("bitsandbytes")
    run("--adapter", "lora", "--load_in_4bit", "--output_dir", "out", "--merge", "--learning_rate", "0.05",
        "--bnb_4bit_compute_dtype", "float32")  # fmt: skip
    ours = base_of(model)  # of so narrow layers, four bits move the norms by more than a load lets pass
    vislora.load(ours, "out/adapter", allow_other_base=True)
    merged = AutoModelForCausalLM.from_pretrained("out/model").eval()
    assert merged.model.layers[0].mlp.up_proj.weight.is_floating_point()
    assert torch.allclose(logits(merged), logits(ours), atol=1e-4)


def test_sorsa_can_leave_its_penalty_unclipped(run):
    flags = ("--adapter", "sorsa", "--gamma", "1", "--max_grad_norm", "1e-3", "--learning_rate", "0.01")
    run(*flags, "--output_dir", "clipped")
    run(*flags, "--output_dir", "unclipped", "--penalty_unclipped")
    a, b = lines("clipped"), lines("unclipped")
    assert all(entry["penalty"] >= 0 for entry in a + b)
    assert a[-1]["penalty"] != b[-1]["penalty"]


def test_conversations(run, place):
    talk = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}] * 4
    write_rows(place / "talk.jsonl", talk)
    run("--dataset_name", "talk.jsonl", "--chat_template", "chatml", "--validation_split_percentage", "25",
        "--sample_prompt", "hi", "--max_new_tokens", "2", "--output_dir", "out")  # fmt: skip
    said = json.loads(Path("out/samples/step-000003.jsonl").read_text().splitlines()[0])
    assert said["prompt"] == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.case("F27")
def test_a_run_that_diverges_stops_before_it_spoils_anything(run, script, place, capsys, monkeypatch):
    original = script.Run.backward

    def spoiled(self, step):
        parts = original(self, step)
        for p in self.adapter.parameters():
            p.grad.mul_(math.nan if step else 1)
        return parts

    monkeypatch.setattr(script.Run, "backward", spoiled)
    with pytest.raises(SystemExit) as stop:
        run("--output_dir", "out", "--save_steps", "1", "--max_train_steps", "4")
    assert stop.value.code == 2 and "not finite for 3 steps in a row" in capsys.readouterr().err
    first, last = state("out", 1), state("out", 3)
    assert all(torch.equal(t, last[n]) for n, t in first.items() if n.startswith("adapter"))
    assert all(t.isfinite().all() for t in last.values())


def test_dry_run_writes_nothing(run, place, capsys):
    run("--dry_run", "--adapter", "nb_lora", "--delta", "2")
    said = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj" in said and "14 layers" in said and "12 examples" in said
    assert {p.name for p in place.iterdir()} == {"rows.jsonl"}


def test_bad_input_gets_one_line_and_writes_nothing(run, place, capsys):
    write_rows(place / "strange.jsonl", [{"left": "a", "right": "b"}])
    for flags, words in (
        (("--dataset_name", "gone.jsonl"), ("gone.jsonl",)),
        (("--dataset_name", "strange.jsonl"), ("left, right", "--dataset_field")),
        (("--model_name_or_path", "./nowhere"), ("nowhere",)),
        (("--max_length", "5000"), ("5000", "256")),
        (("--prompt_template", "qq"), ("qq", "alpaca")),
        (("--targets", "q_prj"), ("q_prj", "q_proj")),
        (("--mixed_precision", "fp16"), ("fp16", "bf16")),
        (("--packing", "--attn_implementation", "flash_attention_2"), ("flash_attention_2",)),
        (("--load_in_4bit", "--load_in_8bit"), ("--load_in_8bit",)),
        (("--optimizer", "lora_pro", "--adapter", "nb_lora"), ("lora_pro", "nb_lora")),
        (("--per_device_train_batch_size", "0"), ("per_device_train_batch_size", "0")),
        (("--warmup_ratio", "1.5"), ("warmup_ratio",)),
    ):
        line = refused(run, capsys, *flags)
        assert all(word in line for word in words), line


def test_resuming_with_changed_settings_or_data_is_refused(run, place, capsys):
    run("--output_dir", "out", "--save_steps", "1")
    resume = ("--output_dir", "out", "--resume_from_checkpoint", "latest")
    line = refused(run, capsys, *resume, "--rank", "4", "--seed", "7")
    assert "rank" in line and "seed was 0, is 7" in line
    write_rows(place / "rows.jsonl", sums(11))
    assert "other rows" in refused(run, capsys, *resume)


def test_help_lists_every_option_once(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and said.count("--learning_rate\n") == 1 and "--adapter nb_lora:" in said


def test_the_gradient_probe_is_logged_and_changes_nothing(run, capsys):
    for more in ((), ("--probe_steps", "1")):
        run("--adapter", "lora", "--dropout", "0.1", *more)
    plain, probed = (read(f"runs/000{i}/adapter/adapter.safetensors")[0] for i in (1, 2))
    assert all(torch.equal(t, probed[k]) for k, t in plain.items())
    found = [line for line in lines("runs/0002") if "cosine" in line]
    assert [line["step"] for line in found] == [1, 2]
    each = [layer["cosine"] for layer in found[0]["layers"].values()]
    assert found[0]["cosine"] == pytest.approx(sum(each) / len(each)) and all(0 < c <= 1 for c in each)
    assert "not full" in refused(run, capsys, "--adapter", "full", "--probe_steps", "2")
    assert "less than 1" in refused(run, capsys, "--adapter", "lora", "--probe_steps", "0")


def test_compiled_graphs(run, place, monkeypatch):
    compiles(run, monkeypatch, "--adapter", "nb_lora", "--p", "1", "--delta", "2")
