"""A campaign of kills: at every file boundary of a run and at random moments; then the run is gone on with and judged.

    python tests/reliability/campaign.py --kills 100

ckpt-chaos (PyPI) does the killing at boundaries: before each file event of the run's folder, with the file cut in half
where one is written, and with everything lost that was not synced. `--kills` more come at random moments. A kill loses
a complete checkpoint when the run goes on from an older one, and is resumed wrongly when it ends otherwise than the
run that nobody killed: adapter, optimizer's state and the log of steps are compared bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[k]) for k in (1, 2)]

from reliability.forks import Server
from script_runs import photograph
from tiny_lm import folder, sums, write_rows
from tiny_sd import tiny_sd
from tiny_vit import image_folder, save_timm

from vislora.io import read

TOTAL = 4
SCRIPTS = {
    "causal_lm": (
        "--model_name_or_path", "model", "--dataset_name", "rows.jsonl", "--prompt_template", "qa", "--adapter",
        "adalora", "--rank", "2", "--init_r", "3", "--tinit", "1", "--tfinal", "1", "--max_length", "128",
        "--per_device_train_batch_size", "2", "--learning_rate", "0.01", "--save_steps", "1", "--save_total_limit", "2",
    ),
    "dreambooth": (
        "--pretrained_model_name_or_path", "model", "--instance_data_dir", "photos", "--instance_prompt", "a b",
        "--adapter", "lora", "--rank", "2", "--dropout", "0.2", "--use_ema", "--train_batch_size", "2",
        "--lr_scheduler", "cosine", "--learning_rate", "0.01", "--checkpointing_steps", "1",
        "--checkpoints_total_limit", "2",
    ),
    "classification": (
        "--model_name_or_path", "model", "--dataset_name", "images", "--adapter", "adalora", "--rank", "2", "--init_r",
        "3", "--tinit", "1", "--tfinal", "1", "--train_batch_size", "3", "--train_val_split", "0.2", "--eval_steps",
        "1", "--ema_decay", "0.9", "--learning_rate", "0.01", "--checkpointing_steps", "1",
        "--checkpoints_total_limit", "2",
    ),
    "sequence_classification": (
        "--model_name_or_path", "model", "--train_file", "pairs", "--task_name", "rte", "--adapter", "adalora",
        "--rank", "2", "--init_r", "3", "--tinit", "1", "--tfinal", "1", "--max_length", "64",
        "--per_device_train_batch_size", "2", "--learning_rate", "0.01", "--eval_steps", "1", "--save_steps", "1",
        "--save_total_limit", "2",
    ),
}  # fmt: skip
TIMES = ("seconds_per_step", "images_per_second", "tokens_per_second", "memory_mib")  # two runs differ in these
USUAL = ("--max_train_steps", str(TOTAL), "--logging_steps", "1", "--report_to", "none", "--cpu_threads", "1")


@dataclass
class Verdict:
    """What became of the kills of one script."""

    kills: Counter = field(default_factory=Counter)  # by their kind
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    began_anew: int = 0  # killed before there was a checkpoint


def prepare(script: str, place: Path) -> Path:
    """A tiny model and its data in a new folder, where runs of the script are started."""
    place.mkdir()
    if script == "dreambooth":
        tiny_sd(place / "model")
        photograph(place / "photos")
    elif script == "classification":
        save_timm(place / "model")
        image_folder(place / "images", 3, train=6, test=2)
    else:
        folder(place / "model")
        write_rows(place / "rows.jsonl", sums())
        (place / "pairs").mkdir()
        rows = [{"sentence1": f"{a} is", "sentence2": f"{a * 7 % 5}", "label": a % 2} for a in range(10)]
        write_rows(place / "pairs" / "train.jsonl", rows)
        write_rows(place / "pairs" / "validation.jsonl", rows[:4])
    return place


class Campaign:
    """Kills of one script's run in `place`."""

    def __init__(self, server: Server, script: str, place: Path):
        self.server, self.script, self.place, self.verdict = server, script, prepare(script, place), Verdict()
        start = time.monotonic()
        assert self._run("whole", "--output_dir", "whole", watch={"event": None})[0] == 0
        self.seconds = time.monotonic() - start
        self.events = [line.split("\t") for line in (place / "events-whole").read_text().splitlines()]
        self.whole = self._result("whole")

    def points(self) -> list[tuple[int, str]]:
        """(event, mode) of every kill at a file boundary; only a file that is written can be cut, and none that is
        appended to: ckpt-chaos would cut off what had long been on the disk."""
        last = len(self.events)
        whole_files = [n for n, e in enumerate(self.events, 1) if e[3] == "1" and e[2] != "metrics.jsonl"]
        torn = [(n, "torn") for n in whole_files]
        return [(n, mode) for mode in ("before", "unsynced") for n in range(1, last + 1)] + torn

    def kill_at(self, event: int, mode: str) -> None:
        """Killed there, then gone on with."""
        name = f"{mode}-{event}"
        status, said = self._run(name, "--output_dir", name, watch={"event": event, "mode": mode})
        if status == 137:
            self._judge(name, mode)
        else:
            self.verdict.wrong.append(f"{name}: not killed, status {status}: {said[-300:]}")

    def kill_after(self, seconds: float) -> bool:
        """Killed so long after its start, then gone on with; False if it was over by then."""
        name = f"after-{seconds:.4f}"
        log = str(self.place / f"events-{name}")
        fault = ["kill_at", {"watch": name, "event": None, "log": log}]
        argv = [*SCRIPTS[self.script], *USUAL, "--output_dir", name]
        pid = self.server.start(self.script, argv, self.place, faults=[fault])
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
        if self.server.wait(pid) != -signal.SIGKILL:
            return False
        self._judge(name, "random moment")
        return True

    def _run(self, name: str, *flags: str, watch: dict) -> tuple[int, str]:
        words = {"watch": name, "log": str(self.place / f"events-{name}"), **watch}
        return self.server.run(self.script, [*SCRIPTS[self.script], *USUAL, *flags], self.place,
                               faults=[["kill_at", words]])  # fmt: skip

    def _judge(self, name: str, kind: str) -> None:
        self.verdict.kills[kind] += 1
        log = self.place / f"events-{name}"
        logged = [line.split("\t") for line in log.read_text().splitlines()] if log.exists() else []
        renamed = [re.fullmatch(r"\.checkpoint-(\d+)\.tmp-\d+", event[2]) for event in logged[:-1]
                   if event[1] == "os.rename"]  # fmt: skip
        newest = max((int(match[1]) for match in renamed if match), default=0)  # the last event may not have happened
        argv = [*SCRIPTS[self.script], *USUAL, "--output_dir", name]
        status, said = self.server.run(self.script, [*argv, "--resume_from_checkpoint", "latest"], self.place)
        end = name
        if status == 2 and not newest and said.count("vislora: error:") == 1:  # there was nothing to go on with
            self.verdict.began_anew += 1
            end = f"{name}-anew"
            status, said = self.server.run(self.script, [*argv[:-1], end], self.place)
        resumed = re.search(r"resumed .* at step (\d+)", said)
        if newest and (resumed is None or int(resumed[1]) < newest):
            self.verdict.lost.append(f"{name}: {newest} was complete; {said[-300:]}")
        if status or "Traceback" in said:
            self.verdict.wrong.append(f"{name}: status {status}: {said[-300:]}")
        elif self._result(end) != self.whole:
            self.verdict.wrong.append(f"{name}: another result")
        for folder_name in {name, end}:
            shutil.rmtree(self.place / folder_name, ignore_errors=True)

    def _result(self, name: str) -> dict:
        """What a run has left: tensors as bytes, its scores, and its log without the times."""
        own, last = self.place / name, self.place / name / "checkpoints" / f"checkpoint-{TOTAL}"
        found = [*sorted((own / "adapter").glob("*.safetensors")), *own.glob("head.safetensors")]
        files = {f"end {file.name}": file for file in found}
        files |= {file.name: file for file in sorted(last.glob("*.safetensors"))}
        tensors = {
            f"{label}|{key}": t.numpy().tobytes() for label, file in files.items() for key, t in read(file)[0].items()
        }
        lines = [json.loads(line) for line in (own / "metrics.jsonl").read_text().splitlines()]
        log = [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
        metrics = json.loads((own / "metrics.json").read_text())
        scores = {key: value for key, value in metrics.items() if key.endswith(("accuracy", "loss"))}
        return {**tensors, "scores": scores, "log": log}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="at random moments, for each script")
    parser.add_argument("--every", type=int, default=1, help="of the file boundaries, only each so-manieth")
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory() as place, Server(*o.scripts) as server:
        for script in o.scripts:
            campaign, draw = Campaign(server, script, Path(place) / script), random.Random(o.seed)
            for point in campaign.points()[:: o.every]:
                campaign.kill_at(*point)
            made = 0
            while made < o.kills:
                made += campaign.kill_after(draw.uniform(0, 1.1 * campaign.seconds))
            v = campaign.verdict
            kinds = ", ".join(f"{count} {kind}" for kind, count in v.kills.items())
            print(f"{script}: {v.kills.total()} kills ({kinds}); {len(campaign.events)} file events a run; "
                  f"{v.began_anew} kills before there was a checkpoint")  # fmt: skip
            print(f"  complete checkpoints lost: {len(v.lost)}, wrong resumes: {len(v.wrong)}", flush=True)
            for line in v.lost + v.wrong:
                print(f"  {line}")
            bad += len(v.lost) + len(v.wrong)
    raise SystemExit(bad > 0)


if __name__ == "__main__":
    main()
