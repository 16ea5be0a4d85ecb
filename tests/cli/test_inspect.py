"""vislora inspect: the numbers against dense matrices, certificates, the picture, and an SDXL-sized file."""

from __future__ import annotations

import csv
import json
import math
import time

import pytest
import torch
from diffusers import UNet2DConditionModel
from lora_files import dense, layers
from PIL import Image
from safetensors.torch import save_file
from tiny_sd import tiny_sd

import vislora
from vislora.cli import main
from vislora.formats import Base, read, save, written
from vislora.io import read as read_tensors
from vislora.io import write


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_sd(tmp_path_factory.mktemp("sd"))


def shown(capsys, *argv):
    main(["inspect", *map(str, argv)])
    return capsys.readouterr().out


def test_numbers_are_those_of_the_dense_updates(tmp_path, capsys):
    made = layers(scale=0.37, conv=True)
    path, _ = save(written(made, "kohya", {}, tmp_path), made)
    told = json.loads(shown(capsys, path, "--json"))
    assert told["format"] == "kohya" and told["components"] == {"text_encoder": 2, "unet": 5}
    assert told["certificate"]["status"] == "absent" and len(told["layers"]) == 7
    for row in told["layers"]:
        (layer,) = (layer for layer in made if layer.name == row["name"])
        S = torch.linalg.svdvals(dense(layer))
        share = S[S > 1e-9] / S.sum()
        for key, value in {
            "spectral": S[0], "frobenius": S.norm(), "nuclear": S.sum(),
            "effective_rank": (-(share * share.log()).sum()).exp(),
        }.items():  # fmt: skip
            assert math.isclose(row[key], value.item(), rel_tol=1e-5), (key, row)
        assert row["shape"] == list(layer.shape) and not row["dora"] and row["dtype"] == "float32"
        assert layer.rank <= row["rank"] <= 4
    table = shown(capsys, path)
    assert all(row["name"] in table and f"{row['frobenius']:.4g}" in table for row in told["layers"])
    assert "certificate: absent" in table and "|dW|/|W|" not in table


def adapted(model, method="nb_lora", **options):
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    adapter = vislora.attach({"unet": unet}, method, rank=4, **options)
    with torch.no_grad():
        for i, parameter in enumerate(adapter.parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return adapter


@pytest.mark.parametrize("method, options", [("nb_lora", {"p": 2, "delta": 0.5}), ("lora", {}), ("dora", {})])
def test_certificates_are_checked(model, method, options, tmp_path, capsys):
    adapter = adapted(model, method, **options)
    path = adapter.export(tmp_path / "out", "diffusers")
    assert "certificate: holds" in shown(capsys, path, "--base", model)
    without = shown(capsys, path)
    assert ("certificate: unchecked" if method == "dora" else "certificate: holds") in without
    tensors, header = read_tensors(path)
    key = next(key for key in tensors if key.endswith("lora_B.weight"))
    write({**tensors, key: tensors[key] * 1.01}, header, path)
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(path), "--base", str(model), "--json"])
    told = capsys.readouterr()
    assert stop.value.code == 2 and key.removesuffix(".lora_B.weight") in told.err and told.err.count("\n") == 1
    assert json.loads(told.out)["certificate"]["status"] == "broken"


def test_a_certificate_of_fewer_layers_or_a_lower_bound_is_broken(model, tmp_path, capsys):
    path = adapted(model, delta=0.5, p=1).export(tmp_path / "out", "diffusers")
    tensors, header = read_tensors(path)
    stated = json.loads(header["vislora.certificate"])
    name = next(iter(stated["modules"]))
    fewer = {**stated, "modules": {k: v for k, v in stated["modules"].items() if k != name}}
    lower = json.loads(json.dumps(stated))
    lower["modules"][name]["bound"] = 0.01
    cases = ((fewer, "1 layers are in the file or"), (lower, "above its bound 0.01"), ({}, "cannot be read"))
    for change, words in cases:
        write(tensors, {**header, "vislora.certificate": json.dumps(change)}, path)
        with pytest.raises(SystemExit):
            main(["inspect", str(path)])
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("method", ["nb_lora", "dora"])
def test_ratios_to_the_base(model, method, tmp_path, capsys):
    adapter = adapted(model, method)
    adapter.save(tmp_path)
    rows = {row["name"]: row for row in json.loads(shown(capsys, tmp_path, "--base", model, "--json"))["layers"]}
    for name, delta in adapter.deltas().items():
        weight = Base(model).weight("unet", name.removeprefix("unet."))
        ratio = (delta.norm() / weight.norm()).item()
        assert math.isclose(rows[name]["ratio"], ratio, rel_tol=1e-4)
        assert math.isclose(rows[name]["nuclear"], torch.linalg.svdvals(delta).sum().item(), rel_tol=1e-4)
    if method == "nb_lora":
        assert "bound by construction: p 1; largest share" in shown(capsys, tmp_path)
    else:
        assert "magnitudes need --base" in shown(capsys, tmp_path)


def test_the_picture_and_its_data(model, tmp_path, capsys):
    adapter = adapted(model)
    adapter.save(tmp_path)
    shown(capsys, tmp_path, "--plot", tmp_path / "a.png")
    picture = Image.open(tmp_path / "a.png").convert("RGB")
    assert min(picture.size) > 200 and len(picture.getcolors(1 << 20)) > 30
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    told = json.loads(shown(capsys, tmp_path, "--json"))["layers"]
    assert [f"{row['block']}.{row['layer']}" for row in rows] == [row["path"] for row in told]
    assert [float(row["frobenius"]) for row in rows] == [row["frobenius"] for row in told]
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path), "--plot", str(tmp_path / "a.jpg")])
    assert "is no .png" in capsys.readouterr().err


def test_a_zero_adapter_is_drawn_and_told(tmp_path, capsys):
    made = layers()
    for layer in made:
        layer.up.zero_()
    path, _ = save(written(made, "peft", {}, tmp_path / "z"), made)
    told = json.loads(shown(capsys, path, "--json", "--plot", tmp_path / "z.png"))
    assert all(row["effective_rank"] == 0 == row["nuclear"] for row in told["layers"])


def test_slices_of_a_fused_matrix_find_their_rows(tmp_path, capsys):
    net = torch.nn.Sequential()
    net.qkv = torch.nn.Linear(6, 12)
    adapter = vislora.attach(net, "nb_lora", targets=["qkv[q]", "qkv[v]"], rank=2, delta=1.0)
    adapter.save(tmp_path / "in")
    (tmp_path / "base").mkdir()
    save_file({"qkv.weight": net.qkv.weight.detach()}, tmp_path / "base/model.safetensors")
    rows = json.loads(shown(capsys, tmp_path / "in", "--base", tmp_path / "base", "--json"))["layers"]
    wanted = [net.qkv.weight[:4].norm().item(), net.qkv.weight[8:].norm().item()]
    assert [row["weight_frobenius"] for row in rows] == pytest.approx(wanted)


def test_help_and_unknown_commands(capsys):
    main([])
    assert "inspect" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["inspct"])
    assert stop.value.code == 2 and "did you mean inspect" in capsys.readouterr().err


@pytest.mark.slow
def test_an_sdxl_sized_file_takes_less_than_a_minute(tmp_path, capsys):
    shapes = {10: 1280, 2: 640}
    g = torch.Generator().manual_seed(0)
    tensors = {}
    stages = {"down_blocks.1": (2, 2), "down_blocks.2": (2, 10), "mid_block": (1, 10), "up_blocks.0": (3, 10)}
    for stage, (count, depth) in (stages | {"up_blocks.1": (3, 2)}).items():
        width = shapes[depth]
        sizes = {f"attn{i}.{k}": (width, width) for i in (1, 2) for k in ("to_q", "to_k", "to_v", "to_out.0")}
        sizes |= {"attn2.to_k": (width, 2048), "attn2.to_v": (width, 2048)}
        sizes |= {"ff.net.0.proj": (8 * width, width), "ff.net.2": (width, 4 * width)}
        for block in range(count * depth):
            path = f"{stage}.attentions.{block // depth}.transformer_blocks.{block % depth}"
            for kind, (m, n) in sizes.items():
                tensors[f"unet.{path}.{kind}.lora_A.weight"] = torch.randn(40, n, generator=g).half()
                tensors[f"unet.{path}.{kind}.lora_B.weight"] = torch.randn(m, 40, generator=g).half()
    save_file(tensors, tmp_path / "xl.safetensors")
    assert (tmp_path / "xl.safetensors").stat().st_size > 200e6 and len(tensors) == 1400
    start = time.perf_counter()
    told = json.loads(shown(capsys, tmp_path / "xl.safetensors", "--json", "--plot", tmp_path / "xl.png"))
    seconds = time.perf_counter() - start
    print(f"{seconds:.1f} s for {len(told['layers'])} layers")
    assert len(told["layers"]) == 700 and seconds < 60
    assert len(read(tmp_path / "xl.safetensors").layers) == 700
