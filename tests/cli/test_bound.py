"""vislora bound: nothing outside the ball, nothing touched inside it, and a file that is otherwise the same."""

from __future__ import annotations

import json
import math

import pytest
import torch
from diffusers import UNet2DConditionModel
from lora_files import dense, layers, norm, same
from safetensors.torch import save_file
from tiny_sd import tiny_sd

import vislora
from vislora.cli import main
from vislora.formats import Base, read, save, written
from vislora.io import read as read_tensors
from vislora.projection import project


def stored(folder, format, **made):
    return save(written(layers(**made), format, {"note": "kept"}, folder), layers(**made))[0]


def run(*argv):
    main([str(word) for word in argv])


def by_name(path):
    return {layer.name: layer for layer in read(path).layers}


@pytest.mark.parametrize("format", ["vislora", "diffusers", "kohya", "peft"])
@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
def test_the_nearest_inside(format, p, tmp_path):
    path = stored(tmp_path / "in", format, scale=0.37, conv=format != "vislora")
    before = by_name(path)
    middle = sorted(norm(layer, p) for layer in before.values())[len(before) // 2] * (1 + 1e-9)
    run("bound", path, "--p", p, "--delta", middle, "-o", tmp_path / "out")
    file = read(tmp_path / "out")
    assert file.format == format and file.header["note"] == "kept"
    kept = 0
    for layer in file.layers:
        old = before[layer.name]
        if norm(old, p) <= middle:
            kept += 1
            assert torch.equal(layer.up, old.up) and torch.equal(layer.down, old.down) and layer.scale == old.scale
            continue
        U, S, Vh = torch.linalg.svd(dense(old), full_matrices=False)
        nearest = (U * project(S, p, middle)) @ Vh
        assert (dense(layer) - nearest).norm() < 1e-6 * nearest.norm()
        assert norm(layer, p) <= middle and norm(layer, p) > 0.999999 * middle
        assert layer.up.shape == old.up.shape and layer.down.shape == old.down.shape
    assert 0 < kept < len(before)


def test_kohyas_alphas_count_and_stay(tmp_path):
    """Whole, fractional, negative, zero and missing alphas, as other trainers write them."""
    g = torch.Generator().manual_seed(0)
    alphas = {"to_q": 8, "to_k": 1.5, "to_v": [-3.0], "to_out_0": 0.0}
    tensors, wanted = {}, {}
    for leaf, alpha in (alphas | {"ff": None}).items():
        leaf = "attn1_" + leaf if leaf != "ff" else "ff_net_2"
        key = f"lora_unet_mid_block_attentions_0_transformer_blocks_0_{leaf}"
        up, down = torch.randn(2, 6, 4, generator=g)
        alpha = None if alpha is None else torch.tensor(alpha)
        tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down.T.contiguous()}
        tensors |= {} if alpha is None else {f"{key}.alpha": alpha}
        wanted[leaf] = up.double() @ down.double().T * (1.0 if alpha is None else alpha.item() / 4)
    save_file(tensors, tmp_path / "k.safetensors")
    run("bound", tmp_path / "k.safetensors", "--p", 2, "--delta", 0.5, "-o", tmp_path / "out.safetensors")
    for path, most in ((tmp_path / "k.safetensors", math.inf), (tmp_path / "out.safetensors", 0.5)):
        for layer in read(path).layers:
            goal = wanted[layer.path.partition("transformer_blocks.0.")[2].replace(".", "_")]
            goal = goal * min(1.0, most / goal.norm().item() if goal.any() else 1.0)
            assert torch.allclose(dense(layer), goal, atol=1e-6), layer.name
    kept = read_tensors(tmp_path / "out.safetensors")[0]
    assert all(torch.equal(kept[key], t) for key, t in tensors.items() if key.endswith(".alpha"))


def test_all_else_is_bit_for_bit(tmp_path):
    path = stored(tmp_path / "in", "kohya", dtype=torch.float16)
    run("bound", path, "--delta", 1e6, "-o", tmp_path / "same.safetensors")
    tensors, header = read_tensors(path)
    again, new = read_tensors(tmp_path / "same.safetensors")
    assert all(torch.equal(t, again[key]) and t.dtype == again[key].dtype for key, t in tensors.items())
    assert again.keys() == tensors.keys() and new.items() >= header.items()
    assert new.keys() - header.keys() == {"vislora.certificate"}
    stated = json.loads(new["vislora.certificate"])
    assert stated["options"]["delta"] == 1e6 and all(m["bound"] == 1e6 for m in stated["modules"].values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("how", ["nearest", "shrink"])
def test_what_is_stored_keeps_the_bound_and_twice_is_once(dtype, how, tmp_path):
    path = stored(tmp_path / "in", "diffusers", dtype=dtype)
    for p in (1, 2, 2.5, math.inf):
        first, second = tmp_path / f"{p}.safetensors", tmp_path / f"{p}b.safetensors"
        run("bound", path, "--p", p, "--delta", 1.5, "--how", how, "-o", first)
        for layer in read(first).layers:
            assert 1.5 * 0.97 < norm(layer, p) <= 1.5 and layer.up.dtype == dtype
        run("bound", first, "--p", p, "--delta", 1.5, "--how", how, "-o", second)
        tensors, again = read_tensors(first)[0], read_tensors(second)[0]
        assert all(torch.equal(t, again[key]) for key, t in tensors.items())


def test_shrinking_only_scales(tmp_path):
    path = stored(tmp_path / "in", "diffusers")
    run("bound", path, "--p", 1, "--delta", 0.5, "--how", "shrink", "-o", tmp_path / "out")
    before = by_name(path)
    for layer in read(tmp_path / "out").layers:
        scaled = dense(before[layer.name]) * (0.5 / norm(before[layer.name], 1))
        assert (dense(layer) - scaled).norm() < 1e-6 * scaled.norm()


def test_the_nearest_is_nearer_than_shrinking(tmp_path):
    path = stored(tmp_path / "in", "diffusers")
    off = {}
    for how in ("nearest", "shrink"):
        run("bound", path, "--p", 1, "--delta", 20, "--how", how, "-o", tmp_path / how)
        new = by_name(tmp_path / how)
        off[how] = [(dense(new[name]) - dense(old)).norm().item() for name, old in by_name(path).items()]
    assert all(a < b for a, b in zip(off["nearest"], off["shrink"], strict=True) if b)


def test_rank(tmp_path, capsys):
    path = stored(tmp_path / "in", "peft", scale=0.37)
    run("bound", path, "--p", 2, "--delta", 3, "--rank", 2, "-o", tmp_path / "out")
    assert json.loads((tmp_path / "out/unet/adapter_config.json").read_text())["r"] == 2
    lost = 0.0
    for layer in read(tmp_path / "out").layers:
        U, S, Vh = torch.linalg.svd(dense(by_name(path)[layer.name]), full_matrices=False)
        S = project(S, 2, 3.0)
        assert torch.allclose(dense(layer), (U[:, :2] * S[:2]) @ Vh[:2], atol=1e-5) and layer.rank == 2
        lost = max(lost, S[2:].norm().item())
    assert f"at most {lost:.4g} of Frobenius norm lost" in capsys.readouterr().out


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_sd(tmp_path_factory.mktemp("sd"))


def trained(model, folder, method="lora", **options):
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    adapter = vislora.attach({"unet": unet}, method, rank=4, **options)
    with torch.no_grad():
        for i, parameter in enumerate(adapter.parameters()):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    adapter.save(folder)
    return unet, adapter


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_a_share_of_the_weights_norms(model, p, tmp_path):
    trained(model, tmp_path / "in")
    run("bound", tmp_path / "in", "--p", p, "--delta_ratio", 0.05, "--base", model, "-o", tmp_path / "out")
    for layer in read(tmp_path / "out").layers:
        weight = Base(model).weight("unet", layer.path)
        limit = 0.05 * torch.linalg.vector_norm(torch.linalg.svdvals(weight), ord=p).item()
        assert 0.9999 * limit < norm(layer, p) <= limit * (1 + 1e-6)


@pytest.mark.parametrize("p", [1, 2, 4, math.inf])
@pytest.mark.parametrize("method", ["lora", "od_lora"])
def test_as_nb_lora_trains_on_from_the_bounded_update(model, p, method, tmp_path):
    unet, adapter = trained(model, tmp_path / "in", method)
    adapter.detach()
    run("bound", tmp_path / "in", "--p", p, "--delta", 0.7, "-o", tmp_path / "out")
    run("bound", tmp_path / "in", "--p", p, "--delta", 0.7, "--as_nb_lora", "-o", tmp_path / "nb")
    bounded = by_name(tmp_path / "out")
    again = vislora.load({"unet": unet}, tmp_path / "nb")
    assert again.method_name == "nb_lora" and again.method.p == p and again.method.delta == 0.7
    for name, delta in again.deltas().items():
        goal = dense(bounded[name])
        U, S, Vh = torch.linalg.svd(goal, full_matrices=False)
        inner = (U * project(S, p, 0.7 * (1 - 1e-3))) @ Vh  # nearest of the nearest, which is not the nearest of all
        assert (delta - inner).norm() < 2e-3 * goal.norm()
        assert torch.linalg.vector_norm(torch.linalg.svdvals(delta.double()), ord=p) <= 0.7
    optimizer = torch.optim.SGD(again.parameters(), lr=1e-2)
    sum(delta.square().sum() for delta in _live(again)).backward()
    grads = [p.grad for p in again.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in grads) and any(g.any() for g in grads)
    optimizer.step()
    assert all(torch.linalg.matrix_norm(d, ord=2) <= 0.7 * (1 + 1e-5) for d in again.deltas().values())


def _live(adapter):
    return [update.product() for part in adapter.parts.values() for update in part()]


def test_nb_loras_parameters_give_the_projection_back(model, tmp_path):
    """To 1e-5 of the projection onto the ball that they were pulled into, with a zero layer and a large rank."""
    trained(model, tmp_path / "in")
    file = read(tmp_path / "in")
    file.layers[0].up.zero_()
    save(written(file.layers, "diffusers", {}, tmp_path / "zero"), file.layers)
    run("bound", tmp_path / "zero", "--p", 1, "--delta", 0.7, "--as_nb_lora", "--rank", 9, "-o", tmp_path / "nb")
    for layer in read(tmp_path / "nb").layers:
        U, S, Vh = torch.linalg.svd(dense(by_name(tmp_path / "zero")[layer.name]), full_matrices=False)
        goal = (U * project(S, 1, 0.7 * (1 - 1e-3))) @ Vh
        assert (dense(layer) - goal).abs().max() < 1e-5 and layer.rank == 9


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--p", 1], "neither of --delta and --delta_ratio"),
        (["--delta", 1, "--delta_ratio", 1], "both of"),
        (["--delta_ratio", 0.1], "give their folder as --base"),
        (["--delta", 0], "0.0 is not a positive number"),
        (["--delta", "nan"], "nan is not a positive number"),
        (["--delta", 1, "--p", 0.5], "0.5 is below 1"),
        (["--delta", 1, "--rank", 0], "0 is no rank"),
        (["--delta", 1, "--ranks", 4], "unknown --ranks (did you mean --rank"),
        (["--delta", "six"], "invalid float value: 'six'"),
        (["--delta", 1, "--as_nb_lora", "--rank", 11], "11 is larger than"),
    ],
)
def test_bad_flags(flags, words, tmp_path, capsys):
    path = stored(tmp_path / "in", "diffusers")
    with pytest.raises(SystemExit) as stop:
        run("bound", path, *flags, "-o", tmp_path / "out")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_another_base_is_refused(model, tmp_path, capsys):
    trained(model, tmp_path / "in")
    other = tiny_sd(tmp_path / "other", seed=5)
    for folder, words in ((other, "was trained on another base"), (tmp_path / "in", "give the base that")):
        with pytest.raises(SystemExit) as stop:
            run("bound", tmp_path / "in", "--delta_ratio", 0.1, "--base", folder, "-o", tmp_path / "out")
        assert stop.value.code == 2 and words in capsys.readouterr().err


def test_a_base_that_lacks_a_shard_is_named(model, tmp_path, capsys):
    trained(model, tmp_path / "in")
    (tmp_path / "base/unet").mkdir(parents=True)
    index = {"weight_map": {"a.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "base/unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    for folder, words in ((tmp_path / "base", "lacks the shard model-00001"), (tmp_path / "none", "is no folder")):
        with pytest.raises(SystemExit) as stop:
            run("inspect", tmp_path / "in", "--base", folder)
        assert stop.value.code == 2 and words in capsys.readouterr().err


def test_convolutions_are_bounded_and_train_on(model, tmp_path):
    unet, adapter = trained(model, tmp_path / "in", "lora", targets=["conv1", "to_q"])
    adapter.detach()
    run("bound", tmp_path / "in", "--p", 1, "--delta", 0.5, "--as_nb_lora", "-o", tmp_path / "out")
    file = read(tmp_path / "out")
    assert {layer.down.dim() for layer in file.layers} == {2, 4}
    assert all(norm(layer, 1) <= 0.5 for layer in file.layers)
    again = vislora.load({"unet": unet}, tmp_path / "out")
    for name, delta in again.deltas().items():
        wanted = next(dense(layer) for layer in file.layers if layer.name == name)
        assert (delta.flatten(1) - wanted).norm() < 1e-5 * wanted.norm()


def test_dora_where_it_does_not_fit(tmp_path, capsys):
    pair = {"lora_A.weight": torch.ones(1, 3), "lora_B.weight": torch.ones(3, 1)}
    pair["lora_magnitude_vector"] = torch.ones(3)
    dora = tmp_path / "dora.safetensors"
    save_file({f"unet.mid_block.attentions.0.proj_in.{k}": t for k, t in pair.items()}, dora)
    with pytest.raises(SystemExit) as stop:
        run("bound", dora, "--delta", 1, "-o", tmp_path / "out")
    assert stop.value.code == 2 and "is DoRA" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_our_file_of_another_method_becomes_lora_of_the_same_updates(model, tmp_path):
    unet, adapter = trained(model, tmp_path / "in", "sorsa")
    adapter.detach()
    run("bound", tmp_path / "in", "--delta", 1e9, "-o", tmp_path / "out")
    assert same(read(tmp_path / "in").layers, read(tmp_path / "out").layers, 1e-6)
    assert vislora.load({"unet": unet}, tmp_path / "out").method_name == "lora"
