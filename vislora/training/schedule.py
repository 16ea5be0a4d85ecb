"""Learning-rate schedules."""

from __future__ import annotations

from torch.optim.lr_scheduler import LambdaLR


def first_rate(scheduler: LambdaLR, total: int) -> float:
    """The largest group's first learning rate above zero within `total` steps; 0 if there is none."""
    rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    base, factor = max(rates, key=lambda pair: pair[0])
    return next((base * factor(step) for step in range(total) if factor(step) > 0), 0.0)
