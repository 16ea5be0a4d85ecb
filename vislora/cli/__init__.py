"""The command `vislora`: what can be seen of adapters, and done to them, without building a model."""

from __future__ import annotations

import argparse
import importlib
from typing import NoReturn

from ..errors import InputError, near, run_script

COMMANDS = {
    "inspect": "what an adapter did: norms and ranks of every update, its certificate checked",
    "bound": "the nearest adapter whose updates keep within a norm",
    "export": "an adapter in another layout: diffusers, kohya, peft",
    "merge": "adapters, weighted, into a model's folder, or several as one adapter",
}
_USAGE = "\n".join(["usage: vislora COMMAND ...", "", *(f"  {name:<8} {text}" for name, text in COMMANDS.items()), "",
                    "vislora COMMAND --help lists a command's flags."])  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(self.prog, message, f"see {self.prog} --help")


def main(argv: list[str] | None = None) -> None:
    """Run `vislora ARGV`. A user's error is one line on stderr and status 2."""
    run_script(_dispatch, argv)


def _dispatch(argv: list[str]) -> None:
    argv = [word for word in argv if word != "--debug"]  # run_script's
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        return
    name, *words = argv
    if name not in COMMANDS:
        wrong = f"{name!r} is no command{near(name, COMMANDS)}"
        raise InputError("vislora", wrong, f"take one of {', '.join(COMMANDS)}")
    command = importlib.import_module(f"{__name__}.{name}")
    parser = _Parser(prog=f"vislora {name}", description=COMMANDS[name], allow_abbrev=False)
    command.flags(parser)
    args, strange = parser.parse_known_args([_underscored(word) for word in words])
    if strange:
        known = [flag for action in parser._actions for flag in action.option_strings]
        parser.error(f"unknown {strange[0]}{near(strange[0], known)}")
    command.run(args)


def _underscored(word: str) -> str:
    """--delta-ratio is --delta_ratio."""
    flag, equals, value = word.partition("=")
    return flag.replace("-", "_").replace("__", "--", 1) + equals + value if word.startswith("--") else word
