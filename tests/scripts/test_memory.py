"""--dry_run's estimate of memory against what runs take: the growth of the process over one that is warm already.

The estimate counts what tensors hold. A process also grows by kernels' workspaces and the allocator's rounding, which
the 15 % have room for, and by libraries that a first run loads, which a small run before the measured one loads here.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from script_runs import REPOSITORY, SCRIPT, photograph
from tiny_sd import tiny_sd

WORLD = str(REPOSITORY / "assets/world/tiny-sd")


def said(text: str) -> dict[str, float]:
    """MiB by phase, and the peak, of a dry run's line on memory."""
    line = [line for line in text.splitlines() if line.startswith("memory: ")][-1]
    named = re.findall(r"(training|encoding photos|drawing images) ([\d.,]+) MiB", line)
    found = {name: float(size.replace(",", "")) for name, size in named}
    return found | {"peak": float(re.match(r"memory: ([\d.,]+) MiB at its peak", line)[1].replace(",", ""))}


def test_the_estimate_follows_what_a_step_is_made_of(run, capsys):
    def of(*flags: str) -> dict[str, float]:
        run("--dry_run", *flags)
        return said(capsys.readouterr().out)

    usual = of("--train_batch_size", "8")
    assert usual["peak"] == max(usual["training"], usual["encoding photos"])
    double = of("--train_batch_size", "16")
    assert 1.5 * usual["training"] < double["training"] < 2 * usual["training"]
    assert of("--train_batch_size", "8", "--gradient_checkpointing")["training"] < 0.8 * usual["training"]
    assert of("--train_batch_size", "8", "--mixed_precision", "bf16")["training"] < 0.8 * usual["training"]
    assert of("--train_batch_size", "8", "--use_ema")["training"] >= usual["training"]
    prior = of("--train_batch_size", "8", "--with_prior_preservation", "--class_prompt", "b")
    assert prior["training"] == pytest.approx(double["training"], rel=0.05) and prior["drawing images"] > 0
    twice = of("--train_batch_size", "8", "--with_prior_preservation", "--class_prompt", "b", "--prior_source",
               "base_output", "--train_text_encoder")  # fmt: skip
    assert twice["training"] > double["training"]


SIZES = {
    "tiny-sd, batch 16": (WORLD, 16),
    "tiny-sd, batch 48": (WORLD, 48),
    "a UNet of 33 M parameters, batch 8": ("wide", 8),
}


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_measured_peaks_are_within_15_percent(tmp_path, size):
    model, batch = SIZES[size]
    photograph(tmp_path / "photos")
    tiny_sd(tmp_path / "tiny")
    if model == "wide":
        tiny_sd(tmp_path / "wide", channels=(128, 256), sample_size=32)
    flags = ["--pretrained_model_name_or_path", model, "--train_batch_size", str(batch)]
    # Large blocks go back to the system when they are freed.
    limits = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    paths = os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "tests")))
    environment = {**os.environ, **limits, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, __file__, *flags], cwd=tmp_path, env=environment, check=True,
                          capture_output=True, text=True)  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    estimated = said(done.stdout)["peak"]
    print(f"\n{size}: {estimated:.0f} MiB estimated, {found['peak']:.0f} measured ({found['step']:.0f} of it the step)")
    assert estimated == pytest.approx(found["peak"], rel=0.15)


def resident(key: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def settled() -> float:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return resident("VmRSS")


def measure(argv: list[str]) -> None:
    """A small run, then the dry run and the run of `argv`; prints the process's growth by the latter."""
    from accelerate.state import AcceleratorState, PartialState

    spec = importlib.util.spec_from_file_location("dreambooth", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    usual = ["--adapter", "nb_lora", "--instance_data_dir", "photos", "--instance_prompt", "a b", "--report_to", "none",
             "--max_train_steps", "3", "--rank", "4"]  # fmt: skip
    found = {}
    train = script.Run.train

    def watched(self, *arguments):
        found["before"] = settled()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        train(self, *arguments)
        found["most"] = resident("VmHWM")

    script.Run.train = watched
    small = ["--pretrained_model_name_or_path", "tiny"]
    for flags in ([*small, "--dry_run"], small, [*argv, "--dry_run"], argv):
        AcceleratorState._reset_state()
        PartialState._reset_state()
        found["start"] = settled()
        script.main([*usual, *flags])
    print(json.dumps({"peak": found["most"] - found["start"], "step": found["most"] - found["before"]}))


if __name__ == "__main__":
    measure(sys.argv[1:])
