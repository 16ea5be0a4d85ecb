"""Subjects and prompts: google/dreambooth's folders as they are, the embedded world's, a run's, or any folders.

A prompt is a template with one {} for the subject: "a {} in the snow" draws "a sks dog in the snow", and CLIP-T, by
default, compares images with "a dog in the snow".
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vislora import world
from vislora.errors import InputError, near

TEXTS = ("without_token", "with_token", "class")
GOOGLE = "prompts_and_classes.txt"
LIVE = ("dog", "cat")  # the classes of google/dreambooth that are alive
_TEMPLATE = re.compile(r"^'(.*)'\.format\(unique_token, class_token\),?$")


@dataclass(frozen=True)
class Subject:
    """A subject: `name`, the folder of its photos, the noun of its class, and its prompts' templates."""

    name: str
    photos: Path
    noun: str
    templates: tuple[str, ...]

    def prompt(self, template: str, token: str) -> str:
        """What the adapted model is asked."""
        return template.format(f"{token} {self.noun}")

    def text(self, template: str, token: str, kind: str) -> str:
        """What CLIP-T compares an image with, by `TEXTS`."""
        if kind == "class":
            return f"a photo of a {self.noun}"
        return self.prompt(template, token) if kind == "with_token" else template.format(self.noun)


def google(folder: str | Path) -> list[Subject]:
    """The subjects of a copy of google/dreambooth, or of its `dataset` folder, by name.

    Classes and prompts are read from prompts_and_classes.txt. InputError where it, or a subject's folder, is missing,
    or where it is not of that file's form.
    """
    folder = Path(folder)
    root = next((place for place in (folder, folder / "dataset") if (place / GOOGLE).is_file()), None)
    if root is None:
        raise InputError(str(folder / GOOGLE), "no such file", "name a copy of google/dreambooth, whole")
    classes, lists = {}, {"object": [], "live": []}
    current = None
    for line in (root / GOOGLE).read_text(encoding="utf-8-sig").splitlines():
        line = line.strip()
        template = _TEMPLATE.match(line)
        if template and current:
            lists[current].append(template[1].replace("{0} {1}", "{}"))
        elif line.lower().endswith("prompts") and line.lower() != "prompts":
            current = "live" if line.lower().startswith("live") else "object"
        elif "," in line and not template and current is None and line != "subject_name,class":
            name, noun = line.split(",", 1)
            classes[name.strip()] = noun.strip()
    if not classes or not all(lists.values()):
        wrong = f"gives {len(classes)} subjects, {len(lists['object'])} and {len(lists['live'])} prompts"
        raise InputError(str(root / GOOGLE), wrong, "restore the file of google/dreambooth")
    missing = [name for name in classes if not (root / name).is_dir()]
    if missing:
        wrong = f"names {len(missing)} subjects without a folder: {', '.join(missing[:5])}"
        raise InputError(str(root / GOOGLE), wrong, "copy google/dreambooth whole")
    return [
        Subject(name, root / name, noun, tuple(lists["live" if noun in LIVE else "object"]))
        for name, noun in sorted(classes.items())
    ]


def of_world() -> list[Subject]:
    """The embedded world's subjects, with its 25 prompts. InputError where the world is not there."""
    file = world.ROOT / "assets" / "world" / "world.json"
    if not file.is_file():
        raise InputError(str(file), "no such file", "run from a clone installed with pip install -e .")
    told = json.loads(file.read_text(encoding="utf-8"))
    templates = tuple(entry["prompt"] for entry in told["prompts"])
    return [
        Subject(name, file.parent / entry["photos"], entry["class_noun"], templates)
        for name, entry in sorted(told["subjects"].items())
    ]


def dataset(folder: str | Path | None) -> list[Subject]:
    """The world's subjects (None), or google/dreambooth's in `folder`."""
    return of_world() if folder is None else google(folder)


def read_templates(file: str | Path) -> tuple[str, ...]:
    """The templates of a UTF-8 file, one a line. InputError for a line without one {}, or a file without lines."""
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts {file}", f"cannot be read ({error})", "name a UTF-8 file") from None
    templates = tuple(line.strip() for line in lines if line.strip())
    for template in templates:
        if template.count("{}") != 1 or template.count("{") != 1:
            wrong = f"{template!r} has not one {{}} for the subject"
            raise InputError(f"--prompts {file}", wrong, 'write it as "a {} in the snow"')
    if not templates:
        raise InputError(f"--prompts {file}", "holds no prompt", "write one a line")
    return templates


def chosen(subjects: Sequence[Subject], names: Sequence[str]) -> list[Subject]:
    """Those named, or all. InputError for a name that is not there."""
    known = {subject.name: subject for subject in subjects}
    for name in names:
        if name not in known:
            wrong = f"{name!r} is no subject here{near(name, known)}"
            raise InputError("--subjects", wrong, f"some of {', '.join(known)}")
    return [known[name] for name in names] if names else list(subjects)


def token_and_noun(instance: str, of_class: str | None) -> tuple[str, str]:
    """("sks", "dog") of "a photo of sks dog" and "a photo of a dog": what only the first says, what ends the second.

    InputError where there is no class prompt, or the first adds no word to it.
    """
    own, shared = instance.rstrip(".").split(), (of_class or "").rstrip(".").split()
    if not shared:
        raise InputError("instance_prompt", f"{instance!r} does not say which word is the token",
                         "give --token and --class_noun")  # fmt: skip
    extra = [word for word in own if word not in shared]
    small = [i for i, word in enumerate(shared) if word in ("a", "an", "the", "of")]
    noun = shared[max(small, default=-1) + 1 :]
    if not extra or not noun:
        wrong = f"{instance!r} and the class prompt {of_class!r} do not differ by a token"
        raise InputError("instance_prompt", wrong, "give --token and --class_noun")
    return " ".join(extra), " ".join(noun)
