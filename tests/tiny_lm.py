"""Small language models of random weights, awkward tokenizers, and files of rows, for tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RwkvConfig,
    RwkvForCausalLM,
)  # fmt: skip

TEXT = [
    "Question: how many apples has Tom?\nAnswer: 12 apples", "### Response: the answer is 7", "ab ba aab bba abab",
    "Below is an instruction that describes a task.", "user assistant system <|im_start|> <|im_end|>",
] * 3  # fmt: skip


def tokenizer(kind: str = "bytes", vocab: int = 400) -> PreTrainedTokenizerFast:
    """bytes: byte-level BPE with a start token; merging: a BPE that merges across anything; prefix: like Llama 2's,
    which puts a space before every text; closing: one that ends every text with the end token; bare: no start token,
    the end token also pads."""
    tok = Tokenizer(models.BPE(unk_token="<unk>" if kind == "prefix" else None))
    if kind == "merging":
        trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=["<s>", "</s>"], show_progress=False,
                                      initial_alphabet=[chr(i) for i in range(32, 127)] + ["\n"])  # fmt: skip
        tok.decoder = decoders.Fuse()
        corpus = [*TEXT, *["Response:a Response:ab :a :ab"] * 20]
    elif kind == "prefix":
        tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
                                      initial_alphabet=[chr(i) for i in range(32, 127)] + ["\n", "▁"])  # fmt: skip
        tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
        corpus = TEXT
    else:
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=["<s>", "</s>"], show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
        corpus = TEXT
    tok.train_from_iterator(corpus, trainer)
    form = {"bare": "$A", "closing": "<s> $A </s>"}.get(kind, "<s> $A")
    marks = [(mark, tok.token_to_id(mark)) for mark in ("<s>", "</s>")]
    tok.post_processor = processors.TemplateProcessing(single=form, pair=f"{form} $B", special_tokens=marks)
    start = {} if kind == "bare" else {"bos_token": "<s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="</s>", pad_token="</s>",
                                   clean_up_tokenization_spaces=False, **start)  # fmt: skip


def llama(vocab: int, seed: int = 0, **more) -> LlamaForCausalLM:
    """Two layers of 16 and 24, random, with weights large enough that tokens matter to each other."""
    config = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=vocab, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**(config | more))).eval()


def rwkv(vocab: int, seed: int = 0) -> RwkvForCausalLM:
    """A recurrent model of two blocks, random, which takes no positions and reads padding as text."""
    config = RwkvConfig(vocab_size=vocab, hidden_size=16, attention_hidden_size=16, intermediate_size=24,
                        num_hidden_layers=2, context_length=256, bos_token_id=0, eos_token_id=1)  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = RwkvForCausalLM(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


def folder(place: Path, make=llama) -> Path:
    """A model and its tokenizer, as `from_pretrained` loads them."""
    tok = tokenizer()
    tok.save_pretrained(place)
    make(len(tok)).save_pretrained(place)
    return place


def sums(count: int = 12) -> list[dict]:
    """Rows in alpaca's format, of different lengths."""
    return [{"instruction": f"How many is {a} and {a * 7 % 5}?" + " please" * (a % 3),
             "output": "so " * (a % 4) + f"The answer is: {a + a * 7 % 5}"} for a in range(count)]  # fmt: skip


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
