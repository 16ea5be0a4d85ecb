"""Several sweeps in one report: the rule of its verdicts against numbers worked out by hand, and a whole run of it."""

import json
import signal
from pathlib import Path

import pytest
import yaml
from script_runs import opened

from vislora.errors import InputError
from vislora.sweep import report
from vislora.sweep.plan import read as read_plan
from vislora.sweep.table import Row
from vislora.sweep.verdict import Comparison, Judged, judge, verdict

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """\
import json, sys
from pathlib import Path
import yaml
args = dict(zip(sys.argv[1::2], sys.argv[2::2]))
given, out = yaml.safe_load(open(args["--config"])), Path(args["--output_dir"])
out.mkdir(parents=True)
if given.get("broken"):
    sys.exit("broken")
lines = [{"step": s, "loss": given["base"] / s + given["seed"] / 100} for s in (1, 2, 4)] + [{"step": 4, "cosine": 1}]
(out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
"""


def plan(place, **body):
    base = {"script": str(place / "script.py"), "methods": {"a": {"base": 1}, "b": {"base": 2}}, "seeds": [0, 1],
            "collect": {"loss": "metrics.jsonl:loss", "mean": "metrics.jsonl:mean(loss)"}}  # fmt: skip
    return yaml.safe_dump(base | body)


@pytest.fixture
def place(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "one.yaml").write_text(plan(tmp_path))
    (tmp_path / "two.yaml").write_text(plan(tmp_path, grid={"extra": [1, 2]}, methods={"a": {"base": 1}, "x": {
        "base": 1, "broken": True}}))  # fmt: skip
    claims = [
        {"claim": "a learns more", "paper": "Paper, Table 1: a < b",
         "comparisons": [{"plan": "one", "column": "loss", "of": "a", "below": ["b", 3]}]},
        {"claim": "b learns more", "paper": "nobody", "comparisons": [
            {"plan": "one", "column": "mean", "of": "b", "below": "a"}]},
        {"claim": "x works", "paper": "nobody", "comparisons": [
            {"plan": "two", "column": "loss", "of": "x", "below": "a", "where": {"extra": 1}}]},
    ]  # fmt: skip
    body = {"title": "All <of> it", "claims": claims,
            "plans": {"one": {"file": "one.yaml", "quick": {"seeds": [3], "methods": ["a"], "fixed": {"base": 1}}},
                      "two": {"file": "two.yaml"}}}  # fmt: skip
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(body, sort_keys=False))
    return tmp_path


def run(place, *flags):
    module = opened("eval/sweep.py")
    code, before = 0, {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        module.main(["--config", str(place / "all.yaml"), "--output_dir", str(place / "out"), *flags])
    except SystemExit as ended:
        code = ended.code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code


def test_a_report_runs_its_sweeps_judges_and_goes_on_past_what_fails(place, capsys):
    assert run(place, "--workers", "2") == 1  # x is broken
    said = json.loads((place / "out/all/verdicts.json").read_text())
    assert [one["verdict"] for one in said] == ["shown", "opposite", "not run"]
    first, constant = said[0]["comparisons"]
    # Losses base / 4 + seed / 100: differences of -0.25 at both seeds; against 3, -2.75 and -2.74.
    assert first["difference"] == pytest.approx(-0.25) and first["half"] == pytest.approx(0, abs=1e-12)
    assert constant["difference"] == pytest.approx(-2.745) and constant["half"] == pytest.approx(12.7062 * 0.005, 1e-4)
    # The mean over the three lines with a loss: base times (1 + 1/2 + 1/4) / 3.
    assert said[1]["comparisons"][0]["difference"] == pytest.approx(1.75 / 3)
    page = (place / "out/all/index.html").read_text()
    assert "All &lt;of&gt; it" in page and "Paper, Table 1: a &lt; b" in page and "a learns more: shown" in page
    assert 'href="../one/index.html"' in page and (place / "out/one/index.html").is_file()
    words = (place / "out/all/report.md").read_text()
    assert "## b learns more: opposite" in words
    # Nothing is dropped: what failed stands in the report with its last words, and by which code the rest was made.
    assert "### two\n\n4 of 8 runs done, 4 failed; seeds 0, 1; by " in words
    assert words.count("- x, extra=") == 4 and "- x, extra=2, seed=1: exit 1: broken" in words
    assert page.count("<li>x, extra=") == 4 and "exit 1: broken" in page
    made = json.loads(next(place.glob("out/one/cells/*/cell.json")).read_text())["made_by"]
    assert f"by {made} (4)" in words and f"by {made} (8)" in page
    assert "written to" in capsys.readouterr().out
    before = {file: file.stat().st_mtime_ns for file in place.glob("out/*/cells/*/cell.json")}
    assert run(place, "--report") == 0  # from what is there
    assert {file: file.stat().st_mtime_ns for file in place.glob("out/*/cells/*/cell.json")} == before


def test_quick_makes_every_sweep_small_and_says_so(place):
    body = yaml.safe_load((place / "all.yaml").read_text())
    body["plans"]["two"]["quick"] = {"grid": {"extra": [1]}, "methods": ["a"], "seeds": [0]}
    (place / "all.yaml").write_text(yaml.safe_dump(body))
    whole = report.read(place / "all.yaml", quick=True)
    assert [len(one.cells({})) for one in whole.plans.values()] == [1, 1]
    assert [[str(c) for c in claim.comparisons] for claim in whole.claims] == [["loss of a below 3.0"], [], []]
    assert run(place, "--quick") == 0
    assert "its verdicts mean nothing" in (place / "out/all/report.md").read_text()
    assert {one["verdict"] for one in json.loads((place / "out/all/verdicts.json").read_text())} == {
        "not shown", "not run"}  # fmt: skip


def rows(place, numbers, failed=()):
    """(plan, its rows) of {method: {(seed, extra): value}}; the rest has no row, and the `failed` an empty one."""
    (place / "grid.yaml").write_text(plan(place, seeds=[0, 1, 2], grid={"extra": [1, 2]}))
    whole = read_plan(place / "grid.yaml")
    at = {(c.method, c.seed, c.varied["extra"]): c for c in whole.cells({})}
    found = [Row(c, {"loss": numbers[m][s, e], "mean": None}, 1.0, "") for (m, s, e), c in at.items()
             if (s, e) in numbers[m]]  # fmt: skip
    return whole, found + [Row(at[key], {"loss": None, "mean": None}, 1.0, "exit 2: nan") for key in failed]


def test_the_rule(place):
    """Differences a - b at extra 1: -1, -1.1, -0.9; half width t(0.975, 2) = 4.30265 times 0.1 / sqrt 3."""
    a = {(0, 1): 1.0, (1, 1): 2.0, (2, 1): 3.0, (0, 2): 1.5, (1, 2): 2.5, (2, 2): 3.5}
    b = {(0, 1): 2.0, (1, 1): 3.1, (2, 1): 3.9, (0, 2): 2.0, (1, 2): 0.0, (2, 2): 5.0}
    found = rows(place, {"a": a, "b": b})

    def one(above=False, **more):
        more = {"where": {"extra": 1}} | more
        return judge(Comparison("one", "loss", "a", more.pop("other", "b"), above, **more), *found)

    below = one()
    assert below.difference.value == pytest.approx(-1) and below.difference.half == pytest.approx(0.24842, abs=1e-4)
    assert below.verdict == "shown" and one(above=True).verdict == "opposite"
    assert one(above=True, margin=1.3).verdict == "shown"  # beaten by 1 at least, 1.3 is allowed
    assert one(above=True, margin=1.1).verdict == "not shown"
    assert one(where={"extra": 2}).verdict == "not shown"  # -0.5, 2.5, -1.5
    assert one(where={"extra": 9}).verdict == "not run"
    # Since extra 1, a gained 0.5 at every seed and b 0, -3.1 and 1.1.
    gained = one(where={"extra": 2}, since={"extra": 1}, other=0.4, above=True)
    assert gained.difference.value == pytest.approx(0.1) and gained.verdict == "shown"
    # The worst over extra for "above" is the least: a 1, 2, 3 against b 2, 0, 3.9.
    assert one(above=True, where={}, worst="extra").difference.value == pytest.approx((-1 + 2 - 0.9) / 3)


def test_nothing_is_concluded_from_the_runs_that_are_left(place):
    """Two of three seeds would show it; the third is missing, or has failed, as a method's worst one would."""
    a = {(0, 1): 1.0, (1, 1): 2.0, (2, 1): 3.0}
    b = {(0, 1): 2.0, (1, 1): 3.01, (2, 1): 4.0}
    comparison = Comparison("one", "loss", "a", "b", False, {"extra": 1})
    assert judge(comparison, *rows(place, {"a": a, "b": b})).verdict == "shown"
    without = {key: value for key, value in b.items() if key != (2, 1)}
    missing = judge(comparison, *rows(place, {"a": a, "b": without}))
    assert (missing.verdict, missing.missing, missing.failed) == ("not run", 1, 0)
    assert missing.difference.value == pytest.approx(-1.005) and missing.difference.seeds == 2
    failed = judge(comparison, *rows(place, {"a": a, "b": without}, [("b", 2, 1), ("b", 2, 2)]))
    assert (failed.verdict, failed.missing, failed.failed) == ("not run", 1, 1)  # extra 2 is not what is compared
    assert report._said(failed) == "-1.005 ± 0.064 so far, 1 of its pairs missing, 1 failed"
    # Of a factor's worst value all values are needed: one run that is missing might have been the worst.
    worst = Comparison("one", "loss", "a", 9, False, worst="extra")
    assert judge(worst, *rows(place, {"a": a, "b": {}})).verdict == "not run"
    assert judge(worst, *rows(place, {"a": a | {(s, 2): 8.0 for s in range(3)}, "b": {}})).verdict == "shown"
    number = Comparison("one", "loss", "a", 9, False, {"extra": 1})
    constant = judge(number, *rows(place, {"a": {(0, 1): 1.0}, "b": {}}))
    assert (constant.verdict, constant.missing) == ("not run", 2)


def test_a_claim_is_its_comparisons_together():
    def of(*words):
        return verdict([Judged(None, None, word) for word in words])

    assert of("shown", "shown") == "shown"
    assert of("shown", "not shown") == of("shown", "opposite") == of("not shown", "not shown") == "not shown"
    assert of("opposite", "not shown") == "opposite" and of() == of("shown", "not run") == "not run"


@pytest.mark.parametrize(
    ("comparison", "said"),
    [
        ({"plan": "oen", "column": "loss", "of": "a", "below": "b"}, "names the plan 'oen'"),
        ({"plan": "one", "column": "lss", "of": "a", "below": "b"}, "has no column 'lss'"),
        ({"plan": "one", "column": "loss", "of": "a", "below": "bb"}, "has no method 'bb'"),
        ({"plan": "one", "column": "loss", "of": "a"}, "give one of above and below"),
        ({"plan": "one", "column": "loss", "of": "a", "belo": "b"}, "belo: is unknown here (did you mean below?)"),
        ({"plan": "one", "column": "loss", "of": "a", "below": "b", "where": {"extra": 3}}, "no run of 'a' is at"),
        ({"plan": "one", "column": "loss", "of": "a", "below": "b", "since": {"extra": 3}}, "no run of 'a' is at"),
    ],
)
def test_a_comparison_that_means_nothing_is_refused_in_one_line(place, comparison, said):
    body = {"plans": {"one": {"file": "one.yaml"}}, "claims": [{"claim": "c", "comparisons": [comparison]}]}
    (place / "bad.yaml").write_text(yaml.safe_dump(body))
    with pytest.raises(InputError) as caught:
        report.read(place / "bad.yaml")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_quick_is_of_a_report(place, capsys):
    (place / "all.yaml").write_text(plan(place))
    with pytest.raises(InputError, match="is one sweep"):
        run(place, "--quick")


def test_minutes_stop_a_sweep_and_it_goes_on(place, capsys):
    (place / "script.py").write_text("import time\ntime.sleep(3)\n" + SCRIPT)
    assert run(place, "--minutes", "0.01") == 130
    assert "goes on from here" in capsys.readouterr().err
    (place / "script.py").write_text(SCRIPT)
    assert run(place) == 1
    assert json.loads((place / "out/all/verdicts.json").read_text())[0]["verdict"] == "shown"


def test_the_whole_tuning_grid_stands_in_the_report(place):
    """Each value with its score, a diverged one too, the choice, and whether it lies at the end of its list."""
    script = SCRIPT.replace('given.get("broken")', 'given.get("rate") == 9').replace(
        'given["base"] / s', 'given["base"] * abs(given["rate"] - given.get("best", 2)) / s')  # fmt: skip
    (place / "script.py").write_text(script)
    methods = {"a": {"base": 1}, "b": {"base": 1, "best": 4}, "c": {"base": 3}}
    tune = {"rate": {"values": {"a": [1, 2, 3, 9], "b": [1, 3], "c": "a"}, "by": "loss", "goal": "min", "seeds": [7]}}
    (place / "one.yaml").write_text(plan(place, methods=methods, tune=tune))
    (place / "all.yaml").write_text(yaml.safe_dump({"plans": {"one": {"file": "one.yaml"}}, "claims": []}))
    assert run(place) == 1  # rate 9 fails
    # Losses |rate - best| / 4 + 7 / 100.
    tried = ["| a | rate, by loss | 1: 0.32, 2: 0.07, 3: 0.32, 9: failed | 2 |",
             "| b | rate, by loss | 1: 0.82, 3: 0.32 | 3, at the end of its list |", "| c | rate, by loss | as a | 2 |"]
    for file in ("all/report.md", "one/table.md"):
        text = (place / "out" / file).read_text()
        assert all(line in text for line in tried), text
    for file in ("all/index.html", "one/index.html"):
        text = (place / "out" / file).read_text()
        assert "<td>1: 0.32, 2: 0.07, 3: 0.32, 9: failed</td><td>2</td>" in text
        assert "<li>a, rate=9, seed=7: exit 1: broken</li>" in text
    said = json.loads((place / "out/one/table.json").read_text())["tuning"]
    assert said[0]["scores"] == [[1, pytest.approx(0.32)], [2, 0.07], [3, pytest.approx(0.32)], [9, None]]
