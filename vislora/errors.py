"""Errors that a user can act on: one line that says what was wrong, the value, and the remedy."""

from __future__ import annotations

import sys
from collections.abc import Callable
from difflib import get_close_matches


class VisloraError(Exception):
    """Base of every error that vislora raises on purpose. `exit_code` is the status a script ends with."""

    exit_code = 1

    def __init__(self, subject: str, wrong: str, remedy: str):
        """`subject`: the file or flag at fault; `wrong`: what is wrong, with the value; `remedy`: what to do."""
        self.subject, self.wrong, self.remedy = subject, wrong, remedy
        super().__init__(printable(f"{subject}: {wrong} -> {remedy}"))


class InputError(VisloraError, ValueError):
    """The caller's input (a file, a flag, an argument) cannot be used."""

    exit_code = 2


class EnvironmentFault(VisloraError, RuntimeError):
    """The machine cannot do what was asked: disk full, a missing device or package."""

    exit_code = 3


class DataChanged(VisloraError, RuntimeError):
    """Data is no longer what it was when the run began."""

    exit_code = 4


def printable(text: str, limit: int = 600) -> str:
    """`text` on one line, control characters (ANSI escapes, newlines of a hostile file name) shown as escapes."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def near(word: str, known) -> str:
    """" (did you mean …?)" for the known words nearest to `word`, or an empty string."""
    hits = get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f" (did you mean {', '.join(hits)}?)" if hits else ""


def run_script(main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Run a script's `main(argv)`: a VisloraError becomes one line on stderr and its exit status.

    With `--debug` among the arguments the traceback is shown instead.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        main(argv)
    except VisloraError as error:
        if "--debug" in argv:
            raise
        print(f"vislora: error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
