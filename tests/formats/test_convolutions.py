"""Convolutions in every layout: written, read by stock tools, and others' files read into our adapters."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from stock_loras import agree, attach, deltas, dense, stock_deltas
from tiny_pipelines import build
from torch import nn

import vislora
from vislora.errors import InputError
from vislora.formats import read
from vislora.io import FILE
from vislora.io import read as read_tensors

# what kohya's trainer adapts with conv_dim, and the layers about the blocks
KINDS = ["to_q", "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv_in", "conv_out",
         r"downsamplers.0.conv", "upsamplers.0.conv"]  # fmt: skip


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_stock_diffusers_reads_convolutions(pipe, name, format, tmp_path):
    pipe = pipe if name == "sd1" else build(name)
    adapter = attach(pipe, name, targets={"unet": KINDS}, rank=2, alpha=3.0)
    wanted, file = deltas(adapter, pipe), adapter.export(tmp_path, format)
    assert any(key.endswith("conv1") for key in wanted) and agree(dense(read(file)), wanted)
    adapter.save(tmp_path / "own")
    assert agree(dense(read(tmp_path / "own" / FILE)), wanted)
    assert {la.path: la.down.shape for la in read(file).layers} == {
        la.path: la.down.shape for la in read(tmp_path / "own").layers
    }
    adapter.detach()
    pipe.load_lora_weights(tmp_path, weight_name=file.name)
    assert agree(stock_deltas(pipe), wanted)
    pipe.unload_lora_weights()
    again = vislora.load(pipe, file)
    assert agree(deltas(again, pipe), wanted)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_stock_peft_reads_convolutions(pipe, method, tmp_path):
    adapter = attach(pipe, "sd1", method, {"unet": KINDS}, rank=2)
    wanted = output(pipe)
    folder = adapter.export(tmp_path, "peft")
    file = adapter.export(tmp_path / "diffusers")
    adapter.detach()
    base = output(pipe)
    for again in (vislora.load(pipe, file), None):
        if again is not None:
            assert again.method_name == method and (output(pipe) - wanted).norm() < 1e-4 * (wanted - base).norm()
            again.detach()
    pipe.load_lora_weights(file.parent)
    assert (output(pipe) - wanted).norm() < 1e-4 * (wanted - base).norm()
    pipe.unload_lora_weights()
    model = PeftModel.from_pretrained(pipe.unet, folder / "unet")
    assert (output(pipe, model) - wanted).norm() < 1e-4 * (wanted - base).norm()


def output(pipe, unet=None) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 4, 16, 16, generator=g), torch.randn(1, 4, 32, generator=g)
    with torch.no_grad():
        return (unet or pipe.unet)(x, torch.tensor([500]), text).sample


def test_a_kohya_file_of_the_usual_targets_loads(pipe, tmp_path):
    """Made of a stock PEFT adapter: attention, ff, pointwise projections and 3 x 3 convolutions, each with an alpha."""
    kinds = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", *KINDS[1:6]]
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=1, target_modules=kinds, init_lora_weights=False), pipe.unet)
    wanted, held = stock_deltas(pipe), {}
    for name, module in pipe.unet.named_modules():
        if isinstance(module, LoraLayer):
            key = f"lora_unet_{name.replace('.', '_')}"
            held[f"{key}.lora_down.weight"] = module.lora_A["default"].weight.detach().clone()
            held[f"{key}.lora_up.weight"] = module.lora_B["default"].weight.detach().clone()
            held[f"{key}.alpha"] = torch.tensor(1.0)
    pipe.unload_lora_weights()
    save_file(held, tmp_path / "kohya.safetensors")
    adapter = vislora.load(pipe, tmp_path / "kohya.safetensors")
    assert agree(deltas(adapter, pipe), wanted) and any(d.dim() == 4 for d in adapter.deltas().values())


def test_pointwise_convolutions_and_linears_take_each_others_factors(tmp_path):
    """SD 1.x projects by pointwise convolutions, SD 2.x by linears."""
    for inner, outer in (((), (1, 1)), ((1, 1), ())):
        layer = nn.Conv2d(6, 4, 1) if outer else nn.Linear(6, 4)
        unet = nn.ModuleDict({"proj_in": layer})
        pair = {"lora_A.weight": torch.randn(2, 6, *inner), "lora_B.weight": torch.randn(4, 2, *inner)}
        save_file({f"unet.proj_in.{key}": t for key, t in pair.items()}, tmp_path / "a.safetensors")
        (delta,) = vislora.load({"unet": unet}, tmp_path / "a.safetensors").deltas().values()
        wanted = pair["lora_B.weight"].flatten(1) @ pair["lora_A.weight"].flatten(1)
        assert delta.shape == layer.weight.shape and torch.allclose(delta.flatten(1), wanted, atol=1e-6)


def test_what_has_no_place_in_files_of_other_tools(tmp_path):
    for layer, words in ((nn.Conv2d(4, 4, 3, groups=2), "x of a Conv2d has no place"),
                         (nn.Conv1d(4, 4, 3), "x of a Conv1d has no place")):  # fmt: skip
        adapter = vislora.attach({"unet": nn.ModuleDict({"x": layer})}, "lora", targets=["x"], rank=2)
        for format in ("diffusers", "kohya", "peft"):
            with pytest.raises(InputError, match=words):
                adapter.export(tmp_path, format)
    attention = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    adapter = vislora.attach({"unet": attention}, "lora", targets=["attn.in_proj_weight"], rank=2)
    with pytest.raises(InputError, match="attn.in_proj_weight of a MultiheadAttention has no place in the peft layout"):
        adapter.export(tmp_path, "peft")
    assert not list(tmp_path.iterdir())
    grouped = nn.ModuleDict({"x": nn.Conv2d(4, 4, 3, groups=2)})
    pair = {"lora_A.weight": torch.randn(2, 2, 3, 3), "lora_B.weight": torch.randn(4, 2, 1, 1)}
    save_file({f"unet.x.{key}": t for key, t in pair.items()}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="x is a convolution in groups"):
        vislora.load({"unet": grouped}, tmp_path / "a.safetensors")
    deep = vislora.attach({"unet": nn.ModuleDict({"x": nn.Conv1d(4, 4, 3)})}, "lora", targets=["x"], rank=2)
    (layer,) = read(deep.save(tmp_path / "own")).layers
    assert layer.down.shape == (2, 4, 3) and read_tensors(tmp_path / "own" / FILE)[0]["unet.x.A"].shape == (2, 12)
