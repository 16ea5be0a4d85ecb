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
    made_by: str = ""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds (of means over subjects) and the half width of its 95 % t interval; nan for one seed."""

    value: float
    half: float
    seeds: int


@dataclass(frozen=True)
class Group:
    """All cells that differ in subject and seed alone; in seed alone where `subject` is one."""

    method: str
    varied: dict[str, Any]
    means: dict[str, Mean | None]
    failed: int
    subject: str | None = None


@dataclass(frozen=True)
class Tried:
    """What tuning saw of a method: every value with its score (None where no run of it ended well), and its choice.

    Scores are means over the subjects and seeds that all values finished, which the choice goes by. failed: the values
    with a run that failed. like: the method whose choice it takes, having no runs of its own.
    """

    setting: str
    method: str
    by: str
    scores: list[tuple[Any, float | None]]
    failed: list[Any]
    chosen: Any
    like: str = ""

    @property
    def at_the_end(self) -> bool:
        """Whether a value beyond those tried might have been better still."""
        values = [value for value, _ in self.scores]
        return len(values) > 1 and self.chosen in (values[0], values[-1])


def rows(plan: Plan, sweep: Path, cells: Iterable[Cell]) -> list[Row]:
    """One row for each cell that has ended."""
    found = []
    for cell in cells:
        place = Place(sweep, cell)
        outcome = place.outcome()
        if outcome is not None:
            values = {column: place.value(where) if outcome.ok else None for column, where in plan.collect.items()}
            found.append(Row(cell, values, outcome.seconds, outcome.last, outcome.made_by))
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


def groups(plan: Plan, found: Sequence[Row], apart: bool = False) -> list[Group]:
    """Rows that are no tuning runs, by method and varied settings, in the order of the plan. apart: by subject, too."""
    keyed: dict[tuple, list[Row]] = {}
    for row in found:
        if row.cell.tuning is None:
            key = row.cell.method, json.dumps(row.cell.varied), row.cell.subject if apart else None
            keyed.setdefault(key, []).append(row)
    out = []
    for (method, _, subject), members in keyed.items():
        means = {c: over_seeds([(row.cell.seed, row.values[c]) for row in members]) for c in plan.collect}
        out.append(Group(method, members[0].cell.varied, means, sum(bool(row.failure) for row in members), subject))
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
    means = scores(setting, found, method)
    if not means:
        return None
    best = (max if setting.goal == "max" else min)(means, key=means.__getitem__)
    return setting.values_for(method)[best]


def scores(setting: Setting, found: Sequence[Row], method: str) -> dict[int, float]:
    """{index of a tuned value: mean of its column} over the subjects and seeds that all values with one finished."""
    each: dict[int, dict[tuple, float]] = {}
    for row in found:
        score = row.values[setting.by]
        if row.cell.tuning == setting.name and row.cell.method == method and score is not None:
            index = setting.values_for(method).index(row.cell.varied[setting.name])
            each.setdefault(index, {})[row.cell.subject, row.cell.seed] = score
    shared = sorted(set.intersection(*(set(by) for by in each.values())) if each else set(), key=str)
    return {index: math.fsum(by[k] for k in shared) / len(shared) for index, by in sorted(each.items()) if shared}


def tried(plan: Plan, found: Sequence[Row], chosen: dict[str, dict[str, Any]]) -> list[Tried]:
    """What tuning saw and chose, method by method in the plan's order; all its values, also where none ended well."""
    out = []
    for setting in plan.tune:
        for method in plan.methods:
            own = chosen.get(method, {}).get(setting.name)
            if method in setting.like:
                out.append(Tried(setting.name, method, setting.by, [], [], own, setting.like[method]))
            elif setting.is_for(method):
                means, ended = scores(setting, found, method), [row for row in found if row.cell.method == method]
                each = [(value, means.get(index)) for index, value in enumerate(setting.values_for(method))]
                failed = [r.cell.varied[setting.name] for r in ended if r.failure and r.cell.tuning == setting.name]
                out.append(Tried(setting.name, method, setting.by, each, failed, own))
    return out


def write(plan: Plan, sweep: Path, found: Sequence[Row], chosen: dict[str, dict[str, Any]]) -> list[Path]:
    """cells.csv (every cell), table.csv, table.json and table.md (means with intervals), subjects.csv (by subject)."""
    varied = list(dict.fromkeys(name for row in found for name in row.cell.varied))
    columns = list(plan.collect)
    paths = [sweep / name for name in ("cells.csv", "table.csv", "table.json", "table.md", "subjects.csv")]
    with paths[0].open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["method", "subject", "seed", *varied, "tuning", *columns, "seconds", "failure", "made_by"])
        for row in found:
            own = [row.cell.method, row.cell.subject, row.cell.seed, *(row.cell.varied.get(n, "") for n in varied)]
            out.writerow([*own, row.cell.tuning or "", *(row.values[c] for c in columns), row.seconds, row.failure,
                          row.made_by])  # fmt: skip
    table = groups(plan, found)
    varied = list(dict.fromkeys(name for group in table for name in group.varied))
    _write_means(paths[1], table, varied, columns, [])
    _write_means(paths[4], groups(plan, found, apart=True), varied, columns, ["subject"])
    grid = tried(plan, found, chosen)
    body = {"sweep": plan.name, "confidence": CONFIDENCE, "chosen": chosen, "rows": [_as_json(g) for g in table],
            "tuning": [vars(one) for one in grid]}
    paths[2].write_text(json.dumps(body, indent=1) + "\n")
    paths[3].write_text(markdown(table, varied, columns) + tuning_markdown(grid))
    return paths


def _write_means(path: Path, table: Sequence[Group], varied: Sequence[str], columns: Sequence[str],
                 also: Sequence[str]) -> None:  # fmt: skip
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        ends = [f"{c}{end}" for c in columns for end in ("", "_half")]
        out.writerow(["method", *also, *varied, *ends, "seeds", "failed"])
        for group in table:
            pairs = [(m.value, m.half) if m else ("", "") for m in group.means.values()]
            seeds = max((m.seeds for m in group.means.values() if m), default=0)
            own = [*([group.subject] if also else []), *(group.varied.get(name, "") for name in varied)]
            out.writerow([group.method, *own, *(v for pair in pairs for v in pair), seeds, group.failed])


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


def tuning_words(one: Tried) -> tuple[str, str]:
    """(the values with their scores, the choice) of what was tried, in words."""
    said = [f"{value}: " + ("" if score is None else f"{score:.4g}") for value, score in one.scores]
    for index, (value, score) in enumerate(one.scores):
        failed, none = value in one.failed, score is None
        said[index] += ("failed" if none else " (a run failed)") if failed else "not run" if none else ""
    each = ", ".join(said)
    choice = "none yet" if one.chosen is None else f"{one.chosen}"
    return (f"as {one.like}" if one.like else each), choice + ", at the end of its list" * one.at_the_end


def tuning_markdown(grid: Sequence[Tried]) -> str:
    """What tuning tried, as a Markdown table after an empty line; empty where nothing is tuned."""
    if not grid:
        return ""
    lines = [f"| {one.method} | {one.setting}, by {one.by} | {' | '.join(tuning_words(one))} |" for one in grid]
    return "\n".join(["", "| method | tuned | tried | chosen |", "|---|---|---|---|", *lines]) + "\n"
