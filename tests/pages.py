"""What README and the pages of docs/ show, taken out of them: blocks, and commands given to their own parsers."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.util
import io
import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from script_runs import opened

from vislora import cli, config
from vislora.sweep import plan, report

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
_OURS = ("accelerate launch", "python eval/", "python train_scripts/", "python -m vislora", "vislora ")


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def commands(text: str) -> list[list[str]]:
    """The words of every command of ours: in blocks for a shell, indented or fenced, and between single backquotes."""
    shell = "\n".join(blocks(text, "(?:sh|bash|console)"))  # the pattern's own group holds nothing
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    shell += "\n" + "\n".join(re.findall(r"^ {4}(.*)", prose, re.M))
    lines = shell.replace("\\\n", " ").splitlines() + re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose)
    said = [part.strip() for line in lines for part in re.split(r"&&|;", line.partition(" #")[0])]
    whole = [line for line in said if line.startswith(_OURS) and "..." not in line]
    return [shlex.split(line) for line in whole if len(line.split()) > 2 or line.startswith("vislora ")]


@functools.cache
def script(name: str):
    """A file of train_scripts/ or eval/ as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str((ROOT / name).parent))
        return opened(name)


class Parsed(Exception):
    """Raised in the place of what a script does after reading its flags."""


def take(words: list[str]) -> None:
    """Give a command to the parsers that read it, and nothing more; files that they read are in the working directory.

    Raises InputError or SystemExit for flags and values that they refuse.
    """
    if words[:2] == ["accelerate", "launch"]:
        told = launch_command_parser().parse_args(words[2:])
        return take(["python", told.training_script, *told.training_script_args])
    if words[0] == "vislora":
        return command_line(words[1], words[2:])
    name, flags = words[1], words[2:]
    if name == "-m":
        assert importlib.util.find_spec(words[2]), words
        return None
    if name == "eval/sweep.py":
        return sweep(flags)
    stop_after_parsing(script(name), flags)


def command_line(name: str, words: list[str]) -> None:
    command, parser = importlib.import_module(f"vislora.cli.{name}"), cli._Parser(prog=name, allow_abbrev=False)
    command.flags(parser)
    parser.parse_args(words)


def sweep(flags: list[str]) -> None:
    file = script("eval/sweep.py").parse([w.replace("NAME", "table3") for w in flags]).config
    report.read(file) if report.is_report(file) else plan.read(file)


def stop_after_parsing(module, flags: list[str]) -> None:
    if hasattr(module, "parse"):
        module.parse(flags)
        return
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Parsed):
        for owner, name in ((config, "parse"), (argparse.ArgumentParser, "parse_args")):
            patch.setattr(owner, name, _then_stop(getattr(owner, name)))
        module.main(flags)
        raise AssertionError(f"{module.__name__} read no flags")


def _then_stop(parse):
    def stop(*args, **more):
        parse(*args, **more)
        raise Parsed

    return stop


@functools.cache
def known_flags() -> frozenset[str]:
    """Every flag that a script or command of ours takes, or accelerate's launcher."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        for file in [*sorted((ROOT / "train_scripts").glob("*.py")), *sorted((ROOT / "eval").glob("*.py"))]:
            module = script(str(file.relative_to(ROOT)))
            if hasattr(module, "main"):
                with contextlib.suppress(SystemExit):
                    module.main(["--help"])
        for name in cli.COMMANDS:
            with contextlib.suppress(SystemExit):
                command_line(name, ["--help"])
        print(*(flag for action in launch_command_parser()._actions for flag in action.option_strings))
    return frozenset(re.findall(r"--[a-z]\w*", said.getvalue()))
