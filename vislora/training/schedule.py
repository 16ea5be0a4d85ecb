"""Learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim.lr_scheduler import LambdaLR


def first_rate(scheduler: LambdaLR, total: int) -> float:
    """The largest group's first learning rate above zero within `total` steps; 0 if there is none."""
    rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    base, factor = max(rates, key=lambda pair: pair[0])
    return next((base * factor(step) for step in range(total) if factor(step) > 0), 0.0)


def by_name(name: str, total: int, warmup: float) -> Callable[[int], float]:
    """step (from 0) -> share of the largest rate, over `total` steps of which the share `warmup` rises.

    "one_cycle" is torch's OneCycleLR with div_factor 25 and final_div_factor 1e4; it leaves momentum alone. "cosine"
    and "linear" rise from 0 and fall to 0, "constant" rises and stays.
    """
    if name == "one_cycle":
        peak, last = max(0.0, warmup * total - 1), total - 1  # torch's peak may lie before the first step

        def one_cycle(step: int) -> float:
            if step <= peak:
                return _between(1 / 25, 1.0, step / peak if peak > 0 else 1.0)
            return _between(1.0, 1 / 25e4, min(1.0, (step - peak) / (last - peak)) if last > peak else 1.0)

        return one_cycle
    rise = round(warmup * total)
    fall = {
        "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)), "linear": lambda x: 1 - x, "constant": lambda x: 1.0,
    }[name]  # fmt: skip
    return lambda step: step / rise if step < rise else fall(min(1.0, (step - rise) / max(1, total - rise)))


def _between(start: float, end: float, x: float) -> float:
    """From start (x = 0) to end (x = 1) along half a cosine."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * x))
