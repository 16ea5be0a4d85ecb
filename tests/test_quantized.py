"""Bases quantized by bitsandbytes: every method on nf4 and int8, against float twins that hold the same weights."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys

import bitsandbytes as bnb
import pytest
import torch
from diffusers import StableDiffusionPipeline
from hosts import llama
from tiny_sd import tiny_sd
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BitsAndBytesConfig, LlamaForCausalLM

import vislora
from vislora.adapters import get
from vislora.diffusion.verify import exported_error
from vislora.errors import InputError
from vislora.measure import fingerprint
from vislora.prepare import weight_gradients
from vislora.quantized import dequantized, is_quantized
from vislora.testing import CHECKS, Host, Subject, hosts, seeded
from vislora.testing.subject import close, refused

KINDS = ("nf4", "int8")


def quantize(model: nn.Module, kind: str, **options) -> nn.Module:
    """The model with every linear but an output head replaced by bitsandbytes' own of the same weight."""
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or name == "lm_head":
            continue
        bias = module.bias is not None
        if kind == "int8":
            made = bnb.nn.Linear8bitLt(module.in_features, module.out_features, bias, has_fp16_weights=False)
            made.weight = bnb.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
        else:
            made = bnb.nn.Linear4bit(module.in_features, module.out_features, bias, quant_type=kind)
            own = {"quant_type": kind, "compress_statistics": False, **options}
            made.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, module=made, **own)
            made.support_avx512bf16_for_cpu = False  # its own test below: there the base computes in bf16
        made.bias = module.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made.to("cpu"))
    return model


def twin(model: nn.Module) -> nn.Module:
    """A float copy of a quantized model: plain linears that hold the dequantised weights."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if is_quantized(module):
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            plain.weight = nn.Parameter(dequantized(module))
            plain.bias = module.bias
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, plain)
    return model


def chain() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12, bias=False))


def noise(*shape: int):
    return lambda model, seed: model(torch.randn(*shape, generator=torch.Generator().manual_seed(100 + seed)))


def tokens(model: nn.Module, seed: int) -> torch.Tensor:
    return model(torch.randint(0, 37, (2, 8), generator=torch.Generator().manual_seed(100 + seed))).logits


def host(name: str, kind: str) -> Host:
    kinds = {"chain": (chain, "all-linear", noise(3, 5, 12)), "llama": (llama, "llm-linear", tokens)}
    build, targets, run = kinds[name]

    def exact(model: nn.Module, seed: int) -> torch.Tensor:
        # In training the 8-bit layers of a CPU multiply by the dequantised weight; in eval they round their inputs.
        return run(model.train(), seed)

    return Host(f"{name}-{kind}", seeded(lambda: quantize(build(), kind)), targets, exact)


def stored(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "vislora_" not in name}


def same(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = stored(model)
    return list(now) == list(before) and all(torch.equal(value, before[name]) for name, value in now.items())


def hook_equals_dense(s: Subject) -> None:
    adapter = s.attach()
    s.train(adapter)
    moved, other = s.run(), twin(s.host.build(0))
    weights = dict(other.named_modules())
    for name, delta in adapter.deltas().items():
        assert delta.shape == weights[name].weight.shape and delta.dtype == torch.float32
        weights[name].weight.data += delta
    with adapter.disabled():
        assert (moved - s.run()).abs().max() > 1e-4, "training moved nothing"
    close(moved, s.run(model=other), 1e-4)


def only_the_adapter_moves_and_detach_leaves_no_trace(s: Subject) -> None:
    before, out = stored(s.model), s.run()
    flags = [p.requires_grad for p in s.model.parameters()]
    adapter = s.attach()
    s.train(adapter)
    hooked = s.run()
    for merge in (adapter.merge, adapter.merged().__enter__, lambda: adapter.detach(merge=True)):
        refused(merge, "is quantized", "load the base in bf16 or fp32")
        assert torch.equal(hooked, s.run()), "a refused merge changed something"
    assert same(s.model, before)
    assert {id(p) for p in s.model.parameters() if p.requires_grad} == {id(p) for p in adapter.parameters()}
    adapter.detach()
    assert same(s.model, before) and torch.equal(out, s.run())
    assert [p.requires_grad for p in s.model.parameters()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in s.model.modules())


_OF_THE_BASE = (
    "starts_as_the_base", "start_is_a_function_of_the_seed", "disabled_is_the_base", "every_tensor_trains",
    "checkpointing_gives_equal_gradients", "saved_and_loaded_is_equal", "copies_are_independent",
)  # fmt: skip
_CHECKS = [check for check in CHECKS if check.__name__ in _OF_THE_BASE]
_CHECKS += [hook_equals_dense, only_the_adapter_moves_and_detach_leaves_no_trace]


@pytest.mark.parametrize("check", _CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("on", [("chain", "nf4"), ("chain", "int8"), ("llama", "nf4")], ids="-".join)
@pytest.mark.parametrize("method", vislora.methods())
def test_conformance(method, on, check):
    check(Subject(get(method)(rank=4, **get(method).quick), host(*on)))


def test_every_check_of_the_base_is_there():
    assert len(_CHECKS) == len(_OF_THE_BASE) + 2


def one(kind: str, dtype=torch.float32, **options) -> nn.Module:
    torch.manual_seed(0)
    return quantize(nn.Sequential(nn.Linear(128, 96).to(dtype)), kind, **options).train()[0]


@pytest.mark.parametrize(
    ("kind", "dtype", "options"),
    [
        ("nf4", torch.float32, {}),
        ("fp4", torch.float32, {"blocksize": 128}),
        ("nf4", torch.float32, {"compress_statistics": True}),
        ("nf4", torch.bfloat16, {"quant_storage": torch.bfloat16}),
        ("int8", torch.float32, {}),
    ],
    ids=["nf4", "fp4", "nested", "bf16", "int8"],
)
def test_the_weight_read_is_the_one_that_is_computed_with(kind, dtype, options):
    layer = one(kind, dtype, **options)
    packed = layer.weight.data.clone()
    for _ in range(2):  # 8-bit layers move their scales at the first call
        weight = dequantized(layer)
        assert weight.shape == (96, 128) and weight.dtype == torch.float32 and is_quantized(layer)
        layer.bias.data = layer.bias.data.float()
        with torch.no_grad():
            computed = (layer(torch.eye(128)) - layer.bias).mT
        close(weight, computed, 1e-6)
    assert torch.equal(layer.weight.data.view(torch.uint8), packed.view(torch.uint8))
    assert (weight - nn.Linear(128, 96).weight).norm() > 0.1, "another weight is another"


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="this CPU has no products of bfloat16")
def test_weights_repacked_for_a_cpu_are_read_too(nested):
    layer = one("nf4", compress_statistics=nested).eval()
    before, shape = dequantized(layer), layer.weight.shape
    layer.support_avx512bf16_for_cpu = True
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = layer(x)
    assert layer.weight.shape != shape, "was not repacked"
    packed = layer.weight.data.clone()
    after = dequantized(layer)
    close(before, after, 2**-8)  # its scales are now bfloat16
    close(out, x @ after.mT + layer.bias, 0.02)
    with torch.no_grad():
        assert torch.equal(layer.weight.data, packed) and torch.equal(out, layer(x))


@pytest.mark.parametrize("name", ["chain", "llama", "fused"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gathered_gradients_are_those_of_the_float_twin(name, kind, checkpointed):
    if name == "fused":
        fused = next(h for h in hosts() if h.name == "fused_qkv")
        on = dataclasses.replace(fused, build=lambda seed: quantize(fused.build(seed), kind), run=noise(2, 6, 16))
    else:
        on = host(name, kind)
    s = Subject(get("lora")(rank=2), on)
    s.model.train()
    other = twin(s.model)
    state, before = torch.random.get_rng_state(), stored(s.model)
    beside = []  # an adapter that acts on what the layer makes of its input, so that dL/dy is not that of the sum
    for model in (s.model, other):
        beside.append(vislora.attach(model, "dora", targets=on.targets, rank=2, name="beside"))
        with torch.no_grad():
            for n, p in beside[-1].named_parameters():
                p.mul_(1.5 if n.endswith(".c") else 1)
    adapter = s.attach()
    calls = []

    def loss_of(model, seed):
        run = lambda: on.run(model, seed)  # noqa: E731
        out = checkpoint(run, use_reentrant=False) if checkpointed and model is s.model else run()
        loss = (out - torch.linspace(-1, 1, out.numel()).view_as(out)).square().mean()
        loss.backward()
        return loss

    def closure():
        torch.rand(3)
        calls.append(len(calls))
        return loss_of(s.model, calls[-1])

    gathered = {site.name: (site, g) for _, site, g in weight_gradients(adapter, closure, 2)}
    weights = dict(other.named_modules())
    for site, _ in gathered.values():
        weights[site.path].weight.requires_grad_(True)
    for seed in range(2):
        loss_of(other, seed)
    for site, gradient in gathered.values():
        true = weights[site.path].weight.grad / 2
        assert gradient.shape == (site.m, site.n) and gradient.dtype == torch.float32
        close(gradient, true if site.rows is None else true[site.rows], 2e-5)
    assert len(gathered) == len(adapter.sites) and calls == [0, 1]
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(p.grad is None for p in adapter.parameters())
    beside[0].detach()
    adapter.detach()
    assert same(s.model, before) and not any(m._forward_hooks for m in s.model.modules())
    assert all(p.grad is None for p in s.model.parameters())


def test_a_layer_that_the_loss_does_not_reach_is_named():
    s = Subject(get("lora_ga")(rank=2), host("chain", "nf4"))
    adapter = s.attach()
    adapter.bind(torch.optim.SGD(adapter.parameters(), 0.1), 1)

    def closure():
        loss = s.model[0](torch.randn(2, 12)).square().mean()
        loss.backward()
        return loss

    refused(lambda: adapter.prepare(closure), "2: got no gradient from the closure")


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("method", ["nb_lora", "sorsa", "lora_xs", "delora"])
def test_adapters_move_between_a_base_and_its_quantized_copy(method, kind, tmp_path):
    """fp4, and for other weights nf4, changes norms by more than the 1 % that bf16 and fp16 copies are held to."""
    plain, packed = (Subject(get(method)(rank=4), h) for h in (Host("", seeded(chain), "all-linear", noise(3, 5, 12)),
                                                               host("chain", kind)))  # fmt: skip
    for source, target in ((plain, packed), (packed, plain)):
        adapter = source.attach()
        source.train(adapter)
        adapter.save(tmp_path)
        deltas = adapter.deltas()
        adapter.detach()
        loaded = vislora.load(target.model, tmp_path)
        assert all(torch.equal(delta, deltas[name]) for name, delta in loaded.deltas().items())
        loaded.detach()
        weight = target.model[0].weight
        if target is plain:
            weight.data *= 1.1
            refused(lambda: vislora.load(plain.model, tmp_path), "another base", "0 has norm")
            weight.data /= 1.1
    saved, own = (fingerprint(s.attach())["norms"] for s in (plain, packed))
    off = max(abs(own[name] / norm - 1) for name, norm in saved.items())
    assert off < {"int8": 0.001, "nf4": 0.01, "fp4": 0.03}[kind] and (off > 0.01 or kind != "fp4")


def test_weights_of_unknown_whole_numbers_are_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(InputError, match="1: a Linear with a weight of torch.int8 -> quantize the base by bitsandb"):
        vislora.attach(model, "lora", rank=2, targets="all-linear")
    vislora.attach(model, "lora", rank=2, targets=["0"])


def test_bitsandbytes_is_not_imported():
    code = """
import sys, torch, vislora
vislora.attach(torch.nn.Sequential(torch.nn.Linear(4, 4)), "pissa", rank=2).deltas()
assert "bitsandbytes" not in sys.modules, "imported"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_models_loaded_by_transformers(kind, tmp_path):
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_8bit=True)
    if kind == "nf4":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, device_map="cpu").train()
    model.gradient_checkpointing_enable()
    adapter = vislora.attach(model, "sorsa", rank=4)
    assert adapter.sites and "lm_head" not in adapter.sites
    base = tokens(model, 0).detach()
    optimizer = torch.optim.Adam(adapter.param_groups(0.01))
    adapter.bind(optimizer, 3)
    for step in range(3):
        (tokens(model, step).float().square().mean() + adapter.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = tokens(model, 0).detach()
    assert (moved - base).abs().max() > 1e-3
    adapter.save(tmp_path / "adapter")
    adapter.detach()
    assert torch.equal(tokens(model, 0), base)
    vislora.load(model, tmp_path / "adapter")
    close(moved, tokens(model, 0), 1e-6)


@pytest.mark.parametrize("method", ["nb_lora", "pissa", "dora"])
def test_exports_of_a_quantized_unet_are_read_by_stock_diffusers(method, tmp_path):
    folder = tiny_sd(tmp_path / "sd")
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, feature_extractor=None)
    quantize(pipe.unet, "nf4")
    adapter = vislora.attach({"unet": pipe.unet}, method, rank=4)
    with torch.no_grad():
        for number, p in enumerate(adapter.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
    before = stored(pipe.unet)
    for rank in (None, 2):
        adapter.export(tmp_path / "lora", rank=rank)
        assert exported_error(pipe, adapter, tmp_path / "lora", rank=rank) < 1e-5
    assert same(pipe.unet, before)
