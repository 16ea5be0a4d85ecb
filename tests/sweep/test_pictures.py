"""Pictures and the page of a sweep, from runs made by hand, against what was put into them."""

import csv
import json
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image
from script_runs import opened

from vislora.errors import InputError
from vislora.sweep.cells import Place
from vislora.sweep.draw import front
from vislora.sweep.plan import read
from vislora.sweep.series import over_steps, samples
from vislora.sweep.sheet import CELL

ROOT = Path(__file__).resolve().parents[2]
PICTURES = {
    "trade": {"kind": "scatter", "x": "drift", "y": "dino", "lines": {"NB": ["nb 6", "nb 12"]},
              "front": {"x": "min", "y": "max"}, "where": {"rate": 1}},
    "curves": {"kind": "steps", "values": {"loss": "loss", "norm": "layers.*.norm"}, "methods": ["lora", "nb 6"],
               "where": {"rate": 1}},
    "rates": {"kind": "against", "setting": "rate", "values": ["dino"], "log": True},
    "samples": {"kind": "images", "scores": ["dino"], "methods": ["lora", "nb 6"], "where": {"rate": 1},
                "title": "What <it> drew"},
}  # fmt: skip
METHODS = {"lora": {"adapter": "lora"}, "nb 6": {"adapter": "nb_lora", "delta": 6},
           "nb 12": {"adapter": "nb_lora", "delta": 12}, "dora": {"adapter": "dora"}}  # fmt: skip
SCORES = {"lora": (0.7, 0.5), "nb 6": (0.5, 0.1), "nb 12": (0.6, 0.2), "dora": (0.6, 0.4)}  # dino, drift
COLOURS = {"lora": (200, 30, 30), "nb 6": (30, 30, 200)}


def write(file, **body):
    base = {"script": "train.py", "methods": METHODS, "subjects": {"owl": {}, "taxi": {}}, "seeds": [0, 1],
            "grid": {"rate": [1, 2]}, "collect": {"dino": "s.json:m.dino", "drift": "s.json:m.drift"},
            "pictures": PICTURES}  # fmt: skip
    file.write_text(yaml.safe_dump(base | body, sort_keys=False))
    return file


def finish(sweep, cell):
    """A finished run: dino and drift as in SCORES and one more tenth a seed and rate; two prompts with images."""
    place = Place(sweep, cell)
    images = place.run / "eval" / "images"
    images.mkdir(parents=True)
    dino, drift = SCORES[cell.method]
    more = 0.1 * cell.seed + 0.1 * (cell.varied["rate"] - 1)
    (place.run / "s.json").write_text(json.dumps({"m": {"dino": dino + more, "drift": drift}}))
    lines = [{"step": step, "loss": 1 / step + cell.seed, "layers": {"a.b": {"norm": step}, "c": {"norm": 3 * step}}}
             for step in (10, 20)]  # fmt: skip
    (place.run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 30, "lo')
    told = {f"{i:03d}_{k}.png": {"prompt": f"a sks owl {i}", "seed": k, "group": i} for i in (0, 1) for k in (0, 1)}
    for name in told:
        Image.new("RGB", (16, 16), COLOURS.get(cell.method, "white")).save(images / name)
    manifest = {"images": told, "templates": ["a {} 0", "a {} 1"]}
    (images / "manifest.json").write_text(json.dumps(manifest))
    by_prompt = {"a {} 0": {"dino": dino}, "a {} 1": {"dino": dino + 0.01}}
    (place.run / "eval" / "subject_driven.json").write_text(json.dumps({"per_prompt": by_prompt}))
    (place.path / "cell.json").write_text(json.dumps({"ok": True, "seconds": 1}))


def report(file, out):
    module = opened("eval/sweep.py")
    module.main(["--config", str(file), "--output_dir", str(out), "--report"])
    return (out / "index.html").read_text()


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """(folder of a reported sweep, its page): all cells but one, which failed."""
    folder = tmp_path_factory.mktemp("sweep")
    file, out = write(folder / "plan.yaml"), folder / "out"
    cells = read(file).cells({})
    for cell in cells[:-1]:
        finish(out, cell)
    Place(out, cells[-1]).path.mkdir(parents=True)
    failed = {"ok": False, "seconds": 1, "last": "exit 1: no <photo>"}
    (Place(out, cells[-1]).path / "cell.json").write_text(json.dumps(failed))
    return out, report(file, out)


def test_scatter_holds_the_means_their_intervals_and_the_front(reported):
    rows = {row["method"]: row for row in rows_of(reported[0] / "trade.csv")}
    assert list(rows) == ["lora", "nb 6", "nb 12", "dora"]
    assert float(rows["lora"]["dino"]) == pytest.approx(0.75) and float(rows["lora"]["drift"]) == pytest.approx(0.5)
    # Seeds 0.7 and 0.8: t(0.975, 1) = 12.706 times the standard error 0.05.
    assert float(rows["lora"]["dino_half"]) == pytest.approx(0.63531, abs=1e-4)
    assert {m: row["on_front"] for m, row in rows.items()} == {"lora": "1", "nb 6": "1", "nb 12": "1", "dora": "0"}
    assert {m: row["line"] for m, row in rows.items()} == {"lora": "", "nb 6": "NB", "nb 12": "NB", "dora": ""}


def test_front_against_its_definition():
    points = [(0, 0), (1, 1), (1, 1), (2, 0.5), (0.5, 1), (-1, -1)]
    assert front(points, {"x": "min", "y": "max"}) == {0, 4, 5}
    assert front(points, {"x": "max", "y": "max"}) == {1, 2, 3}
    assert front(points, {}) == set()


def test_steps_are_means_over_layers_subjects_and_seeds(reported):
    rows = {(row["value"], row["method"], int(row["step"])): row for row in rows_of(reported[0] / "curves.csv")}
    assert len(rows) == 2 * 2 * 2  # the line that was being written is passed over
    assert float(rows["norm", "lora", 20]["mean"]) == 40 and float(rows["norm", "lora", 20]["half"]) == 0
    loss = rows["loss", "nb 6", 10]
    assert float(loss["mean"]) == pytest.approx(0.1 + 0.5) and loss["seeds"] == "2"


def test_against_has_a_line_for_each_method(reported):
    rows = {(row["method"], row["rate"]): row for row in rows_of(reported[0] / "rates.csv")}
    assert len(rows) == 8
    assert float(rows["nb 6", "1"]["mean"]) == pytest.approx(0.55)
    assert float(rows["nb 6", "2"]["mean"]) == pytest.approx(0.65)


def test_the_sheet_shows_each_run_in_its_place(reported):
    rows = rows_of(reported[0] / "samples.csv")
    assert [(r["subject"], r["method"], r["number"]) for r in rows[:4]] == [
        ("owl", "lora", "0"), ("owl", "lora", "1"), ("owl", "nb 6", "0"), ("owl", "nb 6", "1")]  # fmt: skip
    assert [float(r["dino"]) for r in rows[:4]] == [0.7, 0.71, 0.5, 0.51] and {r["seed"] for r in rows} == {"0"}
    assert all((reported[0] / row["file"]).is_file() and row["file"].endswith("_0.png") for row in rows)
    sheet = Image.open(reported[0] / "samples.png")
    counts = {colour: count for count, colour in sheet.getcolors(1 << 20)}
    assert all(counts[colour] == 4 * CELL * CELL for colour in COLOURS.values())  # two subjects, two prompts
    column = [sheet.getpixel((sheet.width // 2, y)) for y in range(sheet.height)]
    seen = [name for y, pixel in enumerate(column) for name, colour in COLOURS.items()
            if pixel == colour and column[y - 1] != colour]  # fmt: skip
    assert seen == ["lora", "nb 6"] * 2


def test_the_page_needs_nothing_beside_it(reported):
    page = reported[1]
    assert page.count("data:image/png;base64,") == 4 and page.count("data:text/csv;base64,") == 4
    for found in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert found.startswith("data:")
    assert "<script" not in page and "http" not in re.sub(r"base64,[^\"]*", "", page) and "@import" not in page
    assert 'name="viewport"' in page
    assert "31 of 32 runs done, 1 failed" in page and "no &lt;photo&gt;" in page and "What &lt;it&gt; drew" in page


def test_a_sweep_that_has_not_begun_has_a_page_too(tmp_path):
    tune = {"rate": {"values": {"lora": [3, 4]}, "by": "dino", "seeds": [9], "subjects": {"cat": {}}}}
    page = report(write(tmp_path / "plan.yaml", tune=tune), tmp_path / "out")
    assert page.count("Nothing that it shows has ended yet") == 4 and "0 of 34 runs done" in page
    assert not list((tmp_path / "out").glob("*.png"))


def test_tuning_runs_have_values_and_subjects_of_their_own(tmp_path):
    own = {"lora": [3, "5e-1"], "nb 6": [7]}
    tune = {"rate": {"values": own, "by": "dino", "seeds": [9], "subjects": {"cat": {"photos": "c"}}}}
    cells = read(write(tmp_path / "plan.yaml", tune=tune)).tuning_cells()
    assert [(c.method, c.subject, c.varied["rate"], c.settings["photos"]) for c in cells] == [
        ("lora", "cat", 3, "c"), ("lora", "cat", 0.5, "c"), ("nb 6", "cat", 7, "c")]  # fmt: skip


def test_what_a_run_lacks_is_no_error(tmp_path):
    assert over_steps(tmp_path, "loss") == {} and samples(tmp_path, "eval/images", "s.json:x") == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": "x"}\n{"loss": 1}\n[]\n')
    assert over_steps(tmp_path, "loss") == {} and over_steps(tmp_path, "layers.*.norm") == {}


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        ("scatter", "'scatter' is no kind of picture"),
        ({"kind": "pie"}, "'pie' is no kind of picture -> take kind: images | scatter"),
        ({"kind": "scatter", "x": "drift"}, "has no y"),
        ({"kind": "scatter", "x": "drift", "y": "dinno"}, "no column of collect 'dinno' (did you mean dino?)"),
        ({"kind": "scatter", "x": "drift", "y": "dino", "line": {}}, "line: is unknown here (did you mean lines?)"),
        ({"kind": "scatter", "x": "drift", "y": "dino", "lines": {"a": ["nb 7"]}}, "no method 'nb 7'"),
        ({"kind": "scatter", "x": "drift", "y": "dino", "front": {"x": "low", "y": "max"}}, "say which end is good"),
        ({"kind": "steps", "values": ["loss"]}, "values: is ['loss'] -> give a dict"),
        ({"kind": "against", "setting": "rank", "values": ["dino"]}, "no setting of grid or factors 'rank'"),
        ({"kind": "images", "where": {"rank": 3}}, "no setting of grid or factors 'rank'"),
        ({"kind": "images", "prompts": ["grass"]}, "give a list[int]"),
        ({"kind": "images", "prompts": [-1]}, "give prompts by number"),
        ({"kind": "images", "result": "scores.json"}, "is no file:path"),
    ],
)
def test_a_picture_that_means_nothing_is_refused_in_one_line(tmp_path, picture, said):
    with pytest.raises(InputError) as caught:
        read(write(tmp_path / "plan.yaml", pictures={"one": picture}))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_name_that_is_a_path_is_refused(tmp_path):
    with pytest.raises(InputError, match="is no name for a file"):
        read(write(tmp_path / "plan.yaml", pictures={"../one": PICTURES["rates"]}))
