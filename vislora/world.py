"""The embedded world: what scripts run on when neither a model nor data is named. It lies in assets/world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vislora.config import read_yaml
from vislora.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
TINY_SD = ROOT / "assets" / "world" / "tiny-sd"


def defaults(script: str) -> dict[str, Any]:
    """The settings in configs/world/<script>.yaml, with paths under assets/ made absolute.

    Raises InputError where vislora is installed without its repository.
    """
    file = ROOT / "configs" / "world" / f"{script}.yaml"
    if not file.is_file() or not (ROOT / "assets" / "world").is_dir():
        wrong = "the embedded world is not beside this installation"
        raise InputError("vislora", wrong, "run from a clone installed with pip install -e ., or name model and data")
    settings = read_yaml(file)
    return {k: str(ROOT / v) if isinstance(v, str) and v.startswith("assets/") else v for k, v in settings.items()}
