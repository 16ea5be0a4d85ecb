"""What commands print: tables and lines in which no file's text can pass for anything else."""

from __future__ import annotations

import re
import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import printable

_WIDTH = 180  # where the output is no terminal


def console() -> Console:
    """On stdout as it is now; wide enough for whole names where it is a file or a pipe."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else _WIDTH, highlight=False, soft_wrap=False)


def table(head: dict[str, str], rows: list[list[str]]) -> Table:
    """head: {column: "left" or "right"}. Cells are plain text, control characters shown as escapes."""
    out = Table(box=None, pad_edge=False, header_style="bold")
    for name, side in head.items():
        out.add_column(name, justify=side, overflow="fold")
    for row in rows:
        out.add_row(*(Text(printable(cell)) for cell in row))
    return out


def say(line: str) -> None:
    """One plain line on stdout."""
    print(printable(line))


def natural(name: str) -> list[tuple[int, str]]:
    """A sorting key by which block 2 comes before block 10."""
    return [(int(word), "") if word.isdigit() else (0, word) for word in re.split(r"(\d+)", name)]


def number(value: float | None) -> str:
    """Four digits; a dash for what is not known."""
    return "-" if value is None else f"{value:.4g}"
