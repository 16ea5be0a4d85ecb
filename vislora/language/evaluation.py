"""What a run measures of itself: the loss on held-out data, sample replies, and how many answers are right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from vislora import distributed
from vislora.language.batches import collate
from vislora.language.encode import Example, encode
from vislora.language.generate import reply
from vislora.language.loss import perplexity, token_losses
from vislora.language.options import CausalLMOptions
from vislora.language.records import Record
from vislora.language.scoring import same_answer
from vislora.language.templates import template


@torch.no_grad()
def held_out_loss(
    model: nn.Module, examples: Sequence[Example], batch_size: int, pad: int, accelerator: Accelerator
) -> float:
    """The mean loss of a learned token, in nats, over all examples; every process takes its share of the batches.

    Every process calls it, and calls the model equally often, as sharded models need. The mode is as before afterwards.
    """
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]))
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    total, training = torch.zeros(2, dtype=torch.float64), model.training
    model.eval()
    for at in range(0, len(batches), world):
        mine = at + rank < len(batches)
        rows = [[examples[i]] for i in (batches[at + rank] if mine else batches[0])]
        batch = collate(rows, pad, torch.float32, device)
        labels = batch.pop("labels")
        loss = token_losses(model(**batch).logits, labels)
        if mine:
            total += torch.tensor([float(loss), sum(row[0].targets for row in rows)], dtype=torch.float64)
    model.train(training)
    loss, count = distributed.mean(total.float(), device).tolist()
    return loss / count


class Evaluation:
    """The held-out side of a run: `measure` at a step, and what it writes to samples/."""

    def __init__(self, options: CausalLMOptions, records: Sequence[Record], tokenizer, folder: Path):
        self.options, self.records, self.tokenizer, self.folder = options, list(records), tokenizer, folder
        self.examples = encode(records, tokenizer, options.max_length, options.truncation).examples if records else []
        self.asked = [self._ask(word) for word in options.sample_prompt]
        self.asked = self.asked or [record.prompt for record in self.records[: options.num_samples]]

    def _ask(self, instruction: str) -> str:
        """The prompt of an instruction: in the chat template where the data are conversations, else in the template."""
        if self.records and not self.records[0].special and self.tokenizer.chat_template:
            turn = [{"role": "user", "content": instruction}]
            return self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return template(self.options.prompt_template or "alpaca").fill(instruction)

    def _said(self, record: Record) -> str:
        """The response as a reply would be decoded: without the marks that a chat template ends it by."""
        ids = self.tokenizer(record.response, add_special_tokens=False)["input_ids"]
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def measure(self, model: nn.Module, inner: nn.Module, step: int, accelerator: Accelerator, main: bool) -> dict:
        """{"eval_loss", "eval_perplexity", "eval_answers"} where there is held-out data; sample replies are written.

        model: as prepared for distribution; inner: the module behind it, which generates, by the main process alone or,
        in shards, by all. main: whether this process writes.
        """
        o, values = self.options, {}
        if self.examples:
            pad = self.tokenizer.pad_token_id
            loss = held_out_loss(model, self.examples, o.per_device_eval_batch_size, pad, accelerator)
            values = {"eval_loss": loss, "eval_perplexity": perplexity(loss)}
        if not main and not any(map(distributed.is_sharded, inner.parameters())):
            return values
        chosen = self.records[: o.eval_answers]
        prompts = [*self.asked, *(record.prompt for record in chosen)]
        if prompts:
            replies = reply(
                inner, self.tokenizer, prompts, max_new_tokens=o.max_new_tokens, batch_size=o.per_device_eval_batch_size
            )
            if main:
                self._write(step, list(zip(self.asked, replies, strict=False)))
            right = [same_answer(text, self._said(record)) for text, record
                     in zip(replies[len(self.asked) :], chosen, strict=True)]  # fmt: skip
            values |= {"eval_answers": sum(right) / len(right)} if right else {}
        return values

    def _write(self, step: int, pairs: list[tuple[str, str]]) -> None:
        if pairs:
            self.folder.mkdir(exist_ok=True)
            lines = [json.dumps({"prompt": prompt, "reply": text}, ensure_ascii=False) for prompt, text in pairs]
            (self.folder / f"step-{step:06d}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
