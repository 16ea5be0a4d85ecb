"""README and docs/ keep their word: commands have the flags that they show, blocks run, links lead somewhere."""

import re

import pages
import pytest
import yaml
from pages import NAMES, PAGES, ROOT

from vislora.sweep import plan

TEXTS = {name: page.read_text(encoding="utf-8") for name, page in zip(NAMES, PAGES, strict=True)}
WITH_PYTHON = [name for name in NAMES if name != "README.md" and pages.blocks(TEXTS[name], "python")]
OTHERS = {"--help", "--strict", "--dest"}  # of any script, mkdocs and pip


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A reader's working directory: the repository's folders, and nothing else yet."""
    monkeypatch.chdir(tmp_path)
    for folder in ("assets", "configs", "train_scripts", "eval"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_what_their_parsers_take(name, place):
    for block in pages.blocks(TEXTS[name], "yaml"):
        if called := re.match(r"# (\w+\.yaml)\n", block):  # the commands below it read it
            (place / called[1]).write_text(block)
    for words in pages.commands(TEXTS[name]):
        try:
            pages.take(words)
        except (SystemExit, Exception) as error:
            if "--help" not in words:
                pytest.fail(f"{' '.join(words)}: {error}")


@pytest.mark.parametrize("name", NAMES)
def test_every_flag_that_is_named_exists(name):
    text = re.sub(r".*\btests/.*", "", TEXTS[name])  # what stands in tests/ has flags of its own
    named = set(re.findall(r"(?<![\w-])--[a-z]\w+", text))
    unknown = {flag.replace("--no_", "--") for flag in named} - pages.known_flags() - OTHERS
    assert not unknown, sorted(unknown)


@pytest.mark.parametrize("name", WITH_PYTHON)
def test_python_runs_as_a_reader_would_run_it(name, place):
    """A page's blocks one after another, in one folder and one interpreter."""
    here = {}
    for block in pages.blocks(TEXTS[name], "python"):
        exec(compile(block, name, "exec"), here)


@pytest.mark.parametrize("name", NAMES)
def test_yaml_is_what_its_reader_takes(name, place):
    for block in pages.blocks(TEXTS[name], "yaml"):
        (place / "block.yaml").write_text(block)
        if "script" not in (settings := yaml.safe_load(block)):
            continue
        for cell in plan.read("block.yaml").cells({}):
            (place / "cell.yaml").write_text(yaml.safe_dump(dict(cell.settings)))
            pages.script(settings["script"]).parse(["--config", "cell.yaml"])


# What looks like a measurement: a decimal fraction, or a number with a unit or a spread.
MEASURED = re.compile(r"(?<![\w./=-])(?:\d+\.\d+(?![\w.])|\d+(?= ?%| ±| points| s\b| MB| GB| min\b))")
DEFINED = {  # numbers that are somebody's definition or recommendation, and that nothing measures
    ("docs/evidence.md", "The rule"), ("docs/files.md", "Files and layouts"), ("docs/methods.md", "Optimizers"),
    ("docs/guides/compare.md", "What is fair"), ("docs/subject_driven.md", "Protocols"),
    ("docs/vision.md", "What tuning costs an image model"),
}  # fmt: skip


def without_a_command(text):
    """The headings of the sections that hold a measurement in their prose or tables, and no command."""
    text, found = re.sub(r"<!-- methods:.*?<!-- end of methods -->", "", text, flags=re.S), []
    for section in re.split(r"^(?=#{1,3} )", text, flags=re.M):
        prose = re.sub(r"^```.*?^```|^ {4}.*?$|`[^`]*`|\]\([^)]*\)|\b\d{4}\.\d{5}\b", "", section, flags=re.M | re.S)
        ours = pages.commands(section) or "python assets/build/build.py" in section
        if MEASURED.search(prose) and not ours:
            found.append(section.partition("\n")[0].lstrip("# "))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_measured_number_has_the_command_beside_it(name):
    assert set(without_a_command(TEXTS[name])) == {heading for page, heading in DEFINED if page == name}


def test_a_number_without_a_command_would_be_found():
    command = "`python eval/sweep.py --config configs/sweeps/table3.yaml`"
    assert without_a_command("# A\nIt keeps 95 % of them.\n") == ["A"]
    assert without_a_command(f"# A\n| LoRA | 0.783 ± 0.1 |\n## B\n{command} gives 0.5.\n") == ["A"]
    assert without_a_command(f"# A\n{command}: 95 %\n## B\nRank 16, `--delta_ratio 0.1`, [x](a0.5.md).\n") == []


@pytest.mark.parametrize("name", NAMES)
def test_links_and_pictures_lead_somewhere(name):
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", TEXTS[name]):
        assert ((ROOT / name).parent / target).exists(), target


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_named_exist(name):
    for target in re.findall(r"`((?:configs|eval|train_scripts|vislora|assets|tests)/[\w/.-]+)`", TEXTS[name]):
        assert (ROOT / target).exists() or target == "configs/sweeps/NAME.yaml", target


def test_a_renamed_flag_would_be_found(place):
    """The net itself: wrong flags, values and commands of each kind are refused."""
    text = """
    accelerate launch --mixed_precision bf16 train_scripts/dreambooth.py --adapter nb_lora --p 1 --dleta 6
    python eval/subject_driven.py --rnu out
    python eval/spectrum.py --run out --gradinets 4
    python eval/od_lora_7.py --output out --runds 3
    python eval/sweep.py --config configs/sweeps/no_such.yaml
    vislora bound a.safetensors --p 1 --delta_ration 0.1 -o b
"""
    found = pages.commands(text)
    assert len(found) == 6
    for words in found:
        with pytest.raises((SystemExit, Exception)):
            pages.take(words)
    good = "`python eval/spectrum.py --run out` and\n```sh\nvislora inspect \\\n    a.safetensors # words\n```\n"
    assert [" ".join(words) for words in pages.commands(good)] == [
        "vislora inspect a.safetensors", "python eval/spectrum.py --run out"]  # fmt: skip
    for words in pages.commands(good):
        pages.take(words)
