"""OD-LoRA's figure 7: how much its warm-up's two numbers matter, N rounds of T steps.

    python eval/od_lora_7.py -o runs/od_lora_7                                          the embedded world, nine runs
    python eval/od_lora_7.py -o OUT --rounds 1 5 --steps 10 -- --max_train_steps 300    flags after -- go to the script

Each pair is one run of --script, in a folder of its own under --output_dir. Whole runs are kept; cut ones go on from
their last checkpoint or, where there is none, begin anew: the grid may be stopped at any time. The paper tunes on
MetaMathQA, which model it does not say, and scores GSM8K (configs/paper/odlora_figure7.yaml); it finds little
difference, and that more of both helps. What is compared here is the mean training loss over the second half of the
steps: with one seed every run meets the same images, timesteps and noise at the same step. od_lora_7.png and .csv.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vislora.errors import EnvironmentFault, InputError, run_script
from vislora.formats.disk import write_bytes
from vislora.spectrum.table import write_csv
from vislora.training.run import RunFolder

SCRIPT = Path(__file__).resolve().parent.parent / "train_scripts" / "dreambooth.py"


def train(run: RunFolder, rounds: int, steps: int, script: Path, flags: list[str]) -> None:
    """One run to its end, unless it is there. Raises EnvironmentFault where it fails, or is under way elsewhere."""
    if run.metrics_file.is_file():
        return
    begun = run.checkpoints.is_dir() and any(run.checkpoints.glob("checkpoint-*"))
    if run.path.exists() and not begun:  # cut before its first checkpoint; nothing of it can be gone on with
        run._lock().close()  # unless it is under way in another process
        shutil.rmtree(run.path)
    own = ["--adapter", "od_lora", "--init_rounds", str(rounds), "--init_steps", str(steps)]
    own += ["--output_dir", str(run.path), *(["--resume_from_checkpoint", "latest"] if begun else [])]
    status = subprocess.run([sys.executable, str(script), *flags, *own]).returncode
    if status:
        wrong = f"N = {rounds}, T = {steps} ended with status {status}"
        raise EnvironmentFault(str(script), wrong, "mend what it says above; the other runs are kept")


def late_loss(run: RunFolder) -> float:
    """The mean loss over the logged lines of the second half of a run. Raises InputError where there is none."""
    try:
        logged = [json.loads(line) for line in run.lines_file.read_text(encoding="utf-8").splitlines()]
        last = max(entry["step"] for entry in logged)
        late = [float(entry["loss"]) for entry in logged if "loss" in entry and entry["step"] > last / 2]
        return sum(late) / len(late)
    except (OSError, ValueError, KeyError, ZeroDivisionError) as error:
        raise InputError(str(run.lines_file), f"holds no losses ({error!r})", "delete that run's folder") from None


def draw(losses: dict[tuple[int, int], float], png: Path) -> list[Path]:
    """Loss against T, a line for each N; returns the paths written."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("OD-LoRA's warm-up of N rounds of T steps: lower is better", fontsize=11)
    axis = figure.subplots()
    for rounds in sorted({n for n, _ in losses}):
        line = sorted((t, loss) for (n, t), loss in losses.items() if n == rounds)
        axis.plot([t for t, _ in line], [loss for _, loss in line], marker="o", label=f"N = {rounds}")
    axis.set_xlabel("T, optimizer steps a round")
    axis.set_xticks(sorted({t for _, t in losses}))
    axis.set_ylabel("mean training loss\n(second half of the steps)")
    axis.grid(True, lw=0.3, alpha=0.6)
    axis.legend(fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    write_bytes(png, picture.getvalue())
    lines = [[n, t, loss] for (n, t), loss in sorted(losses.items())]
    return [png, write_csv(png.with_suffix(".csv"), ("rounds", "steps", "late_loss"), lines)]


def main(argv: list[str]) -> None:
    argv = [word for word in argv if word != "--debug"]
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, nargs="+", default=[1, 3, 5], help="values of N")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 5, 10], help="values of T")
    parser.add_argument("--script", type=Path, default=SCRIPT, help="the training script")
    parser.add_argument("-o", "--output_dir", type=Path, required=True)
    args = parser.parse_args(argv[:cut])
    for flag in ("rounds", "steps"):
        if min(getattr(args, flag)) < 1:
            raise InputError(f"--{flag}", f"{min(getattr(args, flag))} is below 1", "give 1 or more")
    if not args.script.is_file():
        raise InputError(f"--script {args.script}", "does not exist", "name a training script")
    losses = {}
    for rounds in dict.fromkeys(args.rounds):
        for steps in dict.fromkeys(args.steps):
            run = RunFolder(args.output_dir / f"N{rounds}_T{steps}")
            train(run, rounds, steps, args.script, argv[cut + 1 :])
            losses[rounds, steps] = late_loss(run)
            print(f"N = {rounds}, T = {steps}: loss {losses[rounds, steps]:.4f}")
    for written in draw(losses, args.output_dir / "od_lora_7.png"):
        print(f"wrote {written}")


if __name__ == "__main__":
    run_script(main)
