"""What methods are compared with: full fine-tuning and the frozen base. One file each."""

from __future__ import annotations

from ._baseline import Baseline
from .full import Full
from .none import Frozen

__all__ = ["BASELINES", "Baseline"]

BASELINES: dict[str, type[Baseline]] = {"full": Full, "none": Frozen}
