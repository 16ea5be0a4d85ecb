"""Options: what a dataclass field says about its flag, and how a value is read for it, whatever it came from.

A field's help is `metadata["help"]`, or the comment behind the field in the source; `metadata` may also hold `group` (a
heading in --help), `choices` and `aliases`.
"""

from __future__ import annotations

import inspect
import re
import textwrap
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vislora.errors import InputError, near

_BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
# in the order in which a value is tried
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}


@dataclass(frozen=True)
class Option:
    """One flag. `kinds`: the scalar types it takes, `choices`: the exact values; `many`: tuple or list of those."""

    name: str
    kinds: tuple[type, ...]
    choices: tuple[Any, ...]
    many: type | None
    optional: bool
    default: Any  # MISSING: required
    help: str
    group: str
    aliases: tuple[str, ...]

    @property
    def is_switch(self) -> bool:
        """True for --flag and --no_flag, which need no value."""
        return self.kinds == (bool,) and not self.many

    @property
    def expected(self) -> str:
        words = ["one of " + ", ".join(map(str, self.choices))] if self.choices else []
        words += [word for kind, word in _WORDS.items() if kind in self.kinds]
        return ("a list of: " if self.many else "") + " or ".join(words + ["none"] * self.optional)


def option(default: Any = MISSING, help: str = "", *, group: str = "options", choices: Sequence = (),
           aliases: Sequence[str] = ()) -> Any:
    """A dataclass field with this module's metadata. No default: the flag is required."""
    metadata = {"help": help, "group": group, "choices": tuple(choices), "aliases": tuple(aliases)}
    return field(default=default, metadata=metadata)


def options(schema: type, aliases: Mapping[str, tuple[str, ...]] | None = None) -> dict[str, Option]:
    """The options of a dataclass by name, in order. `aliases` adds spellings. TypeError for a type without a flag."""
    hints, comments, found = get_type_hints(schema), _comments(schema), {}
    for item in fields(schema):
        if not item.init:
            continue
        kinds, choices, many, optional = _read_type(hints[item.name], f"{schema.__name__}.{item.name}")
        if item.metadata.get("choices"):
            kinds, choices = (), tuple(item.metadata["choices"])
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        spellings = (*item.metadata.get("aliases", ()), *(aliases or {}).get(item.name, ()))
        text = item.metadata.get("help") or comments.get(item.name, "")
        group = item.metadata.get("group", "options")
        found[item.name] = Option(item.name, kinds, choices, many, optional, default, text, group, spellings)
    return found


def _read_type(hint: Any, where: str) -> tuple[tuple[type, ...], tuple, type | None, bool]:
    """(kinds, choices, many, optional) of a field's annotation."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is types.NoneType:
        return (), (), None, True
    if hint in _WORDS:
        return (hint,), (), None, False
    if origin is Literal:
        return (), args, None, False
    if origin in (Union, types.UnionType):
        parts = [_read_type(arg, where) for arg in args]
        many = next((part[2] for part in parts if part[2]), None)
        kinds, choices = (tuple(x for part in parts for x in part[i]) for i in (0, 1))
        return kinds, choices, many, any(part[3] for part in parts)
    if origin is list or (origin is tuple and args[1:] == (...,)):
        kinds, choices, many, optional = _read_type(args[0], where)
        if many is None and not optional:
            return kinds, choices, origin, False
    raise TypeError(f"{where}: no flag for {hint}; use bool, int, float, str, Path, Literal, tuple[X, ...] or X | None")


def _comments(schema: type) -> dict[str, str]:
    """Field name -> the comment behind it in the source (nothing where the source is not at hand)."""
    found = {}
    for cls in reversed(schema.__mro__[:-1]):
        try:
            source = inspect.getsource(cls)
        except (OSError, TypeError):
            continue
        found |= dict(re.findall(r"^ +(\w+) *:[^#\n]*# *(.+)$", source, re.MULTILINE))
    return found


def convert(one: Option, value: Any, subject: str) -> Any:
    """`value` (a flag's text, or what YAML gave) as the option's type. InputError(subject, …) when it is another."""
    if value is None and one.optional:
        return None
    for choice in one.choices:
        if value == choice and type(value) is type(choice):
            return choice
    for kind in (kind for kind in _WORDS if kind in one.kinds):
        if kind is bool and (isinstance(value, bool) or (isinstance(value, str) and value.lower() in _BOOLS)):
            return value if isinstance(value, bool) else _BOOLS[value.lower()]
        if kind is int and type(value) is int or kind is str and isinstance(value, str):
            return value
        if kind is Path and isinstance(value, str):
            return Path(value)
        if kind is float and type(value) in (int, float, str):  # 1e-4 and inf are text to YAML
            try:
                return float(value)
            except (ValueError, OverflowError):
                continue
    shown = f"{value!r:.60}" if isinstance(value, str | int | float) else f"a {type(value).__name__}"
    hint = near(value, map(str, one.choices)) if isinstance(value, str) else ""
    quote = ", in quotes" if str in one.kinds and not isinstance(value, list | dict) else ""
    raise InputError(subject, f"got {shown}{hint}", f"it takes {one.expected}{quote}")


def convert_text(one: Option, text: str, subject: str) -> Any:
    """A flag's text: whole numbers, choices that are no text and "none" are read first, then as in YAML."""
    for choice in one.choices:
        if str(choice) == text:
            return choice
    if int in one.kinds and re.fullmatch(r"[+-]?\d{1,18}", text):
        return int(text)
    if one.optional and text.lower() in ("none", "null") and str not in one.kinds and Path not in one.kinds:
        return None
    return convert(one, text, subject)


def spellings(known: Mapping[str, Option]) -> dict[str, str]:
    """Every spelling -> canonical name."""
    return {word: one.name for one in known.values() for word in (*one.aliases, one.name)}


def help_text(script: Mapping[str, Option], of_method: Mapping[str, Mapping[str, Option]], prog: str,
              about: str) -> str:
    """What --help prints: the script's options by group, then every method's, with defaults."""
    groups: dict[str, list[Option]] = {}
    for one in script.values():
        groups.setdefault(one.group, []).append(one)
    groups |= {f"--adapter {name}": list(own.values()) for name, own in of_method.items()}
    lines = [f"usage: {prog} [--config FILE.yaml] [--FLAG VALUE ...]", "", *textwrap.wrap(about, 100)]
    for title, members in groups.items():
        lines += ["", f"{title}:"] if members else []
        for one in members:
            default = "required" if one.default is MISSING else f"default: {plain(one.default)}"
            also = "; also " + " ".join("--" + alias for alias in one.aliases) if one.aliases else ""
            text = f"{one.help + ' ' if one.help else ''}({one.expected}; {default}{also})"
            lines += [f"  --{one.name}", *textwrap.wrap(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)]
    return "\n".join(lines)


def plain(value: Any) -> Any:
    """`value` of a field as YAML has it: lists for tuples, text for paths."""
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
