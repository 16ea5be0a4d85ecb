"""Records as token ids, each with a mark: is it learned?

Segments are tokenised apart, so that no merge of a BPE reaches across the place where a prompt ends: the prompt's ids
are exactly those that a generation begins with, and the first id of the response is learned whatever it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vislora.errors import InputError
from vislora.language.records import Record


@dataclass(frozen=True)
class Example:
    """ids (t,) int32; learned (t,) bool; targets: how many learned ids have one before them to be predicted from."""

    ids: Tensor
    learned: Tensor
    targets: int

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Encoded:
    """The examples of a data set; rows cut to the maximal length; rows left out as nothing learned was left."""

    examples: list[Example]
    cut: int
    dropped: int


def encode(
    records: Sequence[Record],
    tokenizer,
    max_length: int,
    truncation: Literal["sequence", "parts"] = "sequence",
) -> Encoded:
    """Token ids of every record, ended by the end token, which is learned.

    truncation: "sequence" keeps the first `max_length` ids; "parts" the first `max_length` of each segment, as
    SORSA's code does, so that the whole may be longer. Raises InputError if no record keeps anything to learn.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise InputError("--tokenizer_name", "the tokenizer has no end token", "take one that has")
    firsts = {special: iter(_firsts(tokenizer, [r.segments[0].text for r in records if r.special == special], special))
              for special in (True, False)}  # fmt: skip
    rests = iter(_ids(tokenizer, [s.text for r in records for s in r.segments[1:]], False))
    examples, cut, dropped = [], 0, 0
    for record in records:
        parts = [next(firsts[record.special])]
        parts += [list(next(rests)) for _ in record.segments[1:]]
        if not parts[-1] or parts[-1][-1] != eos:  # a chat template may have written it
            parts[-1].append(eos)
        kept = [part[:max_length] for part in parts] if truncation == "parts" else parts
        ids = [i for part in kept for i in part]
        learned = [s.learned for s, part in zip(record.segments, kept, strict=True) for _ in part]
        if truncation == "sequence":
            ids, learned = ids[:max_length], learned[:max_length]
        cut += len(ids) < sum(map(len, parts))
        targets = sum(learned[1:])
        if targets:
            made = Example(torch.tensor(ids, dtype=torch.int32), torch.tensor(learned), targets)
            examples.append(made)
        dropped += not targets
    if not examples:
        wrong = f"{max_length} tokens leave nothing of any response"
        raise InputError("--max_length", wrong, "give more, or check the data")
    return Encoded(examples, cut, dropped)


def _ids(tokenizer, texts: list[str], special: bool) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=special)["input_ids"] if texts else []


def _firsts(tokenizer, texts: list[str], special: bool) -> list[list[int]]:
    """First segments' ids, without the end token that some tokenizers put after every text."""
    closes = special and [ids[-1] for flag in (True, False) for ids in _ids(tokenizer, ["x"], flag)]
    added = bool(closes) and closes[0] == tokenizer.eos_token_id != closes[1]
    return [list(ids)[:-1] if added else list(ids) for ids in _ids(tokenizer, texts, special)]


def prompt_ids(tokenizer, prompt: str) -> list[int]:
    """A prompt's ids as training has them: with the start token, unless its text has one, and without an end token."""
    special = not (tokenizer.bos_token and prompt.startswith(tokenizer.bos_token))
    return _firsts(tokenizer, [prompt], special)[0]
