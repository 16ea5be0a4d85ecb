"""The words of the world: the BPE tokenizer trained on its captions, and the tensors of their token ids."""

from __future__ import annotations

import json

import torch
import world
from common import WORK, say

FOLDER = WORK / "tokenizer"
LENGTH = 32


def corpus() -> list[str]:
    """Text that holds every word of the world, and the reserved identifiers, often enough to become whole tokens."""
    lines = []
    for noun in world.OBJECTS:
        for prop in ("", *world.PROPERTIES):
            phrase = world.article(f"{prop} {noun}".strip())
            lines += [template.format(x=phrase, bg=bg) for template, _ in world.TEMPLATES
                      for phrases in world.BACKGROUNDS.values() for bg in phrases]
    lines += [f"{joint} {noun}" for joint in ("and", "next to", "wearing") for noun in world.OBJECTS] * 20
    lines += [text.format(world.IDENTIFIERS[0]) for text, _ in world.PROMPTS] * 20
    return lines + [word for word in world.IDENTIFIERS] * 500


def build() -> None:
    """Train the byte-level BPE in CLIP's manner (lower case, </w> at the end of a word) and save it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    blank = CLIPTokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=4000, min_frequency=2, show_progress=False, initial_alphabet=alphabet,
                                  end_of_word_suffix="</w>")
    tokenizer.train_from_iterator(corpus(), trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    # CLIP's order: bytes, bytes that end a word, merges, the two special tokens.
    entries = [*alphabet, *(char + "</w>" for char in alphabet), *("".join(pair) for pair in merges)]
    entries = list(dict.fromkeys(entries)) + ["<|startoftext|>", "<|endoftext|>"]
    final = CLIPTokenizer(vocab={word: i for i, word in enumerate(entries)}, merges=merges, model_max_length=LENGTH)
    FOLDER.mkdir(parents=True, exist_ok=True)
    final.save_pretrained(FOLDER)
    (FOLDER / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(entries)}, ensure_ascii=False))
    (FOLDER / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n")
    say(f"tokenizer: {len(entries)} tokens, {len(merges)} merges")


def tokenizer():
    """The tokenizer, built if it is not there."""
    from transformers import CLIPTokenizer

    if not (FOLDER / "vocab.json").exists():
        build()
    return CLIPTokenizer.from_pretrained(FOLDER)


def token_ids(captions: list[str]) -> torch.Tensor:
    """Padded ids, as the pipeline makes them."""
    tok = tokenizer()
    return tok(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
