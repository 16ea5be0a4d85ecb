"""Prompts to the embeddings that the UNet attends to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from vislora.diffusion.models import DiffusionModels
from vislora.errors import InputError, near


def tokenize(models: DiffusionModels, prompts: Sequence[str]) -> torch.Tensor:
    """Token ids (n, tokens), int64 on the CPU, padded or cut to the tokenizer's length.

    It runs at every step where the text encoder trains; `vislora.data.captions.check_tokens` warns, once, of a cut.
    """
    tokenizer = models.tokenizer
    length = tokenizer.model_max_length
    padded = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return padded.input_ids


def encode(
    models: DiffusionModels, ids: torch.Tensor, grad: bool = False, text_encoder: torch.nn.Module | None = None
) -> torch.Tensor:
    """Embeddings (n, tokens, width) of token ids (n, tokens); `grad` when the text encoder trains.

    text_encoder: the model's own as prepared for distribution, where gradients are to be shared.
    """
    encoder = models.text_encoder if text_encoder is None else text_encoder
    device = next(encoder.parameters()).device
    with torch.set_grad_enabled(grad):
        return encoder(ids.to(device), return_dict=False)[0]


class EmbeddingCache:
    """The embeddings of a run's prompts, each distinct text encoded once, for a text encoder that is not trained.

    The text itself is the key, so that no order of the data can pair a prompt with another's embedding.
    """

    def __init__(self, models: DiffusionModels, prompts: Iterable[str], batch_size: int = 16):
        distinct = list(dict.fromkeys(prompts))
        self._rows: dict[str, torch.Tensor] = {}  # text: (tokens, width)
        for start in range(0, len(distinct), batch_size):
            chunk = distinct[start : start + batch_size]
            self._rows.update(zip(chunk, encode(models, tokenize(models, chunk)), strict=True))

    def __len__(self) -> int:
        return len(self._rows)

    def lookup(self, prompts: Sequence[str]) -> torch.Tensor:
        """Embeddings (n, tokens, width) of `prompts`. InputError for one that the cache was not built with."""
        for prompt in prompts:
            if prompt not in self._rows:
                wrong = f"{prompt!r} is not among the {len(self)} cached{near(prompt, self._rows)}"
                raise InputError("prompt", wrong, "build the cache with every prompt of the run")
        return torch.stack([self._rows[prompt] for prompt in prompts])
