"""Faults that a forked run can be started with; each takes the script's module and its own arguments."""

from __future__ import annotations

import os
import signal

from ckpt_chaos.inject import arm


def kill_at(script, watch: str, event: int | None, mode: str = "before", log: str | None = None) -> None:
    """ckpt-chaos ends the process at the so-manieth file event under `watch`: before it, with the file cut in half
    ("torn"), or with everything lost that was not synced ("unsynced"). event None: only the log is written."""
    arm(os.path.abspath(watch), event, mode, log, torn_python=True)


def signals_at(script, step: int, numbers: list[int]) -> None:
    """Signals to the process itself before the backward of optimizer step `step` (from 0)."""
    backward, calls = script.Run.backward, []

    def watched(self, *arguments):
        if len(calls) == step:
            for number in numbers:
                os.kill(os.getpid(), number)
        calls.append(step)
        return backward(self, *arguments)

    script.Run.backward = watched


def dies_at(script, step: int) -> None:
    """The process is killed there."""
    signals_at(script, step, [signal.SIGKILL])


def loader_dies(script, position: int) -> None:
    """A loader's process is killed when it comes to this position of the run."""
    from vislora.vision.augment import Stream

    item, owner = Stream.__getitem__, os.getpid()

    def watched(self, at):
        if at >= position and os.getpid() != owner:
            os.kill(os.getpid(), signal.SIGKILL)
        return item(self, at)

    Stream.__getitem__ = watched


def loss_is_nan(script, step: int) -> None:
    """Every loss of causal_lm.py's optimizer step `step` (from 0) is NaN."""
    backward, losses, now = script.Run.backward, script.token_losses, [None]

    def watched(self, at):
        now[0] = at
        return backward(self, at)

    script.Run.backward = watched
    script.token_losses = lambda *arguments: losses(*arguments) * (float("nan") if now[0] == step else 1)
