"""The picture of `vislora inspect --plot`: a cell for each layer, blocks across, kinds of layers down."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from ..errors import printable
from ..formats.disk import write_bytes
from ._table import natural

# The innermost repeated module that a layer lies in: what is left of its path is its kind.
_BLOCK = re.compile(r"(.*(?:blocks|layers|layer|attentions|resnets|downsamplers|upsamplers|h)\.\d+)\.(.+)")
_COLUMNS = ("component", "block", "layer", "rank", "spectral", "frobenius", "nuclear", "effective_rank", "ratio")


def draw(rows: list[dict], png: Path) -> list[Path]:
    """Write `png` and the CSV of what it shows, and return both paths. rows: those of `inspect.measured`.

    The shade is the ratio to the base weight where it is known, else the Frobenius norm.
    """
    placed = [(row, *split(row["path"])) for row in rows]
    key = "ratio" if "ratio" in rows[0] else "frobenius"
    shown = [row[key] for row in rows if row[key]]
    low, high = (max(min(shown), max(shown) / 1e4), max(shown)) if shown else (0.1, 1.0)
    norm = LogNorm(vmin=low, vmax=high if high > low else low * 1.01)
    components = list(dict.fromkeys(row["component"] for row in rows))
    grids = [_grid([p for p in placed if p[0]["component"] == c], key) for c in components]
    widest = max(len(blocks) for blocks, _, _ in grids)
    heights = [len(kinds) + 0.35 * max(map(len, blocks)) + 2 for blocks, kinds, _ in grids]  # in rows of cells
    figure = Figure(figsize=(4 + 0.24 * widest, 0.24 * sum(heights) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(grids), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, component, (blocks, kinds, cells) in zip(axes, components, grids, strict=True):
        image = axis.pcolormesh(cells, norm=norm, cmap="viridis", edgecolors="white", linewidth=0.5)
        axis.invert_yaxis()
        axis.set_xticks([i + 0.5 for i in range(len(blocks))], blocks, rotation=90, fontsize=7)
        axis.set_yticks([i + 0.5 for i in range(len(kinds))], kinds, fontsize=8)
        axis.tick_params(length=0)
        axis.set_title(component or "model", fontsize=10, loc="left")
        for side in axis.spines.values():
            side.set_visible(False)
    words = "Frobenius norm of the update" + (" / of the weight" if key == "ratio" else "")
    bar = figure.colorbar(image, ax=list(axes), aspect=30, pad=0.02, fraction=0.05)
    bar.set_label(words, fontsize=9)
    bar.ax.tick_params(which="both", labelsize=8)
    picture, sheet = io.BytesIO(), io.StringIO()
    figure.savefig(picture, format="png", dpi=130)
    lines = csv.writer(sheet)
    lines.writerow(_COLUMNS)
    for row, block, kind in placed:
        lines.writerow([row["component"], block, kind, *(row.get(column, "") for column in _COLUMNS[3:])])
    write_bytes(png, picture.getvalue())
    write_bytes(png.with_suffix(".csv"), sheet.getvalue().encode())
    return [png, png.with_suffix(".csv")]


def split(path: str) -> tuple[str, str]:
    """(block, kind) of a module's path: ("down_blocks.0.attentions.0.transformer_blocks.0", "attn1.to_q")."""
    match = _BLOCK.fullmatch(printable(path, 120))
    return (match[1], match[2]) if match else ("", printable(path, 120))


def _grid(placed: list[tuple[dict, str, str]], key: str) -> tuple[list[str], list[str], list[list[float]]]:
    """Labels of the columns and rows, and the cells, NaN where there is no layer."""
    blocks = sorted({block for _, block, _ in placed}, key=natural)
    kinds = sorted({kind for _, _, kind in placed}, key=natural)
    value = {(kind, block): row[key] for row, block, kind in placed}
    cells = [[value.get((kind, block)) or float("nan") for block in blocks] for kind in kinds]
    return [_short(block) for block in blocks], kinds, cells


def _short(block: str) -> str:
    """"down 0, attn 1, 0": names of columns stand upright and must be short."""
    for word, brief in {"text_model.encoder.": "", "transformer_blocks": "block", "attentions": "attn",
                        "_blocks": "", "_block": ""}.items():  # fmt: skip
        block = block.replace(word, brief)
    return block.replace(".", " ")

