"""Frozen dataclasses <-> flags <-> YAML: one schema, and every value checked the same way from either side.

A field is a flag of its own name and a YAML key of its own name (see vislora.options). A script's `--adapter NAME` adds
the fields of that method's dataclass; in YAML they stand under `adapter_options:` or plainly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from vislora.errors import InputError, near
from vislora.options import Option, convert, convert_text, help_text, option, options, plain, spellings

__all__ = ["METHOD_ALIASES", "option", "parse", "read_yaml", "to_dict", "to_yaml"]

T = TypeVar("T")
# The words of kohya, PEFT and the diffusers scripts for what the methods call rank, alpha and dropout.
METHOD_ALIASES = {"rank": ("network_dim", "lora_r", "lora_rank"), "alpha": ("lora_alpha", "network_alpha"),
                  "dropout": ("lora_dropout", "network_dropout")}
_MOST = 100_000  # values in a file, its aliases written out: a few lines of them can stand for billions
_RESERVED = {"config", "help", "h", "debug"}  # --debug is errors.run_script's
Flags = list[tuple[str, str, list[str]]]  # (name, flag as typed, the words behind it)


class _Loader(yaml.SafeLoader):
    """YAML's plain data, with two differences: a key given twice is an error, and only true and false are booleans
    (YAML 1.1 reads `mixed_precision: no` as false)."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if tag != "tag:yaml.org,2002:bool"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > _MOST:
            raise yaml.constructor.ConstructorError(None, None, f"merges more than {_MOST} keys", node.start_mark)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def read_yaml(file: str | Path, flag: str = "--config") -> dict[str, Any]:
    """The mapping in a YAML file, `adapter_options` folded in. InputError unless it is plain data with unique keys."""
    try:
        data = yaml.load(Path(file).read_text(encoding="utf-8-sig"), _Loader)  # a SafeLoader
    except OSError as error:
        raise InputError(f"{flag} {file}", f"cannot be read ({error.strerror})", "name a YAML file") from None
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        place = f"{file}:{mark.line + 1}" if mark else str(file)
        raise InputError(place, f"is not plain YAML ({problem})", "write `key: value` lines, each key once") from None
    data = {} if data is None else data
    _require_bounded(data, file)
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise InputError(str(file), "is not a mapping of names to values", "write `key: value` lines")
    nested = data.pop("adapter_options", None) or {}
    if not isinstance(nested, dict) or not all(isinstance(key, str) for key in nested):
        raise InputError(f"{file}: adapter_options", "is not a mapping of names to values", "indent them below it")
    for key in nested:
        if key in data:
            raise InputError(f"{file}: {key}", "is given twice, also under adapter_options", "keep one of the two")
    return data | nested


def _require_bounded(data: Any, file: str | Path) -> None:
    """Raise InputError for more than _MOST values, aliases written out; what holds itself has endlessly many."""
    left, count = [data], 0
    while left:
        value = left.pop()
        count += 1
        if count > _MOST:
            raise InputError(str(file), f"holds more than {_MOST} values, its aliases written out", "write fewer")
        left += value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()


def parse(schema: type[T], argv: Sequence[str], *, prog: str, description: str = "",
          methods: Mapping[str, type] | None = None, selector: str = "adapter",
          base: Mapping[str, Any] | None = None) -> tuple[T, Any]:
    """(instance of `schema`, instance of the chosen method's class or None) from flags and --config FILE.yaml.

    `methods` maps what the field `selector` may say to dataclasses. Flags win over the file, and the file over `base`
    (settings as `read_yaml` gives them). InputError for anything unknown, missing or of the wrong type; `check()` of
    the chosen method runs where it has one. --help prints and raises SystemExit(0).
    """
    script, of_method = options(schema), {n: options(c, METHOD_ALIASES) for n, c in (methods or {}).items()}
    _keep_apart(script, of_method, prog)
    flags = _split(argv)
    if any(name in ("help", "h") for name, _, _ in flags):
        print(help_text(script, of_method, prog, description))
        raise SystemExit(0)
    file = _config_file(flags)
    settings = {**(base or {}), **(read_yaml(file) if file else {})}

    chosen = None
    if of_method:
        only = {selector: script[selector]}
        given = _from_file(settings, only, file)[0] | _from_flags(flags, only)[0]
        chosen = given.get(selector, script[selector].default)
        if chosen is not None and chosen not in of_method:
            wrong = f"{chosen!r} is no method{near(str(chosen), of_method)}"
            raise InputError(f"--{selector}", wrong, f"take one of {', '.join(of_method)}")

    own = of_method.get(chosen, {})
    known = script | own
    from_file, strange_keys = _from_file(settings, known, file)
    from_flags, strange_flags = _from_flags(flags, known)
    for dash, strange in (("--", strange_flags), ("", strange_keys)):
        for key, subject in strange:
            raise _unknown(subject, key, dash, known, of_method, chosen)
    values = from_file | from_flags
    for one in known.values():
        if one.default is MISSING and one.name not in values:
            raise InputError(f"--{one.name}", "is required", f"give {one.expected}, here or in the --config file")
    try:
        instance = schema(**{name: values[name] for name in script if name in values})
        chosen_values = {name: values[name] for name in own if name in values}
        method = methods[chosen](**chosen_values) if chosen in of_method else None
        if hasattr(method, "check"):
            method.check()
    except InputError:
        raise
    except ValueError as error:  # from a schema's own __post_init__
        raise InputError(prog, str(error), "see --help") from error
    return instance, method


def _keep_apart(script: Mapping[str, Option], of_method: Mapping[str, Mapping[str, Option]], prog: str) -> None:
    """A flag means one thing: no name or alias stands for an option of the script and for one of a method."""
    taken = spellings(script).keys() | _RESERVED
    assert len(taken) == sum(1 + len(one.aliases) for one in script.values()) + len(_RESERVED), f"{prog}: a flag twice"
    for name, own in of_method.items():
        clash = taken & spellings(own).keys()
        assert not clash, f"{prog} and the method {name} share the flags {sorted(clash)}"


def _split(argv: Sequence[str]) -> Flags:
    """The command line flag by flag; --a=b and --a-b are read as --a b and --a_b."""
    found: Flags = []
    for word in argv:
        if word == "-h" or (word.startswith("--") and len(word) > 2):
            flag, equals, value = word.partition("=")
            found.append((flag.lstrip("-").replace("-", "_"), flag, [value] if equals else []))
        elif not found:
            raise InputError(word, "stands before any flag", "see --help")
        else:
            found[-1][2].append(word)
    return found


def _config_file(flags: Flags) -> str | None:
    files = [words for name, _, words in flags if name == "config"]
    if not files:
        return None
    if len(files) > 1 or len(files[0]) != 1:
        raise InputError("--config", f"got {sum(files, [])}", "it takes one YAML file, once")
    return files[0][0]


def _from_file(settings: Mapping[str, Any], known: Mapping[str, Option], file: str | None) -> tuple[dict, list]:
    """(canonical name -> value, [(key, where) that is not in `known`]) of a YAML mapping."""
    values, strange, names = {}, [], spellings(known)
    for key, value in settings.items():
        subject = f"{file}: {key}"
        if key not in names:
            strange.append((key, subject))
            continue
        one = known[names[key]]
        if one.name in values:
            raise InputError(subject, f"is given twice, also as {one.name}", "keep one of the two")
        if one.many and value is not None:
            items = value if isinstance(value, list) else [value]
            values[one.name] = one.many(convert(one, item, subject) for item in items)
        else:
            values[one.name] = convert(one, value, subject)
    return values, strange


def _from_flags(flags: Flags, known: Mapping[str, Option]) -> tuple[dict, list]:
    """The same of the command line. A flag given again replaces its value; one that takes several collects them."""
    values, strange, names = {}, [], spellings(known)
    for key, flag, words in flags:
        name = names.get(key)
        positive = names.get(key.removeprefix("no_"))
        if name is None and positive and known[positive].is_switch and not words:
            name, words = positive, ["false"]
        if name is None:
            strange += [(key, flag)] if key not in _RESERVED else []
            continue
        one = known[name]
        words = words or (["true"] if one.is_switch else [])
        if not words or (len(words) > 1 and not one.many):
            raise InputError(flag, f"got {len(words)} values", f"it takes {one.expected}, in quotes if it has spaces")
        read = [convert_text(one, word, flag) for word in words]
        values[name] = one.many([*values.get(name, ()), *read]) if one.many else read[0]
    return values, strange


def _unknown(subject: str, key: str, dash: str, known: Mapping[str, Option],
             of_method: Mapping[str, Mapping[str, Option]], chosen: str | None) -> InputError:
    """The error for a flag (`dash` is "--") or YAML key that belongs to another method, or to none."""
    if any(key.removeprefix("no_") in spellings(own) for own in of_method.values()):
        own = of_method.get(chosen, {})
        has = "it has " + " ".join(dash + name for name in own) if own else "it has no options"
        return InputError(subject, f"{chosen or 'a run without --adapter'} has no such option", has)
    hint = near(dash + key, [dash + word for word in spellings(known)])
    return InputError(subject, f"unknown {'flag' if dash else 'key'}{hint}", "see --help for all of them")


def to_dict(instance: Any, method: Any = None) -> dict[str, Any]:
    """The resolved configuration as plain values: the schema's fields, and `adapter_options` for a chosen method."""
    data = {item.name: plain(getattr(instance, item.name)) for item in fields(instance) if item.init}
    if method is not None:
        data["adapter_options"] = to_dict(method)
    return data


def to_yaml(instance: Any, method: Any = None) -> str:
    """YAML from which `parse(schema, ["--config", file])` makes an equal configuration."""
    return yaml.safe_dump(to_dict(instance, method), sort_keys=False, allow_unicode=True)
