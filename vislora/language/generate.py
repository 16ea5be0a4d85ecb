"""Replies to prompts, many at a time: padded on the left, cut at the end token and at stop words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vislora.language.encode import prompt_ids
from vislora.language.models import checkpointing, is_checkpointed, takes_positions


@torch.no_grad()
def reply(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    stop: Sequence[str] = (),
    **decoding: Any,
) -> list[str]:
    """What the model answers to each prompt, in order; greedy unless `decoding` says otherwise (generate's keywords).

    A reply ends before the first of the words in `stop`. Prompts are tokenised as in training. Longer prompts come
    first, so that a batch is of about one length, and of exactly one where the model would read padding as text. The
    model's mode and cache setting are as before afterwards.
    """
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    training, cached = model.training, model.generation_config.use_cache
    device = next(model.parameters()).device
    found = [""] * len(ids)
    checkpointed = is_checkpointed(model)
    model.eval()
    if checkpointed:  # it excludes the cache
        checkpointing(model, False)
    try:
        for chosen in _batches(order, [len(one) for one in ids], batch_size, takes_positions(model)):
            longest = len(ids[chosen[0]])
            rows = [[tokenizer.pad_token_id] * (longest - len(ids[i])) + ids[i] for i in chosen]
            mask = [[0] * (longest - len(ids[i])) + [1] * len(ids[i]) for i in chosen]
            out = model.generate(
                input_ids=torch.tensor(rows, device=device), attention_mask=torch.tensor(mask, device=device),
                max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, use_cache=True,
                **({"do_sample": False} | decoding),
            )  # fmt: skip
            for i, row in zip(chosen, out[:, longest:].tolist(), strict=True):
                text = tokenizer.decode(row, skip_special_tokens=True)
                for word in stop:
                    text = text.partition(word)[0]
                found[i] = text
    finally:
        if checkpointed:
            checkpointing(model)
        model.train(training)
        model.generation_config.use_cache = cached
    return found


def _batches(order: Sequence[int], lengths: Sequence[int], size: int, mixed: bool) -> list[list[int]]:
    """`order` in batches of at most `size`, of one length each unless `mixed`."""
    found: list[list[int]] = []
    for i in order:
        fits = found and len(found[-1]) < size and (mixed or lengths[found[-1][0]] == lengths[i])
        if fits:
            found[-1].append(i)
        else:
            found.append([i])
    return found


@torch.no_grad()
def log_likelihoods(model: nn.Module, tokenizer, pairs: Sequence[tuple[str, str]], batch_size: int = 16) -> list[float]:
    """log p(continuation | prompt) in nats of every (prompt, continuation), the end token not counted."""
    device, training = next(model.parameters()).device, model.training
    rows = []
    for prompt, continuation in pairs:
        before = prompt_ids(tokenizer, prompt)
        rows.append((before, tokenizer(continuation, add_special_tokens=False)["input_ids"]))
    order = sorted(range(len(rows)), key=lambda i: -sum(map(len, rows[i])))
    found = [0.0] * len(rows)
    model.eval()
    try:
        for at in range(0, len(order), batch_size):
            chosen = order[at : at + batch_size]
            longest = sum(map(len, rows[chosen[0]]))
            ids = torch.full((len(chosen), longest), tokenizer.pad_token_id)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(chosen):
                own = torch.tensor([*rows[i][0], *rows[i][1]])
                ids[row, : len(own)], mask[row, : len(own)] = own, 1
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
            for row, i in enumerate(chosen):
                first, last = len(rows[i][0]), len(rows[i][0]) + len(rows[i][1])
                scores = F.log_softmax(logits[row, first - 1 : last - 1].float(), dim=-1)
                wanted = torch.tensor(rows[i][1], device=device)
                found[i] = float(scores.gather(1, wanted[:, None]).sum())
    finally:
        model.train(training)
    return found
