"""vislora export and vislora merge."""

from __future__ import annotations

import json

import pytest
import torch
from hosts import unet
from lora_files import dense, layers, norm, same
from safetensors.torch import save_file

import vislora
from vislora.cli import main
from vislora.formats import read, save, written
from vislora.io import read as read_tensors


def run(*argv):
    main([str(word) for word in argv])


def stored(folder, format="diffusers", header=None, **made):
    return save(written(layers(**made), format, header or {}, folder), layers(**made))[0]


def fails(capsys, words, *argv):
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err and err.count("\n") == 1, err


@pytest.mark.parametrize("format", ["diffusers", "kohya", "peft"])
def test_export(format, tmp_path, capsys):
    path = stored(tmp_path / "in", "kohya", scale=0.37, conv=True)
    run("export", path, "--format", format, "-o", tmp_path / "out")
    file = read(tmp_path / "out")
    assert file.format == format and same(file.layers, read(path).layers)
    assert all(layer.scale == 1 for layer in file.layers) and "read back to" in capsys.readouterr().out
    assert ("ss_network_dim" in file.header) == (format == "kohya")


def test_kohyas_prefixes_follow_the_family(tmp_path):
    for parts, prefixes in ((("unet", "text_encoder"), {"lora_unet", "lora_te"}),
                            (("text_encoder", "text_encoder_2"), {"lora_te1", "lora_te2"})):  # fmt: skip
        path = stored(tmp_path / parts[-1], "diffusers", components=parts)
        run("export", path, "--format", "kohya", "-o", tmp_path / f"{parts[-1]}.safetensors")
        tensors, header = read_tensors(tmp_path / f"{parts[-1]}.safetensors")
        assert {key.partition("_text_model")[0].partition("_mid")[0].partition("_up")[0].partition("_down")[0]
                for key in tensors} == prefixes  # fmt: skip
        assert all(tensors[key] == int(header["ss_network_dim"]) for key in tensors if key.endswith(".alpha"))
        assert ("sdxl" in header["ss_base_model_version"]) == ("text_encoder_2" in parts)


def test_a_bounded_methods_export_carries_its_certificate(tmp_path):
    adapter = vislora.attach({"unet": unet()}, "nb_lora", rank=2, p=1, delta=0.5)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    adapter.save(tmp_path / "in")
    run("export", tmp_path / "in", "--format", "diffusers", "-o", tmp_path / "out")
    run("inspect", tmp_path / "out")  # raises where it does not hold
    stated = json.loads(read(tmp_path / "out").header["vislora.certificate"])
    assert all(m["bound"] == 0.5 and m["p"] == 1 for m in stated["modules"].values()) and len(stated["modules"]) == 32


def test_what_a_layout_cannot_hold(tmp_path, capsys):
    net = torch.nn.Sequential(torch.nn.Linear(6, 6))
    vislora.attach(net, "lora", rank=2).save(tmp_path / "own")
    out, file = tmp_path / "out", tmp_path / "a.safetensors"
    fails(capsys, "belongs to no component", "export", tmp_path / "own", "--format", "diffusers", "-o", out)
    fails(capsys, "belongs to no component", "export", tmp_path / "own", "--format", "kohya", "-o", out)
    fails(capsys, "give a folder's name", "export", tmp_path / "own", "--format", "peft", "-o", file)
    run("export", tmp_path / "own", "--format", "peft", "-o", tmp_path / "peft")
    assert [layer.name for layer in read(tmp_path / "peft").layers] == ["0"]
    fails(capsys, "invalid choice: 'kohia'", "export", tmp_path / "own", "--format", "kohia", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("second", ["diffusers", "kohya", "peft", "vislora"])
def test_the_merge_is_the_weighted_sum(second, tmp_path):
    a = stored(tmp_path / "a", rank=3, scale=0.5)
    b = stored(tmp_path / "b", second, rank=5, components=("unet",), scale=0.37)
    run("merge", a, b, "--weights", 1, -0.5, "-o", tmp_path / "out")
    one, two = ({layer.name: dense(layer) for layer in read(path).layers} for path in (a, b))
    file = read(tmp_path / "out")
    assert file.format == "diffusers" and {layer.name for layer in file.layers} == one.keys() | two.keys()
    for layer in file.layers:
        wanted = one[layer.name] - 0.5 * two.get(layer.name, torch.zeros(()))
        assert (dense(layer) - wanted).norm() < 1e-6 * wanted.norm()


def test_squeezing_a_merge_keeps_what_fits(tmp_path, capsys):
    a, b = stored(tmp_path / "a", rank=2), stored(tmp_path / "b", rank=4)
    run("merge", a, b, "--rank", 4, "-o", tmp_path / "out", "--format", "kohya")
    one, two = ({layer.name: dense(layer) for layer in read(path).layers} for path in (a, b))
    for layer in read(tmp_path / "out").layers:
        U, S, Vh = torch.linalg.svd(one[layer.name] + two[layer.name], full_matrices=False)
        assert torch.allclose(dense(layer), (U[:, :4] * S[:4]) @ Vh[:4], atol=1e-4) and layer.rank == 4
    assert "of Frobenius norm lost" in capsys.readouterr().out


def test_the_stated_bound_is_the_sum_of_bounds_and_holds(tmp_path, capsys):
    paths = []
    for name, rank, delta in (("a", 2, 3.0), ("b", 4, 2.0)):
        path = stored(tmp_path / name, rank=rank)
        run("bound", path, "--p", 1, "--delta", delta, "-o", tmp_path / f"{name}_in")
        paths.append(tmp_path / f"{name}_in")
    run("merge", *paths, "--weights", 1, -0.5, "-o", tmp_path / "out")
    assert "Schatten 1-norm at most 4 in any layer" in capsys.readouterr().out
    file = read(tmp_path / "out")
    stated = json.loads(file.header["vislora.certificate"])["modules"]
    assert all(m["bound"] == pytest.approx(4.0) and m["p"] == 1 for m in stated.values())
    assert all(norm(layer, 1) <= 4.0 for layer in file.layers)
    run("inspect", tmp_path / "out")


def test_an_adapter_without_a_bound_counts_with_its_norm(tmp_path):
    a, b = stored(tmp_path / "a", rank=2), stored(tmp_path / "b", rank=4)
    run("bound", a, "--p", "inf", "--delta", 1, "-o", tmp_path / "a_in")
    run("merge", tmp_path / "a_in", b, "--weights", 2, 1, "-o", tmp_path / "out")
    stated = json.loads(read(tmp_path / "out").header["vislora.certificate"])["modules"]
    for layer in read(b).layers:
        assert stated[layer.name]["bound"] == pytest.approx(2 * 1 + norm(layer, float("inf")), rel=1e-6)
        assert stated[layer.name]["p"] == "inf"


def test_merges_that_make_no_sense(tmp_path, capsys):
    a = stored(tmp_path / "a")
    fails(capsys, "got one adapter", "merge", a, "-o", tmp_path / "out")
    fails(capsys, "for 2 adapters", "merge", a, a, "--weights", 1, "-o", tmp_path / "out")
    fails(capsys, "for 2 adapters", "merge", a, a, "--weights", 1, "inf", "-o", tmp_path / "out")
    for size in ((12, 7), (9, 10)):
        other = stored(tmp_path / f"{size}", size=size)
        fails(capsys, "merge adapters of one base", "merge", a, other, "-o", tmp_path / "out")
    lie = read_tensors(a)[0]
    save_file(lie, tmp_path / "lie.safetensors", metadata={"vislora.certificate": '{"modules": {}}'})
    fails(capsys, "lie.safetensors: certificate", "merge", a, tmp_path / "lie.safetensors", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()
