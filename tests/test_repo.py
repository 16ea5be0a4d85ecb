"""Promises of the repository about itself: README's snippets run, its table is current, files keep to their size."""

from __future__ import annotations

import re
from pathlib import Path

import vislora
from vislora.adapters import get
from vislora.adapters._table import fill

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_readme_has_both_commands_on_its_first_screen():
    first = "\n".join(README.splitlines()[:25])
    launch = "accelerate launch train_scripts/dreambooth.py --adapter nb_lora --p 1 --delta 6"
    assert f"pip install -e . && {launch}" in first
    assert 'pip install -e ".[dev]" && pytest' in first


def test_readme_snippets_run(tmp_path, monkeypatch):
    """One after another, in one folder, as a reader would."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(REPOSITORY / "assets")
    snippets = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(snippets) == 2  # pages have theirs run by tests/docs
    for snippet, left in zip(snippets, ("adapter/adapter.safetensors", "bird.png"), strict=True):
        exec(compile(snippet, "README.md", "exec"), {})
        assert (tmp_path / "out" / left).exists()


def test_readme_table_is_current():
    assert fill(README) == README, "run: python -m vislora.adapters._table README.md"


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (REPOSITORY / target).exists(), target


def test_files_keep_to_their_size():
    for file in [f for folder in ("vislora", "train_scripts", "eval") for f in (REPOSITORY / folder).rglob("*.py")]:
        limit = 150 if file.parent.name == "adapters" else 300
        assert len(file.read_text().splitlines()) <= limit, file


def test_one_method_a_file_and_all_is_true():
    assert vislora.methods() == sorted(vislora.methods())
    for name in vislora.methods():
        assert get(name).__module__ == f"vislora.adapters.{name}"
    assert all(hasattr(vislora, name) for name in vislora.__all__)


def test_nothing_of_ours_writes_or_reads_pickles():
    for folder in ("vislora", "train_scripts", "eval", "assets/build"):
        for file in (REPOSITORY / folder).rglob("*.py"):
            if file.name == "files.py" and file.parent.name == "testing":
                continue  # the conformance suite copies a model in memory as users may
            assert not re.search(r"\bimport pickle|torch\.(save|load)\(|np\.load\(", file.read_text()), file
