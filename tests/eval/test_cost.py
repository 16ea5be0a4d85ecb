"""The cost tables: each command runs, and what can be known beforehand comes out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def cost(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "eval"))
    for name in ("cost", "cost_papers", "turns"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import cost

    monkeypatch.setitem(cost.SIZES, "small", (32, 48, 1, 2))
    return cost


@pytest.fixture
def table(cost, tmp_path, capsys):
    def run(*words: str) -> list[dict]:
        cost.main([*words, "--json", str(tmp_path / "rows.json")])
        head, *rows = json.loads((tmp_path / "rows.json").read_text())
        shown = capsys.readouterr().out
        assert all(str(row[0]) in shown for row in rows)
        return [dict(zip(head, row, strict=True)) for row in rows]

    return run


def test_the_paper_s_ratios_stand_beside_ours(table):
    rows = table("nb_lora_5", "--ranks", "4", "16", "--repeats", "1", "--tokens", "8")
    assert [(row["rank"], row["method"]) for row in rows] == [
        (rank, name) for rank in (4, 16) for name in ("dora", "pissa", "nb_lora")
    ]
    of = {(row["rank"], row["method"]): row for row in rows}
    assert of[16, "pissa"]["time / PiSSA"] == of[16, "pissa"]["memory / PiSSA"] == 1
    assert of[16, "nb_lora"]["paper's"] == pytest.approx(61.28 / 61.15)  # the second column of that name
    assert all(row["ms a step"] > 0 for row in rows)


def test_an_inverse_is_cheaper_than_the_product(table):
    (row,) = table("nb_lora_6", "--ranks", "2", "--repeats", "1")
    assert row["inverse / product"] == pytest.approx(row["inverse, us"] / row["product, us"]) and row["product, us"] > 0
    assert row["paper's"] == pytest.approx(29.2 / 314.1)


def test_sorsa_s_equations_are_timed(table):
    (row,) = table("sorsa_4", "--ranks", "2", "--repeats", "1", "--tokens", "3")
    factored = row["((x V^T) * S) U^T, us"] / row["x (U diag(S) V)^T, us"]
    assert row["over the first"] == pytest.approx(factored) and factored > 0  # the last column of that name


@pytest.mark.parametrize(("name", "rows"), [("nb_lora_4", 2), ("od_lora_6", 3), ("lora_sb_5", 4)])
def test_the_other_tables_run(table, cost, name, rows, monkeypatch):
    monkeypatch.setattr(cost, "Trainee", _smaller(cost.Trainee))
    found = table(name, "--ranks", "4", "--repeats", "1", "--tokens", "8")
    assert len(found) == rows
    assert all(value > 0 for row in found for value in row.values() if not isinstance(value, str))


def _smaller(trainee):
    """The same at a rank that the little Llama holds."""
    return lambda *args, **options: trainee(*args, **(options | {"rank": min(options["rank"], 8)}))


def test_operations_are_counted_at_full_size(cost):
    lora, sb = (cost._forward_macs("RoBERTa-large", name, rank) for name, rank in (("lora", 8), ("lora_sb", 8)))
    d, wide, tokens = 1024, 4096, 256
    layer = 4 * d * d + 2 * d * wide + 2 * tokens * d  # projections, the two products of attention
    adapters = 24 * 8 * (3 * 2 * d + d + wide)
    head = d * d + 2 * d  # on one token
    assert lora == pytest.approx(tokens * (24 * layer + adapters) + head, rel=1e-6)
    assert sb - lora == 24 * 8 * 8 * 4 * d  # B R, once a layer and forward


def test_what_a_step_holds_is_weights_moments_and_activations(cost):
    import turns
    from torch import nn

    import vislora

    trainee = turns.Trainee(lambda: nn.Sequential(nn.Linear(8, 6, bias=False)), _loss, "lora", rank=2)
    held = trainee.held_bytes()
    weights, trained = 4 * 8 * 6, 4 * 2 * (8 + 6)
    kept = held - weights - trained - 3 * trained  # the parameters themselves are weights of the model
    assert isinstance(trainee.adapter, vislora.Adapter)
    assert 4 * 5 * (8 + 2) <= kept <= 4 * (2 * 5 * 8 + 5 * 2 + 3 * 5 * 6)  # x and x A^T, and what the loss keeps


def _loss(model):
    import torch

    return model(torch.ones(5, 8)).square().mean()


def test_a_rank_outside_the_tables_is_refused(cost):
    with pytest.raises(cost.InputError, match="--ranks.*7.*take some of"):
        cost.main(["nb_lora_5", "--ranks", "7"])
