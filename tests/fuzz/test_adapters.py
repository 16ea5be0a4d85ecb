"""Damaged adapters: bytes, safetensors headers, our configuration and PEFT's, through the reader and load."""

from __future__ import annotations

import json
import struct
from collections import Counter

import pytest
import torch
from fuzzing import bitten, bounded_memory, damaged, ends_well, inputs, report
from hypothesis import given
from hypothesis import strategies as st
from lora_files import layers

import vislora
from vislora.errors import InputError
from vislora.formats import read, save, written
from vislora.io import PEFT_CONFIG, PEFT_FILE

METHODS = ("lora", "rslora", "dora", "adalora", "vera", "delora", "lora_xs", "sorsa", "od_lora", "nb_lora")
DTYPES = ["F64", "F16", "BF16", "F8_E4M3", "F8_E8M0", "F4", "C64", "I64", "I8", "U64", "BOOL", "F128"]
NUMBERS = [struct.pack("<f", x) for x in (float("nan"), float("inf"), 3e38, 1e-45, 0.0)]


def model() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 4))


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> list[bytes]:
    """A file of ours for each of METHODS, then one in diffusers' and one in kohya's layout."""
    folder = tmp_path_factory.mktemp("sound")
    files = [vislora.attach(model(), name, rank=2).save(folder / name) for name in METHODS]
    for format in ("diffusers", "kohya"):
        made = layers(conv=True, size=(6, 5), rank=2)
        files.append(save(written(made, format, {}, folder / f"{format}.safetensors"), made)[0])
    return [file.read_bytes() for file in files]


@st.composite
def headers(draw, content: bytes) -> bytes:
    """A safetensors file whose header, the configuration in it, or numbers are damaged."""
    size = struct.unpack("<Q", content[:8])[0]
    head, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    told = head.setdefault("__metadata__", {})
    kind = draw(st.sampled_from(["header", "own", "own", "metadata", "dtype", "number"]))
    if kind == "own" and "vislora" in told:
        told["vislora"] = json.dumps(draw(damaged(json.loads(told["vislora"]))))
    elif kind == "dtype":
        keys = sorted(head.keys() - {"__metadata__"})
        for key in keys if draw(st.booleans()) else [draw(st.sampled_from(keys))]:
            head[key]["dtype"] = draw(st.sampled_from(DTYPES))
    elif kind == "number":
        at = 4 * draw(st.integers(0, len(data) // 4 - 1))
        data = data[:at] + draw(st.sampled_from(NUMBERS)) + data[at + 4 :]
    elif kind == "metadata":
        own = {"r": 2, "lora_alpha": 2, "rank_pattern": {"to_q": 3}, "alpha_pattern": {"to_q": 3}, "use_rslora": False}
        own = {f"{part}.{key}": value for part in ("unet", "text_encoder") for key, value in own.items()}
        told["lora_adapter_metadata"] = json.dumps(draw(damaged(own)))
    else:
        head = draw(damaged(head))
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_bytes(sound, tmp_path):
    seen, file = Counter(), tmp_path / "a.safetensors"

    @inputs(0.25)
    @given(st.sampled_from(sound).flatmap(bitten))
    def fuzz(content):
        file.write_bytes(content)
        ends_well(lambda: read(file), seen)

    with bounded_memory():
        fuzz()
    report("bytes of adapters", seen)


def test_headers(sound, tmp_path):
    seen, file = Counter(), tmp_path / "a.safetensors"

    @inputs(0.25)
    @given(st.sampled_from(sound).flatmap(headers))
    def fuzz(content):
        file.write_bytes(content)
        ends_well(lambda: read(file), seen)

    with bounded_memory():
        fuzz()
    report("headers of adapters", seen)


def test_shared_matrices_that_no_memory_holds_are_refused(sound, tmp_path):
    """VeRA's are drawn from the seed, so that a few bytes may claim any size."""
    vera = sound[METHODS.index("vera")]
    size = struct.unpack("<Q", vera[:8])[0]
    for change in ({"rank": 2**40}, {}):
        head = json.loads(vera[8 : 8 + size])
        own = json.loads(head["__metadata__"]["vislora"])
        own["options"] |= change
        if not change:
            own["base"]["shapes"]["0"][1] = 2**40
        head["__metadata__"]["vislora"] = json.dumps(own)
        text = json.dumps(head).encode()
        (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + vera[8 + size :])
        for reader in (read, lambda file: vislora.load(model(), file)):
            with pytest.raises(InputError, match="numbers to share|in the model"):
                reader(tmp_path / "a.safetensors")


def test_load(sound, tmp_path):
    seen, file, host = Counter(), tmp_path / "a.safetensors", model()

    def state() -> list:
        return [(name, type(part), list(part._forward_hooks)) for name, part in host.named_modules()]

    before = state()

    @inputs(0.1)
    @given(st.sampled_from(sound[: len(METHODS)]).flatmap(headers))
    def fuzz(content):
        file.write_bytes(content)
        ends_well(lambda: vislora.load(host, file).detach(), seen)
        assert state() == before

    with bounded_memory():
        fuzz()
    report("adapters loaded", seen)


def test_peft_configurations(tmp_path):
    seen, made = Counter(), layers(("unet",), size=(6, 5), rank=2)
    save(written(made, "peft", {}, tmp_path / "a"), made)
    folder = next((tmp_path / "a").rglob(PEFT_FILE)).parent
    config = json.loads((folder / PEFT_CONFIG).read_text())
    config |= {"rank_pattern": {"to_v": 2}, "alpha_pattern": {"to_q": 4.0}, "use_rslora": False,
               "init_lora_weights": True, "base_model_name_or_path": "a"}  # fmt: skip
    whole = json.dumps(config).encode()

    @inputs(0.1)
    @given(st.one_of(damaged(config).map(lambda tree: json.dumps(tree).encode()), bitten(whole)))
    def fuzz(content):
        (folder / PEFT_CONFIG).write_bytes(content)
        ends_well(lambda: read(folder), seen)

    with bounded_memory():
        fuzz()
    report("PEFT's configurations", seen)
