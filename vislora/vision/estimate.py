"""What a classification run will take of memory, before a step of it: counted on fake tensors."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

from vislora.handle import Handle
from vislora.training.memory import STEP, Estimate, held_by, optimizer_state, peak_of, peak_of_step
from vislora.vision import augment
from vislora.vision.heads import Classifier
from vislora.vision.options import ClassificationOptions
from vislora.vision.state import Tuned


def estimate(options: ClassificationOptions, adapter: Handle, model: Classifier, accelerator: Accelerator) -> Estimate:
    """Count a step of the run that the options describe, and a batch of its scoring.

    The adapter must be attached and not yet trained. While it is scored, an average stands in the place of what trains,
    which waits aside; and the best so far is kept on the CPU.
    """
    o, side = options, model.tower.preprocess.size
    tuned = Tuned(adapter, model.head, o, 1)
    parameters, training = tuned.parameters(), model.training
    state = sum(map(optimizer_state, tuned.optimizers.values()))
    state += 0 if tuned.ema is None else sum(p.nbytes for p in parameters)
    layout = torch.channels_last if o.channels_last else torch.contiguous_format

    def images(count: int) -> Tensor:
        return torch.empty(count, 3, side, side, device=accelerator.device, memory_format=layout)

    def loss() -> Tensor:
        targets = torch.zeros(o.train_batch_size, dtype=torch.long, device=accelerator.device)
        with accelerator.autocast():
            logits = model(images(o.train_batch_size))
        total = augment.cross_entropy(logits.float(), targets, o.label_smoothing)
        return total + (adapter.penalty() if adapter.method.has_penalty() else 0)

    @torch.no_grad()
    def score() -> None:
        model.all(images(o.eval_batch_size))

    model.train()
    phases = {STEP: peak_of_step(loss, parameters, o.gradient_accumulation_steps)}
    model.eval()
    size = sum(p.nbytes for p in parameters)
    aside = (0 if tuned.ema is None else size) + (size if accelerator.device.type == "cpu" and o.train_val_split else 0)
    phases["scoring"] = peak_of(score) + aside
    model.train(training)
    return Estimate(held_by([model]) + adapter.base_copy, state, phases, adapter.base_copy)
