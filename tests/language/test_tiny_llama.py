"""The shipped tiny-llama: small, readable by stock transformers, and able to do both of its tasks; the texts fit."""

from __future__ import annotations

import json

import pytest
from script_runs import REPOSITORY
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import vislora
from vislora.errors import InputError
from vislora.language.rows import read_rows
from vislora.language.tasks import TASKS, run

WORLD = REPOSITORY / "assets" / "world"


@pytest.fixture(scope="module")
def tiny():
    folder = WORLD / "tiny-llama"
    return AutoModelForCausalLM.from_pretrained(folder).float().eval(), AutoTokenizer.from_pretrained(folder)


def test_it_is_small_and_its_digits_are_single(tiny):
    model, tok = tiny
    assert sum(f.stat().st_size for f in (WORLD / "tiny-llama").iterdir()) < 12e6
    assert tok.tokenize("1234") == list("1234") and tok.decode(tok("7 + 8 = 15")["input_ids"][1:]) == "7 + 8 = 15"
    assert model.config.tie_word_embeddings and tok.bos_token_id == 0 and tok.eos_token_id == 1


@pytest.mark.parametrize("name, task, least, most", [
    ("capitals_test", "answers", 80, 100), ("capitals_test", "choices", 80, 100),
    ("arithmetic_test", "answers", 80, 100),
    ("word_problems_test", "answers", 0, 20),  # the task to fine-tune on
])  # fmt: skip
def test_it_does_its_two_tasks_and_not_the_third(tiny, name, task, least, most):
    rows = read_rows(str(WORLD / "language" / f"{name}.jsonl"))[:20]
    assert least <= run(TASKS[task], rows, *tiny, max_new_tokens=48, batch_size=20).percent <= most


def test_what_is_tested_was_not_trained_on():
    train, test = (read_rows(str(WORLD / "language" / f"word_problems_{part}.jsonl")) for part in ("train", "test"))
    assert not {row["instruction"] for row in train} & {row["instruction"] for row in test}
    for row in [*train, *test, *read_rows(str(WORLD / "language/arithmetic_test.jsonl"))]:
        (left, sign, right), answer = row["output"].split(". ")[0].split(), row["output"].split("is: ")[1]
        assert int(answer) == (int(left) + int(right) if sign == "+" else int(left) - int(right)), json.dumps(row)
    held, seen = (read_rows(str(WORLD / "language" / f"fits_{part}.jsonl")) for part in ("test", "train"))
    assert not {row["question"] for row in held} & {row["question"] for row in seen}


class Recurrent(nn.Module):
    """An architecture that no preset knows, with RWKV's names."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({
            "attention": nn.ModuleDict({"receptance": nn.Linear(8, 8), "gate": nn.Linear(8, 8)}),
            "feed_forward": nn.ModuleDict({"key": nn.Linear(8, 16), "value": nn.Linear(16, 8)}),
        }) for _ in range(2)])  # fmt: skip
        self.head = nn.Linear(8, 30)

    def forward(self, x):
        for block in self.blocks:
            x = x + block["attention"]["receptance"](x) * block["attention"]["gate"](x).sigmoid()
            x = x + block["feed_forward"]["value"](block["feed_forward"]["key"](x).relu())
        return self.head(x)


def test_an_unknown_architecture_is_adapted_by_all_linear_and_listed_by_errors():
    model = Recurrent()
    adapter = vislora.attach(model, "lora", targets="all-linear", rank=2)
    assert len(adapter.sites) == 9
    adapter.detach()
    paper = r"(?!head).*(attention|feed_forward)\..*"  # configs/paper/sorsa_rwkv6_7b_metamath.yaml
    assert len(vislora.attach(model, "sorsa", targets=paper, rank=2).sites) == 8
    with pytest.raises(InputError, match="feed_forward|key.*receptance.*value"):
        vislora.attach(Recurrent(), "lora", targets="q_proj", rank=2)
