"""The DreamBooth script, whole, on a random Stable Diffusion of 32 pixels."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from script_runs import REPOSITORY, compiles, lines, photograph, refused, state

import vislora
from vislora.export import CERTIFICATE
from vislora.io import LORA_FILE, read


def test_a_run_leaves_everything_and_can_be_run_again(run, place, model):
    flags = ("--adapter", "nb_lora", "--p", "1", "--delta", "6", "--validation_prompt", "a b", "c d",
             "--num_validation_images", "2", "--validation_steps", "2", "--validation_inference_steps", "2",
             "--report_to", "tensorboard", "--learning_rate", "0.01")  # fmt: skip
    run(*flags)
    run("--config", "runs/0001/config.yaml", "--adapter", "nb_lora")
    one, two = Path("runs/0001"), Path("runs/0002")
    for name in ("config.yaml", "adapter/adapter.safetensors", LORA_FILE, "samples/grid.png", "samples/step-000000.png",
                 "samples/step-000002.png", "samples/step-000003.png", "metrics.json", "metrics.jsonl",
                 "README.md"):  # fmt: skip
        assert (one / name).is_file(), name
    assert any((one / "logs").iterdir())
    first, second = (read(run / "adapter" / "adapter.safetensors")[0] for run in (one, two))
    assert all(torch.equal(t, second[k]) for k, t in first.items())
    assert yaml.safe_load((one / "config.yaml").read_text())["adapter_options"]["delta"] == 6.0

    logged = lines("runs/0001")
    assert [entry["step"] for entry in logged] == [1, 2, 3]
    assert all(np.isfinite(entry["loss"]) and entry["lr"] == 0.01 for entry in logged)
    layers = logged[-1]["layers"]
    assert len(layers) == 32 and all(0 < x["share"] <= 1 and x["norm"] > 0 and x["ratio"] > 0 for x in layers.values())
    assert logged[-1]["largest_share"] == max(x["share"] for x in layers.values())
    metrics = json.loads((one / "metrics.json").read_text())
    assert metrics["diffusers_export_error"] < 1e-3 and metrics["largest_share"] <= 1
    card = (one / "README.md").read_text()
    assert "samples/grid.png" in card and "delta = 6" in card and "load_lora_weights" in card

    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None, feature_extractor=None)
    adapter = vislora.load(pipe, one)
    assert len(adapter.sites) == 32 and adapter.method.delta == 6.0


EVERYTHING = ("--adapter", "lora", "--dropout", "0.3", "--gradient_accumulation_steps", "2", "--random_flip",
              "--with_prior_preservation", "--class_prompt", "b", "--num_class_images", "3",
              "--class_data_dir", "class",
              "--validation_inference_steps", "2", "--train_text_encoder", "--lr_scheduler", "cosine",
              "--lr_warmup_steps", "2", "--snr_gamma", "5", "--learning_rate", "0.01", "--text_encoder_lr", "0.01",
              "--checkpointing_steps", "1")  # fmt: skip


def test_resuming_at_any_step_is_exact(run, place):
    run(*EVERYTHING, "--max_train_steps", "4", "--output_dir", "whole")
    run(*EVERYTHING, "--max_train_steps", "4", "--output_dir", "parts", "--logging_steps", "1")
    # cut back to step 1, then go on twice
    for step in (2, 3, 4):
        for file in (place / "parts/checkpoints" / f"checkpoint-{step}").iterdir():
            file.unlink()
        (place / "parts/checkpoints" / f"checkpoint-{step}").rmdir()
    run(*EVERYTHING, "--max_train_steps", "4", "--output_dir", "parts", "--resume_from_checkpoint", "latest")
    whole, parts = state("whole", 4), state("parts", 4)
    assert whole.keys() == parts.keys() and all(torch.equal(t, parts[k]) for k, t in whole.items())
    assert any("text_encoder" in k for k in whole)
    keep = ("step", "loss", "loss_prior", "lr", "layers")
    assert [{k: e[k] for k in keep} for e in lines("whole")] == [{k: e[k] for k in keep} for e in lines("parts")]
    assert [e["lr"] for e in lines("whole")] == [0.0, 0.005, 0.01, 0.005]  # of the step itself
    run(*EVERYTHING, "--max_train_steps", "4", "--output_dir", "parts", "--resume_from_checkpoint", "checkpoint-3")
    assert all(torch.equal(t, whole[k]) for k, t in state("parts", 4).items())


def test_a_signal_ends_the_run_with_a_checkpoint(run, script, place, monkeypatch):
    run("--output_dir", "whole", "--checkpointing_steps", "3")
    original = script.Run.backward
    for last in (1, 2):  # in the middle, and in the very last step

        def kill(self, step, last=last):
            if step == last:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, step)

        with monkeypatch.context() as patch:
            patch.setattr(script.Run, "backward", kill)
            with pytest.raises(SystemExit) as stop:
                run("--output_dir", f"cut{last}", "--checkpointing_steps", "30")
        assert stop.value.code == 143 and not (place / f"cut{last}/adapter").exists()
        assert (place / f"cut{last}/checkpoints/checkpoint-{last + 1}").is_dir()
        run("--output_dir", f"cut{last}", "--checkpointing_steps", "30", "--resume_from_checkpoint", "latest")
        whole, cut = (read(Path(f) / "adapter/adapter.safetensors")[0] for f in ("whole", f"cut{last}"))
        assert all(torch.equal(t, cut[k]) for k, t in whole.items())


def test_cached_and_fresh_latents_train_alike(run):
    run("--output_dir", "cached")
    run("--output_dir", "fresh", "--no_cache_latents")
    for a, b in zip(lines("cached"), lines("fresh"), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-5 * a["loss"]


def test_gradient_checkpointing_and_accumulation_change_nothing_but_memory(run):
    run("--output_dir", "plain", "--train_batch_size", "4")
    run("--output_dir", "split", "--gradient_accumulation_steps", "2", "--gradient_checkpointing")
    for a, b in zip(lines("plain"), lines("split"), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-4 * a["loss"]


@pytest.mark.parametrize("encoder", [(), ("--train_text_encoder",)], ids=["unet", "text_encoder"])
def test_base_output_preservation_starts_at_no_loss(run, encoder):
    flags = ("--with_prior_preservation", "--class_prompt", "b", "--prior_source", "base_output", *encoder)
    run(*flags, "--learning_rate", "0.05", "--text_encoder_lr", "0.05", "--output_dir", "out", "--adapter", "lora")
    prior = [entry["loss_prior"] for entry in lines("out")]
    assert prior[0] < 1e-9 < prior[1]
    assert not list(Path("out").glob("class*"))


def test_class_images_are_made_up_to_the_number(run, place):
    photograph(place / "class", 1)
    run("--with_prior_preservation", "--class_prompt", "b", "--num_class_images", "3", "--class_data_dir", "class",
        "--validation_inference_steps", "2")  # fmt: skip
    assert len(list((place / "class").iterdir())) == 3 and (place / "class/0.png").is_file()


@pytest.mark.parametrize("method", vislora.methods())
def test_every_method_in_bf16(run, method):
    run("--adapter", method, "--mixed_precision", "bf16", "--output_dir", "out", "--learning_rate", "0.01")
    assert all(np.isfinite(entry["loss"]) for entry in lines("out"))
    tensors = read(Path("out/adapter/adapter.safetensors"))[0].values()
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in tensors)


@pytest.mark.parametrize("flags", [
    ("scaled_adamw", "--optimizer_damping", "1e-4"), ("lora_pro",), ("lora_pro", "--lora_pro_moments", "factors"),
    ("alt_lora", "--alt_lora_alternate"), ("alt_lora", "--no_alt_lora_plus", "--mixed_precision", "bf16"),
])  # fmt: skip
def test_every_optimizer_trains_and_resumes_exactly(run, flags):
    usual = ("--adapter", "lora_plus", "--optimizer", *flags, "--learning_rate", "0.01", "--max_train_steps", "4",
             "--lr_scheduler", "cosine", "--checkpointing_steps", "2", "--output_dir", "out")  # fmt: skip
    run(*usual)
    whole, start = state("out", 4), state("out", 2)
    assert all(np.isfinite(entry["loss"]) for entry in lines("out"))
    factors = [k for k in whole if k.startswith("adapter.")]
    assert all(whole[k].isfinite().all() and not torch.equal(whole[k], start[k]) for k in factors)
    assert f"optimizer | {flags[0]} " in Path("out/README.md").read_text().replace("\\", "")
    run(*usual, "--resume_from_checkpoint", "checkpoint-2")
    assert all(torch.equal(t, whole[k]) for k, t in state("out", 4).items())


@pytest.mark.parametrize("method", vislora.methods())
def test_every_entry_of_configs_adapters_runs(run, method):
    file = REPOSITORY / "configs/adapters" / f"{method}.yaml"
    run("--config", str(file), "--output_dir", "out", "--max_train_steps", "2")
    config = yaml.safe_load(Path("out/config.yaml").read_text())
    entry = yaml.safe_load(file.read_text())
    assert config["adapter"] == method and config["learning_rate"] == float(entry["learning_rate"])
    taken = {key: config["adapter_options"][key] for key in entry["adapter_options"] if key != "rank"}
    assert taken == {key: type(taken[key])(entry["adapter_options"][key]) for key in taken}
    assert all(t.isfinite().all() for t in read(Path("out/adapter/adapter.safetensors"))[0].values())


def test_captions_are_used(run, place, script, monkeypatch):
    for i in range(3):
        (place / "photos" / f"{i}.txt").write_text(f"c {i}\n")
    seen, embed = set(), script.Denoising.embed
    monkeypatch.setattr(script.Denoising, "embed", lambda self, prompts: seen.update(prompts) or embed(self, prompts))
    run("--train_batch_size", "3")
    assert seen == {"c 0", "c 1", "c 2"}


def test_a_prompt_that_is_cut_is_warned_of_once(run, caplog):
    run("--instance_prompt", "a " + "b" * 90, "--validation_prompt", "c " * 80, "--validation_inference_steps", "1",
        "--num_validation_images", "1", "--train_text_encoder")  # fmt: skip
    warned = sorted(r.message.split("lost: ")[1] for r in caplog.records if "lost" in r.message)
    assert len(warned) == 2 and "bbb" in warned[0] and "c c" in warned[1]


def test_the_exported_file_is_squeezed_and_the_loss_is_told(run, capsys):
    run("--adapter", "pissa", "--learning_rate", "0.01", "--export_rank", "3")
    tensors, header = read(Path("runs/0001") / LORA_FILE)
    assert {len(t) for name, t in tensors.items() if "lora_A" in name} == {3}  # of 2 x 2
    lost = json.loads((Path("runs/0001") / "metrics.json").read_text())["largest_lost"]
    assert 0 < lost < 1 and lost == json.loads(header[CERTIFICATE])["largest_lost"]
    assert f"lost: {lost:.1%} of a layer" in capsys.readouterr().out
    assert "| export\\_rank | 3 |" in Path("runs/0001/README.md").read_text()


def test_dry_run_writes_nothing(run, place, capsys):
    run("--dry_run", "--adapter", "nb_lora", "--delta", "2")
    said = capsys.readouterr().out
    assert "mid_block.attentions.0.transformer_blocks.0.attn2.to_v" in said and "32 layers" in said
    assert "3 photos" in said and {p.name for p in place.iterdir()} == {"photos"}


@pytest.mark.case("I01", "I02", "I03", "I06", "I07", "C01", "C02", "C04", "C05", "C08", "C09", "C10")
def test_bad_input_gets_one_line_and_writes_nothing(run, place, capsys, model):
    (place / "empty").mkdir()
    (place / "texts").mkdir()
    (place / "texts/a.txt").write_text("no photo")
    photograph(place / "cut")
    whole = (place / "cut/1.png").read_bytes()
    (place / "cut/1.png").write_bytes(whole[: len(whole) // 2])
    photograph(place / "fake")
    (place / "fake/x.jpg").write_text("no image")
    run("--output_dir", "taken")
    nowhere = ("--pretrained_model_name_or_path", "nowhere/at/all")
    for flags, words in (
        (("--instance_data_dir", "gone"), ("gone",)),
        (("--instance_data_dir", "empty"), ("empty",)),
        (("--instance_data_dir", "texts"), ("texts", "photo")),
        (("--instance_data_dir", "cut"), ("1.png",)),
        (("--instance_data_dir", "fake"), ("x.jpg",)),
        (("--adapter", "nb_lora", "--alpha", "4"), ("--alpha", "nb_lora", "--delta")),
        (("--adapter", "lora", "--delta", "4"), ("--delta", "lora", "--alpha")),
        (("--adapter", "nb_lorra"), ("nb_lorra", "nb_lora")),
        (("--learningrate", "1"), ("--learning_rate",)),
        (("--rank", "5000"), ("5000",)),
        (("--adapter", "nb_lora", "--p", "0.5"), ("p", "0.5")),
        (("--adapter", "nb_lora", "--delta", "0"), ("delta", "0.0")),
        (("--adapter", "nb_lora", "--delta", "-1"), ("delta", "-1")),
        (("--targets", "to_qq"), ("to_qq", "to_q")),
        (("--output_dir", "taken"), ("taken", "another run")),
        (("--output_dir", "taken", "--resume_from_checkpoint", "checkpoint-9"), ("checkpoint-9",)),
        (("--resume_from_checkpoint", "latest"), ("output_dir",)),
        (("--learning_rate", "nan"), ("learning_rate", "nan")),
        (("--train_batch_size", "0"), ("train_batch_size", "0")),
        (("--export_rank", "0"), ("export_rank", "0")),
        (("--with_prior_preservation",), ("--class_prompt",)),
        (("--mixed_precision", "fp16"), ("fp16", "bf16")),
        (nowhere, ("nowhere",)),
        (("--adapter", "dora", "--train_text_encoder"), ("dora", "text_encoder")),
        (("--optimizer", "lora_pro", *nowhere), ("lora_pro", "nb_lora", "dora")),  # before a model is looked for
        (("--optimizer_damping", "0.1", *nowhere), ("--optimizer_damping", "adamw", "lora_pro")),
        (("--optimizer", "alt_lora", "--optimizer_damping", "-1", *nowhere), ("--optimizer_damping", "-1")),
        (("--config", "gone.yaml"), ("gone.yaml",)),
        (("--validation_prompt", "gone.txt"), ("gone.txt",)),
    ):
        line = refused(run, capsys, *flags)
        assert all(word in line for word in words), line


@pytest.mark.case("C13")
def test_resuming_with_changed_settings_lists_them(run, capsys):
    run("--output_dir", "out", "--checkpointing_steps", "1")
    resume = ("--output_dir", "out", "--resume_from_checkpoint", "latest")
    line = refused(run, capsys, *resume, "--rank", "4", "--seed", "7")
    assert "rank" in line and "seed was 0, is 7" in line
    photo = next(Path("photos").iterdir())
    Image.new("RGB", (48, 40)).save(photo)
    assert "other photos" in refused(run, capsys, *resume)


def test_help_lists_every_option_once(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and said.count("--learning_rate\n") == 1 and "--adapter nb_lora:" in said


def test_scripts_are_short_and_name_no_method():
    for file in (REPOSITORY / "train_scripts").glob("*.py"):
        text = file.read_text()
        assert len(text.splitlines()) <= 300, file.name
        code = text.split('"""', 2)[2]
        for method in vislora.methods():
            assert not re.search(rf"\b{method}\b", code), f"{file.name} names {method}"


@pytest.mark.parametrize("flags", [("od_lora",), ("nb_lora", "--p", "1", "--delta_ratio", "0.2")])
def test_compiled_graphs(run, place, monkeypatch, flags):
    compiles(run, monkeypatch, "--gradient_checkpointing", "--validation_steps", "2", "--adapter", *flags)


def test_compiling_needs_a_compiler(run, place, capsys, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(SystemExit):
        run("--compile", "--output_dir", "out")
    assert "--compile: needs a C++ compiler" in capsys.readouterr().err
