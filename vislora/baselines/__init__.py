"""What methods are compared with: full fine-tuning, the frozen base, PEFT's methods."""

from __future__ import annotations

from ._baseline import Baseline
from .full import Full
from .none import Frozen
from .peft import Peft

__all__ = ["BASELINES", "Baseline"]

BASELINES: dict[str, type[Baseline]] = {"full": Full, "none": Frozen, "peft": Peft}
