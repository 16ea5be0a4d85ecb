"""The labels of GLUE's tasks, in words and in numbers: one order, on which F1 depends."""

from __future__ import annotations

import json

import pytest
from tiny_lm import tokenizer

from vislora.language.classification import GLUE, ClassificationOptions, Labelled


def read(place, task: str, labels: list) -> Labelled:
    for split in ("train", "validation"):
        rows = [dict(zip((*GLUE[task][0], "label"), (f"a {i}", f"b {i}", label), strict=True))
                for i, label in enumerate(labels)]  # fmt: skip
        (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ClassificationOptions(task_name=task, train_file=str(place), model_name_or_path="x")
    return Labelled.read(options, tokenizer())


@pytest.mark.parametrize(
    "labels",
    [[0, 1, 1], ["0", "1", "1"], ["not_equivalent", "equivalent", "equivalent"]],
)
def test_the_second_label_of_mrpc_is_equivalent(labels, tmp_path, caplog):
    found = read(tmp_path, "mrpc", labels)
    assert found.train_labels == found.held_labels == [0, 1, 1] and found.metrics == ("accuracy", "f1")
    assert not caplog.records


def test_a_label_that_is_missing_keeps_its_number(tmp_path):
    assert read(tmp_path, "rte", ["not_entailment"] * 3).train_labels == [1, 1, 1]


def test_other_words_say_which_f1_is_of(tmp_path, caplog):
    found = read(tmp_path, "qqp", ["yes", "no", "yes"])
    assert found.classes == ("no", "yes") and found.train_labels == [1, 0, 1]
    said = caplog.records[0].getMessage()
    assert "F1 of qqp is of label 'yes'" in said and "('not_duplicate', 'duplicate')" in said
