"""Draws the pictures of a sweep from what has ended so far: each a PNG with a CSV of what it shows."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from vislora.formats.disk import write_bytes
from vislora.sweep import sheet
from vislora.sweep.cells import Place
from vislora.sweep.pictures import Against, Images, Picture, Scatter, Steps
from vislora.sweep.plan import Plan
from vislora.sweep.series import over_steps
from vislora.sweep.table import Group, Mean, Row, groups, over_seeds

# Okabe and Ito's colours, which people with any colour vision can tell apart, and three more; then with other strokes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B", "#7F7F7F", "#5B2A86")
STROKES, MARKS = ("-", "--", ":", "-."), "osD^vP*XpH<>"
WIDTH = 5.6  # inches: a page shows it at the width of a phone, and 9 points stay legible

Lines = list[list]


@dataclass(frozen=True)
class Drawn:
    """A picture and its files; None for both where nothing has ended that it could show."""

    picture: Picture
    png: Path | None = None
    csv: Path | None = None


def draw(plan: Plan, sweep: Path, found: Sequence[Row]) -> list[Drawn]:
    """All pictures of the plan, into the sweep's folder. found: the rows of its cells; tuning runs are not shown."""
    return [_one(plan, sweep, picture, [row for row in found if shows(picture, row)]) for picture in plan.pictures]


def shows(picture: Picture, row: Row) -> bool:
    """Whether a row is among those that a picture is of."""
    if row.cell.tuning is not None or row.failure:
        return False
    if picture.methods and row.cell.method not in picture.methods:
        return False
    return all(row.cell.settings.get(name) == value for name, value in picture.where.items())


def _one(plan: Plan, sweep: Path, picture: Picture, found: list[Row]) -> Drawn:
    if isinstance(picture, Images):
        made = sheet.draw(picture, sweep, found)
    else:
        kind = {Scatter: scatter, Steps: steps, Against: against}[type(picture)]
        made = kind(plan, sweep, picture, found)
    if made is None:
        return Drawn(picture)
    image, lines = made
    out = io.StringIO()
    csv.writer(out).writerows(lines)
    paths = [sweep / f"{picture.name}{end}" for end in (".png", ".csv")]
    write_bytes(paths[0], image)
    write_bytes(paths[1], out.getvalue().encode())
    return Drawn(picture, *paths)


def scatter(plan: Plan, sweep: Path, picture: Scatter, found: list[Row]) -> tuple[bytes, Lines] | None:
    """A column against a column, means with intervals, and the Pareto front where it is asked for."""
    whole = [group for group in groups(plan, found) if group.means[picture.x] and group.means[picture.y]]
    if not whole:
        return None
    figure, (axis,) = _figure(1, 4.6)
    points = [(group.means[picture.x], group.means[picture.y]) for group in whole]
    best = front([(x.value, y.value) for x, y in points], picture.front)
    line_of = {label: name for name, labels in picture.lines.items() for label in labels}
    series: dict[str, list[int]] = {name: [] for name in picture.lines}  # first, so that their colours differ
    for i, group in enumerate(whole):
        series.setdefault(line_of.get(group.method, group.method), []).append(i)
    series = {name: members for name, members in series.items() if members}
    for order, (name, members) in enumerate(series.items()):
        if name in picture.lines:
            members.sort(key=lambda i: picture.lines[name].index(whole[i].method))
        style = _style(order)
        joined = name in picture.lines or len(members) > 1
        axis.errorbar(
            [points[i][0].value for i in members], [points[i][1].value for i in members],
            xerr=[_half(points[i][0]) for i in members], yerr=[_half(points[i][1]) for i in members],
            label=name, marker=MARKS[order % len(MARKS)], linestyle=style[1] if joined else "", color=style[0],
            markersize=6, elinewidth=0.8, linewidth=1.5,
        )  # fmt: skip
        right, up = ((1, -1), (-1, 1), (1, 1), (-1, -1))[order % 4]  # so that lines that meet can still be read
        for i, words in zip(members, _apart([whole[i] for i in members]), strict=True) if joined else ():
            axis.annotate(words, (points[i][0].value, points[i][1].value), xytext=(4 * right, 4 * up),
                          textcoords="offset points", fontsize=7, color=style[0],
                          ha="left" if right > 0 else "right", va="bottom" if up > 0 else "top",
                          path_effects=[withStroke(linewidth=2, foreground="white")])  # fmt: skip
    if picture.front:
        ends = sorted((points[i][0].value, points[i][1].value) for i in best)
        axis.plot(*zip(*ends, strict=True), color="0.75", linewidth=5, zorder=0, solid_capstyle="round",
                  label="Pareto front of the means")  # fmt: skip
    better = {"min": "less is better", "max": "more is better"}
    for side, column in (("x", picture.x), ("y", picture.y)):
        words = f"{column} ({better[picture.front[side]]})" if picture.front else column
        getattr(axis, f"set_{side}label")(words)
    _legend(figure, [axis])
    lines: Lines = [["method", "settings", picture.x, f"{picture.x}_half", picture.y, f"{picture.y}_half", "seeds",
                     "line", "on_front"]]  # fmt: skip
    for i, group in enumerate(whole):
        x, y = points[i]
        lines.append([group.method, _settings(group), x.value, x.half, y.value, y.half, x.seeds,
                      line_of.get(group.method, ""), int(i in best) if picture.front else ""])  # fmt: skip
    return _png(figure), lines


def front(points: Sequence[tuple[float, float]], goals: dict[str, str]) -> set[int]:
    """Indices of the points that no other is at least as good as in both coordinates and better in one."""
    if not goals:
        return set()
    signs = [1 if goals[side] == "max" else -1 for side in ("x", "y")]
    good = [(signs[0] * x, signs[1] * y) for x, y in points]
    return {i for i, a in enumerate(good) if not any(b != a and b[0] >= a[0] and b[1] >= a[1] for b in good)}


def steps(plan: Plan, sweep: Path, picture: Steps, found: list[Row]) -> tuple[bytes, Lines] | None:
    """Values of metrics.jsonl over training steps: a panel each, a line for each method, a band for its interval."""
    keyed: dict[str, list[Row]] = {}
    for row in found:
        shown = {name: value for name, value in row.cell.varied.items() if name not in picture.where}
        words = ", ".join([row.cell.method, *(f"{name} {value}" for name, value in shown.items())])
        keyed.setdefault(words, []).append(row)
    lines: Lines = [["value", "method", "step", "mean", "half", "seeds"]]
    figure, axes = _figure(len(picture.values), 2.6)
    for axis, (value, path) in zip(axes, picture.values.items(), strict=True):
        for order, (name, members) in enumerate(keyed.items()):
            tracks = [over_steps(Place(sweep, row.cell).run, path) for row in members]
            seen = [(step, over_seeds([(row.cell.seed, track[step]) for row, track in zip(members, tracks, strict=True)
                                       if step in track])) for step in sorted({s for track in tracks for s in track})]
            _line(axis, name, order, seen)
            lines += [[value, name, step, mean.value, mean.half, mean.seeds] for step, mean in seen]
        axis.set_ylabel(value)
        if picture.log:
            axis.set_yscale("log")
    axes[-1].set_xlabel("training step")
    if len(lines) == 1:
        return None
    _legend(figure, axes)
    return _png(figure), lines


def against(plan: Plan, sweep: Path, picture: Against, found: list[Row]) -> tuple[bytes, Lines] | None:
    """Columns against a varied setting: a panel each, a line for each method and for what else varied."""
    keyed: dict[str, list[tuple[object, Group]]] = {}
    for group in groups(plan, found):
        if picture.setting in group.varied:
            rest = {k: v for k, v in group.varied.items() if k != picture.setting and k not in picture.where}
            name = ", ".join([group.method, *(f"{k} {v}" for k, v in rest.items())])
            keyed.setdefault(name, []).append((group.varied[picture.setting], group))
    if not keyed:
        return None
    values = next(s.values for s in (*plan.grid, *plan.factors) if s.name == picture.setting)
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    lines: Lines = [["value", "method", picture.setting, "mean", "half", "seeds"]]
    figure, axes = _figure(len(picture.values), 2.6)
    for axis, column in zip(axes, picture.values, strict=True):
        for order, (name, members) in enumerate(keyed.items()):
            seen = [(value, group.means[column]) for value, group in members if group.means[column]]
            seen.sort(key=lambda pair: values.index(pair[0]))
            _line(axis, name, order, [(v if numbers else values.index(v), mean) for v, mean in seen], mark=True)
            lines += [[column, name, value, mean.value, mean.half, mean.seeds] for value, mean in seen]
        if picture.log and numbers:
            axis.set_xscale("log")
        axis.minorticks_off()
        axis.set_xticks(values if numbers else range(len(values)), [str(value) for value in values])
        axis.set_ylabel(column)
    axes[-1].set_xlabel(picture.setting)
    _legend(figure, axes)
    return _png(figure), lines


def _line(axis, name: str, order: int, seen: list[tuple[float, Mean]], mark: bool = False) -> None:
    """A line of means, and for several seeds its interval: bars where the points are marked, else a band."""
    if not seen:
        return
    colour, stroke = _style(order)
    xs, ys, halves = [x for x, _ in seen], [m.value for _, m in seen], [_half(m) for _, m in seen]
    if mark:
        axis.errorbar(xs, ys, yerr=halves, label=name, color=colour, linestyle=stroke, marker=MARKS[order % len(MARKS)],
                      markersize=5, elinewidth=0.8, capsize=2)  # fmt: skip
        return
    axis.plot(xs, ys, label=name, color=colour, linestyle=stroke)
    if any(halves):
        low, high = ([y + sign * half for y, half in zip(ys, halves, strict=True)] for sign in (-1, 1))
        axis.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)


def _half(mean: Mean) -> float:
    return 0.0 if math.isnan(mean.half) else mean.half


def _style(order: int) -> tuple[str, str]:
    return COLOURS[order % len(COLOURS)], STROKES[order // len(COLOURS) % len(STROKES)]


def _settings(group: Group) -> str:
    return ", ".join(f"{name} {value}" for name, value in group.varied.items())


def _apart(members: Sequence[Group]) -> list[str]:
    """Short names of a line's points: the words of their labels that not all of them have, and what varied."""
    labels = [group.method.split() for group in members]
    shared = set.intersection(*map(set, labels))
    names = {name for group in members for name in group.varied}
    own = [_settings(group) if len(names) > 1 else "".join(map(str, group.varied.values())) for group in members]
    words = [" ".join(word for word in label if word not in shared) for label in labels]
    return [", ".join(filter(None, pair)) for pair in zip(words, own, strict=True)]


def _figure(panels: int, height: float) -> tuple[Figure, list]:
    figure = Figure(figsize=(WIDTH, height * panels), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(panels, 1, squeeze=False, sharex=True)[:, 0])
    for axis in axes:
        axis.grid(color="0.92")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(figure: Figure, axes: list) -> None:
    """Of all panels, below them, in as many columns as fit; the figure grows by what it takes."""
    shown = {name: handle for axis in axes for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    names, handles = list(shown), list(shown.values())
    columns = max(1, min(len(names), 3, int(78 / (max(map(len, names), default=1) + 7))))
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(names) // columns))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=200)
    return out.getvalue()
