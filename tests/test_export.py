"""Exports against stock diffusers: every method, denoiser and text encoder, and back through our own reader."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import vislora
from vislora.adapters import get
from vislora.diffusion.verify import exported_error
from vislora.errors import EnvironmentFault, InputError
from vislora.export import CERTIFICATE, read_certificate
from vislora.io import LORA_FILE, read, write
from vislora.measure import norms


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
        adapter.check_exportable(rank=3)  # folded there, and kept in the UNet
        adapter.export(tmp_path, rank=3)
        assert exported_error(pipe, adapter, tmp_path, rank=3) < 1e-4
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
    rounding = 1e-6 * base.norm()  # of the output: some of the updates are smaller than a thousandth of it
    assert (stock - base_free).norm() < 1e-4 * (base_free - base).norm() + rounding
    ours = vislora.load(pipe, tmp_path)  # our reader, as plain LoRA or DoRA
    assert (run(pipe) - base_free).norm() < 1e-4 * (base_free - base).norm() + rounding
    assert ours.deltas().keys() == deltas.keys()


def test_layout_and_certificate(pipe, tmp_path):
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    adapter = moved(vislora.attach(parts, "nb_lora", rank=4, p=1, delta=0.5))
    tensors, header = read(adapter.export(tmp_path))
    assert len(tensors) == 2 * len(adapter.sites)
    q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    assert tensors[f"{q}.lora_A.weight"].shape == (4, 16) and tensors[f"{q}.lora_B.weight"].shape == (16, 4)
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight" in tensors
    assert header["format"] == "pt" and set(header) == {"format", CERTIFICATE, "modelspec.architecture"}
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
    tensors, expected, ranks, alphas = {}, {}, {}, {}
    for i, site in enumerate(sites):
        name = site.removeprefix("unet.")
        m, n = layer[name].weight.shape
        down, up = torch.randn(2 + i % 3, n, generator=g), torch.randn(m, 2 + i % 3, generator=g)
        tensors[f"unet.{name}.lora.down.weight"], tensors[f"unet.{name}.lora.up.weight"] = down, up
        ranks[name], alphas[name] = 2 + i % 3, 3.0 + i % 2
        expected[site] = alphas[name] / ranks[name] * up @ down
    of_all = {"unet.r": 4, "unet.lora_alpha": 8, "unet.target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
    patterns = {"unet.rank_pattern": ranks, "unet.alpha_pattern": alphas}
    save_file(tensors, tmp_path / LORA_FILE, metadata={"lora_adapter_metadata": json.dumps(of_all | patterns)})
    adapter = vislora.load(pipe, tmp_path, name="read")
    for site, delta in adapter.deltas().items():
        assert torch.allclose(delta, expected[site], atol=1e-4)
    save_file(tensors, tmp_path / LORA_FILE, metadata={"lora_adapter_metadata": json.dumps(of_all)})
    with pytest.raises(InputError, match="has rank [23] and the configuration says 4"):
        vislora.load(pipe, tmp_path, name="contradicted")
    with adapter.hidden(), pytest.raises(RuntimeError, match="size mismatch"):  # stock diffusers refuses it too
        pipe.load_lora_weights(str(tmp_path))


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
    with pytest.raises(InputError, match="4 of 32 layers lack one of their two factors: .*attn1.to_q"):
        vislora.load(pipe, tmp_path, name="half")
    write({"unet.nowhere.lora_A.weight": torch.zeros(2, 4), "unet.nowhere.lora_B.weight": torch.zeros(4, 2)}, {}, file)
    with pytest.raises(InputError, match="1 of its 1 layers are not in UNet2DConditionModel"):
        vislora.load(pipe, tmp_path, name="nowhere")


def factors_of(tensors, site):
    key = site.replace("text_encoder.", "text_encoder.text_model.")
    return tensors[f"{key}.lora_B.weight"].double(), tensors[f"{key}.lora_A.weight"].double()


@pytest.mark.parametrize("method", vislora.methods())
def test_squeezed_exports_are_the_best_of_their_rank(pipe, method, tmp_path):
    adapter = moved(vislora.attach({"unet": pipe.unet}, get(method)(rank=4)))
    file = adapter.export(tmp_path, rank=2)
    tensors, stated = read(file)[0], read_certificate(file)
    assert stated["ranks"] == {"unet": 2} and 0 < stated["largest_lost"] < 1
    assert stated["largest_lost"] == max(m["lost"] for m in stated["modules"].values())
    for name, site, _, update in adapter.site_updates():
        up, down = update.factors()
        U, S, Vh = torch.linalg.svd(up.double() @ down.double(), full_matrices=False)
        best = U[:, :2] * S[:2] @ Vh[:2]
        B, A = factors_of(tensors, name)
        assert A.shape == (2, site.n) and B.shape == (site.m, 2)
        assert (B @ A - best).norm() < 1e-5 * S.norm()
        lost = (S[2:].norm() / S.norm()).item()
        assert abs(stated["modules"][name]["lost"] - lost) < 1e-6
        if update.magnitude is None:  # with one, the norm is of the rescaled weight's change
            assert abs(stated["modules"][name]["spectral"] - S[0].item()) < 1e-5 * S[0].item()
        else:
            assert torch.equal(tensors[f"{name}.lora_magnitude_vector"], update.magnitude)
    assert exported_error(pipe, adapter, tmp_path, rank=2) < 1e-5
    with pytest.raises(EnvironmentFault, match="off"):  # against what was not exported
        exported_error(pipe, adapter, tmp_path)


def test_a_squeezed_bound_still_holds(pipe, tmp_path):
    adapter = moved(vislora.attach({"unet": pipe.unet}, "nb_lora", rank=4, p=1, delta=0.5))
    whole = read_certificate(adapter.export(tmp_path))
    file = adapter.export(tmp_path, rank=2)
    stated = read_certificate(file)
    for name, of_module in stated["modules"].items():
        B, A = factors_of(read(file)[0], name)
        assert abs(torch.linalg.svdvals(B @ A).sum().item() - of_module["norm"]) < 1e-5
        assert of_module["norm"] < whole["modules"][name]["norm"] <= of_module["bound"] * (1 + 1e-5)
    assert stated["largest_share"] < whole["largest_share"] and whole["largest_lost"] == 0


def test_a_rank_that_is_not_smaller_changes_nothing(pipe, tmp_path):
    adapter = moved(vislora.attach({"unet": pipe.unet}, "pissa", rank=2))
    plain, header = read(adapter.export(tmp_path / "plain"))
    for rank in (4, 40):
        same, stated = read(adapter.export(tmp_path / "same", rank=rank))
        assert same.keys() == plain.keys() and all(torch.equal(t, plain[name]) for name, t in same.items())
        assert stated == header
    assert all(len(t) == 4 for name, t in plain.items() if "lora_A" in name)
    less = read(adapter.export(tmp_path / "less", rank=3))[0]
    assert all(len(t) == 3 for name, t in less.items() if "lora_A" in name)
    for rank in (0, -1, 1.5, True):
        with pytest.raises(InputError, match=f"rank: {rank} is not a positive whole number"):
            adapter.export(tmp_path / "none", rank=rank)
    assert not (tmp_path / "none").exists()


def test_od_lora_needs_half_its_columns_right_after_a_refresh(pipe, tmp_path):
    method = get("od_lora")(rank=3, init_rounds=1, init_steps=1, refresh_phases=2)
    adapter = vislora.attach({"unet": pipe.unet}, method)
    optimizer = torch.optim.AdamW(adapter.param_groups(1e-2))
    adapter.bind(optimizer, 4)  # refreshed after every step of the first half, then after every second one
    ids = pipe.tokenizer(["a b"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        text = pipe.text_encoder(ids)[0]

    def closure():
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(adapter.step))
        loss = (pipe.unet(x, torch.tensor([500]), text).sample - x).square().mean()
        loss.backward()
        return loss

    adapter.prepare(closure)
    ranks = []
    for step in range(1, 5):
        closure()
        optimizer.step()
        optimizer.zero_grad()
        file = adapter.export(tmp_path)
        stated = read_certificate(file)
        ranks.append((method.refreshes(step, 4), stated["ranks"]["unet"]))
        assert stated["largest_lost"] <= 1e-6 and exported_error(pipe, adapter, tmp_path) < 1e-5
        for name, _, _, update in adapter.site_updates():
            B, A = factors_of(read(file)[0], name)
            assert (B @ A - update.product().double()).norm() <= 2e-6 * update.product().norm()
    assert ranks == [(True, 3), (True, 3), (False, 6), (True, 3)]


def test_only_what_rounding_left_is_dropped(pipe, tmp_path):
    adapter = moved(vislora.attach({"unet": pipe.unet}, "lora", rank=4))
    first = adapter.sites[0]
    for exponent, rank in ((-5, 4), (-8, 3)):  # the last column's share of every product but one
        with torch.no_grad():
            for name, t in adapter.named_parameters():
                if name.endswith(".B") and not name.startswith(first):
                    t[:, 3] = 10.0**exponent * torch.linalg.vector_norm(t[:, :3]) / t.shape[0] ** 0.5
                elif name.endswith(".B"):
                    t[:, 1:] = 0  # of rank one: padded to the others' rank
        file = adapter.export(tmp_path)
        assert read_certificate(file)["ranks"] == {"unet": rank}
        assert {t.shape[0] for k, t in read(file)[0].items() if "lora_A" in k} == {rank}
    untrained = vislora.attach({"unet": pipe.unet}, "lora", rank=4, name="untrained")
    assert read_certificate(untrained.export(tmp_path))["ranks"] == {"unet": 4}, "zeros say nothing of a rank"
