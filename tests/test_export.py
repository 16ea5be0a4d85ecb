"""Exports against stock diffusers: every method, denoiser and text encoder, and back through our own reader."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from tiny_sd import tiny_sd

import vislora
from vislora.adapters import get
from vislora.diffusion.verify import exported_error
from vislora.errors import EnvironmentFault, InputError
from vislora.export import CERTIFICATE, LORA_FILE
from vislora.io import read, write
from vislora.measure import norms


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_sd(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def pipe(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, feature_extractor=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def moved(adapter):
    g = torch.Generator().manual_seed(4)
    data_driven = adapter.method.needs_prepare  # whose bases are zero before a start from data
    with torch.no_grad():
        for _, p in adapter.named_tensors():
            if p.requires_grad or (data_driven and p.dim() == 2):
                p.add_(0.2 * torch.randn(p.shape, generator=g) * (p.abs().mean() if p.any() else 0.3))
    return adapter


def run(pipe):
    ids = pipe.tokenizer(["a b"], padding="max_length", return_tensors="pt").input_ids
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        text = pipe.text_encoder(ids)[0]
        return pipe.unet(torch.randn(1, 4, 16, 16, generator=g), torch.tensor([500]), text).sample


@pytest.mark.parametrize("method", vislora.methods())
@pytest.mark.parametrize("encoder", [False, True], ids=["unet", "unet+text_encoder"])
def test_stock_diffusers_computes_the_same(pipe, method, encoder, tmp_path):
    parts = {"unet": pipe.unet} | ({"text_encoder": pipe.text_encoder} if encoder else {})
    adapter = moved(vislora.attach(parts, get(method)(rank=4)))
    base_free = run(pipe)
    if encoder and "magnitude" in adapter.method.roles.values():
        with pytest.raises(InputError, match="magnitudes in the text_encoder"):
            adapter.export(tmp_path)
        return
    file = adapter.export(tmp_path, "diffusers")
    assert file.name == LORA_FILE and exported_error(pipe, adapter, tmp_path) < 1e-5
    assert torch.equal(run(pipe), base_free), "the check left something behind"
    deltas = adapter.deltas()
    adapter.detach()
    base = run(pipe)
    pipe.load_lora_weights(str(tmp_path))
    stock = run(pipe)
    pipe.unload_lora_weights()
    assert (stock - base_free).norm() < 1e-4 * (base_free - base).norm()
    ours = vislora.load(pipe, tmp_path)  # our reader, as plain LoRA or DoRA
    assert (run(pipe) - base_free).norm() < 1e-4 * (base_free - base).norm()
    assert ours.deltas().keys() == deltas.keys()


def test_layout_and_certificate(pipe, tmp_path):
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    adapter = moved(vislora.attach(parts, "nb_lora", rank=4, p=1, delta=0.5))
    tensors, header = read(adapter.export(tmp_path))
    assert len(tensors) == 2 * len(adapter.sites)
    q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    assert tensors[f"{q}.lora_A.weight"].shape == (4, 16) and tensors[f"{q}.lora_B.weight"].shape == (16, 4)
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight" in tensors
    assert header["format"] == "pt" and set(header) == {"format", CERTIFICATE}
    stated = json.loads(header[CERTIFICATE])
    assert stated["method"] == "nb_lora" and stated["options"]["delta"] == 0.5
    assert stated["modules"].keys() == norms(adapter).keys()
    for name, of_module in stated["modules"].items():
        key = name.replace("text_encoder.", "text_encoder.text_model.") if name.startswith("text") else name
        product = tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
        values = torch.linalg.svdvals(product.double())
        assert abs(values.sum().item() - of_module["norm"]) < 1e-5 and of_module["norm"] <= 0.5 * (1 + 1e-5)
        assert abs(values.max().item() - of_module["spectral"]) < 1e-5
    assert stated["largest_share"] == max(m["norm"] / m["bound"] for m in stated["modules"].values())


def test_a_file_that_says_something_else_is_noticed(pipe, tmp_path):
    adapter = moved(vislora.attach({"unet": pipe.unet}, "lora", rank=2))
    file = adapter.export(tmp_path)
    tensors, header = read(file)
    name = next(k for k in tensors if "lora_B" in k)
    write({**tensors, name: tensors[name] * 1.1}, header, file)
    with pytest.raises(EnvironmentFault, match="off"):
        exported_error(pipe, adapter, tmp_path)
    fewer = {k: v for k, v in tensors.items() if not k.startswith(name.rsplit(".", 2)[0])}
    write(fewer, header, file)
    with pytest.raises(EnvironmentFault, match="did not load 1 of"):
        exported_error(pipe, adapter, tmp_path)


def test_mixed_ranks_alphas_and_old_names_are_read(pipe, tmp_path):
    g = torch.Generator().manual_seed(0)
    sites = vislora.attach(pipe, "lora", rank=2).sites
    layer = dict(pipe.unet.named_modules())
    tensors, expected = {}, {}
    for i, site in enumerate(sites):
        name = site.removeprefix("unet.")
        m, n = layer[name].weight.shape
        down, up = torch.randn(2 + i % 3, n, generator=g), torch.randn(m, 2 + i % 3, generator=g)
        tensors[f"unet.{name}.lora.down.weight"], tensors[f"unet.{name}.lora.up.weight"] = down, up
        expected[site] = 2.0 * up @ down
    header = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 8})}
    save_file(tensors, tmp_path / LORA_FILE, metadata=header)
    adapter = vislora.load(pipe, tmp_path, name="read")
    for site, delta in adapter.deltas().items():
        assert torch.allclose(delta, expected[site], atol=1e-4)


def test_what_the_layout_cannot_hold_is_refused(pipe, tmp_path):
    adapter = vislora.attach(pipe, "lora", rank=2)
    with pytest.raises(InputError, match="'kohia' is not written"):
        adapter.export(tmp_path, "kohia")
    other = vislora.attach({"vae": torch.nn.ModuleDict({"to_q": torch.nn.Linear(4, 4)})}, "lora", rank=2)
    with pytest.raises(InputError, match="no place for vae"):
        other.export(tmp_path)
    assert list(tmp_path.iterdir()) == []
    file = adapter.export(tmp_path)
    tensors, header = read(file)
    half = {k: v for k, v in tensors.items() if not (k.endswith("lora_B.weight") and "attn1.to_q" in k)}
    write(half, {}, file)
    with pytest.raises(InputError, match="has only"):
        vislora.load(pipe, tmp_path, name="half")
    write({"unet.nowhere.lora_A.weight": torch.zeros(2, 4), "unet.nowhere.lora_B.weight": torch.zeros(4, 2)}, {}, file)
    with pytest.raises(InputError, match="1 of its 1 layers are not in UNet2DConditionModel"):
        vislora.load(pipe, tmp_path, name="nowhere")
