"""vislora merge --base: whole folders that stock libraries load, with what the adapters add in their weights."""

from __future__ import annotations

import json

import open_clip
import pytest
import timm
import torch
from diffusers import StableDiffusionPipeline
from hosts import hf_vit, llama
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_sd import tiny_sd
from transformers import LlamaForCausalLM

import vislora
from vislora.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_sd(tmp_path_factory.mktemp("model"))


def run(*argv):
    main([str(word) for word in argv])


def fails(capsys, words, *argv, status=2):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    err = capsys.readouterr().err
    assert stop.value.code == status and words in err and err.count("\n") == 1, err


def pipeline(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, feature_extractor=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def trained(pipe, folder, method="lora", seed=1, format=None, targets=None, **options):
    """Saved adapters of a UNet's attention and convolutions and an encoder; their deltas."""
    targets = targets or {"unet": ["to_q", "to_v", "conv1"], "text_encoder": ["q_proj"]}
    adapter = vislora.attach(pipe, method, targets=targets, rank=2, **options)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    deltas = adapter.deltas()
    adapter.export(folder, format) if format else adapter.save(folder)
    adapter.detach()
    return deltas


def weights(pipe):
    return {
        f"{part}.{key}": t.clone()
        for part in ("unet", "text_encoder", "vae") for key, t in getattr(pipe, part).state_dict().items()
    }  # fmt: skip


def test_a_pipelines_folder_with_two_adapters_in_it(model, tmp_path, capsys):
    pipe = pipeline(model)
    base = weights(pipe)
    one = trained(pipe, tmp_path / "a", "nb_lora", p=1, delta=0.5)
    two = trained(pipe, tmp_path / "b", seed=2, format="kohya")
    run("merge", f"{tmp_path / 'a'}=0.5", f"{tmp_path / 'b'}=-2", "--base", model, "-o", tmp_path / "out", "--p", 1)
    said = capsys.readouterr().out
    again = weights(pipeline(tmp_path / "out"))
    assert again.keys() == base.keys()
    largest = 0.0
    for key, weight in base.items():
        name = key.removesuffix(".weight")
        wanted = weight + 0.5 * one[name] - 2 * two[name] if name in one and key.endswith("weight") else weight
        assert torch.allclose(again[key], wanted, atol=1e-6), key
        if name in one and key.endswith("weight"):
            delta = (again[key] - weight).flatten(1)
            largest = max(largest, torch.linalg.svdvals(delta).sum().item())
    stated = float(said.split("Schatten 1-norm at most ")[1].split()[0])
    assert largest <= stated < 3 * largest and f"{len(one)} weights" in said
    ours = {p.relative_to(model) for p in model.rglob("*") if p.is_file()}
    assert {p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*") if p.is_file()} == ours


def test_dora_and_half_precision(model, tmp_path, capsys):
    pipe = pipeline(model)
    wanted = trained(pipe, tmp_path / "dora", "dora")
    base = weights(pipe)
    half = tmp_path / "half"
    pipeline(model).to(torch.bfloat16).save_pretrained(half)
    run("merge", tmp_path / "dora", "--base", half, "-o", tmp_path / "out")
    out = capsys.readouterr().out
    again = weights(pipeline(tmp_path / "out"))
    for name, delta in wanted.items():
        moved = again[f"{name}.weight"] - base[f"{name}.weight"]
        assert (moved - delta).norm() < 0.05 * delta.norm()
    assert load_file(next((tmp_path / "out/unet").glob("*.safetensors")))["conv_in.weight"].dtype == torch.bfloat16
    assert "precision took" in out
    fails(capsys, "is adapted by DoRA and by another", "merge", tmp_path / "dora", tmp_path / "dora", "--base", model,
          "-o", tmp_path / "both")  # fmt: skip
    run("export", tmp_path / "dora", "--format", "kohya", "--rank", 16, "--base", model, "-o", tmp_path / "folded")
    assert "lost" in capsys.readouterr().out
    folded = vislora.load(pipe, tmp_path / "folded")
    for name, delta in folded.deltas().items():
        assert (delta - wanted[name]).norm() < 0.6 * wanted[name].norm()
    fails(capsys, "give the model as --base", "export", tmp_path / "dora", "--format", "kohya", "--rank", 4,
          "-o", tmp_path / "none")  # fmt: skip


def test_a_sharded_transformers_folder(tmp_path, capsys):
    net = llama()
    net.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    (tmp_path / "base/pytorch_model.bin").write_bytes(b"the same in another form")
    tuned = get_peft_model(net, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    run("merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "out")
    wanted = tuned.merge_and_unload().state_dict()
    again = LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert again.keys() == wanted.keys() and all(torch.allclose(again[k], wanted[k], atol=1e-6) for k in wanted)
    assert not (tmp_path / "out/pytorch_model.bin").exists()
    names = [p.name for p in (tmp_path / "out").iterdir()]
    assert sorted(names) == sorted(p.name for p in (tmp_path / "base").iterdir() if p.suffix != ".bin")
    vit = hf_vit()
    vit.save_pretrained(tmp_path / "vit")
    targets = [n for n, m in vit.named_modules() if isinstance(m, torch.nn.Linear)][:3]
    trained(vit, tmp_path / "vit_adapter", targets=targets)  # whose weights transformers renames as it loads them
    fails(capsys, "or merge the loaded model", "merge", tmp_path / "vit_adapter", "--base", tmp_path / "vit",
          "-o", tmp_path / "vit_out")  # fmt: skip
    assert not (tmp_path / "vit_out").exists()


def test_timms_and_open_clips_folders(tmp_path):
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
    (tmp_path / "timm").mkdir()
    save_file(net.state_dict(), tmp_path / "timm/model.safetensors")
    about = {"architecture": "vit_tiny_patch16_224", "num_classes": 3, "model_args": {"img_size": 32, "depth": 2}}
    (tmp_path / "timm/config.json").write_text(json.dumps({**about, "pretrained_cfg": {"input_size": [3, 32, 32]}}))
    deltas = trained(net, tmp_path / "a", targets="vit-qv")
    run("merge", f"{tmp_path / 'a'}=2", "--base", tmp_path / "timm", "-o", tmp_path / "timm_out")
    again = timm.create_model(f"local-dir:{tmp_path / 'timm_out'}", pretrained=True).state_dict()
    for key, weight in net.state_dict().items():
        assert torch.allclose(again[key], weight + 2 * deltas.get(key.removesuffix(".weight"), 0), atol=1e-6)
    run("merge", tmp_path / "a", "--base", tmp_path / "timm/model.safetensors", "-o", tmp_path / "one.safetensors")
    assert torch.allclose(load_file(tmp_path / "one.safetensors")["blocks.0.attn.qkv.weight"],
                          net.blocks[0].attn.qkv.weight + deltas["blocks.0.attn.qkv"], atol=1e-6)  # fmt: skip
    config = {
        "embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32},
        "text_cfg": {"context_length": 8, "vocab_size": 60, "width": 32, "heads": 2, "layers": 1},
    }  # fmt: skip
    clip = open_clip.CLIP(**config)
    (tmp_path / "clip").mkdir()
    save_file(clip.state_dict(), tmp_path / "clip/open_clip_model.safetensors")
    (tmp_path / "clip/open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    wanted = ["attn.in_proj_weight[q]", "attn.in_proj_weight[v]", "mlp.c_fc"]
    deltas = trained(clip, tmp_path / "c", targets=wanted)
    run("merge", tmp_path / "c", "--base", tmp_path / "clip", "-o", tmp_path / "clip_out")
    again = open_clip.create_model(f"local-dir:{tmp_path / 'clip_out'}").state_dict()
    for key, weight in clip.state_dict().items():
        delta = deltas.get(key, deltas.get(key.removesuffix(".weight"), 0))
        assert torch.allclose(again[key], weight + delta, atol=1e-6), key
    assert any(key.endswith("in_proj_weight") for key in deltas)


def test_what_is_refused_leaves_nothing(model, tmp_path, capsys):
    pipe = pipeline(model)
    trained(pipe, tmp_path / "a")
    before = sorted(tmp_path.rglob("*"))
    fails(capsys, "exists already", "merge", tmp_path / "a", "--base", model, "-o", tmp_path / "a")
    fails(capsys, "'x' is no weight", "merge", f"{tmp_path / 'a'}=x", "--base", model, "-o", tmp_path / "out")
    fails(capsys, "stands at 1 of 2", "merge", f"{tmp_path / 'a'}=1", tmp_path / "a", "--base", model,
          "-o", tmp_path / "out")  # fmt: skip
    fails(capsys, "is of adapters", "merge", tmp_path / "a", "--base", model, "--rank", 2, "-o", tmp_path / "out")
    fails(capsys, "is no folder, and no hub id", "merge", tmp_path / "a", "--base", "nowhere", "-o", tmp_path / "out")
    fails(capsys, "give a folder", "merge", tmp_path / "a", "--base", model, "-o", tmp_path / "out.safetensors")
    other = tiny_sd(tmp_path.with_name("other"), seed=5)
    fails(capsys, "was trained on another base", "merge", tmp_path / "a", "--base", other, "-o", tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


COMMANDS = [
    ["inspect"], ["merge", "-o", "out"], ["bound", "--delta_ratio", "0.1", "-o", "out"],
    ["export", "--format", "kohya", "-o", "out"],
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: words[0])
def test_a_hub_id_that_cannot_be_reached_is_one_line(command, model, tmp_path, capsys, monkeypatch):
    """The tests run offline (HF_HUB_OFFLINE)."""
    monkeypatch.chdir(tmp_path)
    trained(pipeline(model), tmp_path / "a")
    words = [command[0], "a", *command[1:], "--base", "nobody/nothing-at-all"]
    fails(capsys, "nothing-at-all: no such folder, and the hub cannot be reached", *words, status=3)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
