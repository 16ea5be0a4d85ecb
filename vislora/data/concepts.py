"""Concepts: several subjects in one run, from a JSON list in the field's layout."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

from vislora.errors import InputError, near


@dataclass(frozen=True)
class Concept:
    """One subject: a folder of photos, the prompt of those without a caption, and the class it belongs to."""

    instance_data_dir: str
    instance_prompt: str | None = None
    class_prompt: str | None = None
    class_data_dir: str | None = None


def read_concepts(file: str) -> list[Concept]:
    """The concepts of a JSON file: a list of objects with the keys of `Concept`, of which instance_data_dir is needed.

    InputError for anything else.
    """
    where = f"--concepts_list {file}"
    try:
        entries = json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(where, f"cannot be read ({error.strerror})", "name a JSON file") from None
    except (ValueError, RecursionError) as error:
        raise InputError(where, f"is not JSON ({error})", 'write [{"instance_data_dir": "photos/dog", …}]') from None
    if not isinstance(entries, list) or not entries:
        raise InputError(where, "is not a list of concepts", 'write [{"instance_data_dir": "photos/dog", …}]')
    known = [item.name for item in fields(Concept)]
    concepts = []
    for number, entry in enumerate(entries, 1):
        place = f"{where}: concept {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("instance_data_dir"), str):
            raise InputError(place, "names no instance_data_dir", f"give an object with some of {', '.join(known)}")
        for key, value in entry.items():
            if key not in known:
                raise InputError(place, f"has a key {key!r}{near(key, known)}", f"take some of {', '.join(known)}")
            if value is not None and not isinstance(value, str):
                raise InputError(place, f"{key} is a {type(value).__name__}", "give text")
        concepts.append(Concept(**entry))
    return concepts
