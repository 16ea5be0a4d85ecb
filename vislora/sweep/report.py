"""Several sweeps in one report, with a verdict for each of the papers' claims. What its YAML says:

    title: What the papers claim
    plans:                                    # name: a sweep's YAML beside this file, run in this order
      table3: {file: table3.yaml, quick: {seeds: [0], methods: [lora, nb_lora p=1 0.03], fixed: {max_train_steps: 4}}}
    claims:
      - claim: NB-LoRA keeps the source
        paper: NB-LoRA, Figure 6: LoRA, DoRA and PiSSA fall below 10 % on the source
        comparisons:                          # all of them together are the claim
          - {plan: figure6, column: source_accuracy, of: nb_lora 0.1, above: [lora, dora, pissa]}
          - {plan: figure6, column: target_accuracy, of: nb_lora 0.1, above: lora, margin: 0.05}

A comparison holds one or several methods (`of`) against others, or a number, in `above` or `below`. `where` is the
setting of grid or factors that is meant; `since`: from each value that of this setting is taken off; `worst`: a factor,
of whose values the least favourable counts, seed by seed; `margin`: how far it may be beaten and still hold.

The rule: differences are taken seed by seed (and subject by subject, then averaged), and have a 95 % interval of
Student's t over seeds. Where the interval lies wholly on the claimed side (beyond the margin) the comparison is shown,
wholly on the other it is opposite; else, and with one seed, it is not shown. A claim is shown where all of its
comparisons are, opposite where none is shown and one is opposite, and not shown otherwise. Intervals are not widened
for their number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from vislora.config import read_yaml
from vislora.errors import InputError, near
from vislora.formats.disk import write_bytes
from vislora.sweep import page, plan
from vislora.sweep.plan import Plan
from vislora.sweep.table import Mean, Row, over_seeds

SHOWN, NOT_SHOWN, OPPOSITE, MISSING = "shown", "not shown", "opposite", "not run"
_KEYS = ("title", "plans", "claims")
_OF_CLAIM = ("claim", "paper", "comparisons")
_OF_COMPARISON = ("plan", "column", "of", "above", "below", "where", "since", "worst", "margin")


@dataclass(frozen=True)
class Comparison:
    """One column of one method held against another method's, or a number."""

    plan: str
    column: str
    method: str
    other: str | float
    above: bool
    where: dict[str, Any] = field(default_factory=dict)
    since: dict[str, Any] | None = None
    worst: str | None = None
    margin: float = 0.0

    def __str__(self) -> str:
        words = [f"{name} {value}" for name, value in self.where.items()]
        words += [f"less that at {name} {value}" for name, value in (self.since or {}).items()]
        words += [f"the worst {self.worst}"] if self.worst else []
        side = "above" if self.above else "below"
        slack = f" less {self.margin:g}" if self.margin and self.above else f" plus {self.margin:g}" * bool(self.margin)
        about = f" ({', '.join(words)})" if words else ""
        return f"{self.column}{about} of {self.method} {side} {self.other}{slack}"


@dataclass(frozen=True)
class Claim:
    """What a paper says, where, and the comparisons that it comes to here."""

    name: str
    paper: str
    comparisons: list[Comparison]


@dataclass(frozen=True)
class Report:
    """Sweeps by name, and claims that rest on them."""

    name: str
    title: str
    plans: dict[str, Plan]
    claims: list[Claim]


@dataclass(frozen=True)
class Judged:
    """A comparison's outcome: the mean difference (method less other) with its interval, None where it was not run."""

    comparison: Comparison
    difference: Mean | None
    verdict: str


def is_report(file: str | Path) -> bool:
    """Whether a YAML file names several sweeps. Raises InputError where it cannot be read."""
    return "plans" in read_yaml(file)


def read(file: str | Path, quick: bool = False) -> Report:
    """The report of a YAML file. quick: every plan made as small as its own `quick` says.

    Raises InputError, one line, for what it cannot mean.
    """
    raw, name = read_yaml(file), str(file)
    _require_keys(raw, _KEYS, name)
    plans = {}
    for label, given in _mapping(raw.get("plans"), f"{name}, plans").items():
        about = _mapping(given, f"{name}, plans, {label}")
        _require_keys(about, ("file", "quick"), f"{name}, plans, {label}")
        small = _mapping(about.get("quick", {}), f"{name}, plans, {label}, quick")
        plans[label] = plan.read(Path(file).parent / str(about.get("file")), small if quick else None)
    claims = []
    for given in raw.get("claims") or []:
        about = _mapping(given, f"{name}, claims")
        _require_keys(about, _OF_CLAIM, f"{name}, claims")
        place = f"{name}, {about.get('claim')}"
        found = [one for part in about.get("comparisons") or [] for one in _comparisons(part, plans, place, quick)]
        claims.append(Claim(str(about.get("claim")), str(about.get("paper", "")), found))
    return Report(Path(file).stem, str(raw.get("title") or Path(file).stem), plans, claims)


def _mapping(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise InputError(where, f"is {given!r}", "give names with values; see vislora/sweep/report.py")
    return dict(given)


def _require_keys(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in given:
        if key not in known:
            raise InputError(f"{where}, {key}", f"is unknown here{near(str(key), known)}", "take " + ", ".join(known))


def _comparisons(given: Any, plans: Mapping[str, Plan], where: str, quick: bool) -> list[Comparison]:
    """Each method of `of` against each of `above` or `below`; quick: without those that the plan does not run."""
    about = _mapping(given, where)
    _require_keys(about, _OF_COMPARISON, where)
    whole = plans.get(about.get("plan"))
    if whole is None:
        raise InputError(where, f"names the plan {about.get('plan')!r}", f"take one of {', '.join(plans)}")
    if about.get("column") not in whole.collect:
        raise InputError(where, f"{whole.name} has no column {about.get('column')!r}", ", ".join(whole.collect))
    if ("above" in about) == ("below" in about):
        raise InputError(where, f"{about} says not which side is claimed", "give one of above and below")
    above = "above" in about
    sides = [about.get("of"), about["above" if above else "below"]]
    of, than = ([side] if not isinstance(side, list) else side for side in sides)
    methods = [word for word in (*of, *than) if isinstance(word, str)]
    for word in methods:
        if word not in whole.methods and not quick:
            raise InputError(where, f"{whole.name} has no method {word!r}{near(word, whole.methods)}", "mend it")
    more = {key: about[key] for key in ("where", "since", "worst", "margin") if key in about}
    return [
        Comparison(about["plan"], about["column"], str(a), b if isinstance(b, str) else float(b), above, **more)
        for a in of for b in than
        if {a, *([b] if isinstance(b, str) else [])} <= set(whole.methods)
    ]  # fmt: skip


def judge(one: Comparison, found: Sequence[Row]) -> Judged:
    """Hold a comparison against the rows of its plan, by the rule above."""
    ours = _values(one, one.method, found)
    theirs = _values(one, one.other, found) if isinstance(one.other, str) else dict.fromkeys(ours, one.other)
    both = [key for key in ours if key in theirs]
    mean = over_seeds([(seed, ours[subject, seed] - theirs[subject, seed]) for subject, seed in both])
    if mean is None:
        return Judged(one, None, MISSING)
    if math.isnan(mean.half):
        return Judged(one, mean, NOT_SHOWN)
    ahead = (mean.value if one.above else -mean.value) + one.margin
    verdict = SHOWN if ahead > mean.half else OPPOSITE if ahead < -mean.half else NOT_SHOWN
    return Judged(one, mean, verdict)


def _values(one: Comparison, method: str, found: Sequence[Row]) -> dict[tuple[str | None, int], float]:
    """{(subject, seed): the column of a method as the comparison means it}."""
    by: dict[tuple[str | None, int], list[float]] = {}
    base: dict[tuple[str | None, int], float] = {}
    counts: dict[tuple[str | None, int], int] = {}
    for row in found:
        cell, value = row.cell, row.values[one.column]
        if cell.method != method or cell.tuning is not None:
            continue
        key = cell.subject, cell.seed
        if one.since is not None and cell.varied == one.since and value is not None:
            base[key] = value
        rest = {name: v for name, v in cell.varied.items() if name != one.worst}
        if rest == one.where:  # of a factor, the point that it is varied around counts too
            counts[key] = counts.get(key, 0) + 1
            by.setdefault(key, []).extend([] if value is None else [value])
    most = max(counts.values(), default=0)
    worst = min if one.above else max
    out = {key: worst(values) for key, values in by.items() if values and len(values) == most}
    return out if one.since is None else {key: out[key] - base[key] for key in out if key in base}


def verdict(judged: Sequence[Judged]) -> str:
    """Of a claim, from its comparisons'."""
    said = [one.verdict for one in judged]
    if not said or MISSING in said:
        return MISSING
    if all(word == SHOWN for word in said):
        return SHOWN
    return OPPOSITE if OPPOSITE in said and SHOWN not in said else NOT_SHOWN


def write(report: Report, folder: Path, found: Mapping[str, Sequence[Row]], expected: Mapping[str, int],
          note: str = "") -> Path:  # fmt: skip
    """verdicts.json, report.md and index.html in `folder`; returns the page's path.

    found: the rows of each plan, whose own page lies in the folder of its name beside `folder`. expected: how many
    runs it has. note: said above everything else.
    """
    judged = [(claim, [judge(one, found[one.plan]) for one in claim.comparisons]) for claim in report.claims]
    folder.mkdir(parents=True, exist_ok=True)
    said = [{"claim": claim.name, "paper": claim.paper, "verdict": verdict(each),
             "comparisons": [_as_json(one) for one in each]} for claim, each in judged]  # fmt: skip
    write_bytes(folder / "verdicts.json", (json.dumps(said, indent=1, ensure_ascii=False) + "\n").encode())
    write_bytes(folder / "report.md", markdown(report, judged, note).encode())
    rule = escape(__doc__.partition("The rule: ")[2].strip())
    parts = [f'<p class="note">{escape(note)}</p>' if note else "", "<h2>The claims</h2>", _overview(judged)]
    for claim, each in judged:
        lines = "".join(f"<tr><td>{escape(str(one.comparison))}</td><td>{_said(one)}</td><td>{one.verdict}</td></tr>"
                        for one in each)  # fmt: skip
        head = "<tr><th>comparison</th><th>difference, 95 % interval</th><th>verdict</th></tr>"
        parts += [f"<h2>{escape(claim.name)}: {verdict(each)}</h2>", f'<p class="note">{escape(claim.paper)}</p>',
                  f'<div class="wide"><table>{head}{lines}</table></div>']  # fmt: skip
    parts += ["<h2>The rule</h2>", f"<p>{rule}</p>", "<h2>The sweeps</h2>"]
    for name, one in report.plans.items():
        parts += [f'<h3><a href="../{name}/index.html">{escape(one.title or name)}</a></h3>',
                  page.count(one, found[name], expected[name]), page.table(one, found[name])]  # fmt: skip
    return page.whole(report.title, parts, folder / "index.html")


def _overview(judged: Sequence[tuple[Claim, Sequence[Judged]]]) -> str:
    rows = "".join(f"<tr><td>{escape(claim.name)}</td><td>{verdict(each)}</td></tr>" for claim, each in judged)
    return f'<div class="wide"><table><tr><th>claim</th><th>verdict</th></tr>{rows}</table></div>'


def _said(one: Judged) -> str:
    if one.difference is None:
        return ""
    half = one.difference.half
    return f"{one.difference.value:+.4g}" + (" (one seed)" if math.isnan(half) else f" ± {half:.2g}")


def _as_json(one: Judged) -> dict[str, Any]:
    mean, half = one.difference, None
    if mean is not None and not math.isnan(mean.half):
        half = mean.half
    about = {"seeds": mean.seeds, "difference": mean.value, "half": half} if mean is not None else {}
    return {"plan": one.comparison.plan, "comparison": str(one.comparison), **about, "verdict": one.verdict}


def markdown(report: Report, judged: Sequence[tuple[Claim, Sequence[Judged]]], note: str = "") -> str:
    """The verdicts as Markdown, each claim with its comparisons."""
    lines = [f"# {report.title}", "", *([note, ""] if note else []), "| claim | verdict |", "|---|---|"]
    lines += [f"| {claim.name} | {verdict(each)} |" for claim, each in judged]
    for claim, each in judged:
        lines += ["", f"## {claim.name}: {verdict(each)}", "", claim.paper, ""]
        lines += ["| comparison | difference ± half of its 95 % interval | verdict |", "|---|---|---|"]
        lines += [f"| {one.comparison} | {_said(one)} | {one.verdict} |" for one in each]
    return "\n".join(lines) + "\n"
