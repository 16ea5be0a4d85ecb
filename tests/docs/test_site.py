"""The site of docs/ builds with warnings as errors, and holds what it is to hold."""

import re
import subprocess
import sys

import yaml
from pages import PAGES, ROOT

import vislora


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in PAGES[1:]:
        name = page.relative_to(ROOT / "docs").with_suffix("")
        folder = tmp_path / "site" / (name.parent if name.name == "index" else name)
        made = (folder / "index.html").read_text()
        assert "--8&lt;--" not in made and "--8<--" not in made
    api = (tmp_path / "site" / "api" / "index.html").read_text()
    for name in vislora.methods():
        assert f'id="vislora.adapters.{name}.' in api  # by its docstring
    for name in ("attach.attach", "io.load", "handle.Handle.merge", "optim.build", "errors.InputError"):
        assert f'id="vislora.{name}"' in api
    table = (tmp_path / "site" / "methods" / "index.html").read_text()
    assert all(f"<code>{name}</code>" in table for name in vislora.methods())
    links = re.findall(r'(?:src|href)="(https?://[^"]+)"', (tmp_path / "site" / "index.html").read_text())
    assert all("squidfunk" in link for link in links), "nothing is fetched from elsewhere; the theme names its home"


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    named = set(re.findall(r"[\w/]+\.md", str(nav)))
    assert named == {str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]}
