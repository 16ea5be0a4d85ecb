"""Prompts to what the denoiser attends to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from vislora.data.captions import check_tokens
from vislora.diffusion.family import Condition
from vislora.diffusion.models import DiffusionModels
from vislora.errors import InputError, near


def tokenize(models: DiffusionModels, prompts: Sequence[str]) -> dict[str, Tensor]:
    """{encoder: token ids (n, tokens), int64 on the CPU}, padded or cut to the encoder's length.

    It runs at every step where a text encoder trains; `warn_of_cuts` warns, once, of a cut.
    """
    found = {}
    for name, tokenizer, length in _readers(models):
        padded = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        found[name] = padded.input_ids
    return found


def warn_of_cuts(models: DiffusionModels, prompts: Sequence[str]) -> None:
    """Warn of each different prompt of which the encoder that reads furthest still loses a tail."""
    _, tokenizer, length = max(_readers(models), key=lambda reader: reader[2])
    check_tokens(tokenizer, prompts, "prompt", length)


def _readers(models: DiffusionModels) -> list[tuple[str, object, int]]:
    """(encoder, its tokenizer, tokens that it reads), in the family's order."""
    readers = []
    for name, word in zip(models.family.encoders, models.family.tokenizers, strict=True):
        if models.parts[name] is not None:
            reads = models.parts[word].model_max_length if "CLIP" in type(models.parts[name]).__name__ else None
            readers.append((name, models.parts[word], reads or models.sequence))
    return readers


def encode(
    models: DiffusionModels,
    ids: Mapping[str, Tensor],
    grad: bool = False,
    prepared: Mapping[str, nn.Module] | None = None,
) -> Condition:
    """The condition of token ids (n, tokens), one tensor for each encoder; `grad` when a text encoder trains.

    prepared: the models' own encoders as prepared for distribution, where gradients are to be shared.
    """
    encoders = {**models.encoders, **(prepared or {})}
    with torch.set_grad_enabled(grad):
        return models.family.encode(models, encoders, {name: t.to(models.device) for name, t in ids.items()})


def joined(*parts: Condition) -> Condition:
    """Batches one after the other; of the same names."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class EmbeddingCache:
    """The conditions of a run's prompts, each distinct text encoded once, for text encoders that are not trained.

    The text itself is the key, so that no order of the data can pair a prompt with another's embedding.
    """

    def __init__(self, models: DiffusionModels, prompts: Iterable[str], batch_size: int = 16):
        distinct = list(dict.fromkeys(prompts))
        self._rows: dict[str, Condition] = {}  # text: {name: (…)}
        for start in range(0, len(distinct), batch_size):
            chunk = distinct[start : start + batch_size]
            found = encode(models, tokenize(models, chunk))
            self._rows.update((text, {name: t[i] for name, t in found.items()}) for i, text in enumerate(chunk))

    def __len__(self) -> int:
        return len(self._rows)

    def lookup(self, prompts: Sequence[str]) -> Condition:
        """The condition of `prompts`. InputError for one that the cache was not built with."""
        for prompt in prompts:
            if prompt not in self._rows:
                wrong = f"{prompt!r} is not among the {len(self)} cached{near(prompt, self._rows)}"
                raise InputError("prompt", wrong, "build the cache with every prompt of the run")
        rows = [self._rows[prompt] for prompt in prompts]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
