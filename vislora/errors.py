"""Errors that a user can act on: one line that says what was wrong, the value, and the remedy."""

from __future__ import annotations

import errno
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

    def __reduce__(self) -> tuple:
        """A loader process sends its errors to the run's."""
        return type(self), (self.subject, self.wrong, self.remedy)


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


_GO_ON = "then go on with --resume_from_checkpoint latest"
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def fault_of(error: BaseException) -> VisloraError | None:
    """The fault that a library's error tells of: memory, the disk, a loader or another process that ended, numbers that
    are not finite.

    None for everything else, which is a fault of the program and keeps its traceback.
    """
    said = next(iter(str(error).splitlines()), "")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in said:
        remedy = "take smaller batches (with more --gradient_accumulation_steps) or --gradient_checkpointing"
        return EnvironmentFault("memory", f"there is not enough ({said or 'none is left'})", f"{remedy}; {_GO_ON}")
    if isinstance(error, OSError) and error.errno in _DISK:
        wrong = f"could not be written ({error.strerror})"
        return EnvironmentFault(str(error.filename or "a file of the run"), wrong, f"make room; {_GO_ON}")
    if type(error).__name__.endswith("LinAlgError") and "non-finite" in said:
        wrong = "what trains is not finite any more: the run diverged"
        return InputError("--learning_rate", wrong, "lower it, or warm up longer; what was saved before is finite")
    if isinstance(error, RuntimeError) and "DataLoader worker" in said:
        return EnvironmentFault("--dataloader_num_workers", f"a loader process ended ({said})",
                                f"memory may have run out: take fewer; {_GO_ON}")
    if isinstance(error, RuntimeError) and ("gloo" in said.lower() or type(error).__name__.startswith("Dist")):
        wrong = f"ended, or is not heard of any more ({said})"
        return EnvironmentFault("another process of this run", wrong, f"see what it says itself; {_GO_ON}")
    return None


def _close_bars() -> None:
    """End the lines of progress bars, in which the cursor still stands."""
    if "tqdm" in sys.modules:
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()


def run_script(main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Run a script's `main(argv)`: a VisloraError, or a fault of the machine's, becomes one line on stderr and its
    exit status.

    With `--debug` among the arguments the traceback is shown instead.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        main(argv)
    except Exception as error:
        told = error if isinstance(error, VisloraError) else fault_of(error)
        if "--debug" in argv or told is None:
            raise
        _close_bars()
        print(f"vislora: error: {told}", file=sys.stderr)
        raise SystemExit(told.exit_code) from None
