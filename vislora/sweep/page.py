"""One HTML page of a sweep: its table, pictures and choices, self-contained, for any width of screen."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from vislora.formats.disk import write_bytes
from vislora.sweep.draw import Drawn
from vislora.sweep.pictures import Images
from vislora.sweep.plan import Plan
from vislora.sweep.table import Group, Row, groups, number, tried, tuning_words

STYLE = """
:root { color-scheme: light }
body { font: 16px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 60rem; color: #1a1a1a }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin: 2rem 0 .4rem }
.wide { overflow-x: auto; border: 1px solid #ddd; border-radius: 4px }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #eee }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff }
td small { color: #666 }
figure { margin: 0 } figure img { display: block; width: 100%; max-width: 44rem; height: auto }
.wide img { width: auto; max-width: none; min-width: 100% }
.note, figcaption { color: #555; font-size: .9rem; margin: .3rem 0 }
.failed { color: #a00 }
"""


def write(plan: Plan, sweep: Path, found: Sequence[Row], chosen: dict[str, dict[str, Any]], drawn: Sequence[Drawn],
          expected: int) -> Path:  # fmt: skip
    """Write `sweep`/index.html and return its path. expected: how many cells the whole sweep has, tuning included."""
    title = plan.title or plan.name
    parts = [count(plan, found, expected), "<h2>Table</h2>", table(plan, found)]
    for one in drawn:
        parts += _figure(one)
    return whole(title, [*parts, *tuning(plan, found, chosen), *failures(found)], sweep / "index.html")


def whole(title: str, parts: Sequence[str], path: Path) -> Path:
    """Write a page of a title and parts of HTML, and return its path."""
    head = [
        "<!doctype html>", '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>", f"<h1>{escape(title)}</h1>",
    ]  # fmt: skip
    write_bytes(path, "\n".join([*head, *parts, "</body></html>\n"]).encode())
    return path


def count(plan: Plan, found: Sequence[Row], expected: int) -> str:
    """How much of a sweep is there, and made by which code, as a line of HTML."""
    return f'<p class="note">{escape(counted(plan, found, expected))}; {datetime.now():%Y-%m-%d %H:%M}.</p>'


def counted(plan: Plan, found: Sequence[Row], expected: int) -> str:
    """The same in words. A run that stands for several points of the table counts once."""
    runs, seeds = _runs(found), ", ".join(map(str, plan.seeds))
    failed = sum(bool(row.failure) for row in runs)
    return f"{len(runs) - failed} of {expected} runs done, {failed} failed; seeds {seeds}; {codes(found)}"


def _runs(found: Sequence[Row]) -> list[Row]:
    return list({row.cell.folder: row for row in found}.values())


def codes(found: Sequence[Row]) -> str:
    """Which code made the runs, and how many each, in words."""
    made = Counter(row.made_by or "code that was not recorded" for row in _runs(found))
    return "by " + ", ".join(f"{words} ({count})" for words, count in made.most_common()) if made else "no code yet"


def table(plan: Plan, found: Sequence[Row]) -> str:
    """The means with their intervals, as a table of HTML; where there are several subjects, for each one below it."""
    shown = groups(plan, found)
    if not shown:
        return '<p class="note">No run of the table has ended yet.</p>'
    note = "Means over seeds of means over subjects; ± is the half width of the 95 % t interval over seeds."
    out = f'{_means(plan, shown)}<p class="note">{note} Also in table.csv, table.json and, run by run, cells.csv.</p>'
    if len(plan.subjects) > 1:
        each = _means(plan, groups(plan, found, apart=True))
        out += f"<details><summary>Each subject (subjects.csv)</summary>{each}</details>"
    return out


def _means(plan: Plan, shown: Sequence[Group]) -> str:
    varied = list(dict.fromkeys(name for group in shown for name in group.varied))
    also = ["subject"] if any(group.subject for group in shown) else []
    head = "".join(f"<th>{escape(str(word))}</th>" for word in ("method", *also, *varied, *plan.collect))
    body = []
    for group in shown:
        label = escape(group.method) + (f' <small class="failed">{group.failed} failed</small>' if group.failed else "")
        own = [*([group.subject] if also else []), *(group.varied.get(name, "") for name in varied)]
        cells = [escape(str(value)) for value in own] + [_mean(group.means[column]) for column in plan.collect]
        body.append(f"<tr><td>{label}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _mean(mean) -> str:
    value, _, half = number(mean).partition(" ± ")
    return f"{value} <small>±{half}</small>" if half else value


def _figure(one: Drawn) -> list[str]:
    picture = one.picture
    title = escape(picture.title or picture.name.replace("_", " "))
    about = f'<p class="note">{escape(picture.about)}</p>' if picture.about else ""
    if one.png is None or one.csv is None:
        return [f"<h2>{title}</h2>", about, '<p class="note">Nothing that it shows has ended yet.</p>']
    image = f'<img alt="{title}" src="data:image/png;base64,{base64.b64encode(one.png.read_bytes()).decode()}">'
    if isinstance(picture, Images):
        image = f'<div class="wide">{image}</div>'
    data = base64.b64encode(one.csv.read_bytes()).decode()
    link = f'<a download="{one.csv.name}" href="data:text/csv;base64,{data}">{one.csv.name}</a>'
    return [f"<h2>{title}</h2>", about, f"<figure>{image}<figcaption>The numbers: {link}</figcaption></figure>"]


def tuning(plan: Plan, found: Sequence[Row], chosen: dict[str, dict[str, Any]], level: int = 2) -> list[str]:
    """Every value that tuning tried with its score, and its choice, as parts of HTML; none where nothing is tuned."""
    grid = tried(plan, found, chosen)
    if not grid:
        return []
    said = [(one.method, f"{one.setting}, by {one.by}", *tuning_words(one)) for one in grid]
    rows = "".join(f"<tr>{''.join(f'<td>{escape(word)}</td>' for word in words)}</tr>" for words in said)
    head = "<tr><th>method</th><th>tuned</th><th>tried</th><th>chosen</th></tr>"
    return [f"<h{level}>What tuning tried and chose</h{level}>", f'<div class="wide"><table>{head}{rows}</table></div>']


def failures(found: Sequence[Row], level: int = 2) -> list[str]:
    """The runs that failed, each with its last words, as parts of HTML; none where none did."""
    rows = [f"<li>{escape(row.cell.label)}: {escape(row.failure)}</li>" for row in _runs(found) if row.failure]
    head = f"<h{level}>Runs that failed</h{level}>"
    return [head, f'<ul class="failed">{"".join(rows)}</ul>'] if rows else []
