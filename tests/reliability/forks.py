"""Runs of scripts in processes of their own that start in no time: a server that has imported everything forks them.

    with Server("causal_lm") as server:
        pid = server.start("causal_lm", ["--adapter", "lora"], cwd, faults=[["kill_at", {"watch": "out", "event": 7}]])
        status = server.wait(pid)

The server itself trains nothing: torch's backward does not work in the forks of a process that has run one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


class Server:
    """Forks runs on request; scripts that are not named at its start are imported when they are first asked for.
    `log(pid)` is what a run has said."""

    def __init__(self, *scripts: str):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1",
                       "PYTHONPATH": os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "tests")))}  # fmt: skip
        command = [sys.executable, str(Path(__file__)), *scripts]
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True)  # fmt: skip
        self.logs: dict[int, Path] = {}
        assert self.process.stdout.readline() == "ready\n"

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def _ask(self, **words) -> int:
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, script: str, argv: list[str], cwd: Path, faults=(), env=None) -> int:
        """Start `script` with these flags in `cwd`; returns its process number at once. faults: [[name, arguments]] of
        faults.py, brought about in that process before the script runs."""
        log = Path(cwd) / f".said-{time.monotonic_ns()}"
        words = {"script": script, "argv": argv, "cwd": str(cwd), "faults": list(faults), "env": env or {}}
        pid = self._ask(**words, log=str(log))
        self.logs[pid] = log
        return pid

    def wait(self, pid: int, seconds: float = 120) -> int:
        """The run's exit status, negative for a signal's number. One that is not over in time is killed: -9."""
        return self._ask(wait=pid, seconds=seconds)

    def run(self, *arguments, **words) -> tuple[int, str]:
        """Start and wait; (status, all that it said)."""
        pid = self.start(*arguments, **words)
        return self.wait(pid), self.log(pid)

    def log(self, pid: int) -> str:
        return self.logs[pid].read_text(errors="replace")


def load(name: str):
    """The module of a training script."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "train_scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def serve(names: list[str]) -> None:
    """Answer on stdin's lines until it is closed."""
    import torch

    torch.set_num_threads(1)
    from reliability import faults

    from vislora.errors import run_script

    scripts = {name: load(name) for name in names}
    print("ready", flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        if "wait" in ask:
            print(ended(ask["wait"], ask["seconds"]), flush=True)
            continue
        if ask["script"] not in scripts:
            scripts[ask["script"]] = load(ask["script"])
        pid = os.fork()
        if pid:
            print(pid, flush=True)
            continue
        status = 1
        try:
            into = os.open(ask["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(into, 1), os.dup2(into, 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.chdir(ask["cwd"])
            os.environ.update(ask["env"])
            for fault, words in ask["faults"]:
                getattr(faults, fault)(scripts[ask["script"]], **words)
            run_script(scripts[ask["script"]].main, ask["argv"])
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)


def ended(pid: int, seconds: float) -> int:
    """The exit status of a child; it is killed after `seconds`."""
    until = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return -signal.SIGKILL
        time.sleep(0.01)


if __name__ == "__main__":
    serve(sys.argv[1:])
