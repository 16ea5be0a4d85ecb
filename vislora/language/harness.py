"""lm-evaluation-harness on a model in memory, for its stock tasks; the package is optional."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from vislora.errors import EnvironmentFault, InputError


@contextmanager
def same_chance() -> Iterator[None]:
    """Whatever seeds Python, numpy and torch inside, outside they go on as if it had not."""
    states = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def run(
    model: nn.Module, tokenizer, tasks: Sequence[str], *, batch_size: int = 8, limit: int | None = None,
    include_path: str | None = None, allow_code: bool = False, max_length: int | None = None,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """{task: {metric: value}} by the harness's own prompts and few-shot counts. Chance outside is left as it was.

    include_path: a folder of task YAMLs, such as stock ones with `dataset_path: json`, which run offline. The model is
    in eval mode inside. Raises InputError for a task that the harness does not know.
    """
    try:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        wrong = "needs lm-evaluation-harness"
        raise EnvironmentFault("--harness", wrong, 'pip install "vislora[harness]"') from None
    training = model.training
    model.eval()
    try:
        with same_chance():
            manager = TaskManager(include_path=include_path)
            unknown = [name for name in tasks if name not in manager.all_tasks]
            if unknown:
                raise InputError("--harness", f"{', '.join(unknown)}: no such task", "see lm-eval ls tasks")
            lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
            found = lm_eval.simple_evaluate(
                model=lm, tasks=list(tasks), limit=limit, bootstrap_iters=0, task_manager=manager,
                confirm_run_unsafe_code=allow_code,
            )  # fmt: skip
    finally:
        model.train(training)
    return {
        name: {key: float(value) for key, value in own.items() if isinstance(value, int | float)}
        for name, own in found["results"].items()
    }
