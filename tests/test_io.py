"""Files: what `load` accepts, maps between bare modules and pipelines, and refuses by name."""

from __future__ import annotations

import json
import os

import pytest
import torch
from hosts import llama, text_encoder, unet
from safetensors.torch import save_file

import vislora
from vislora.errors import InputError
from vislora.io import FILE, read, write


def parts():
    torch.manual_seed(0)
    return {"unet": unet().eval(), "text_encoder": text_encoder().eval()}


def moved(adapter):
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    return adapter


def test_components_find_their_places(tmp_path):
    base = parts()
    both = moved(vislora.attach(base, "nb_lora", rank=2, delta=1.0))
    both.save(tmp_path / "both")
    wanted = both.deltas()
    both.detach()
    again = vislora.load(base, tmp_path / "both")
    assert all(torch.equal(d, wanted[k]) for k, d in again.deltas().items())
    again.detach()
    with pytest.raises(InputError, match="unet, text_encoder.*model given has UNet2DConditionModel"):
        vislora.load(base["unet"], tmp_path / "both")

    alone = moved(vislora.attach(base["unet"], "lora", rank=2))
    alone.save(tmp_path / "alone")
    wanted = alone.deltas()
    alone.detach()
    found = vislora.load(base, tmp_path / "alone")  # a bare module's file finds its component
    assert {k.removeprefix("unet."): True for k in found.deltas()} == {
        k.removeprefix("unet."): torch.equal(d, wanted[k.removeprefix("unet.")]) for k, d in found.deltas().items()
    }
    found.detach()
    named = vislora.attach({"unet": base["unet"]}, "lora", rank=2)
    named.save(tmp_path / "named")
    named.detach()
    assert len(vislora.load(base["unet"], tmp_path / "named").sites) == 32


def test_weight_and_name(tmp_path):
    base = parts()["unet"]
    adapter = moved(vislora.attach(base, "lora", rank=2))
    adapter.save(tmp_path)
    full = adapter.deltas()
    adapter.detach()
    half = vislora.load(base, tmp_path / FILE, name="half", weight=0.5)
    assert half.weight == 0.5 and half.name == "half"
    assert all(torch.equal(d, 0.5 * full[k]) for k, d in half.deltas().items())
    with pytest.raises(InputError, match="taken"):
        vislora.load(base, tmp_path, name="half")


def test_infinite_p_survives_the_file(tmp_path):
    base = parts()["text_encoder"]
    vislora.attach(base, "nb_lora", rank=2, p=float("inf"), delta=0.5).save(tmp_path)
    config = json.loads(read(tmp_path / FILE)[1]["vislora"])
    assert config["options"]["p"] == "inf"
    assert vislora.load(base, tmp_path, name="b").method.p == float("inf")


def test_foreign_models_are_refused(tmp_path):
    vislora.attach(parts()["text_encoder"], "lora", rank=2).save(tmp_path)
    with pytest.raises(InputError, match="8 of its 8 layers are not in LlamaForCausalLM: encoder.layers.0"):
        vislora.load(llama(), tmp_path)


def test_bad_files_are_refused(tmp_path):
    base = parts()["unet"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.bin").write_bytes(b"\x80\x04")
    (tmp_path / "p.safetensors").write_bytes(b"\x80\x04" * 50)
    (tmp_path / "none.safetensors").write_bytes(b"")
    save_file({}, tmp_path / "void.safetensors")
    save_file({"unet.x.foo": torch.zeros(2)}, tmp_path / "strange.safetensors")
    adapter = vislora.attach(base, "lora", rank=2)
    file = adapter.save(tmp_path / "good")
    tensors, header = read(file)
    adapter.detach()
    newer = json.loads(header["vislora"]) | {"format": 99}
    write(tensors, {"vislora": json.dumps(newer)}, tmp_path / "newer.safetensors")
    write(tensors, {"vislora": "{\x1b[31m"}, tmp_path / "hostile.safetensors")
    whole = {k: torch.zeros_like(v, dtype=torch.int32) for k, v in tensors.items()}
    write(whole, header, tmp_path / "ints.safetensors")
    for name, words in {
        "missing": ("does not exist",),
        "empty": ("holds no adapter", FILE),
        "a.bin": (".bin", "convert"),
        "p.safetensors": ("p.safetensors", "no whole safetensors"),
        "none.safetensors": ("no whole safetensors",),
        "void.safetensors": ("no tensors",),
        "strange.safetensors": ("unet.x.foo",),
        "newer.safetensors": ("format 99", "update"),
        "hostile.safetensors": ("damaged header",),
        "ints.safetensors": ("int32",),
    }.items():
        with pytest.raises(InputError) as error:
            vislora.load(base, tmp_path / name)
        message = str(error.value)
        assert all(word in message for word in words), message
        assert "\x1b" not in message and "\n" not in message
        assert not any("vislora" in key for key in base.state_dict())


def test_saving_never_leaves_a_half_written_file(tmp_path, monkeypatch):
    adapter = vislora.attach(parts()["unet"], "lora", rank=2)
    file = adapter.save(tmp_path)
    before = file.read_bytes()
    moved(adapter)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(vislora.errors.EnvironmentFault, match="No space left"):
        adapter.save(tmp_path)
    assert file.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [FILE]


def test_non_finite_adapters_are_not_saved(tmp_path):
    adapter = vislora.attach(parts()["unet"], "lora", rank=2)
    with torch.no_grad():
        next(adapter.parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match="NaN"):
        adapter.save(tmp_path)
    assert list(tmp_path.iterdir()) == []
