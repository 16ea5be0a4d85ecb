"""What came out of a sweep, as one table: every cell, and means over subjects and seeds with their intervals."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vislora.sweep.cells import Place
from vislora.sweep.plan import Cell, Plan, Setting

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Row:
    """One finished or failed cell with the numbers collected from it (None where one is missing)."""

    cell: Cell
    values: dict[str, float | None]
    seconds: float
    failure: str


@dataclass(frozen=True)
class Mean:
    """A mean over seeds (of means over subjects) and the half width of its 95 % t interval; nan for one seed."""

    value: float
    half: float
    seeds: int


@dataclass(frozen=True)
class Group:
    """All cells that differ in subject and seed alone."""

    method: str
    varied: dict[str, Any]
    means: dict[str, Mean | None]
    failed: int


def rows(plan: Plan, sweep: Path, cells: Iterable[Cell]) -> list[Row]:
    """One row for each cell that has ended."""
    found = []
    for cell in cells:
        place = Place(sweep, cell)
        outcome = place.outcome()
        if outcome is not None:
            values = {column: place.value(where) if outcome.ok else None for column, where in plan.collect.items()}
            found.append(Row(cell, values, outcome.seconds, outcome.last))
    return found


def interval(values: Sequence[float]) -> Mean:
    """Mean and half width of the 95 % interval of Student's t over independent values."""
    from scipy.stats import t

    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return Mean(mean, math.nan, 1)
    if len(set(values)) == 1:  # exactly, which the mean's rounding would hide
        return Mean(values[0], 0.0, n)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    return Mean(mean, float(t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * spread / math.sqrt(n), n)


def groups(plan: Plan, found: Sequence[Row]) -> list[Group]:
    """Rows that are no tuning runs, by method and varied settings, in the order of the plan."""
    keyed: dict[tuple, list[Row]] = {}
    for row in found:
        if row.cell.tuning is None:
            keyed.setdefault((row.cell.method, json.dumps(row.cell.varied)), []).append(row)
    out = []
    for (method, _), members in keyed.items():
        means = {c: over_seeds([(row.cell.seed, row.values[c]) for row in members]) for c in plan.collect}
        out.append(Group(method, members[0].cell.varied, means, sum(bool(row.failure) for row in members)))
    return out


def over_seeds(values: Iterable[tuple[int, float | None]]) -> Mean | None:
    """Over seeds, of the means within each; values: (seed, number or None). None where there is no number."""
    by_seed: dict[int, list[float]] = {}
    for seed, value in values:
        if value is not None:
            by_seed.setdefault(seed, []).append(value)
    return interval([math.fsum(v) / len(v) for v in by_seed.values()]) if by_seed else None


def choose(setting: Setting, found: Sequence[Row], method: str) -> Any:
    """The value of a tuned setting with the best mean of its column; None where no run of the method ended well.

    Values are compared on the subjects and seeds that all of them finished; the earlier of equal ones wins.
    """
    scores: dict[int, dict[tuple, float]] = {}
    for row in found:
        score = row.values[setting.by]
        if row.cell.tuning == setting.name and row.cell.method == method and score is not None:
            index = setting.values_for(method).index(row.cell.varied[setting.name])
            scores.setdefault(index, {})[row.cell.subject, row.cell.seed] = score
    shared = set.intersection(*(set(by) for by in scores.values())) if scores else set()
    if not shared:
        return None
    sign = 1 if setting.goal == "max" else -1
    means = {index: sign * math.fsum(by[k] for k in sorted(shared, key=str)) for index, by in sorted(scores.items())}
    return setting.values_for(method)[max(means, key=means.__getitem__)]


def write(plan: Plan, sweep: Path, found: Sequence[Row], chosen: dict[str, dict[str, Any]]) -> list[Path]:
    """cells.csv (every cell), table.csv, table.json and table.md (means with intervals)."""
    varied = list(dict.fromkeys(name for row in found for name in row.cell.varied))
    columns = list(plan.collect)
    paths = [sweep / name for name in ("cells.csv", "table.csv", "table.json", "table.md")]
    with paths[0].open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["method", "subject", "seed", *varied, "tuning", *columns, "seconds", "failure"])
        for row in found:
            own = [row.cell.method, row.cell.subject, row.cell.seed, *(row.cell.varied.get(n, "") for n in varied)]
            out.writerow([*own, row.cell.tuning or "", *(row.values[c] for c in columns), row.seconds, row.failure])
    table = groups(plan, found)
    varied = list(dict.fromkeys(name for group in table for name in group.varied))
    with paths[1].open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["method", *varied, *(f"{c}{end}" for c in columns for end in ("", "_half")), "seeds", "failed"])
        for group in table:
            pairs = [(m.value, m.half) if m else ("", "") for m in group.means.values()]
            seeds = max((m.seeds for m in group.means.values() if m), default=0)
            own = [group.varied.get(name, "") for name in varied]
            out.writerow([group.method, *own, *(v for pair in pairs for v in pair), seeds, group.failed])
    body = {"sweep": plan.name, "confidence": CONFIDENCE, "chosen": chosen, "rows": [_as_json(g) for g in table]}
    paths[2].write_text(json.dumps(body, indent=1) + "\n")
    paths[3].write_text(markdown(table, varied, columns))
    return paths


def _as_json(group: Group) -> dict[str, Any]:
    means = {name: None if m is None else {"mean": m.value, "half": None if math.isnan(m.half) else m.half,
                                           "seeds": m.seeds} for name, m in group.means.items()}  # fmt: skip
    return {"method": group.method, "settings": group.varied, "failed": group.failed, "values": means}


def markdown(table: Sequence[Group], varied: Sequence[str], columns: Sequence[str]) -> str:
    """The means as a Markdown table; +- is the half width of the 95 % interval over seeds."""
    head = ["method", *varied, *columns]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for group in table:
        own = [group.method + (f" ({group.failed} failed)" if group.failed else "")]
        own += [str(group.varied.get(name, "")) for name in varied]
        lines.append("| " + " | ".join([*own, *(number(group.means[c]) for c in columns)]) + " |")
    return "\n".join(lines) + "\n"


def number(mean: Mean | None) -> str:
    """A mean as the tables show it; empty where there is none."""
    if mean is None:
        return ""
    return f"{mean.value:.4g}" if math.isnan(mean.half) else f"{mean.value:.4g} ± {mean.half:.2g}"
