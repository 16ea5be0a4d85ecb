"""The goals of speed, each a ratio that eval/speed.py measures, and whether they are met."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cost import show
from speed_models import HOSTS

SLACK = 0.03  # ratios of one machine move by so much from run to run


@dataclass(frozen=True)
class Goal:
    """What is measured on which model, and the most that it may be. value: from {variant: row}."""

    name: str
    host: str
    rank: int
    what: str
    limit: float
    value: Callable[[dict[str, dict]], float]
    dtype: str = "float32"


def _time(variant: str, reference: str) -> Callable[[dict[str, dict]], float]:
    return lambda rows: rows[variant][f"over {reference}"][0]


def _share(key: str) -> Callable[[dict[str, dict]], float]:
    return lambda rows: rows["lora"][f"{key} over frozen"]


def _casts(rows: dict[str, dict]) -> float:
    return rows["lora"]["casts"] - rows["frozen"]["casts"]


def _operators(rows: dict[str, dict]) -> float:
    return (rows["lora"]["ops"] - rows["frozen"]["ops"]) / 88  # the UNet's adapted layers


def _full(*words) -> Goal:
    """A goal on a model of full size, which a GPU measures in bf16."""
    return Goal(*words, "bfloat16")


GOALS = (
    Goal("P1", "unet", 16, "LoRA's step / frozen", 1.05, _time("lora", "frozen")),
    Goal("P2", "vit", 16, "LoRA's step / frozen", 1.10, _time("lora", "frozen")),
    Goal("P3", "unet", 16, "LoRA's step / PEFT's", 0.92, _time("lora", "peft:lora")),
    Goal("P3", "vit", 16, "LoRA's step / PEFT's", 0.90, _time("lora", "peft:lora")),
    Goal("P4", "unet", 16, "saved for the backward / frozen", 1.065, _share("saved")),
    Goal("P4", "unet", 16, "saved for the backward / frozen", 1.065, _share("saved"), "bfloat16"),
    Goal("P5", "unet", 16, "peak of living tensors / frozen", 1.08, _share("peak")),
    Goal("P5", "vit", 16, "peak of living tensors / frozen", 1.08, _share("peak")),
    Goal("P6", "unet", 16, "operators more an adapted layer", 6, _operators),
    Goal("P6", "unet", 16, "casts of activations, more than frozen", 0, _casts, "bfloat16"),
    Goal("P7", "linear", 128, "LoRA's step / frozen", 2.0, _time("lora", "frozen")),
    Goal("P8", "unet", 16, "NB-LoRA's step / LoRA's", 1.03, _time("nb_lora", "lora")),
    Goal("P8", "llm_block", 128, "NB-LoRA's step / LoRA's", 1.08, _time("nb_lora", "lora")),
    Goal("P10", "unet", 16, "DoRA's step / LoRA's", 1.15, _time("dora", "lora")),
    Goal("P10", "llm_block", 16, "DoRA's step / LoRA's", 1.15, _time("dora", "lora")),
    Goal("OD", "unet", 16, "OD-LoRA's step / LoRA's", 1.03, _time("od_lora", "lora")),
    Goal("SORSA", "unet", 16, "SORSA's step / LoRA's", 1.03, _time("sorsa", "lora")),
    Goal("OD", "llm_block", 16, "OD-LoRA's step / LoRA's", 1.03, _time("od_lora", "lora")),
    Goal("SORSA", "llm_block", 16, "SORSA's step / LoRA's", 1.03, _time("sorsa", "lora")),
    _full("P1", "sd15", 16, "LoRA's step / frozen", 1.05, _time("lora", "frozen")),
    _full("P2", "vit_b", 16, "LoRA's step / frozen", 1.10, _time("lora", "frozen")),
    _full("P3", "sd15", 16, "LoRA's step / PEFT's", 0.92, _time("lora", "peft:lora")),
    _full("P3", "vit_b", 16, "LoRA's step / PEFT's", 0.90, _time("lora", "peft:lora")),
    _full("P4", "sd15", 16, "peak memory of a step / frozen", 1.065, _share("peak")),
    _full("P8", "sd15", 16, "NB-LoRA's step / LoRA's", 1.03, _time("nb_lora", "lora")),
    _full("P8", "llama_1b", 16, "NB-LoRA's step / LoRA's", 1.03, _time("nb_lora", "lora")),
    _full("P8", "llama_1b", 128, "NB-LoRA's step / LoRA's", 1.08, _time("nb_lora", "lora")),
    _full("P8", "llama_8b", 16, "NB-LoRA's step / LoRA's", 1.03, _time("nb_lora", "lora")),
    _full("P10", "llama_1b", 16, "DoRA's step / LoRA's", 1.15, _time("dora", "lora")),
    _full("P13", "llama_1b", 16, "LoRA's step / training the norms alone", 1.30, _time("lora", "norms")),
    _full("P13", "llama_8b", 16, "LoRA's step / training the norms alone", 1.30, _time("lora", "norms")),
    _full("OD", "sd15", 16, "OD-LoRA's step / LoRA's", 1.03, _time("od_lora", "lora")),
    _full("OD", "llama_1b", 16, "OD-LoRA's step / LoRA's", 1.03, _time("od_lora", "lora")),
    _full("SORSA", "sd15", 16, "SORSA's step / LoRA's", 1.03, _time("sorsa", "lora")),
)


def wanted(hosts: list[str], size: str) -> list[tuple[str, int, list[str], str]]:
    """(model, rank, variants, dtype) of the measurements that the goals on these models need."""
    lean, more = ["frozen", "peft:lora", "lora"], ["nb_lora", "dora", "od_lora", "sorsa"]
    found: dict[tuple[str, int, str], list[str]] = {}
    for goal in GOALS:
        if goal.host in hosts:
            own = found.setdefault((goal.host, goal.rank if size != "tiny" else 4, goal.dtype), list(lean))
            asked = more if goal.name in ("P8", "P10", "OD", "SORSA") else ["norms"] if goal.name == "P13" else []
            own += [variant for variant in asked if variant not in own]
    without = {host: HOSTS[host](size).without for host in hosts}
    return [(host, rank, [v for v in chosen if v not in without[host]], dtype)
            for (host, rank, dtype), chosen in found.items()]  # fmt: skip


def check(rows: list[dict]) -> bool:
    """Print every goal beside what was measured; whether all are met but for `SLACK`."""
    out, good = [["goal", "model", "what", "limit", "measured", ""]], True
    for goal in GOALS:
        own = {row["variant"]: row for row in rows
               if (row["model"], row["rank"], row["dtype"]) == (goal.host, goal.rank, goal.dtype)}
        if own:
            value = goal.value(own)
            passed = value <= goal.limit + (SLACK if goal.limit else 0)
            good = good and passed
            said = "met" if value <= goal.limit else "within the slack" if passed else "missed"
            model = f"{goal.host} r {goal.rank}{' bf16' if goal.dtype == 'bfloat16' else ''}"
            out.append([goal.name, model, goal.what, f"{goal.limit:g}", f"{value:.3f}", said])
    print(show(out))
    return good
