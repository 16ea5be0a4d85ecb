"""Programs that a model wrote, run in a process of its own with little time, memory and disk.

This keeps accidents small. It is no wall against malice: run it where nothing is lost, and only when asked to.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile

_LIMITS = """
import resource as _r
def _most(kind, value):
    hard = _r.getrlimit(kind)[1]
    value = value if hard == _r.RLIM_INFINITY else min(value, hard)
    _r.setrlimit(kind, (value, value))
_most(_r.RLIMIT_CPU, {seconds})
_most(_r.RLIMIT_AS, {memory})
_most(_r.RLIMIT_FSIZE, 2**20)
_most(_r.RLIMIT_CORE, 0)
_most(_r.RLIMIT_NOFILE, 32)
del _r, _most
"""


def passes(program: str, seconds: int = 10, memory_mib: int = 1024) -> bool:
    """Whether `program`, Python text, ends by itself without an error within the limits.

    It runs in an empty folder that is removed, with no input, no environment but PATH, no site packages of the user,
    in a process group that is killed whole when the time is over. An `exit()` before its end counts as a failure.
    """
    with tempfile.TemporaryDirectory() as place:
        limits = _LIMITS.format(seconds=seconds, memory=memory_mib * 2**20)
        text = f"{limits}{program}\n\nprint(end='\\n<passed>\\n')\n"
        file = os.path.join(place, "program.py")
        with open(file, "w", encoding="utf-8", errors="replace") as handle:
            handle.write(text)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", file], cwd=place, env={"PATH": os.defpath}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            said, _ = process.communicate(timeout=seconds + 1)
        except subprocess.TimeoutExpired:
            return False
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
            process.stdout.close()
    return process.returncode == 0 and said.endswith(b"\n<passed>\n")
