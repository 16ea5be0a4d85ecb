"""Adversarial adapter files through the command: one line, status 2, nothing written"""

from __future__ import annotations

import json
import re
import shutil
import struct

import pytest
import torch
from diffusers import StableDiffusionPipeline
from lora_files import layers
from safetensors.torch import save_file
from tiny_sd import tiny_sd

import vislora
from vislora.cli import main
from vislora.errors import InputError
from vislora.formats import read, save, written
from vislora.io import LORA_FILE
from vislora.io import read as read_tensors


def diffusers_file(folder, metadata=None, drop=(), rename=(), change=None, dtype=None):
    """A sound diffusers file with one thing wrong."""
    path, _ = save(written(layers(), "diffusers", {}, folder), layers())
    tensors, header = read_tensors(path)
    tensors = {key.replace(*rename) if rename else key: t for key, t in tensors.items() if key not in drop}
    if change:
        tensors = {key: change(key, t) for key, t in tensors.items()}
    if metadata is not None:
        header["lora_adapter_metadata"] = metadata
    save_file({key: t.to(dtype) if dtype else t for key, t in tensors.items()}, path, metadata=header)
    return path


def own_file(folder, change, method="nb_lora"):
    """Our own file of a tiny model, its tensors and configuration changed by `change(tensors, config)`."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 4))
    file = vislora.attach(model, method, rank=2).save(folder)
    tensors, header = read_tensors(file)
    config = json.loads(header["vislora"])
    change(tensors, config)
    save_file(tensors, file, metadata={"vislora": json.dumps(config)})
    return file


def raw(folder, content, name="a.safetensors"):
    (folder / name).write_bytes(content)
    return folder / name


def poisoned(value):
    return lambda key, t: t.clone().index_put_((torch.tensor(0), torch.tensor(0)), torch.tensor(value))


def overlapping(folder):
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    head = json.dumps({"unet.a.lora_A.weight": entry, "unet.a.lora_B.weight": entry}).encode()
    return raw(folder, struct.pack("<Q", len(head)) + head + bytes(16))


def oversized(folder):
    head = json.dumps({"a": {"dtype": "F32", "shape": [9, 9], "data_offsets": [0, 324]}}).encode()
    return raw(folder, struct.pack("<Q", len(head)) + head + bytes(16))


def big_header(folder):
    size = 101_000_000
    with open(folder / "a.safetensors", "wb") as file:
        file.write(struct.pack("<Q", size) + b'{"')
        file.truncate(size + 8)
    return folder / "a.safetensors"


def peft_folder(folder, drop=(), **config):
    path, _ = save(written(layers(("unet",)), "peft", {}, folder / "p"), layers(("unet",)))
    file = path.parent / "adapter_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k not in drop} | config))
    return path.parent


def kohya_file(folder, **tensors):
    path, _ = save(written(layers(("unet",)), "kohya", {}, folder), layers(("unet",)))
    held, header = read_tensors(path)
    name = next(iter(held)).partition(".")[0]
    save_file(held | {f"{name}.{key}": t for key, t in tensors.items()}, path, metadata=header)
    return path


Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
one = torch.ones(3, 3)
CASES = {
    "A01 truncated": (lambda d: raw(d, diffusers_file(d / "x").read_bytes()[:-40]), "no whole safetensors"),
    "A02 empty": (lambda d: raw(d, b""), "no whole safetensors"),
    "A03 overlapping": (overlapping, "no whole safetensors"),
    "A03 oversized": (oversized, "no whole safetensors"),
    "A04 header of 100 MB": (big_header, "no whole safetensors"),
    "A05 bin": (lambda d: raw(d, b"\x80\x04", "a.bin"), ".bin file, which may run code"),
    "A05 pt": (lambda d: raw(d, b"\x80\x04", "a.pt"), ".pt file, which may run code"),
    "A05 ckpt": (lambda d: raw(d, b"\x80\x04", "a.ckpt"), "convert it to .safetensors"),
    "A05 PEFT's bin": (
        lambda d: [p := peft_folder(d), (p / "adapter_model.safetensors").rename(p / "adapter_model.bin")][0],
        "may run code",
    ),
    "A06 pickle by another name": (lambda d: raw(d, b"\x80\x04" * 50), "no whole safetensors"),
    "A07 renamed": (lambda d: diffusers_file(d, rename=(".lora_A.", ".lora_C.")), "lora_C.weight is no key"),
    "A07 renamed in ours": (
        lambda d: own_file(d, lambda t, c: t.update({"0.Z": t.pop("0.A")})), "0.A is missing, and so for 2 tensors",
    ),
    "A08 layer missing in ours": (
        lambda d: own_file(d, lambda t, c: [t.pop(k) for k in list(t) if k.startswith("1.")]), "1.A is missing",
    ),
    "A09 extra layer in ours": (lambda d: own_file(d, lambda t, c: t.update({"9.A": one})), "9.A belongs to no layer"),
    "A10 A without B": (lambda d: diffusers_file(d, drop=[f"{Q}.lora_B.weight"]), f"1 of 6 layers lack one.*{Q}"),
    "A11 halves of two widths": (
        lambda d: diffusers_file(d, change=lambda k, t: t[:-1].clone() if k == f"{Q}.lora_A.weight" else t),
        "make no update",
    ),
    "A11 ours of another shape": (
        lambda d: own_file(d, lambda t, c: c["base"]["shapes"].update({"0": [6, 7]})), "6 x 6 by its tensors, 6 x 7",
    ),
    "A13 NaN": (lambda d: diffusers_file(d, change=poisoned(float("nan"))), "12 of 12 tensors hold NaN or infinity"),
    "A13 infinity": (lambda d: diffusers_file(d, change=poisoned(float("-inf"))), "NaN or infinity"),
    "A13 NaN in ours": (lambda d: own_file(d, lambda t, c: t["0.A"].fill_(float("nan"))), "0.A"),
    "A13 NaN for alpha": (lambda d: kohya_file(d, alpha=torch.tensor(float("nan"))), "alpha is no single finite"),
    "A14 whole numbers": (lambda d: diffusers_file(d, dtype=torch.int8), "is of int8"),
    "A15 rank contradicts": (lambda d: diffusers_file(d, '{"unet.r": 9, "unet.lora_alpha": 9}'), "rank 4 .* says 9"),
    "A15 PEFT's rank contradicts": (lambda d: peft_folder(d, r=9), "rank 4 .* says 9"),
    "A15 metadata is no JSON": (lambda d: diffusers_file(d, "{"), "damaged lora_adapter_metadata"),
    "A15 metadata is deep": (lambda d: diffusers_file(d, "[" * 200_000), "damaged lora_adapter_metadata"),
    "A15 alpha is text": (
        lambda d: diffusers_file(d, '{"unet.r": 4, "unet.lora_alpha": "x"}'), "damaged configuration",
    ),
    "A15 pattern is no pattern": (
        lambda d: diffusers_file(d, '{"unet.r": 4, "unet.rank_pattern": {"(": 2}}'), "damaged configuration",
    ),
    "A15 our rank contradicts": (
        lambda d: own_file(d, lambda t, c: c["options"].update(rank=4, alpha=8.0), "lora"), "rank 2 and the header",
    ),
    "options are text": (lambda d: own_file(d, lambda t, c: c["options"].update(p="2")), "damaged options"),
    "a layer twice": (
        lambda d: own_file(d, lambda t, c: [
            c["base"]["shapes"].update({f"{x}mid_block.attentions.0.proj_in": [6, 6] for x in ("", "unet.")}),
            c.update(components=["unet"]),
        ]), "names a layer twice",
    ),
    "A16 no tensors": (lambda d: [save_file({}, d / LORA_FILE), d][1], "holds no tensors"),
    "A17 prefix": (lambda d: diffusers_file(d, rename=("unet.", "diffusion_model.")), "is led by 'diffusion_model'"),
    "A17 PEFT's without its configuration": (
        lambda d: diffusers_file(d, rename=("unet.", "base_model.model.")), "without its adapter_config.json",
    ),
    "A17 kohya's T5": (
        lambda d: [save_file({"lora_te3_a.lora_up.weight": one}, d / LORA_FILE), d][1], "a is no module of",
    ),
    "A18 newer": (lambda d: own_file(d, lambda t, c: c.update({"format": 99})), "format 99.*update vislora"),
    "A18 all else unknown": (lambda d: own_file(d, lambda t, c: [c.clear(), c.update({"format": 2})]), "format 2"),
    "header without parts": (lambda d: own_file(d, lambda t, c: c.pop("base")), "damaged header"),
    "unknown method": (lambda d: own_file(d, lambda t, c: c.update({"method": "nb_lore"})), "did you mean nb_lora"),
    "LoHa": (lambda d: kohya_file(d, hada_w1_a=one), "is LoHa, by its key"),
    "LoKr": (lambda d: kohya_file(d, lokr_w1=one), "is LoKr, by its key"),
    "LoCon with a middle": (lambda d: kohya_file(d, **{"lora_mid.weight": one}), "middle factor"),
    "magnitudes along inputs": (lambda d: kohya_file(d, dora_scale=torch.ones(1, 12)), r"is \(1, 12\) for 12 outputs"),
    "OFT": (lambda d: kohya_file(d, oft_blocks=one), "is OFT"),
    "whole differences": (lambda d: kohya_file(d, diff=one), "full difference"),
    "PEFT's LoHa": (lambda d: peft_folder(d, peft_type="LOHA"), "adapter of the kind LOHA"),
    "PEFT's PiSSA": (lambda d: peft_folder(d, init_lora_weights="pissa_niter_4"), "pissa_niter_4, which moves"),
    "a model's weights": (lambda d: [save_file({"conv.weight": one}, d / LORA_FILE), d][1], "no adapter's keys"),
    "no such file": (lambda d: d / "none.safetensors", "does not exist"),
    "an empty folder": (lambda d: d, "holds 0 safetensors files"),
    "hostile key": (
        lambda d: [save_file({"unet.\x1b[31m\n" + "x" * 10**6: one}, d / LORA_FILE), d][1], r"\\x1b\[31m\\n",
    ),
}  # fmt: skip


def refused(capsys, *argv) -> str:
    """The one line that a command with status 2 leaves."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in argv])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "", (out, err)
    assert err.count("\n") == 1 and err.startswith("vislora: error: ")
    assert err[:-1].isprintable() and len(err) < 700
    return err


@pytest.mark.case("A01", "A02", "A03", "A04", "A05", "A06", "A07", "A08", "A09")
@pytest.mark.case("A10", "A11", "A13", "A14", "A15", "A16", "A17", "A18")
@pytest.mark.parametrize("case", CASES)
def test_refused_in_one_line(case, tmp_path, capsys):
    make, words = CASES[case]
    path = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for command in (["inspect", path, "--plot", tmp_path / "a.png"],
                    ["bound", path, "--delta", 1, "-o", tmp_path / "out"],
                    ["export", path, "--format", "kohya", "-o", tmp_path / "out"],
                    ["merge", path, path, "-o", tmp_path / "out"]):  # fmt: skip
        line = refused(capsys, *command)
        assert re.search(words, line), line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.case("A20")
def test_hostile_metadata_is_harmless(tmp_path, capsys):
    """A20: megabytes and escapes in a header change nothing."""
    made = layers()
    header = {"note": "\x1b[2J" * 250_000, "vislora.certificate": "\x1b[31m{", "[bold]": "[/bold]"}
    path, _ = save(written(made, "diffusers", header, tmp_path), made)
    with pytest.raises(SystemExit):
        main(["inspect", str(path)])
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and "certificate: broken" in out and len(out) < 5000
    assert len(read(path).layers) == 6


def test_markup_in_names_is_text(tmp_path, capsys):
    pair = {"lora_A.weight": torch.ones(1, 3), "lora_B.weight": torch.ones(3, 1)}
    save_file({f"unet.[red]x[/].{key}": t for key, t in pair.items()}, tmp_path / LORA_FILE)
    main(["inspect", str(tmp_path)])
    assert "unet.[red]x[/]" in capsys.readouterr().out


# ---- what shows only beside a base or a model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_sd(tmp_path_factory.mktemp("model"))


def saved(model, folder, format=None):
    """An adapter of the pipeline in `model`, and the pipeline."""
    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None, feature_extractor=None)
    targets = {"unet": ["to_q"], "text_encoder": ["q_proj"]}
    adapter = vislora.attach(pipe, "nb_lora", targets=targets, rank=2, p=2, delta=1.0)
    with torch.no_grad():
        for i, p in enumerate(adapter.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    path = adapter.export(folder, format) if format else adapter.save(folder)
    adapter.detach()
    return pipe, path


@pytest.mark.case("A12")
@pytest.mark.parametrize("format", [None, "diffusers", "kohya"])
def test_a12_right_shapes_of_another_base(format, model, tmp_path, capsys):
    _, path = saved(model, tmp_path / "a", format)
    other = tiny_sd(tmp_path / "other", seed=5)
    capsys.readouterr()
    for command in (["inspect", path], ["merge", path, "-o", tmp_path / "out"],
                    ["bound", path, "--delta_ratio", 0.1, "-o", tmp_path / "out"]):  # fmt: skip
        assert "was trained on another base" in refused(capsys, *command, "--base", other)
    pipe = StableDiffusionPipeline.from_pretrained(other, safety_checker=None, feature_extractor=None)
    if format is None:
        with pytest.raises(InputError, match="was trained on another base"):
            vislora.load(pipe, path)
        assert vislora.load(pipe, path, allow_other_base=True).sites


@pytest.mark.case("A08", "A09")
@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_a08_and_a09_layers_missing_and_too_many(format, model, tmp_path, capsys):
    """A file of other tools does not say which layers it should have; the certificate does, and the model does."""
    pipe, path = saved(model, tmp_path, format)
    tensors, header = read_tensors(path)
    first = re.split(r"\.(?:lora|alpha)", min(tensors))[0]
    save_file({k: t for k, t in tensors.items() if not k.startswith(first)}, path, metadata=header)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(path)])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "layers are in the file or in the certificate alone" in err
    unet = "unet.up_blocks.3.resnets.0.conv1" if format == "diffusers" else "lora_unet_up_blocks_3_resnets_0_conv1"
    names = ("lora_A", "lora_B") if format == "diffusers" else ("lora_down", "lora_up")
    more = {f"{unet}.{names[0]}.weight": torch.ones(2, 4, 3, 3), f"{unet}.{names[1]}.weight": torch.ones(4, 2, 1, 1)}
    save_file({**tensors, **more}, path, metadata=header)
    with pytest.raises(InputError, match=r"1 of its \d+ layers are not in UNet2DConditionModel: up_blocks.3"):
        vislora.load(pipe, path)


@pytest.mark.case("A19")
def test_a19_a_base_of_which_a_part_is_missing(model, tmp_path, capsys):
    _, path = saved(model, tmp_path / "a")
    capsys.readouterr()
    part = tmp_path / "part"
    shutil.copytree(model, part)
    shutil.rmtree(part / "text_encoder")
    assert "has no text_encoder" in refused(capsys, "inspect", path, "--base", part)
    assert "has no text_encoder" in refused(capsys, "merge", path, "--base", part, "-o", tmp_path / "out")
    sharded = tmp_path / "sharded"
    shutil.copytree(model, sharded)
    shutil.rmtree(sharded / "unet")
    StableDiffusionPipeline.from_pretrained(model, safety_checker=None, feature_extractor=None).unet.save_pretrained(
        sharded / "unet", max_shard_size="200KB"
    )
    capsys.readouterr()
    shard = sorted((sharded / "unet").glob("*.safetensors"))[0]
    whole = shard.read_bytes()
    shard.unlink()
    assert f"lacks the shard {shard.name}" in refused(capsys, "inspect", path, "--base", sharded)
    shard.write_bytes(whole[:-10])
    assert "no whole safetensors" in refused(capsys, "merge", path, "--base", sharded, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_number_of_the_catalogue_is_here():
    numbers = {case[:3] for case in CASES if case.startswith("A")} | {
        number.upper() for name, test in globals().items() if name.startswith("test_")
        for number in re.findall(r"\ba\d\d\b", name.replace("_", " ") + " " + (test.__doc__ or "").lower())
    }  # fmt: skip
    assert numbers == {f"A{i:02}" for i in range(1, 21)}
