"""What bound, merge and export share: where results go."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import InputError
from ..formats import LoraFile


def add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT",
                        help="a folder, or a new .safetensors file (PEFT: a folder)")  # fmt: skip


def add_rank(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rank", type=int, help="keep so many singular values a layer, the largest")


def check_rank(rank: int | None) -> None:
    """Raise InputError for a rank below 1."""
    if rank is not None and rank < 1:
        raise InputError("--rank", f"{rank} is no rank", "take 1 or more")


def require_plain(file: LoraFile, deed: str) -> None:
    """Raise InputError for DoRA: its update is no product, and what is done to the product says nothing of its norm."""
    for layer in file.layers:
        if layer.magnitude is not None:
            wrong = f"{layer.name} is DoRA, whose magnitudes rescale the base's rows"
            raise InputError(str(file.path), wrong, f"{deed} a plain LoRA")
