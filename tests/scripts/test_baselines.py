"""--adapter full, none and peft through the DreamBooth script."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from script_runs import lines, refused, state

import vislora
from vislora.diffusion.sample import render
from vislora.io import LORA_FILE, read

DRAWN = ("--validation_prompt", "a b", "--num_validation_images", "1", "--validation_inference_steps", "2")


def cut_back(folder: Path, last: int) -> None:
    """Forget every checkpoint after step `last`."""
    for place in (folder / "checkpoints").iterdir():
        if int(place.name.partition("-")[2]) > last:
            shutil.rmtree(place)


def stock(model) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(model, safety_checker=None, feature_extractor=None)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_full_fine_tuning_leaves_a_unet_that_stock_diffusers_runs_alike(run, model, precision):
    run("--adapter", "full", "--learning_rate", "1e-3", "--mixed_precision", precision, "--output_dir", "out", *DRAWN)
    out = Path("out")
    logged = lines("out")
    assert [entry["step"] for entry in logged] == [1, 2, 3] and all(np.isfinite(e["loss"]) for e in logged)
    base = dict(UNet2DConditionModel.from_pretrained(model, subfolder="unet").named_parameters())
    unet = UNet2DConditionModel.from_pretrained(out / "unet")
    assert all(p.dtype == torch.float32 and not torch.equal(p, base[n]) for n, p in unet.named_parameters())
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["trainable_parameters"] == sum(p.numel() for p in base.values())
    assert metrics["diffusers_export_error"] == 0.0 and metrics["largest_norm"] > 0
    matrices = {n.removesuffix(".weight") for n, p in base.items() if p.dim() > 1}
    assert {n.removeprefix("unet.") for n in logged[-1]["layers"]} == matrices
    card = (out / "README.md").read_text()
    assert "UNet2DConditionModel.from_pretrained('out/unet')" in card and "load_lora_weights" not in card

    pipe, ours = stock(model), stock(model)
    pipe.unet = unet
    handle = vislora.load(ours, out)
    pictures = [render(p, ["a b"], [1], 2, 1.0, 1) for p in (pipe, ours)]
    assert np.array_equal(*(np.asarray(images[0]) for images in pictures))
    with handle.disabled():
        before = render(ours, ["a b"], [1], 2, 1.0, 1)[0]
    assert not np.array_equal(before, pictures[0][0])
    assert np.array_equal(before, render(stock(model), ["a b"], [1], 2, 1.0, 1)[0])


def test_partial_fine_tuning_moves_its_targets_alone(run, model):
    run("--adapter", "full", "--targets", "to_k", "to_v", "--train_text_encoder", "--output_dir", "out",
        "--text_encoder_lr", "1e-3", "--checkpointing_steps", "1")  # fmt: skip
    base = UNet2DConditionModel.from_pretrained(model, subfolder="unet").state_dict()
    trained = UNet2DConditionModel.from_pretrained("out/unet").state_dict()
    moved = {n for n, t in trained.items() if not torch.equal(t, base[n])}
    assert moved and all(".to_k." in n or ".to_v." in n for n in moved)
    encoder = stock(model).text_encoder
    assert not torch.equal(type(encoder).from_pretrained("out/text_encoder").state_dict()[
        "embeddings.token_embedding.weight"], encoder.state_dict()["embeddings.token_embedding.weight"])  # fmt: skip
    names = read("out/checkpoints/checkpoint-1/adapter.safetensors")[0]
    assert {n for n in names if n.startswith("unet.")} == {f"unet.{n}" for n in moved}


@pytest.mark.parametrize("prior", [(), ("--with_prior_preservation", "--class_prompt", "b", "--prior_source",
                                        "base_output")], ids=["plain", "base_output"])  # fmt: skip
def test_resuming_full_fine_tuning_is_exact(run, place, prior):
    flags = ("--adapter", "full", "--max_train_steps", "3", "--learning_rate", "1e-3", "--checkpointing_steps", "1",
             "--lr_scheduler", "cosine", *prior)  # fmt: skip
    run(*flags, "--output_dir", "whole")
    run(*flags, "--output_dir", "parts")
    cut_back(place / "parts", 1)
    run(*flags, "--output_dir", "parts", "--resume_from_checkpoint", "latest")
    whole, parts = state("whole", 3), state("parts", 3)
    assert whole.keys() == parts.keys() and all(torch.equal(t, parts[k]) for k, t in whole.items())
    if prior:
        assert lines("whole")[0]["loss_prior"] < 1e-9 < lines("whole")[1]["loss_prior"]


def test_the_frozen_base_is_drawn_and_not_trained(run, model, place, capsys):
    run("--adapter", "none", "--output_dir", "out", *DRAWN)
    said = capsys.readouterr().out
    assert "none trains nothing" in said and "adapter  " not in said and "diffusers  " not in said
    names = {p.name for p in Path("out").iterdir() if not p.name.startswith(".")}
    assert names == {"config.yaml", "samples", "metrics.json", "README.md"}
    metrics = json.loads(Path("out/metrics.json").read_text())
    assert metrics["steps"] == 0 and metrics["trainable_parameters"] == 0 and metrics["diffusers_export_error"] is None
    card = Path("out/README.md").read_text()
    assert "Nothing was trained" in card and "samples/grid.png" in card and "load" not in card
    run("--adapter", "lora", "--output_dir", "lora", *DRAWN)
    first = [Path(folder) / "samples/step-000000/00-00.png" for folder in ("out", "lora")]
    assert first[0].read_bytes() == first[1].read_bytes()
    run("--config", "out/config.yaml", "--adapter", "none", "--output_dir", "again")
    assert (place / "again/samples/step-000000/00-00.png").read_bytes() == first[0].read_bytes()


PEFT = {
    "LORA": {"r": 2}, "ADALORA": {"init_r": 4, "target_r": 2}, "VERA": {"r": 4}, "LOHA": {"r": 2}, "LOKR": {"r": 2},
    "OFT": {"oft_block_size": 4, "r": 0}, "BOFT": {"boft_block_size": 4}, "IA3": {}, "DELORA": {"r": 2},
    "LILY": {"r": 2},
}  # fmt: skip


def peft(kind: str, **options) -> tuple[str, ...]:
    """The flags for a configuration of this type, which is written here."""
    file = Path(f"{kind}.json")
    file.write_text(json.dumps({"peft_type": kind, **PEFT[kind], **options}))
    return "--adapter", "peft", "--peft_config", str(file), "--learning_rate", "1e-2"


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's advice on its own options
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("kind", PEFT)
def test_pefts_types_train_and_load(run, model, kind, precision):
    run(*peft(kind), "--mixed_precision", precision, "--output_dir", "out", "--validation_inference_steps", "2")
    out = Path("out")
    logged = lines("out")
    assert len(logged) == 3 and all(np.isfinite(entry["loss"]) for entry in logged)
    metrics = json.loads((out / "metrics.json").read_text())
    measured = kind != "LILY"  # which PEFT cannot merge
    assert len(logged[-1]["layers"]) == 32 * measured and (metrics["largest_norm"] > 0) == measured
    assert (out / LORA_FILE).is_file() == (kind == "LORA")
    assert ("penalty" in logged[0]) == (kind == "ADALORA")
    if kind == "LORA":
        assert metrics["diffusers_export_error"] < 1e-3
    else:
        assert metrics["diffusers_export_error"] is None
        assert "load_lora_weights" not in (out / "README.md").read_text()
    pipe = stock(model)
    base = render(pipe, ["a b"], [1], 2, 1.0, 1)[0]
    handle = vislora.load(pipe, out)
    assert handle.method.kind == kind and len(handle.sites) == 32
    assert all(t.isfinite().all() for _, t in handle.named_tensors() if t.is_floating_point())
    handle.detach()
    assert np.array_equal(base, render(pipe, ["a b"], [1], 2, 1.0, 1)[0])


@pytest.mark.parametrize("kind, more", [("ADALORA", ("--train_text_encoder", "--text_encoder_lr", "1e-2")),
                                        ("LORA", ("--with_prior_preservation", "--class_prompt", "b",
                                                  "--prior_source", "base_output"))])  # fmt: skip
def test_resuming_peft_is_exact(run, place, kind, more):
    dropout = {"lora_dropout": 0.3}
    flags = (*peft(kind, **dropout), *more, "--max_train_steps", "4", "--checkpointing_steps", "1")
    run(*flags, "--output_dir", "whole")
    run(*flags, "--output_dir", "parts")
    cut_back(place / "parts", 2)
    run(*flags, "--output_dir", "parts", "--resume_from_checkpoint", "latest")
    whole, parts = state("whole", 4), state("parts", 4)
    assert whole.keys() == parts.keys() and all(torch.equal(t, parts[k]) for k, t in whole.items())
    assert any("text_encoder" in k for k in whole) == (kind == "ADALORA")
    if kind == "LORA":
        assert lines("whole")[0]["loss_prior"] < 1e-9 < lines("whole")[1]["loss_prior"]


def test_a_changed_peft_configuration_is_not_resumed(run, capsys):
    run(*peft("LORA"), "--output_dir", "out", "--checkpointing_steps", "1")
    line = refused(run, capsys, *peft("LORA", r=4), "--output_dir", "out", "--resume_from_checkpoint", "latest")
    assert "1 settings changed: r was 2, is 4" in line


def test_what_baselines_lack_is_refused(run, capsys, place):
    for flags, words in (
        (("--adapter", "full", "--rank", "4"), ("--rank", "full has no such option", "no options")),
        (("--adapter", "none", "--targets", "to_q"), ("targets", "none")),
        (("--adapter", "full", "--targets", "to_qq"), ("to_qq", "to_q")),
        (("--adapter", "ful"), ("ful", "full")),
        (("--adapter", "peft"), ("--peft_config", "required")),
        (("--adapter", "lora", "--peft_config", "x.json"), ("--peft_config", "lora has no such option")),
        (("--adapter", "peft", "--peft_config", "gone.json"), ("gone.json", "cannot be read")),
        ((*peft("LOHA", target_modules=["to_q"]), "--targets", "to_v"), ("to_v", "target_modules")),
        ((*peft("LORA", lora_alfa=2),), ("lora_alfa", "lora_alpha")),
        (("--adapter", "full", "--export_rank", "2"), ("export_rank", "2 beside full")),
        (("--adapter", "none", "--export_rank", "2"), ("export_rank", "2 beside none")),
        ((*peft("OFT", oft_block_size=4), "--export_rank", "2"), ("export_rank", "2 beside peft")),
    ):
        line = refused(run, capsys, *flags)
        assert all(word in line for word in words), line


def test_pefts_lora_is_squeezed_like_ours(run):
    run(*peft("LORA", r=4), "--export_rank", "2", "--learning_rate", "0.05", "--output_dir", "out")
    tensors, _ = read(Path("out") / LORA_FILE)
    assert {t.shape[0] for key, t in tensors.items() if "lora_A" in key} == {2}
    metrics = json.loads(Path("out/metrics.json").read_text())
    assert 0 < metrics["largest_lost"] < 1 and metrics["diffusers_export_error"] < 1e-3


def test_dry_run_counts_the_copy_of_the_base(run, capsys):
    run("--dry_run", "--adapter", "full")
    said = capsys.readouterr().out
    assert "conv_in.weight" in said and "MiB of the base's values" in said
    run("--dry_run", "--adapter", "none")
    assert "nothing trains" in capsys.readouterr().out
