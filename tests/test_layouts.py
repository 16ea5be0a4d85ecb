"""Adapters exported as kohya's and PEFT's files, read back by stock tools and by vislora.load, outputs compared."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hosts import library_hosts, llama, text_encoder, unet
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn

import vislora
from vislora.adapters import get
from vislora.errors import InputError
from vislora.export import CERTIFICATE, read_certificate
from vislora.formats import read as read_layers
from vislora.formats.spectrum import check_certificate, spectrum
from vislora.io import KOHYA_FILE, LORA_FILE, PEFT_CONFIG, PEFT_FILE, read, write

METHODS = {"lora": {"alpha": 7.0}, "pissa": {}, "nb_lora": {"p": 1, "delta": 3.0}}
PEFT_HOSTS = {"unet": None, "text_encoder": None, "llama": "llm-linear", "timm_vit": ["attn.proj", "mlp.fc1"]}
Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@torch.no_grad()
def moved(adapter):
    g = torch.Generator().manual_seed(4)
    for parameter in adapter.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=g))
    return adapter


@torch.no_grad()
def text_and_image(pipe):
    """What the text encoder makes of a prompt, and what the UNet makes of that, each as one output."""
    ids = pipe.tokenizer(["a b"], padding="max_length", return_tensors="pt").input_ids
    text = pipe.text_encoder(ids)[0]
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    fixed = torch.randn(text.shape, generator=torch.Generator().manual_seed(1))
    return [text, pipe.unet(latents, torch.tensor([500]), fixed).sample]


def off(outputs, wanted, base):
    """The largest error of several outputs, each relative to what the adapter changes in it."""
    return max(((o - w).norm() / (w - b).norm()).item() for o, w, b in zip(outputs, wanted, base, strict=True))


def stock(pipe, folder):
    pipe.load_lora_weights(str(folder))
    outputs = text_and_image(pipe)
    pipe.unload_lora_weights()
    return outputs


@pytest.mark.parametrize("format", ["diffusers", "kohya", "peft"])
@pytest.mark.parametrize("method", METHODS)
def test_a_pipelines_adapter_comes_back(pipe, method, format, tmp_path):
    base = text_and_image(pipe)
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    adapter = moved(vislora.attach(parts, method, rank=3, **METHODS[method]))
    wanted, deltas = text_and_image(pipe), adapter.deltas()
    out = adapter.export(tmp_path, format)
    assert out == tmp_path / {"diffusers": LORA_FILE, "kohya": KOHYA_FILE, "peft": ""}[format]
    adapter.detach()
    if format == "peft":
        outputs = text_and_image(peft_pipe(pipe, tmp_path))
    else:
        outputs = stock(pipe, tmp_path)
    assert off(outputs, wanted, base) < 1e-5
    again = vislora.load(pipe, tmp_path)
    assert off(text_and_image(pipe), wanted, base) < 1e-5 and again.deltas().keys() == deltas.keys()
    assert again.method_name == ("peft" if format == "peft" else "lora")
    again.detach()
    assert all(torch.equal(a, b) for a, b in zip(text_and_image(pipe), base, strict=True))


def peft_pipe(pipe, folder):
    """A copy of the pipeline whose components stock PEFT has wrapped."""
    twin = copy.copy(pipe)
    for part in ("unet", "text_encoder"):
        setattr(twin, part, PeftModel.from_pretrained(copy.deepcopy(getattr(pipe, part)), folder / part).eval())
    return twin


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_bare_component_comes_back(pipe, part, format, tmp_path):
    adapter = moved(vislora.attach(getattr(pipe, part), "lora", rank=2, alpha=5.0))
    wanted = adapter.deltas()
    adapter.export(tmp_path, format)
    adapter.detach()
    for model, lead in ((getattr(pipe, part), ""), (pipe, f"{part}.")):
        again = vislora.load(model, tmp_path)
        deltas = again.deltas()
        assert deltas.keys() == {lead + name for name in wanted}
        assert all(torch.allclose(deltas[lead + name], delta, atol=1e-5) for name, delta in wanted.items())
        again.detach()


@pytest.mark.parametrize("method", [*METHODS, "dora", "vera"])
@pytest.mark.parametrize("name", PEFT_HOSTS)
def test_peft_reads_any_model(name, method, tmp_path):
    host = next(host for host in library_hosts() if host.name == name)
    model = host.build(0).eval()
    with torch.no_grad():
        base = [host.run(model, 0)]
        adapter = moved(vislora.attach(model, method, targets=PEFT_HOSTS[name], rank=3, **METHODS.get(method, {})))
        wanted = [host.run(model, 0)]
        assert adapter.export(tmp_path, "peft") == tmp_path
        adapter.detach()
        theirs = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
        assert off([host.run(theirs, 0)], wanted, base) < 1e-5
        theirs.load_adapter(tmp_path, "second")
        theirs.set_adapter("second")
        assert off([host.run(theirs, 0)], wanted, base) < 1e-5
        for path in (tmp_path, tmp_path / PEFT_FILE):
            again = vislora.load(model, path)
            assert off([host.run(model, 0)], wanted, base) < 1e-5
            again.detach()


def test_peft_takes_no_module_for_another_by_its_end(tmp_path):
    """PEFT's list of names would match "1.0" by "0"."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 4))), torch.randn(3, 6)
    for targets in ("0", r"1\.0"):
        adapter = moved(vislora.attach(model, "lora", targets=targets, rank=2))
        wanted = model(x)
        adapter.export(tmp_path, "peft")
        adapter.detach()
        theirs = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
        assert len(list(theirs.base_model.model.state_dict())) == 4 + 2 and torch.allclose(theirs(x), wanted, atol=1e-6)
        again = vislora.load(model, tmp_path)
        assert again.sites == [targets.replace("\\", "")] and torch.allclose(model(x), wanted, atol=1e-6)
        again.detach()


def test_pefts_own_methods_are_exported_alike(pipe, tmp_path):
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "use_dora": True, "target_modules": ["q_proj", "to_q"]}
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    handle = moved(vislora.attach(parts, "peft", peft_config=config))
    wanted = handle.deltas()
    assert handle.export(tmp_path / "none", "diffusers") is None  # which drops magnitudes in text encoders
    handle.export(tmp_path, "peft")
    handle.detach()
    deltas = vislora.load(pipe, tmp_path).deltas()
    assert deltas.keys() == wanted.keys()
    assert all(torch.allclose(deltas[name], delta, atol=1e-5) for name, delta in wanted.items())


@pytest.mark.parametrize("format", ["diffusers", "kohya", "peft"])
def test_the_certificate_is_borne_out(pipe, format, tmp_path):
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    adapter = moved(vislora.attach(parts, "nb_lora", rank=4, p=1, delta=0.5))
    out = adapter.export(tmp_path, format, rank=2)
    file = read_layers(out)
    spectra = {layer.name: spectrum(layer) for layer in file.layers}
    assert {layer.rank for layer in file.layers} == {2} and len(spectra) == len(adapter.sites)
    assert check_certificate(file, spectra, has_base=False).status == "holds"
    assert read_certificate(out / "unet" / PEFT_FILE if format == "peft" else out)["ranks"]["unet"] == 2


def test_a_wrong_alpha_shows(pipe, tmp_path):
    """kohya's alpha of one layer and PEFT's of all: the comparisons above would fail, by as much as is said."""
    base = text_and_image(pipe)
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    adapter = moved(vislora.attach(parts, "lora", rank=3, alpha=7.0))
    wanted, deltas = text_and_image(pipe), adapter.deltas()
    file = adapter.export(tmp_path / "kohya", "kohya")
    folder = adapter.export(tmp_path / "peft", "peft")
    adapter.detach()
    tensors, header = read(file)
    alphas = [key for key in tensors if key.endswith(".alpha")]
    assert len(alphas) == len(deltas) and all(tensors[key] == 3.0 for key in alphas)
    one = f"lora_unet_{Q.replace('.', '_')}.alpha"
    write({**tensors, one: torch.tensor(6.0)}, header, file)
    again = vislora.load(pipe, file)
    for name, delta in again.deltas().items():
        assert torch.allclose(delta, (2 if name == f"unet.{Q}" else 1) * deltas[name], atol=1e-5)
    assert off(text_and_image(pipe), wanted, base) > 1e-2
    again.detach()
    write(tensors | {key: torch.tensor(6.0) for key in alphas}, header, file)
    assert off(stock(pipe, tmp_path / "kohya"), wanted, base) > 0.1
    for config in folder.glob(f"*/{PEFT_CONFIG}"):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 6}))
    assert off(text_and_image(peft_pipe(pipe, folder)), wanted, base) > 0.1
    doubled = vislora.load(pipe, folder).deltas()
    assert all(torch.allclose(doubled[name], 2 * delta, atol=1e-5) for name, delta in deltas.items())


def kohya_pair(name, m, n, rank=2, alpha=None, **more):
    g = torch.Generator().manual_seed(len(name))
    down, up = torch.randn(rank, n, generator=g), torch.randn(m, rank, generator=g)
    pair = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    pair |= {} if alpha is None else {f"{name}.alpha": torch.tensor(alpha)}
    return pair | {f"{name}.{key}": tensor for key, tensor in more.items()}


def test_ranks_and_alphas_of_their_own_and_names_of_the_model_are_read(tmp_path):
    """Of a model that is no Stable Diffusion, whose names no vocabulary has."""
    odd = nn.ModuleDict({"odd_one": nn.ModuleDict({"to_q": nn.Linear(6, 8), "to_out": nn.Linear(8, 6)})})
    tensors = kohya_pair("lora_unet_odd_one_to_q", 8, 6, rank=2, alpha=5.0)
    tensors |= kohya_pair("lora_unet_odd_one_to_out", 6, 8, rank=4)  # no alpha: it is the rank
    save_file(tensors, tmp_path / "any name.safetensors")
    deltas = vislora.load({"unet": odd}, tmp_path).deltas()
    for name, scale in (("to_q", 2.5), ("to_out", 1.0)):
        up, down = (tensors[f"lora_unet_odd_one_{name}.lora_{side}.weight"] for side in ("up", "down"))
        assert torch.allclose(deltas[f"unet.odd_one.{name}"], scale * up @ down, atol=1e-5)


def test_magnitudes_make_it_dora(tmp_path):
    model = unet().eval()
    adapter = moved(vislora.attach(model, get("dora")(rank=2)))
    wanted = adapter.deltas()
    tensors = {}
    for site, _, own, update in adapter.site_updates():
        tensors |= kohya_pair(f"lora_unet_{site.replace('.', '_')}", *wanted[site].shape)
        name = f"lora_unet_{site.replace('.', '_')}"
        tensors |= {f"{name}.lora_down.weight": update.down, f"{name}.lora_up.weight": update.up,
                    f"{name}.dora_scale": own.c[:, None].detach()}  # fmt: skip
    adapter.detach()
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / KOHYA_FILE)
    again = vislora.load(model, tmp_path)
    assert again.method_name == "dora"
    assert all(torch.allclose(delta, wanted[name], atol=1e-5) for name, delta in again.deltas().items())


Q_KEY = f"lora_unet_{Q.replace('.', '_')}"
REFUSED = {
    "partial": (kohya_pair(Q_KEY, 8, 8) | kohya_pair("lora_unet_down_blocks_3_resnets_0_time_emb_proj", 8, 8),
                "1 of its 2 layers are not in UNet2DConditionModel: down_blocks.3.resnets.0.time_emb_proj"),
    "foreign": (kohya_pair("lora_unet_joint_blocks_0_x", 8, 8),
                "joint_blocks_0_x is no module of the unet of UNet2DConditionModel or of SD"),
    "shape": (kohya_pair(Q_KEY, 8, 9), r"to_q is \(8, 9\) in the file, \(8, 8\) in the model"),
    "half": ({f"{Q_KEY}.lora_up.weight": torch.zeros(8, 2)}, "1 of 1 layers lack one of their two factors"),
    "another kernel": (
        {f"lora_unet_conv_in.{side}.weight": torch.zeros(size)
         for side, size in (("lora_down", (2, 36, 1, 1)), ("lora_up", (8, 2, 1, 1)))},
        r"conv_in is \(8, 36, 1, 1\) in the file, \(8, 4, 3, 3\) in the model",
    ),
    "two kinds": (
        kohya_pair(Q_KEY, 8, 8) | kohya_pair(Q_KEY.replace("to_q", "to_k"), 8, 8, dora_scale=torch.ones(8, 1)),
        "1 of its 2 layers have no magnitude and the others have",
    ),
    "encoder": (kohya_pair("lora_te_text_model_encoder_layers_0_mlp_fc1", 8, 8), "1 of its 1 layers are not in UNet2D"),
    "two components": (kohya_pair(Q_KEY, 8, 8) | kohya_pair("lora_te_text_model_encoder_layers_0_mlp_fc1", 8, 8),
                       "adapts text_encoder, unet; the model given has UNet2DConditionModel"),
    "no number": (kohya_pair(Q_KEY, 8, 8, alpha=float("nan")), "NaN"),
    "LoHa": ({f"{Q_KEY}.hada_w1_a": torch.zeros(2, 2)}, "is LoHa"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_without_a_trace(case, tmp_path):
    tensors, words = REFUSED[case]
    save_file(tensors, tmp_path / KOHYA_FILE)
    model = unet()
    with pytest.raises(InputError, match=words):
        vislora.load(model, tmp_path)
    assert not any("vislora" in key for key in model.state_dict())


def test_what_a_layout_cannot_hold_is_refused(tmp_path):
    vit = next(host for host in library_hosts() if host.name == "timm_vit").build(0)
    sliced = vislora.attach(vit, "lora", targets="vit-qv", rank=2)
    with pytest.raises(InputError, match="kohya layout has no place for VisionTransformer -> export it as peft"):
        sliced.export(tmp_path, "kohya")
    with pytest.raises(InputError, match="kohya layout has no place for LlamaForCausalLM -> export it as peft"):
        vislora.attach(llama(), "lora", rank=2).export(tmp_path, "kohya")
    dora = vislora.attach({"unet": unet(), "text_encoder": text_encoder()}, "dora", rank=2)
    with pytest.raises(InputError, match="kohya's files drop dora's magnitudes.*-> export it as diffusers or peft"):
        dora.export(tmp_path, "kohya")
    with pytest.raises(InputError, match="'loha' is not written.*take diffusers, kohya, peft"):
        dora.export(tmp_path, "loha")
    assert list(tmp_path.iterdir()) == []


def test_an_export_replaces_the_one_before(tmp_path):
    model = unet()
    adapter = vislora.attach(model, "lora", rank=2)
    for format, name in (("kohya", KOHYA_FILE), ("peft", PEFT_FILE)):
        adapter.export(tmp_path, format)
        before = read(tmp_path / name)[0]
        moved(adapter).export(tmp_path, format)
        after = read(tmp_path / name)[0]
        assert after.keys() == before.keys() and not all(torch.equal(after[key], before[key]) for key in after)


@pytest.mark.parametrize("method, options", [("lora", {}), ("dora", {}), ("pissa", {}), ("od_lora", {}),
                                             *(("nb_lora", {"p": p, "delta": 0.5}) for p in (1, 1.5, 2, 3, torch.inf))])
def test_row_blocks_of_a_fused_matrix_become_one_update_of_it(method, options, tmp_path):
    """timm's q and v, whose rows stock PEFT and our own reader find in the whole of qkv, at twice the rank."""
    host = next(host for host in library_hosts() if host.name == "timm_vit")
    vit = host.build(0)
    adapter = vislora.attach(vit, method, targets="vit-qv", rank=2, **options)
    if method == "od_lora":
        adapter.bind(torch.optim.SGD(adapter.param_groups(0.1)), 5)
        adapter.prepare(lambda: host.run(vit, 0).square().mean().backward())
    vit.eval()
    moved(adapter)
    with torch.no_grad():
        wanted = host.run(vit, 0)
    adapter.export(tmp_path, "peft")
    deltas = adapter.deltas()
    adapter.detach()
    with torch.no_grad():
        base = host.run(vit, 0)
        theirs = PeftModel.from_pretrained(copy.deepcopy(vit), tmp_path).eval()
        assert off([host.run(theirs.base_model.model, 0)], [wanted], [base]) < 1e-4
        again = vislora.load(vit, tmp_path)
        assert off([host.run(vit, 0)], [wanted], [base]) < 1e-4
    assert all(torch.allclose(again.deltas()[name], delta, atol=1e-5) for name, delta in deltas.items())
    again.detach()
    file = read_layers(tmp_path)
    spectra = {layer.name: spectrum(layer, vit.get_submodule(layer.path).weight) for layer in file.layers}
    verdict = check_certificate(file, spectra, has_base=True)
    assert verdict.status == "holds", verdict.why
    stated = json.loads(file.header[CERTIFICATE])
    assert set(stated["modules"]) == {layer.path for layer in file.layers}
    assert (stated["largest_share"] is None) == (method != "nb_lora")
    if method == "nb_lora":
        p = options["p"]
        expected = pytest.approx(0.5 * 2 ** (1 / min(p, 2)))
        assert all(m["bound"] == expected for m in stated["modules"].values())
        assert 0 < stated["largest_share"] <= 1 + 1e-6
