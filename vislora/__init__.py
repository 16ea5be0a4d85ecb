"""vislora: fine-tune image models with low-rank adapters without making them forget."""

from __future__ import annotations

from .adapter import Adapter
from .adapters import Method
from .adapters import names as methods
from .attach import attach
from .io import load

__all__ = ["Adapter", "Method", "attach", "load", "methods"]
__version__ = "0.1.0"
