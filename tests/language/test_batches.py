"""Packing: the same losses and gradients as row by row, every example once an epoch, in an order of the seed's."""

from __future__ import annotations

import pytest
import torch
from tiny_lm import llama, sums, tokenizer

from vislora.language.batches import IGNORED, Plan, collate
from vislora.language.encode import encode
from vislora.language.loss import share, token_losses
from vislora.language.records import records


@pytest.fixture(scope="module")
def examples():
    tok = tokenizer()
    return encode(records(sums(), tok, prompt_template="qa"), tok, 128).examples


def test_a_packed_row_has_the_losses_and_gradients_of_its_examples(examples):
    rows = [examples[:3], examples[3:5]]
    apart = [[example] for row in rows for example in row]
    found = []
    for attention in ("sdpa", "eager"):
        for chosen, packing in ((apart, False), (rows, True)):
            model = llama(400, attn_implementation=attention)
            batch = collate(chosen, 1, torch.float32, torch.device("cpu"), packing)
            labels = batch.pop("labels")
            loss = token_losses(model(**batch).logits, labels)
            loss.backward()
            found.append((loss.detach(), int((labels != IGNORED).sum()), model.model.layers[0].mlp.up_proj.weight.grad))
    for loss, count, gradient in found[1:]:
        assert count == found[0][1] == sum(e.targets for e in examples[:5])
        assert torch.allclose(loss, found[0][0], rtol=1e-5)
        assert torch.allclose(gradient, found[0][2], rtol=1e-4, atol=1e-5)


def test_without_the_block_mask_packing_would_differ(examples):
    model = llama(400)
    batch = collate([examples[:3]], 1, torch.float32, torch.device("cpu"), packing=True)
    batch.pop("labels")
    first, second = len(examples[0]), len(examples[1])
    alone = model(input_ids=examples[1].ids[None].long()).logits[0]
    right = model(**batch).logits[0, first : first + second]
    wrong = model(input_ids=batch["input_ids"]).logits[0, first : first + second]
    assert torch.allclose(right, alone, atol=1e-5) and (wrong - alone).abs().max() > 1e-3


def test_the_loss_is_that_of_transformers_where_everything_is_learned():
    tok, model = tokenizer(), llama(400)
    (example,) = encode(records([{"text": "how many apples has Tom?"}], tok), tok, 64).examples
    batch = collate([[example]], 1, torch.float32, torch.device("cpu"))
    labels = batch.pop("labels")
    theirs = model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
    assert torch.allclose(token_losses(model(**batch).logits, labels) / example.targets, theirs, rtol=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_a_plan_visits_everything_once_an_epoch_within_its_length(packing):
    lengths = [3, 9, 4, 4, 7, 1, 2, 10, 5, 5] * 9
    plan = Plan(lengths, 3, packing, 12)
    assert plan.rows(2) == plan.rows(1) * 2 if not packing else plan.rows(2) > plan.rows(1)
    for first, last in ((0, plan.rows(1)), (plan.rows(1), plan.rows(2))):
        rows = [plan.row(q) for q in range(first, last)]
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in row) <= 12 for row in rows)
    if packing:
        assert plan.rows(1) < 1.15 * sum(lengths) / 12
    again = Plan(lengths, 3, packing, 12)
    assert [again.row(q) for q in (plan.rows(1) + 3, 0)] == [plan.row(q) for q in (plan.rows(1) + 3, 0)]  # any order
    assert plan.rows(0.5) == -(-plan.rows(1) // 2) and plan.rows(1.5) > plan.rows(1)
    other = Plan(lengths, 4, packing, 12)
    assert [plan.row(q) for q in range(9)] != [other.row(q) for q in range(9)]


def test_shares_add_up_to_the_mean_over_the_window_or_the_mean_of_means():
    totals, counts = torch.tensor([6.0, 2.0]), (3, 1)
    tokens = sum(share(t, n, 4, "tokens", 2, 1) for t, n in zip(totals, counts, strict=True))
    means = sum(share(t, n, 4, "means", 2, 1) for t, n in zip(totals, counts, strict=True))
    assert tokens == 2.0 and means == 2.0
    assert sum(share(t, n, 4, "tokens", 2, 1) for t, n in zip((9.0, 2.0), counts, strict=True)) == 11 / 4
    assert sum(share(t, n, 4, "means", 2, 1) for t, n in zip((9.0, 2.0), counts, strict=True)) == (3 + 2) / 2
    # two processes, one batch each: their mean is the whole window's
    assert sum(share(t, n, 4, "tokens", 1, 2) for t, n in zip((9.0, 2.0), counts, strict=True)) / 2 == 11 / 4
