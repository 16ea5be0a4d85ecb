"""Stage `llama`: a small Llama that knows capitals and can add, trained from nothing on the text of `texts.py`."""

from __future__ import annotations

import json
import math
import random
import shutil
import time

import texts
import torch
import torch.nn.functional as F
from common import WORK, WORLD, load_tensors, pack_optimizer, save_tensors, say, unpack_optimizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TARGET, CHECKPOINT = WORLD / "tiny-llama", WORK / "llama.safetensors"
STEPS, BATCH, RATE, WARM, ASIDE, LENGTH = 6000, 48, 3e-3, 100, 0.1, 512


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, every digit a token of its own, trained once and shipped with the model."""
    if not (TARGET / "tokenizer.json").exists():
        tok = Tokenizer(models.BPE(byte_fallback=False))
        tok.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
        tok.decoder = decoders.ByteLevel()
        known, talk, rng = texts.facts(), texts.dialogue(), random.Random(0)
        rows = [texts.sample(rng, known, talk) for _ in range(6000)] + [texts.word_problem(rng) for _ in range(1000)]
        rows += [{"instruction": f["subject"], "output": f["answer"]} for f in known] + talk
        corpus = [texts.QUESTION.format(**row) + row["output"] for row in rows]
        tok.train_from_iterator(corpus, trainers.BpeTrainer(
            vocab_size=1536, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False))
        tok.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tok.token_to_id("<s>"))])
        whole = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", pad_token="</s>",
                                        model_max_length=LENGTH, clean_up_tokenization_spaces=False)
        whole.save_pretrained(TARGET)
    return PreTrainedTokenizerFast.from_pretrained(TARGET)


def build(tok: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The model, freshly initialised."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tok), hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=3, max_position_embeddings=LENGTH, tie_word_embeddings=True,
        bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id,
    ))
    model.set_attn_implementation("eager")  # the fused attention's backward is slow in bfloat16 on CPUs
    return model


def encode(tok: PreTrainedTokenizerFast, rows: list[dict]) -> list[tuple[list[int], int]]:
    """[(ids with the end token, length of the prompt)]; the two parts are tokenised apart."""
    prompts = tok([texts.QUESTION.format(**row) for row in rows])["input_ids"]
    answers = tok([row["output"] for row in rows], add_special_tokens=False)["input_ids"]
    return [(p + a + [tok.eos_token_id], len(p)) for p, a in zip(prompts, answers, strict=True)]


def batch(tok: PreTrainedTokenizerFast, rng: random.Random, known: list, talk: list) -> tuple[torch.Tensor, ...]:
    """ids (b, t), and the weight of each token as a target: 1 in answers, `ASIDE` in questions, 0 in padding."""
    rows = encode(tok, [texts.sample(rng, known, talk) for _ in range(BATCH)])
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([own + [tok.pad_token_id] * (longest - len(own)) for own, _ in rows])
    weight = torch.tensor([[ASIDE] * cut + [1.0] * (len(own) - cut) + [0.0] * (longest - len(own))
                           for own, cut in rows])
    return ids, weight


@torch.no_grad()
def answers(model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, rows: list[dict], tokens: int = 48) -> list[str]:
    """Greedy answers, equally long questions together, so that nothing is padded."""
    model.eval()
    by_length: dict[int, list[int]] = {}
    prompts = tok([texts.QUESTION.format(**row) for row in rows])["input_ids"]
    for index, ids in enumerate(prompts):
        by_length.setdefault(len(ids), []).append(index)
    found = [""] * len(rows)
    for indices in by_length.values():
        out = model.generate(torch.tensor([prompts[i] for i in indices]), max_new_tokens=tokens, do_sample=False)
        for index, ids in zip(indices, out, strict=True):
            found[index] = tok.decode(ids[len(prompts[index]):], skip_special_tokens=True)
    return found


def score(model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, name: str, count: int | None = None) -> float:
    """Share of right answers on a file of world/language: after `The answer is: `, or the whole reply."""
    rows = texts.read(texts.FOLDER / f"{name}.jsonl")[:count]
    pairs = zip(answers(model, tok, rows), rows, strict=True)
    return sum(a.split("is: ")[-1].strip() == row["output"].split("is: ")[-1] for a, row in pairs) / len(rows)


def write(model: LlamaForCausalLM, tok: PreTrainedTokenizerFast) -> None:
    """The folder that `from_pretrained` loads, float16; the old weights go only when the new are whole."""
    fresh = TARGET.with_name("tiny-llama.new")
    shutil.rmtree(fresh, ignore_errors=True)
    state = {name: value.half() for name, value in model.state_dict().items()}
    model.save_pretrained(fresh, state_dict=state)
    tok.save_pretrained(fresh)
    config = fresh / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float16"}, indent=2) + "\n")
    for path in fresh.iterdir():
        path.chmod(0o644)
    shutil.rmtree(TARGET, ignore_errors=True)
    fresh.rename(TARGET)


def train(steps: int = STEPS, minutes: float = 30) -> None:
    """Train, products in bfloat16; ends annealed. Every hundredth step is kept and can be gone on from."""
    texts.run()
    known, talk, tok = texts.facts(), texts.dialogue(), tokenizer()
    model = build(tok)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.05)
    step, spent = 0, 0.0
    if CHECKPOINT.exists():
        tensors, meta = load_tensors(CHECKPOINT)
        if meta["done"]:
            return say("llama: already trained")
        model.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("net.")})
        unpack_optimizer(optimizer, tensors)
        step, spent = meta["step"], meta["seconds"]
    say(f"llama: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, step {step} of {steps}")
    start, clock, done = time.time() - spent, time.time(), False
    while not done:
        progress = max(step / steps, (time.time() - start) / (60 * minutes))
        done = progress >= 1
        decay = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, (progress - 0.4) / 0.6))))
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / WARM) * (0.01 + 0.99 * decay)
        ids, weight = batch(tok, random.Random(30_000_000 + step), known, talk)
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids[:, :-1]).logits
        losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weight[:, 1:].flatten()).sum() / weight[:, 1:].sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            say(f"llama {step}: loss {loss.item():.3f} {(time.time() - clock) / 50:.2f} s/step")
            clock = time.time()
        if step % 500 == 0 or done:
            found = {name: score(model, tok, name, None if done else 60) for name in
                     ("capitals_test", "arithmetic_test", "word_problems_test")}
            say(f"llama {step}: {found}")
            write(model, tok)
            save_tensors(CHECKPOINT, {**{f"net.{k}": v for k, v in model.state_dict().items()},
                                      **pack_optimizer(optimizer)},
                         {"step": step, "seconds": time.time() - start, "done": done, **found})
            clock = time.time()
