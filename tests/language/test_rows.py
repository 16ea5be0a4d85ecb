"""Every source of rows gives the same rows, slices included; templates and formats; what is refused."""

from __future__ import annotations

import csv
import json

import pytest
from tiny_lm import sums, tokenizer, write_rows

from vislora.errors import EnvironmentFault, InputError
from vislora.language.records import format_of, records
from vislora.language.rows import holdout, read_rows
from vislora.language.templates import TEMPLATES, template


def test_every_source_gives_the_same_rows(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = sums()
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data/train.jsonl", rows)
    (tmp_path / "list.json").write_text(json.dumps(rows))
    (tmp_path / "named.json").write_text(json.dumps({"version": "1", "data": rows}))
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    whole = datasets.Dataset.from_list(rows)
    whole.to_parquet(str(tmp_path / "rows.parquet"))
    whole.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": whole}).save_to_disk(str(tmp_path / "splits"))
    for name in ("data", "data/train.jsonl", "list.json", "named.json", "rows.csv", "rows.parquet", "saved", "splits"):
        assert read_rows(str(tmp_path / name)) == rows, name


@pytest.mark.parametrize("split, expected", [
    ("train[:3]", slice(0, 3)), ("train[4:]", slice(4, None)), ("train[-2:]", slice(10, 12)),
    ("train[25%:50%]", slice(3, 6)), ("train[:100]", slice(0, 12)), ("train", slice(0, 12)),
])  # fmt: skip
def test_slices_are_those_of_datasets(tmp_path, split, expected):
    datasets = pytest.importorskip("datasets")
    rows = sums()
    file = write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(str(file), split) == rows[expected]
    theirs = datasets.load_dataset("json", data_files=str(file), split=split, cache_dir=str(tmp_path / "cache"))
    assert theirs.to_list() == rows[expected]


def test_bad_sources_are_refused_in_one_line(tmp_path):
    write_rows(tmp_path / "rows.jsonl", sums())
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{"a": \n')
    (tmp_path / "flat.json").write_text('["a", "b"]')
    (tmp_path / "odd.txt").write_text("x")
    (tmp_path / "folder").mkdir()
    write_rows(tmp_path / "folder/tests.jsonl", sums())
    for source, split, words in (
        ("gone.jsonl", "train", "no such file"), ("bad.jsonl", "train", "bad.jsonl:2"), ("flat.json", "train", "list"),
        ("odd.txt", "train", ".parquet"), ("rows.jsonl", "train[9:3]", "no rows"), ("rows.jsonl", "train[x]", "split"),
        ("folder", "test", "tests"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words.replace("[", r"\[")):
            read_rows(str(tmp_path / source), split)


def test_a_hub_id_offline_is_one_line():
    pytest.importorskip("datasets")
    with pytest.raises(EnvironmentFault, match="local file"):
        read_rows("nobody/nothing-of-this-name", "train")


def test_the_last_rows_are_held_out():
    train, held = holdout(list(range(50)), 10)
    assert train == list(range(45)) and held == list(range(45, 50))
    train, held = holdout(list(range(50)), 10, 2)
    assert held == [48, 49] and len(train) == 48


@pytest.mark.parametrize("row, fields, expected", [
    ({"instruction": "", "input": "", "output": "", "answer": ""}, (), ("instruction", ("instruction", "output"))),
    ({"type": "", "query": "", "original_question": "", "response": ""}, (), ("instruction", ("query", "response"))),
    ({"query": "", "answer": "", "lang": ""}, (), ("instruction", ("query", "answer"))),
    ({"prompt": "", "completion": ""}, (), ("prompt_completion", ("prompt", "completion"))),
    ({"text": ""}, (), ("text", ("text",))),
    ({"messages": []}, (), ("messages", ("messages",))),
    ({"q": "", "a": ""}, ("q", "a"), ("instruction", ("q", "a"))),
    ({"q": "", "a": ""}, ("q",), ("text", ("q",))),
])  # fmt: skip
def test_formats_are_known_by_their_columns(row, fields, expected):
    assert format_of(row, fields, "--dataset_name") == expected


def test_columns_that_tell_nothing_are_named():
    with pytest.raises(InputError, match="left, right"):
        format_of({"left": "", "right": ""}, (), "--dataset_name")
    with pytest.raises(InputError, match="gone"):
        format_of({"left": ""}, ("gone",), "--dataset_name")
    with pytest.raises(InputError, match="row 1.*output"):
        records([{"instruction": "a", "output": "b"}, {"instruction": "a", "output": 3}], tokenizer())
    with pytest.raises(InputError, match="chatml"):
        records([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}], tokenizer())


def test_templates_say_what_the_papers_say():
    short = template("alpaca").fill("Add 1 and {2}.")
    assert short.startswith("Below is an instruction that describes a task. Write a response that appropriately")
    assert short.endswith("### Instruction:\nAdd 1 and {2}.\n\n### Response:")
    assert template("metamath_cot").fill("Add.") == template("alpaca").fill("Add.") + " Let's think step by step."
    paired = template("alpaca").fill("Add.", "1 {2}")
    assert "paired with an input" in paired and paired.endswith("### Input:\n1 {2}\n\n### Response:")
    assert template("codefeedback").fill("f", "g") == "@@ Instruction\nf\ng\n\n@@ Response\n"
    assert template("Q: {instruction} A:").fill("x") == "Q: x A:"
    assert template("{instruction}|{input}|").fill("x", "y") == "x|y|"
    with pytest.raises(InputError, match="alpaca"):
        template("alpacca")
    assert all("{" not in form.fill("a", "b").replace("{instruction}", "") for form in TEMPLATES.values())


def test_an_input_column_is_used_where_it_says_something():
    rows = [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Add.", "input": "", "output": "3"}]
    one, two = records(rows, tokenizer())
    assert "### Input:\n1 2" in one.prompt and "### Input" not in two.prompt and one.response == "3"
    assert records(rows, tokenizer(), prompt_template="alpaca_newline")[0].response == "3\n"
