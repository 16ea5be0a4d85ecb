"""The pictures that a sweep's YAML asks for, read and checked; vislora/sweep/draw.py draws them.

    pictures:
      samples:                              # the names of its files: samples.png, samples.csv
        kind: images                        # subjects x prompts x methods, scores under each image
        prompts: [0, 4, 18]                 # which, by number; a few by default
        scores: [dino, clip_t]              # keys of `result`, which holds numbers by prompt
      fidelity_drift:
        kind: scatter                       # a column against a column, with intervals
        x: drift_dino
        y: dino
        lines: {"NB-LoRA, p = 1": [nb 0.3, nb 0.1]}    # points joined in this order; a mark of its own for every other
        front: {x: min, y: max}             # draw the Pareto front of the means
      norms:
        kind: steps                         # what metrics.jsonl holds over steps, a panel each
        values: {loss: loss, norm of the update: "layers.*.norm"}   # * is the mean over all that is there
      rates:
        kind: against                       # columns against a setting of grid or factors, a line a method
        setting: learning_rate
        values: [dino, drift_dino]

All take `title`, `about` (a sentence below it), `methods` (labels; all by default) and `where` ({setting: value} of
grid or factors). `log: true` gives `steps` a logarithmic y, and `against` a logarithmic x.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, get_args, get_origin, get_type_hints

from vislora.errors import InputError, near


@dataclass(frozen=True)
class Picture:
    """What all pictures have. `name`: of its files."""

    name: str
    title: str = ""
    about: str = ""
    methods: list[str] = field(default_factory=list)
    where: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Images(Picture):
    """Generated images: `images` in the run, with a manifest.json that names each one's prompt and its number.

    result: file:path in the run of {prompt: {score: number}}. photos: the setting that names the subject's photos.
    """

    images: str = "eval/images"
    prompts: list[int] = field(default_factory=list)
    scores: list[str] = field(default_factory=list)
    result: str = "eval/subject_driven.json:per_prompt"
    photos: str = "instance_data_dir"


@dataclass(frozen=True, kw_only=True)
class Scatter(Picture):
    x: str
    y: str
    lines: dict[str, list[str]] = field(default_factory=dict)
    front: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Steps(Picture):
    values: dict[str, str]
    log: bool = False


@dataclass(frozen=True, kw_only=True)
class Against(Picture):
    setting: str
    values: list[str]
    log: bool = False


KINDS: dict[str, type[Picture]] = {"images": Images, "scatter": Scatter, "steps": Steps, "against": Against}


def read(raw: Any, where: str, methods: Collection[str], columns: Collection[str],
         settings: Collection[str]) -> list[Picture]:  # fmt: skip
    """The pictures under `pictures:`. methods, columns, settings: what the sweep has, which they may name.

    Raises InputError, one line, for what none of them can mean.
    """
    if not isinstance(raw, Mapping):
        raise InputError(where, f"is {type(raw).__name__}", "give names, each with a kind and what it takes")
    found = []
    for name, given in raw.items():
        place = f"{where}, {name}"
        kind = given.get("kind") if isinstance(given, Mapping) else given
        if not isinstance(given, Mapping) or kind not in list(KINDS):
            raise InputError(place, f"{kind!r} is no kind of picture", f"take kind: {' | '.join(KINDS)}")
        if not all(c.isalnum() or c in "._-" for c in str(name)):
            raise InputError(place, "is no name for a file", "take letters, digits, . _ -")
        picture = _picture(KINDS[given["kind"]], str(name), {k: v for k, v in given.items() if k != "kind"}, place)
        _names(picture, place, methods, columns, settings)
        found.append(picture)
    return found


def _picture(kind: type[Picture], name: str, given: Mapping[str, Any], place: str) -> Picture:
    known = {f.name: f for f in fields(kind) if f.name != "name"}
    hints = get_type_hints(kind)
    for key, value in given.items():
        if key not in known:
            raise InputError(f"{place}, {key}", f"is unknown here{near(str(key), known)}", "take " + ", ".join(known))
        if not _fits(value, hints[key]):
            raise InputError(f"{place}, {key}", f"is {value!r}", f"give a {known[key].type}")
    for key, one in known.items():
        if key not in given and one.default is MISSING and one.default_factory is MISSING:
            raise InputError(place, f"has no {key}", f"a picture of this kind takes {', '.join(known)}")
    return kind(name=name, **given)


def _fits(value: Any, hint: Any) -> bool:
    """Whether plain data is of a field's type, down to the last item."""
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind is Any:
        return True
    if kind is dict:
        return isinstance(value, dict) and all(_fits(k, parts[0]) and _fits(v, parts[1]) for k, v in value.items())
    return isinstance(value, kind) and (kind is not list or all(_fits(item, parts[0]) for item in value))


def _names(picture: Picture, place: str, methods: Collection[str], columns: Collection[str],
           settings: Collection[str]) -> None:  # fmt: skip
    """Raise for a method, column or setting that the sweep does not have."""
    labels, numbers, varied = list(picture.methods), [], list(picture.where)
    if isinstance(picture, Scatter):
        labels += [label for line in picture.lines.values() for label in line]
        numbers += [picture.x, picture.y]
        if picture.front and (picture.front.keys() != {"x", "y"} or not {*picture.front.values()} <= {"min", "max"}):
            raise InputError(f"{place}, front", f"is {picture.front!r}", "say which end is good: {x: min, y: max}")
    if isinstance(picture, Against):
        numbers, varied = numbers + picture.values, [*varied, picture.setting]
    for words, known, what in ((labels, methods, "method"), (numbers, columns, "column of collect"),
                               (varied, settings, "setting of grid or factors")):  # fmt: skip
        for word in words:
            if word not in known:
                raise InputError(place, f"no {what} {word!r}{near(str(word), known)}", f"one of {', '.join(known)}")
    if isinstance(picture, Images) and not all(isinstance(n, int) and n >= 0 for n in picture.prompts):
        raise InputError(f"{place}, prompts", f"is {picture.prompts!r}", "give prompts by number, from 0")
    if isinstance(picture, Images) and ":" not in picture.result:
        raise InputError(f"{place}, result", f"{picture.result!r} is no file:path", "as in scores.json:per_prompt")
