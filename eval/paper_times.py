"""What each file of configs/paper takes on one H100, by arithmetic from what the papers measured.

    python eval/paper_times.py                                   every file, as its header states it
    python eval/paper_times.py configs/paper/nblora_table8.yaml  some of them

Nothing here is measured by us. Language, training alone: an epoch of LLaMA 3 8B on 100K rows of MetaMathQA takes LoRA
1.61 hours (OD-LoRA, Table 6), and other runs in proportion to weights and rows; a row of Code-Feedback takes 1.72 /
1.61 of that (the same table), one of Commonsense-170K what LoRA-SB's Table 5 makes of it, one of GLUE a quarter, which
is ours. A step without gradient checkpointing is four operations a weight and token; checkpointing and weights that
train are two more each. What methods cost beside each other, and quantized weights, are left out. Images, with
scoring, by guesses of ours: 800 a second for a ViT-B and 300 for a ViT-L, and two minutes; 7 steps a second of Stable
Diffusion, and three minutes of drawing.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vislora.config import read_yaml
from vislora.errors import run_script
from vislora.sweep import plan

FOLDER = Path(__file__).resolve().parent.parent / "configs" / "paper"
WEIGHTS = {  # billions
    "llama-2-7b": 6.74, "llama-2-13b": 13.02, "llama-3-8b": 8.03, "llama-3-70b": 70.6, "llama-3.2-3b": 3.21,
    "mistral-7b": 7.24, "gemma-7b": 8.54, "gemma-2b": 2.51, "gemma-2-9b": 9.24, "v6-finch-7b": 7.64,
    "roberta-large": 0.355,
}  # fmt: skip
ROWS = {"metamathqa": 395_000, "codefeedback-filtered-instruction": 156_526, "commonsense_170k.json": 170_420,
        "cola": 8_551, "rte": 2_490, "mrpc": 3_668, "stsb": 5_749, "sst2": 67_349, "qnli": 104_743,
        "svhn": 73_257, "cifar100": 50_000, "food101": 75_750, "stanfordcars": 8_144, "cub200": 5_994, "dtd": 3_760,
        "sun397": 19_850}  # fmt: skip
EPOCH = 1.61 / (8.03 * 100_000)  # hours a billion weights and row of MetaMathQA
_MISTRAL, _LLAMA = 3 + 3 / 60 + 57 / 3600, 4 + 54 / 60 + 31 / 3600  # hours an epoch, 7B and 3B, in LoRA-SB's Table 5
ROW = {"metamathqa": 1.0, "codefeedback-filtered-instruction": 1.72 / 1.61,
       "commonsense_170k.json": (_LLAMA / (3.21 * 170_420)) / (_MISTRAL / (7.24 * 50_000))}  # fmt: skip
GLUE = 0.25
IMAGES = {"vit_base": 800, "vit_large": 300}  # a second
SCORING, STEPS, DRAWING = 120, 7, 180  # seconds, steps a second, seconds


def hours(settings: Mapping[str, Any]) -> float:
    """Of one run of the given settings."""
    if "pretrained_model_name_or_path" in settings:
        return (settings["max_train_steps"] / STEPS + DRAWING) / 3600
    if "train_batch_size" in settings:
        rate = next(value for name, value in IMAGES.items() if settings["model_name_or_path"].startswith(name))
        return (_rows(settings) * settings["num_train_epochs"] / rate + SCORING) / 3600
    base, data = str(settings["model_name_or_path"]).lower().rpartition("/")[2], _data(settings)
    weights = next(value for name, value in WEIGHTS.items() if name in base)
    rows = _rows(settings) * settings.get("num_train_epochs", 1)
    if steps := settings.get("max_train_steps"):
        rows = steps * settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    operations = 4 + 2 * bool(settings.get("gradient_checkpointing")) + 2 * (settings["adapter"] == "full")
    return EPOCH * weights * rows * ROW.get(data, GLUE) * operations / 4


def _data(settings: Mapping[str, Any]) -> str:
    return str(settings.get("task_name") or settings["dataset_name"]).lower().rpartition("/")[2]


def _rows(settings: Mapping[str, Any]) -> int:
    cut = re.fullmatch(r"train\[:(\d+)\]", str(settings.get("dataset_split")))
    return int(cut[1]) if cut else ROWS[_data(settings)]


def of_file(file: Path) -> tuple[int, float]:
    """(runs, hours in all) of a file of configs/paper. Runs that two points of a grid share count once."""
    raw = read_yaml(file)
    if "script" not in raw:
        return 1, hours(raw)
    cells = {cell.folder: cell.settings for cell in plan.read(file).cells({})}
    return len(cells), sum(map(hours, cells.values()))


def words(runs: int, total: float) -> str:
    """As a header states it: "18 runs, 36 hours"."""
    many = f"{runs} runs, " if runs > 1 else ""
    if total >= 9.5:
        return f"{many}{total:.0f} hours"
    if total >= 0.95:
        return f"{many}{total:.1f} hours"
    return many + ("a minute" if total < 0.025 else f"{60 * total:.0f} minutes")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="of configs/paper; none: all of them")
    args = parser.parse_args([word for word in argv if word != "--debug"])
    for file in args.files or sorted(FOLDER.rglob("*.yaml")):
        print(f"{file.stem:<44} {words(*of_file(file))}")


if __name__ == "__main__":
    run_script(main)
