"""What a run wrote about itself: numbers over training steps, and its images with the scores of their prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def over_steps(run: Path, path: str) -> dict[int, float]:
    """{step: value} from metrics.jsonl: `path` is dotted, and * in it stands for the mean over all that is there.

    Lines without the value, and one that was being written, are passed over; empty where there is no file.
    """
    found: dict[int, float] = {}
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return found
    for line in lines:
        try:
            entry = json.loads(line)
            values = _reach(entry, path.split("."))
            if values:
                found[int(entry["step"])] = math.fsum(values) / len(values)
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _reach(node: Any, path: list[str]) -> list[float]:
    """All numbers below `node` that the path leads to. Names may hold dots (layers do): the longest one wins."""
    if not path:
        return [float(node)] if isinstance(node, int | float) and math.isfinite(node) else []
    if not isinstance(node, Mapping):
        return []
    if path[0] == "*":
        return [value for child in node.values() for value in _reach(child, path[1:])]
    for length in range(len(path), 0, -1):
        if (key := ".".join(path[:length])) in node:
            return _reach(node[key], path[length:])
    return []


@dataclass(frozen=True)
class Sample:
    """A generated image: its file, its prompt and the prompt's number, and the scores of that prompt's images."""

    file: Path
    prompt: str
    number: int
    scores: dict[str, float]


def samples(run: Path, folder: str, result: str) -> list[Sample]:
    """The first image of each prompt, by the prompts' numbers; empty where the run has none.

    Scores stand under the prompt, or where the manifest has them under its template ("a {} on grass").
    """
    scores = _by_prompt(run, result)
    try:
        told = json.loads((run / folder / "manifest.json").read_text(encoding="utf-8"))
        named = [(int(about["group"]), file, str(about["prompt"])) for file, about in told["images"].items()]
        templates = dict(enumerate(told.get("templates", ())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    found: dict[int, Sample] = {}
    for number, file, prompt in sorted(named):
        path = run / folder / file
        if number not in found and path.is_file():
            own = scores.get(templates.get(number, prompt), {})
            numbers = {name: float(value) for name, value in own.items() if isinstance(value, int | float)}
            found[number] = Sample(path, prompt, number, numbers)
    return list(found.values())


def _by_prompt(run: Path, result: str) -> dict[str, dict[str, Any]]:
    file, _, path = result.partition(":")
    try:
        node = json.loads((run / file).read_text(encoding="utf-8"))
        for step in path.split("."):
            node = node[step]
        return node if isinstance(node, dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
