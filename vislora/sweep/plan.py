"""What a sweep's YAML says, and the cells (single runs) that follow from it.

    script: train_scripts/classification.py
    fixed: {max_train_steps: 200}            # settings of every run, as in the script's own --config files
    methods:                                 # a label, and what makes the method
      lora: {adapter: lora, rank: 8}
      nb_lora 0.1: {adapter: nb_lora, rank: 8, p: 1, delta_ratio: 0.1}
    subjects:                                # optional: labels of data, with their settings
      owl: {instance_data_dir: assets/world/subjects/owl}
    seeds: [0, 1, 2]
    grid: {rank: [4, 16]}                    # every combination
    factors: {learning_rate: [1e-3, 1e-2]}   # one at a time, the others as they stand
    tune:                                    # a setting chosen for each method, before the rest, by its mean `by`
      learning_rate: {values: [1e-3, 1e-2], by: validation_accuracy, goal: max, seeds: [100]}
                                             # also subjects: {label: settings}, to choose on others than are reported
    evaluate: ["eval/forgetting.py --run {run}"]
    collect: {source: metrics.json:source_accuracy}   # a column of the table: file in the run, path in its JSON; of a
                                             # .jsonl the last line that has it, or mean(path) over all that have it
    title: Figure 6                          # of the page
    pictures: {...}                          # see vislora/sweep/pictures.py

In `grid`, `factors` and `tune` a setting may be {values: [...], methods: [labels]}, for methods that have it; in `tune`
`values` may also be {label: [...]}, a list for each method that is tuned, and {label: other} takes what other is given.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vislora.config import read_yaml
from vislora.errors import InputError, near
from vislora.sweep import pictures
from vislora.sweep.pictures import Picture

Settings = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run: who it is in the table, and all that is given to the script."""

    method: str
    subject: str | None
    seed: int
    varied: Settings
    settings: Settings
    key: str
    tuning: str | None = None

    @property
    def label(self) -> str:
        """A short name, for messages and folders."""
        words = [self.method, *([self.subject] if self.subject else [])]
        words += [f"{name}={value}" for name, value in self.varied.items()] + [f"seed={self.seed}"]
        return ", ".join(words)

    @property
    def folder(self) -> str:
        """The cell's folder: readable, and one for each content, so that equal points of two factors share a run."""
        words = "__".join(str(word) for word in (self.method, self.subject, self.seed) if word is not None)
        safe = "".join(c if c.isalnum() or c in "._-" else "_" for c in words)
        return f"{safe[:60]}-{self.key}"

    def matches(self, only: Mapping[str, str]) -> bool:
        """Whether it is among those that `--only` asks for."""
        own = {"method": self.method, "subject": self.subject, "seed": self.seed, **self.varied}
        return all(name in own and str(own[name]) == value for name, value in only.items())


@dataclass(frozen=True)
class Setting:
    """Values of one setting, and the methods that take them (all where None)."""

    name: str
    values: list[Any]
    methods: list[str] | None = None
    by: str = ""
    goal: str = "max"
    seeds: list[int] = field(default_factory=list)
    own: dict[str, list[Any]] = field(default_factory=dict)
    like: dict[str, str] = field(default_factory=dict)
    subjects: dict[str | None, Settings] | None = None

    def is_for(self, method: str) -> bool:
        return self.methods is None or method in self.methods

    def values_for(self, method: str) -> list[Any]:
        return self.own.get(method, self.values)


@dataclass(frozen=True)
class Plan:
    """A sweep, read and checked."""

    name: str
    script: str
    fixed: Settings
    methods: dict[str, Settings]
    subjects: dict[str | None, Settings]
    seeds: list[int]
    grid: list[Setting]
    factors: list[Setting]
    tune: list[Setting]
    evaluate: list[str]
    collect: dict[str, str]
    title: str = ""
    pictures: list[Picture] = field(default_factory=list)

    def tuning_cells(self, only: str | None = None) -> list[Cell]:
        """The runs that `tune` needs: every value of every tuned setting, for each method that takes it.

        only: a method; those runs alone that its settings are chosen by.
        """
        cells = []
        for setting, (method, given) in itertools.product(self.tune, self.methods.items()):
            if not setting.is_for(method) or (only is not None and method != setting.like.get(only, only)):
                continue
            subjects = setting.subjects or self.subjects
            for value, subject, seed in itertools.product(setting.values_for(method), subjects, setting.seeds):
                who = (method, given, subject, subjects[subject], seed)
                cells.append(self._cell(*who, {setting.name: value}, {}, setting.name))
        return cells

    def cells(self, chosen: Mapping[str, Settings]) -> list[Cell]:
        """The sweep's own points. chosen: {method: the settings that tuning chose}. Those with one key are one run."""
        cells = []
        for method, given in self.methods.items():
            for varied in self._points(method):
                for subject, seed in itertools.product(self.subjects, self.seeds):
                    who = (method, given, subject, self.subjects[subject], seed)
                    cells.append(self._cell(*who, varied, chosen.get(method, {}), None))
        return cells

    def _points(self, method: str) -> list[Settings]:
        grid = [setting for setting in self.grid if setting.is_for(method)]
        product = [dict(zip([s.name for s in grid], values, strict=True))
                   for values in itertools.product(*[s.values for s in grid])]  # fmt: skip
        single = [{s.name: value} for s in self.factors if s.is_for(method) for value in s.values]
        return product + [{**point, **one} for point in product for one in single]

    def _cell(self, method: str, given: Settings, subject: str | None, about: Settings, seed: int, varied: Settings,
              chosen: Settings, tuning: str | None) -> Cell:  # fmt: skip
        settings = {**self.fixed, **about, **given, **chosen, **varied, "seed": seed}
        content = json.dumps([self.script, settings, self.evaluate], sort_keys=True, default=str)
        key = hashlib.sha256(content.encode()).hexdigest()[:10]
        return Cell(method, subject, seed, varied, settings, key, tuning)


_MOST = 100_000  # runs
_KEYS = ("script", "fixed", "methods", "subjects", "seeds", "grid", "factors", "tune", "evaluate", "collect",
         "title", "pictures")  # fmt: skip


def read(file: str | Path, less: Mapping[str, Any] | None = None) -> Plan:
    """The plan of a YAML file. Raises InputError, one line, for what it cannot mean.

    less: to make it smaller: `fixed` is added to the file's, `methods` and `subjects` are the labels that stay, and
    other keys stand in the place of the file's. Pictures are left out then.
    """
    raw, name = read_yaml(file), str(file)
    if less is not None:
        raw = _smaller(raw, less, name)
    for key in raw:
        if key not in _KEYS:
            raise InputError(f"{name}, {key}", f"is no part of a sweep{near(key, _KEYS)}", "take " + ", ".join(_KEYS))
    for key in ("script", "methods", "collect"):
        if not raw.get(key):
            raise InputError(name, f"has no {key}", "see vislora/sweep/plan.py for what a sweep holds")
    methods = _mappings(raw["methods"], f"{name}, methods")
    subjects: dict[str | None, Settings] = dict(_mappings(raw.get("subjects") or {}, f"{name}, subjects"))
    seeds = _list(raw.get("seeds", [0]), f"{name}, seeds", int)
    plan = Plan(
        Path(file).stem, str(raw["script"]), _mapping(raw.get("fixed"), f"{name}, fixed"), methods,
        subjects or {None: {}}, seeds,
        *(_settings(raw.get(part), f"{name}, {part}", methods) for part in ("grid", "factors", "tune")),
        evaluate=_list(raw.get("evaluate") or [], f"{name}, evaluate", str),
        collect=_mapping(raw["collect"], f"{name}, collect"), title=str(raw.get("title") or ""),
    )  # fmt: skip
    _require_cells(plan, name)
    names = [setting.name for setting in (*plan.grid, *plan.factors)]
    shown = pictures.read(raw.get("pictures") or {}, f"{name}, pictures", methods, plan.collect, names)
    plan = replace(plan, pictures=shown)
    for setting in plan.tune:
        if setting.by not in list(plan.collect) or setting.goal not in ("max", "min") or not setting.seeds:
            wrong = f"by={setting.by!r}, goal={setting.goal!r}, seeds={setting.seeds}"
            remedy = f"by is a column of collect ({', '.join(plan.collect)}), goal max or min, seeds a list"
            raise InputError(f"{name}, tune, {setting.name}", wrong, remedy)
        if overlap := sorted(set(setting.seeds) & set(seeds)):
            wrong = f"seeds {overlap} choose the value and are reported too"
            raise InputError(f"{name}, tune, {setting.name}", wrong, "choose on other seeds than those reported")
    for column, path in plan.collect.items():
        if ":" not in str(path):
            raise InputError(f"{name}, collect, {column}", f"{path!r} is no file:path", "as in metrics.json:accuracy")
    return plan


def _smaller(raw: dict[str, Any], less: Mapping[str, Any], name: str) -> dict[str, Any]:
    small = {key: value for key, value in raw.items() if key != "pictures"} | dict(less)
    small["fixed"] = {**_mapping(raw.get("fixed"), f"{name}, fixed"), **_mapping(less.get("fixed"), f"{name}, fixed")}
    for key in ("methods", "subjects"):
        if key in less:
            known = _mappings(raw.get(key), f"{name}, {key}")
            small[key] = {label: known.get(label) for label in _list(less[key], f"{name}, {key}", str)}
            if strange := [label for label in small[key] if label not in known]:
                wrong = f"no {strange[0]!r}{near(strange[0], known)}"
                raise InputError(f"{name}, {key}", wrong, f"take some of {', '.join(known)}")
    return small


def _mapping(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, Mapping | None):
        raise InputError(where, f"is {type(given).__name__}", "give names, each with its value")
    return {str(name): value for name, value in (given or {}).items()}


def _mappings(given: Any, where: str) -> dict[str, Settings]:
    if not isinstance(given, Mapping) or not all(isinstance(v, Mapping | None) for v in given.values()):
        raise InputError(where, f"is {type(given).__name__}", "give labels, each with its settings")
    return {str(label): _mapping(settings, where) for label, settings in given.items()}


def _require_cells(plan: Plan, name: str) -> None:
    """Raise InputError for more runs than anybody starts, and for settings of which no name for a run can be made."""
    points = math.prod(len(s.values) for s in plan.grid) * (1 + sum(len(s.values) for s in plan.factors))
    tuned = sum(max(map(len, [s.values, *s.own.values()])) * len(s.seeds) * len(s.subjects or "1") for s in plan.tune)
    runs = len(plan.methods) * (points * len(plan.subjects) * len(plan.seeds) + tuned * len(plan.subjects))
    if runs > _MOST:
        raise InputError(name, f"makes up to {runs} runs", f"make {_MOST} at most")
    varied = [{s.name: [s.values, *s.own.values(), *(s.subjects or {}).values()]}
              for s in (*plan.grid, *plan.factors, *plan.tune)]  # fmt: skip
    for settings in (plan.fixed, *plan.methods.values(), *plan.subjects.values(), *varied):
        for key, value in settings.items():
            try:
                json.dumps(value, sort_keys=True, default=str)
            except TypeError:
                wrong = "mixes names and numbers as keys"
                raise InputError(f"{name}, {key}", wrong, "put quotes around them") from None


def _plain(value: Any) -> Any:
    """2e-4 as the number that it means: YAML 1.1 takes it for a word, for want of a point."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _list(given: Any, where: str, kind: type) -> list:
    if not isinstance(given, Sequence) or isinstance(given, str) or not all(isinstance(v, kind) for v in given):
        raise InputError(where, f"is {given!r}", f"give a list of {kind.__name__}")
    return list(given)


def _lists_and_others(values: Mapping, where: str) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Of {label: list or another label}: the lists, and the labels that follow one that has a list."""
    named = {str(label): own for label, own in values.items()}
    like = {label: own for label, own in named.items() if isinstance(own, str)}
    lists = {label: _list(own, where, object) for label, own in named.items() if label not in like}
    for label, other in like.items():
        if other not in lists:
            raise InputError(where, f"{label!r} is as {other!r}{near(other, lists)}", "name a method with a list")
    return lists, like


def _settings(given: Any, where: str, methods: Mapping[str, Settings]) -> list[Setting]:
    found = []
    for name, value in _mapping(given, where).items():
        parts = dict(value) if isinstance(value, Mapping) else {"values": value}
        values = parts.pop("values", None)
        unknown = set(parts) - {"methods", "by", "goal", "seeds", "subjects"}
        for key, kind in (("methods", str), ("seeds", int)):
            if key in parts:
                parts[key] = _list(parts[key], f"{where}, {name}, {key}", kind)
        if isinstance(values, Mapping) and values and "by" in parts and "methods" not in parts:
            lists, like = _lists_and_others(values, f"{where}, {name}")
            parts |= {"own": lists, "like": like, "methods": list(lists)}
            values = []
            values += [value for own in parts["own"].values() for value in own if value not in values]
        if "subjects" in parts:
            parts["subjects"] = _mappings(parts["subjects"], f"{where}, {name}, subjects")
        if not isinstance(values, list) or not values or unknown:
            remedy = "give a list of values, or {values: [...], methods: [...]}"
            raise InputError(f"{where}, {name}", f"is {value!r}", remedy)
        for label in (*(parts.get("methods") or []), *parts.get("like", {})):
            if label not in methods:
                raise InputError(f"{where}, {name}", f"no method {label!r}{near(label, methods)}", "take a label above")
        parts["own"] = {label: list(map(_plain, own)) for label, own in parts.get("own", {}).items()}
        found.append(Setting(name, list(map(_plain, values)), **parts))
    return found
