"""The pictures of an analysis, each a PNG with the CSV of what it shows beside it. Rows are those of `table`."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..cli._table import natural
from ..cli.plot import _short as short
from ..cli.plot import split
from ..errors import printable
from ..formats.disk import write_bytes
from .table import write_csv

WINDOW = 5  # probes that a cosine's curve is smoothed over, OD-LoRA's figure 4
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999933")  # colour-blind safe
_MARKS = "osD^vP*X"
_LOG_FROM = 4  # a logarithmic axis where values differ by more than this factor
_IN_SIGHT = 1e-4  # singular values below this share of the largest are counted, not drawn


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def median(values: Sequence[float]) -> float:
    return float(np.median(values))


def by_step(rows: list[dict], key: str, over: Callable[[Sequence[float]], float]) -> dict[str, list[tuple]]:
    """{run: [(step, `over` all layers that have `key`)]}, runs in the order in which they come."""
    gathered: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row.get(key) is not None:
            gathered.setdefault(row["run"], {}).setdefault(row["step"], []).append(row[key])
    return {run: [(step, over(values)) for step, values in sorted(steps.items())] for run, steps in gathered.items()}


def draw_all(rows: list[dict], cosines: list[dict], out: Path, bins: int = 40) -> list[Path]:
    """Every picture that the rows have data for; returns the paths of what was written."""
    runs = list(dict.fromkeys(row["run"] for row in [*rows, *cosines]))
    drawn = [change(rows, runs, out), turned(rows, runs, out), histogram(rows, runs, out, bins)]
    drawn.append(curves(rows, runs, out / "condition.png", "Condition number of adapted weights: lower is better", {
        "condition": ("of the whole weight", "largest / smallest singular value", median),
        "condition_principal": ("of the principal part (W_p + update)", "largest / r-th singular value", median),
    }, "median over layers", log=True))  # fmt: skip
    drawn.append(curves(rows, runs, out / "orthonormality.png",
                        "Bases that the method keeps orthonormal: lower is closer", {
        "off_orthonormal": ("", "Frobenius norm of (gram matrix - identity)", mean),
    }, "mean over layers and bases", log=True))  # fmt: skip
    drawn.append(curves(rows, runs, out / "update_norms.png",
                        "Size of the update in the layer where it is largest: lower is nearer to the base", {
        "nuclear": ("nuclear norm", "sum of singular values", max),
        "frobenius": ("Frobenius norm", "root of summed squares", max),
        "spectral": ("spectral norm", "largest singular value", max),
    }, "largest over layers"))  # fmt: skip
    drawn.append(curves(rows, runs, out / "weight_norms.png",
                        "Size of the adapted weights: flat stays near the base (step 0)", {
        "weight_nuclear": ("nuclear norm", "sum of singular values", mean),
        "weight_frobenius": ("Frobenius norm", "root of summed squares", mean),
        "weight_spectral": ("spectral norm", "largest singular value", mean),
    }, "mean over layers"))  # fmt: skip
    drawn.append(curves(rows, runs, out / "bound.png", "Share of the norm bound in use: never above 1", {
        "share": ("", "Schatten norm of the update / its bound", max),
    }, "largest over layers", limit=1.0))  # fmt: skip
    drawn.append(cosine(cosines, runs, out))
    return [path for pair in drawn for path in pair]


def change(rows: list[dict], runs: list[str], out: Path) -> list[Path]:
    """SORSA's figure 2: each layer's path from the base, and the mean over layers."""
    held = [row for row in rows if "d_sigma" in row]
    if not held:
        return []
    figure = _figure(6.4, 4.6, "Change of the weights' spectrum in training: lower left is nearer to the base")
    axis = figure.subplots()
    lines = []
    for at, run in enumerate(runs):
        own = [row for row in held if row["run"] == run]
        paths: dict[str, list[dict]] = {}
        for row in own:
            paths.setdefault(row["layer"], []).append(row)
        for path in paths.values():
            axis.plot([r["d_sigma"] for r in path], [r["d_vectors"] for r in path], color=_color(at), lw=0.5, alpha=0.2)
        x, y = (by_step(own, key, mean).get(run, []) for key in ("d_sigma", "d_vectors"))
        if not x:
            continue
        axis.plot([v for _, v in x], [v for _, v in y], color=_color(at), marker=_MARKS[at % 8], ms=5, lw=2, label=run)
        axis.annotate(f"{x[-1][0]}", (x[-1][1], y[-1][1]), xytext=(6, 4), textcoords="offset points", fontsize=8)
        lines += [[run, step, value, turn] for (step, value), (_, turn) in zip(x, y, strict=True)]
    axis.set_xlabel("mean change of a singular value (unit of the weights)")
    axis.set_ylabel("turn of the singular vectors (0: none, 1: orthogonal)")
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    _legend(axis, "thin: single layers; marks: mean at a step; number: last step")
    return _save(figure, out / "change.png", ("run", "step", "mean_d_sigma", "mean_d_vectors"), lines)


def curves(
    rows: list[dict], runs: list[str], png: Path, title: str, panels: dict[str, tuple], about: str, log: bool = False,
    limit: float | None = None,
) -> list[Path]:
    """A panel for each key: {key: (panel's title, what the axis holds, how layers are summed up)}, by step."""
    data = {key: by_step(rows, key, over) for key, (_, _, over) in panels.items()}
    data = {key: found for key, found in data.items() if found}
    if not data:
        return []
    figure = _figure(max(6.4, 4.0 * len(data)), 4.2, title)
    axes = figure.subplots(1, len(data), squeeze=False)[0]
    lines = []
    for axis, (key, found) in zip(axes, data.items(), strict=True):
        for run, points in found.items():
            _line(axis, runs.index(run), run, points)
            lines += [[run, key, step, value] for step, value in points]
        values = [value for points in found.values() for _, value in points if math.isfinite(value)]
        if log and values and max(values) > _LOG_FROM * min(values) > 0:
            axis.set_yscale("log")
        if limit is not None:
            axis.axhline(limit, color="black", lw=1, ls="--")
            axis.set_ylim(0, 1.08 * max(limit, *values))
        axis.set_title(panels[key][0], fontsize=10)
        axis.set_xlabel("optimizer step")
        axis.set_ylabel(f"{panels[key][1]}\n({about})")
    _legend(axes[-1])
    return _save(figure, png, ("run", "quantity", "step", "value"), lines)


def cosine(cosines: list[dict], runs: list[str], out: Path) -> list[Path]:
    """OD-LoRA's figures 2 (right) and 4: the mean over layers, smoothed where probes are many."""
    found = by_step(cosines, "cosine", mean)
    if not found:
        return []
    figure = _figure(6.4, 4.2, "How well each step follows full fine-tuning's gradient: higher is better")
    axis = figure.subplots()
    lines = []
    for run, points in found.items():
        smooth = rolling([value for _, value in points], WINDOW if len(points) >= 2 * WINDOW else 1)
        _line(axis, runs.index(run), run, [(step, value) for (step, _), value in zip(points, smooth, strict=True)])
        lines += [[run, step, value, soft] for (step, value), soft in zip(points, smooth, strict=True)]
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("cosine of full and equivalent gradient\n(mean over layers)")
    _legend(axis)
    return _save(figure, out / "cosine.png", ("run", "step", "mean_cosine", "rolling_mean"), lines)


def rolling(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and up to window - 1 before it."""
    return [mean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def counted(values: Sequence[float], edges: Sequence[float]) -> tuple[int, list[int]]:
    """(how many lie below the first edge, how many in each bin); of values up to the last edge they sum to all."""
    below = sum(value < edges[0] for value in values)
    return below, np.histogram([v for v in values if v >= edges[0]], edges)[0].tolist()


def histogram(rows: list[dict], runs: list[str], out: Path, bins: int) -> list[Path]:
    """OD-LoRA's figures 5 and 6: the update's singular values at each run's last step, kind by kind of layer."""
    last = {run: max((r["step"] for r in rows if r["run"] == run and r["values"]), default=None) for run in runs}
    pools: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["step"] == last[row["run"]]:
            kind = split(row["layer"])[1]
            pools.setdefault(kind, {}).setdefault(row["run"], []).extend(row["values"])
    pooled = [v for of in pools.values() for values in of.values() for v in values]
    top = max(pooled, default=0.0)
    if not top:
        return []
    edges = np.geomspace(min(v for v in pooled if v >= _IN_SIGHT * top) * (1 - 1e-9), top * (1 + 1e-9), bins + 1)
    kinds = sorted(pools, key=natural)
    across = min(4, len(kinds))
    figure = _figure(max(6.4, 3.1 * across), 1.1 + 2.3 * math.ceil(len(kinds) / across),
                     "Singular values of the updates at the last step: narrow is uniform, wide is skewed")  # fmt: skip
    axes = list(figure.subplots(math.ceil(len(kinds) / across), across, squeeze=False, sharex=True).flat)
    lines, small = [], {}
    for axis, kind in zip(axes, kinds, strict=False):
        for run, values in pools[kind].items():
            below, counts = counted(values, edges)
            axis.stairs(counts, edges, color=_color(runs.index(run)), lw=1.4)
            small[run] = small.get(run, 0) + below
            bars = [(0.0, edges[0], below), *zip(edges[:-1], edges[1:], counts, strict=True)]
            lines += [[run, last[run], kind, *bar] for bar in bars]
        axis.set_xscale("log")
        axis.set_title(printable(kind, 40), fontsize=9)
    for axis in axes[len(kinds) :]:
        axis.set_visible(False)
    for axis in axes[::across]:
        axis.set_ylabel("number of\nsingular values")
    for axis in axes[max(0, len(kinds) - across) : len(kinds)]:
        axis.set_xlabel("singular value")
        axis.tick_params(labelbottom=True)
    for run, below in small.items():
        all_of_run = sum(len(of[run]) for of in pools.values() if run in of)
        note = f" ({below} of {all_of_run} too small to see)" if below else ""
        axes[0].plot([], [], color=_color(runs.index(run)), label=f"{printable(run, 40)}, step {last[run]}{note}")
    figure.legend(loc="outside lower center", ncols=min(4, len(small)), fontsize=8)
    return _save(figure, out / "singular_values.png", ("run", "step", "kind", "low", "high", "count"), lines)


def turned(rows: list[dict], runs: list[str], out: Path) -> list[Path]:
    """Where in the network the singular vectors turned by each run's last step: blocks across, kinds of layers down."""
    held = [row for row in rows if "d_vectors" in row]
    last = {run: max((row["step"] for row in held if row["run"] == run), default=None) for run in runs}
    shown = [(row, *split(row["layer"])) for row in held if row["step"] == last[row["run"]]]
    if not shown:
        return []
    present = [run for run in runs if last[run] is not None]
    blocks = sorted({block for _, block, _ in shown}, key=natural)
    kinds = sorted({kind for _, _, kind in shown}, key=natural)
    top = max(row["d_vectors"] for row, _, _ in shown) or 1.0
    names = [short(block) for block in blocks]
    figure = _figure(max(8.4, 2.2 + len(present) * (0.6 + 0.22 * len(blocks))),
                     1.6 + 0.24 * len(kinds) + 0.07 * max(map(len, names)),
                     "Turn of the singular vectors, layer by layer, at the last step: darker is nearer to the base")
    axes = figure.subplots(1, len(present), squeeze=False, sharey=True)[0]
    for axis, run in zip(axes, present, strict=True):
        value = {(kind, block): row["d_vectors"] for row, block, kind in shown if row["run"] == run}
        cells = [[value.get((kind, block), math.nan) for block in blocks] for kind in kinds]
        image = axis.pcolormesh(cells, vmin=0, vmax=top, cmap="viridis", edgecolors="white", linewidth=0.5)
        axis.set_yticks([i + 0.5 for i in range(len(kinds))], kinds, fontsize=8)
        axis.set_xticks([i + 0.5 for i in range(len(blocks))], names, rotation=90, fontsize=7)
        axis.set_title(f"{run}, step {last[run]}", fontsize=9)
        axis.tick_params(length=0)
    axes[0].invert_yaxis()
    figure.colorbar(image, ax=list(axes), pad=0.02, fraction=0.05).set_label("0: none, 1: orthogonal", fontsize=9)
    lines = [[row["run"], row["step"], block, kind, row["d_vectors"]] for row, block, kind in shown]
    return _save(figure, out / "change_by_layer.png", ("run", "step", "block", "layer", "d_vectors"), lines)


def _color(at: int) -> str:
    return _COLORS[at % len(_COLORS)]


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    return figure


def _line(axis: Axes, at: int, run: str, points: list[tuple]) -> None:
    x, y = [step for step, _ in points], [value for _, value in points]
    marks = {"marker": _MARKS[at % 8], "ms": 4} if len(points) <= 25 else {}
    axis.plot(x, y, color=_color(at), lw=1.6, label=printable(run, 40), **marks)
    axis.grid(True, lw=0.3, alpha=0.6)


def _legend(axis: Axes, note: str = "") -> None:
    legend = axis.legend(fontsize=8, title=note or None)
    legend.get_title().set_fontsize(7)


def _save(figure: Figure, png: Path, columns: Sequence[str], lines: list[list]) -> list[Path]:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    write_bytes(png, picture.getvalue())
    return [png, write_csv(png.with_suffix(".csv"), columns, lines)]
