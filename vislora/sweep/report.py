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
of whose values the least favourable counts, seed by seed; `margin`: how far it may be beaten and still hold. What
verdicts mean, verdict.py says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from vislora.config import read_yaml
from vislora.errors import InputError, near
from vislora.formats.disk import write_bytes
from vislora.sweep import page, plan
from vislora.sweep.plan import Plan
from vislora.sweep.table import Row, tried, tuning_markdown
from vislora.sweep.verdict import RULE, Comparison, Judged, judge, meant, verdict

_KEYS = ("title", "plans", "claims")
_OF_CLAIM = ("claim", "paper", "comparisons")
_OF_COMPARISON = ("plan", "column", "of", "above", "below", "where", "since", "worst", "margin")


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
    found = [
        Comparison(about["plan"], about["column"], str(a), b if isinstance(b, str) else float(b), above, **more)
        for a in of for b in than
        if {a, *([b] if isinstance(b, str) else [])} <= set(whole.methods)
    ]  # fmt: skip
    cells = [] if quick else whole.cells({})
    for one in found if cells else []:
        for method in [one.method, *([one.other] if isinstance(one.other, str) else [])]:
            own = [cell for cell in cells if cell.method == method]
            if not any(meant(one, c) for c in own) or one.since not in (None, *(c.varied for c in own)):
                wrong = f"no run of {method!r} is at {one.where} and {one.since}"
                raise InputError(where, wrong, "see the sweep's grid and factors")
    return found


@dataclass(frozen=True)
class Ran:
    """What there is of a plan: its rows, the number of runs that it has in all, and what tuning chose."""

    rows: Sequence[Row]
    expected: int
    chosen: dict[str, dict[str, Any]]


def write(report: Report, folder: Path, ran: Mapping[str, Ran], note: str = "") -> Path:
    """verdicts.json, report.md and index.html in `folder`; returns the page's path.

    ran: what there is of each plan, whose own page lies in the folder of its name beside `folder`. note: said above
    everything else.
    """
    judged = [(claim, [judge(one, report.plans[one.plan], ran[one.plan].rows) for one in claim.comparisons])
              for claim in report.claims]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    said = [{"claim": claim.name, "paper": claim.paper, "verdict": verdict(each),
             "comparisons": [_as_json(one) for one in each]} for claim, each in judged]  # fmt: skip
    write_bytes(folder / "verdicts.json", (json.dumps(said, indent=1, ensure_ascii=False) + "\n").encode())
    write_bytes(folder / "report.md", markdown(report, judged, ran, note).encode())
    rule = escape(RULE)
    parts = [f'<p class="note">{escape(note)}</p>' if note else "", "<h2>The claims</h2>", _overview(judged)]
    for claim, each in judged:
        lines = "".join(f"<tr><td>{escape(str(one.comparison))}</td><td>{_said(one)}</td><td>{one.verdict}</td></tr>"
                        for one in each)  # fmt: skip
        head = "<tr><th>comparison</th><th>difference, 95 % interval</th><th>verdict</th></tr>"
        parts += [f"<h2>{escape(claim.name)}: {verdict(each)}</h2>", f'<p class="note">{escape(claim.paper)}</p>',
                  f'<div class="wide"><table>{head}{lines}</table></div>']  # fmt: skip
    parts += ["<h2>The rule</h2>", f"<p>{rule}</p>", "<h2>The sweeps</h2>"]
    for name, one in report.plans.items():
        rows = ran[name].rows
        parts += [f'<h3><a href="../{name}/index.html">{escape(one.title or name)}</a></h3>',
                  page.count(one, rows, ran[name].expected), page.table(one, rows),
                  *page.tuning(one, rows, ran[name].chosen, 4), *page.failures(rows, 4)]  # fmt: skip
    return page.whole(report.title, parts, folder / "index.html")


def _overview(judged: Sequence[tuple[Claim, Sequence[Judged]]]) -> str:
    rows = "".join(f"<tr><td>{escape(claim.name)}</td><td>{verdict(each)}</td></tr>" for claim, each in judged)
    return f'<div class="wide"><table><tr><th>claim</th><th>verdict</th></tr>{rows}</table></div>'


def _said(one: Judged) -> str:
    lacks = [f"{one.missing} of its pairs missing"] * bool(one.missing) + [f"{one.failed} failed"] * bool(one.failed)
    if one.difference is None:
        return ", ".join(lacks)
    half = one.difference.half
    words = f"{one.difference.value:+.4g}" + (" (one seed)" if math.isnan(half) else f" ± {half:.2g}")
    return words + (f" so far, {', '.join(lacks)}" if lacks else "")


def _as_json(one: Judged) -> dict[str, Any]:
    mean, half = one.difference, None
    if mean is not None and not math.isnan(mean.half):
        half = mean.half
    about = {"seeds": mean.seeds, "difference": mean.value, "half": half} if mean is not None else {}
    about |= {"missing": one.missing, "failed": one.failed} if one.missing else {}
    return {"plan": one.comparison.plan, "comparison": str(one.comparison), **about, "verdict": one.verdict}


def markdown(report: Report, judged: Sequence[tuple[Claim, Sequence[Judged]]], ran: Mapping[str, Ran],
             note: str = "") -> str:  # fmt: skip
    """The verdicts as Markdown, each claim with its comparisons; then what each sweep holds, tried and failed at."""
    lines = [f"# {report.title}", "", *([note, ""] if note else []), "| claim | verdict |", "|---|---|"]
    lines += [f"| {claim.name} | {verdict(each)} |" for claim, each in judged]
    for claim, each in judged:
        lines += ["", f"## {claim.name}: {verdict(each)}", "", claim.paper, ""]
        lines += ["| comparison | difference ± half of its 95 % interval | verdict |", "|---|---|---|"]
        lines += [f"| {one.comparison} | {_said(one)} | {one.verdict} |" for one in each]
    lines += ["", "## The sweeps"]
    for name, one in report.plans.items():
        rows = ran[name].rows
        lines += ["", f"### {name}", "", page.counted(one, rows, ran[name].expected) + "."]
        lines += tuning_markdown(tried(one, rows, ran[name].chosen)).splitlines()
        failed = {row.cell.folder: f"- {row.cell.label}: {row.failure}" for row in rows if row.failure}
        lines += ["", *failed.values()] if failed else []
    return "\n".join(lines) + "\n"
