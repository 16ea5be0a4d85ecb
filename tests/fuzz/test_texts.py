"""Damaged captions, rows of texts, configurations and sweeps."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import yaml
from fuzzing import WORDS, bitten, bounded_memory, damaged, ends_well, inputs, report
from hypothesis import given
from hypothesis import strategies as st

from vislora.adapters import get, names
from vislora.config import parse, read_yaml, to_yaml
from vislora.data.captions import captions
from vislora.errors import InputError
from vislora.language.rows import read_rows
from vislora.sweep import plan

PHOTOS = [SimpleNamespace(path=Path(f"{i}.png")) for i in range(2)]
ENTRIES = [{"file_name": f"{i}.png", "text": "a red owl"} for i in range(2)]
TAGS = ["!!timestamp a", "!!bool a", "!!int a", "!!float a", "!!binary =", "!!set {a}", "!!omap [a]", "!!pairs [a]",
        "!!python/object/apply:os.system [a]", "&a [*a]", "? &a [*a]", "{[a]: b}", "2001-99-99", "0x", "<<: *a", "=",
        "1:99", "- - - a", "&a {<<: *a}", "0b", "{? {}}", "<<: [{}, {a: 1}]", "1e400", "-.inf"]  # fmt: skip
SWEEP = {
    "script": "train_scripts/classification.py",
    "fixed": {"max_train_steps": 2},
    "methods": {"lora": {"adapter": "lora", "rank": 8}, "full": None},
    "subjects": {"owl": {"instance_data_dir": "a"}},
    "seeds": [0, 1],
    "grid": {"rank": {"values": [4, 16], "methods": ["lora"]}, "p": [1, 2]},
    "factors": {"learning_rate": ["1e-3", 0.01]},
    "tune": {"lr": {"values": {"lora": [0.1, 1]}, "by": "acc", "goal": "max", "seeds": [7], "subjects": {"b": {}}}},
    "evaluate": ["eval/forgetting.py --run {run}"],
    "collect": {"acc": "metrics.json:a", "loss": "metrics.json:b"},
    "title": "a",
    "pictures": {
        "one": {"kind": "images", "prompts": [0], "scores": ["dino"]},
        "two": {"kind": "scatter", "x": "acc", "y": "loss", "lines": {"a": ["lora"]},
                "front": {"x": "min", "y": "max"}},
        "three": {"kind": "steps", "values": {"loss": "loss"}, "log": True},
        "four": {"kind": "against", "setting": "rank", "values": ["acc"], "methods": ["lora"], "where": {"p": 1}},
    },
}  # fmt: skip
LADDER = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{b: *a{i - 1}, c: *a{i - 1}}}\n" for i in range(1, 40))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12))


@dataclass(frozen=True)
class Run:
    adapter: str | None = "lora"
    learning_rate: float = 1e-3
    steps: int | None = 3
    tokens: tuple[str, ...] = ("a",)
    sizes: tuple[int, ...] = ()
    precision: Literal["no", "fp16"] = "no"
    folder: Path = Path("a")
    switch: bool = False


@st.composite
def documents(draw, text: str) -> bytes:
    """YAML with its bytes damaged, or a value of it replaced by what YAML has beyond JSON."""
    if draw(st.booleans()):
        return draw(bitten(text.encode()))
    lines = text.splitlines()
    at = draw(st.integers(0, len(lines) - 1))
    head = lines[at].partition(":")[0]
    tag = draw(st.one_of(st.sampled_from(TAGS), st.text(max_size=12)))
    lines[at] = draw(st.sampled_from([f"{head}: {tag}", f"{head}:\n    {tag}", tag, f"{lines[at]} {tag}"]))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def dumped(tree: object) -> bytes:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass")


def json_lines(entries: object) -> bytes:
    return "\n".join(map(json.dumps, entries if isinstance(entries, list) else [entries])).encode()


@pytest.mark.parametrize("text", [LADDER, "a: &a [*a]"])
def test_aliases_that_stand_for_billions_are_refused(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with bounded_memory(), pytest.raises(InputError, match="more than 100000 values"):
        read_yaml(tmp_path / "a.yaml")


def test_merges_of_merges_end(tmp_path):
    (tmp_path / "a.yaml").write_text(MERGES)  # 9^11 keys for a PyYAML that does not drop doubles itself
    with bounded_memory():
        ends_well(lambda: read_yaml(tmp_path / "a.yaml"), Counter())


def test_captions(tmp_path):
    seen = Counter()
    lines = st.one_of(damaged(ENTRIES).map(json_lines), bitten(json_lines(ENTRIES)))
    sidecar = st.one_of(bitten("a réd owl\n".encode()), st.binary(max_size=30),
                        WORDS.map(lambda word: word.encode("utf-8", "surrogatepass")))  # fmt: skip
    for folder in ("lines", "files"):
        (tmp_path / folder).mkdir()
    (tmp_path / "files" / "1.txt").write_text("a blue owl")

    @inputs(0.15)
    @given(st.one_of(lines.map(lambda x: ("lines", x)), sidecar.map(lambda x: ("files", x))))
    def fuzz(case):
        folder, content = case
        (tmp_path / folder / ("metadata.jsonl" if folder == "lines" else "0.txt")).write_bytes(content)
        ends_well(lambda: captions(PHOTOS, tmp_path / folder, None), seen)

    with bounded_memory():
        fuzz()
    report("captions", seen)


def test_rows(tmp_path):
    seen, rows = Counter(), [{"text": "a red owl", "label": i, "parts": [1, {"a": None}]} for i in range(2)]
    deep = st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000])
    lines = st.one_of(damaged(rows).map(json_lines), bitten(json_lines(rows)), deep)
    whole = st.one_of(damaged(rows).map(lambda tree: json.dumps(tree).encode()), deep)
    table = bitten(b'text,label\n"a ""red"" owl",1\n"b\n",2\n')
    file = st.one_of(*(content.map(lambda x, end=end: (end, x))
                       for end, content in (("jsonl", lines), ("json", whole), ("csv", table))))  # fmt: skip

    @inputs(0.05)
    @given(file)
    def fuzz(case):
        path = tmp_path / f"rows.{case[0]}"
        path.write_bytes(case[1])
        ends_well(lambda: read_rows(str(path)), seen)

    with bounded_memory():
        fuzz()
    report("rows of texts", seen)


def test_configs(tmp_path):
    seen, file = Counter(), tmp_path / "a.yaml"
    methods = {name: get(name) for name in names()}
    texts = [to_yaml(Run(adapter=name), methods[name]()) for name in names()]
    trees = [yaml.safe_load(text) for text in texts]

    @inputs(0.05)
    @given(st.one_of(st.sampled_from(trees).flatmap(damaged).map(dumped), st.sampled_from(texts).flatmap(documents)))
    def fuzz(content):
        file.write_bytes(content)
        ends_well(lambda: parse(Run, ["--config", str(file)], prog="fuzz", methods=methods), seen)

    with bounded_memory():
        fuzz()
    report("configurations", seen)


def test_sweeps(tmp_path):
    seen, file = Counter(), tmp_path / "a.yaml"

    def cells():
        sweep = plan.read(file)
        return [(cell.label, cell.folder) for cell in (*sweep.tuning_cells(), *sweep.cells({}))]

    @inputs(0.05)
    @given(st.one_of(damaged(SWEEP).map(dumped), documents(dumped(SWEEP).decode())))
    def fuzz(content):
        file.write_bytes(content)
        ends_well(cells, seen)

    with bounded_memory():
        fuzz()
    report("sweeps", seen)
