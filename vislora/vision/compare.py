"""Runs beside each other: means over seeds with intervals, and the pictures of NB-LoRA's Figures 6, 7 and 14."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vislora.errors import InputError
from vislora.sweep.cells import STATE
from vislora.training.run import RunFolder
from vislora.vision import plots, results

_MOST = 12  # curves in one picture
BY = ("head", "knn10", "knn20", "knn100", "knn200")
_APART = ("seed", "output_dir", "cpu_threads", "logging_steps", "report_to", "checkpointing_steps")
# two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
      2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip


@dataclass
class Setting:
    """Runs that differ in their seed alone: the options that set them apart from other settings, and their scores."""

    method: str
    options: dict[str, Any]
    runs: list[Path] = field(default_factory=list)
    scores: list[Mapping[str, float]] = field(default_factory=list)

    def mean(self, name: str) -> tuple[float, float]:
        """(mean, half-width of the 95 % interval by Student's t; nan for one seed)."""
        values = [s[name] for s in self.scores if s.get(name) is not None]
        return interval(values)

    @property
    def label(self) -> str:
        return " ".join([self.method, *(f"{k}={v}" for k, v in self.options.items())])


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half-width of its two-sided 95 % interval by Student's t); nan where there are too few values."""
    if not values:
        return math.nan, math.nan
    n = len(values)
    if n == 1:
        return values[0], math.nan
    t = _T[n - 2] if n - 2 < len(_T) else 1.96
    return statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(n)


def find(places: Sequence[Path]) -> list[Path]:
    """The ended runs that `places` are or hold, at any depth; of a sweep's folder not those that chose its settings.
    InputError for none."""
    found = sorted({file.parent for place in places for file in place.rglob("metrics.json")})
    found = [run for run in found if RunFolder(run).config_file.is_file() and not _tuned(run, places)]
    if not found:
        raise InputError("--runs", f"{', '.join(map(str, places))} hold no run that has ended", "name runs' folders")
    return found


def _tuned(run: Path, places: Sequence[Path]) -> bool:
    """Whether `run` is a tuning run of a sweep, and not named itself."""
    try:
        return run not in places and bool(json.loads((run.parent / STATE).read_text(encoding="utf-8")).get("tuning"))
    except (OSError, ValueError, AttributeError):
        return False


def score_names(by: str) -> tuple[str, str, str, str, str]:
    """The figures of metrics.json that are compared: target, source, both's geometric and arithmetic mean, the norm.

    by: one of BY, what the source is scored by."""
    mean = "" if by == "head" else f"_{by}"
    source = "source_accuracy" if by == "head" else f"source_{by}_accuracy"
    return "target_accuracy", source, f"geometric_mean{mean}", f"arithmetic_mean{mean}", "nuclear_ratio"


def settings(runs: Sequence[Path], by: str = "head") -> list[Setting]:
    """The runs by setting, in the order in which settings first occur; a setting is told by the options that differ
    among its method's runs. InputError for a run without source scores `by` that."""
    source = score_names(by)[1]
    flat = {}
    for run in runs:
        own = RunFolder(run).read_config()
        scores = json.loads(RunFolder(run).metrics_file.read_text(encoding="utf-8"))
        if source not in scores:
            remedy = "take another --score, or compare runs with --source_dataset_name" + " and --knn" * (by != "head")
            raise InputError(str(run), f"has no {source}", remedy)
        flat[run] = ({**own, **(own.get("adapter_options") or {})}, scores)
    by_method: dict[str, list[dict[str, Any]]] = {}
    for own, _ in flat.values():
        by_method.setdefault(own["adapter"], []).append(own)
    apart = {}
    for method, rows in by_method.items():
        keys = {k for own in rows for k in own} - {"adapter_options", "adapter", *_APART}
        apart[method] = [k for k in sorted(keys) if len({repr(own.get(k)) for own in rows}) > 1]
    found: dict[str, Setting] = {}
    for run, (own, scores) in flat.items():
        one = Setting(own["adapter"], {k: own.get(k) for k in apart[own["adapter"]]})
        one = found.setdefault(one.label, one)
        one.runs.append(run)
        one.scores.append(scores)
    return list(found.values())


def report(places: Sequence[Path], out: Path, by: str = "head") -> str:
    """Write out/compared.csv and the pictures of all ended runs under `places`; returns the table as text.

    by: one of BY, what the source is scored by: the kept head, or so many neighbours."""
    found, names_of = settings(find(places), by), score_names(by)
    _, source, mean, *_ = names_of
    out.mkdir(parents=True, exist_ok=True)
    names = [k for k in dict.fromkeys(k for s in found for k in s.options)]
    with (out / "compared.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["method", *names, "seeds", *(c for s in names_of for c in (s, f"{s}_half_width"))])
        for s in found:
            means = [f"{v:.6g}" for score in names_of for v in s.mean(score)]
            table.writerow([s.method, *(s.options.get(k, "") for k in names), len(s.scores), *means])
    groups: dict[str, list[Setting]] = {}
    for s in found:
        groups.setdefault(s.method, []).append(s)
    points, spread = {}, {}
    for method, own in groups.items():
        both = [(s.mean(source), s.mean("target_accuracy")) for s in own]
        points[method] = [(a[0], b[0]) for a, b in both]
        spread[method] = [tuple(0 if math.isnan(x[1]) else x[1] for x in pair) for pair in both]
    plots.trade_off(out / "trade_off.png", points, spread)
    shown = sorted(found, key=lambda s: -s.mean(mean)[0])[:_MOST]
    curves = {s.label: results.mean_curve([RunFolder(run).lines_file for run in s.runs]) for s in found if s in shown}
    plots.over_steps(out / "steps.png", curves)
    for name in names:
        _against(out, name, groups, mean)
    first = names_of[:3]
    rows = [f"{s.label:60} " + " ".join(f"{s.mean(k)[0]:.3f} +- {s.mean(k)[1]:.3f}" for k in first) for s in found]
    title = f"{'setting':60} {', '.join(first)}".replace("_", " ")
    rows += [f"steps.png has the {_MOST} settings of highest {mean.replace('_', ' ')}"] if len(found) > _MOST else []
    return "\n".join([title, *rows, f"look at    {out}/trade_off.png"])


def _against(out: Path, name: str, groups: Mapping[str, Sequence[Setting]], mean: str) -> None:
    """The geometric mean over one numeric option: of each method the settings whose other options have their commonest
    values, so that one factor moves at a time."""
    lines = {}
    for method, own in groups.items():
        usual = {key: statistics.mode(s.options[key] for s in own) for key in own[0].options}
        line = [
            (float(s.options[name]), *s.mean(mean)) for s in own
            if isinstance(s.options.get(name), int | float) and not isinstance(s.options[name], bool)
            and all(v == usual[k] for k, v in s.options.items() if k != name)
        ]  # fmt: skip
        if len(line) > 1:
            lines[method] = sorted(line)
    if lines:
        values = [x for line in lines.values() for x, _, _ in line]
        plots.against(out / f"over_{name}.png", name, lines, log=min(values) > 0 and max(values) / min(values) > 5)
