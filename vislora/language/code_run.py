"""Programs that a model wrote, run in a process of its own with little time, memory and disk.

This keeps accidents small. It is no wall against malice: files and the network are as open as to any process of this
user. Run it where nothing is lost, and only when asked to.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile

_PASSED = 86  # the status of a program that came to its end; exit() and os._exit(0) give another
# What follows -c: seconds, bytes, the program's file. The limits hold for its children too.
_CAGE = f"""
import os, resource, sys
def most(kind, value):
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))
seconds, memory, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
text = open(file, encoding="utf-8").read()
most(resource.RLIMIT_CPU, seconds)
most(resource.RLIMIT_AS, memory)
most(resource.RLIMIT_FSIZE, 2**20)
most(resource.RLIMIT_CORE, 0)
most(resource.RLIMIT_NOFILE, 32)
most(resource.RLIMIT_NPROC, 0)
leave, sys.argv = os._exit, [file]
exec(compile(text, file, "exec"), {{"__name__": "__main__"}})
leave({_PASSED})
"""


def passes(program: str, seconds: int = 10, memory_mib: int = 1024) -> bool:
    """Whether `program`, Python text, comes to its end without an error within the limits.

    It runs in an empty folder that is removed, with no input, its output thrown away, no environment but PATH, no
    installed packages, at most 1 MiB a file, and, unless as root, no processes or threads of its own; its process
    group is killed whole at the end. An `exit()` before its end counts as a failure.
    """
    with tempfile.TemporaryDirectory() as place:
        file = os.path.join(place, "program.py")
        with open(file, "w", encoding="utf-8", errors="replace") as handle:
            handle.write(program)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CAGE, str(seconds), str(memory_mib * 2**20), file], cwd=place,
            env={"PATH": os.defpath}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(timeout=seconds + 1) == _PASSED
        except subprocess.TimeoutExpired:
            return False
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
