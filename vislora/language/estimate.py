"""What a language run will take of memory, before a step of it: counted on fake tensors, over its longest rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vislora import optim
from vislora.handle import Handle
from vislora.language import models
from vislora.language.batches import Plan, collate
from vislora.language.classification import ClassificationOptions, Labelled, WithHead, losses, optimizer_of
from vislora.language.classification import collate as collate_ids
from vislora.language.data import Data
from vislora.language.encode import Example, encode
from vislora.language.loss import token_losses
from vislora.language.options import CausalLMOptions
from vislora.training.memory import STEP, Estimate, held_by, optimizer_state, peak_of, peak_of_step


def of_causal_lm(options: CausalLMOptions, adapter: Handle, model: nn.Module, tokenizer, data: Data,
                 accelerator: Accelerator) -> Estimate | None:  # fmt: skip
    """Count a step of the run on the longest rows of an epoch, and a batch of the longest held-out examples.

    The adapter must be attached and not yet trained. Replies that are sampled on the way are not counted. None for a
    quantized base, whose kernels know no fake tensors.
    """
    if getattr(model, "is_quantized", False):
        return None
    o, optimizer = options, None
    if next(adapter.parameters(), None) is not None:
        optimizer = optim.from_options(o, adapter, fused=accelerator.scaler is None)
    plan = Plan([len(e) for e in data.examples], o.seed, o.packing, o.max_length)
    rows = [[data.examples[i] for i in plan.row(q)] for q in range(plan.rows(1))]
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())

    def loss(rows: list[list[Example]], count: int, dtype: torch.dtype, packing: bool = False) -> Tensor:
        made = collate(_longest(rows, count, lambda row: sum(map(len, row))), tokenizer.pad_token_id, dtype,
                       accelerator.device, packing)  # fmt: skip
        labels = made.pop("labels")
        with accelerator.autocast():
            return token_losses(model(**made).logits, labels)

    step = partial(loss, rows, o.per_device_train_batch_size, dtype, o.packing)
    if not data.held_out:
        return _estimate(o, adapter, model, optimizer, step)
    held = [[e] for e in encode(data.held_out, tokenizer, o.max_length, o.truncation).examples]
    score = partial(loss, held, o.per_device_eval_batch_size, torch.float32)
    return _estimate(o, adapter, model, optimizer, step, score)


def of_classifier(options: ClassificationOptions, adapter: WithHead, model: nn.Module, tokenizer, data: Labelled,
                  accelerator: Accelerator) -> Estimate | None:  # fmt: skip
    """Count a step of the run on its longest texts, and a batch of the longest held-out ones.

    The adapter must be attached and not yet trained. None for a quantized base, as above.
    """
    if getattr(model, "is_quantized", False):
        return None

    def logits(texts: Sequence[Sequence[int]], count: int) -> Tensor:
        batch = collate_ids(_longest(texts, count, len), tokenizer, accelerator.device)
        with accelerator.autocast():
            return model(**batch).logits.float()

    def loss() -> Tensor:
        count = options.per_device_train_batch_size
        labels = torch.zeros(count, dtype=torch.long if data.classes else torch.float32, device=accelerator.device)
        return losses(logits(data.train, count), labels, data.classes)

    optimizer = optimizer_of(options, adapter, fused=accelerator.scaler is None)
    return _estimate(options, adapter, model, optimizer, loss,
                     lambda: logits(data.held, options.per_device_eval_batch_size))  # fmt: skip


def _longest(rows: Sequence, count: int, length: Callable) -> list:
    """The `count` longest rows; some again where there are fewer."""
    rows = sorted(rows, key=length, reverse=True)[:count]
    return (rows * -(-count // len(rows)))[:count]


def _estimate(options, adapter: Handle, model: nn.Module, optimizer: torch.optim.Optimizer | None,
              loss: Callable[[], Tensor], score: Callable[[], Tensor] | None = None) -> Estimate:  # fmt: skip
    """optimizer: None where nothing trains. score: a batch that is scored, None for none."""
    parameters, phases, state, training = list(adapter.parameters()), {}, 0, model.training
    if optimizer is not None:
        if adapter.method.has_penalty():
            adapter.bind(optimizer, 1)
        state = optimizer_state(optimizer)
        if options.gradient_checkpointing:
            models.checkpointing(model)

        def whole() -> Tensor:
            return loss() + (adapter.penalty() if adapter.method.has_penalty() else 0)

        model.train()
        phases[STEP] = peak_of_step(whole, parameters, options.gradient_accumulation_steps)
    model.eval()
    if score is not None:
        phases["scoring"] = peak_of(torch.no_grad()(score))
    model.train(training)
    return Estimate(held_by([model]) + adapter.base_copy, state, phases, adapter.base_copy)
