"""Rows of measures, one for each layer and point, kept in a file as they come, so that a cut analysis goes on."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tqdm.auto import tqdm

from ..cli._table import natural
from ..errors import EnvironmentFault, InputError
from ..formats import Base
from ..formats.disk import write_bytes
from . import source
from .measures import Original, base_row, measure
from .source import Point, Series

_VERSION = 1  # of the rows' meaning: another one is measured again
COLUMNS = (
    "run", "method", "step", "layer", "spectral", "frobenius", "nuclear", "effective_rank", "ratio", "p", "bound",
    "norm", "share", "d_sigma", "d_vectors", "condition", "condition_principal", "weight_spectral",
    "weight_frobenius", "weight_nuclear", "off_orthonormal", "cosine",
)  # fmt: skip


class Cache:
    """{key: row} in a file of JSON lines; a line that a kill cut short is passed over."""

    def __init__(self, file: Path):
        """Raises EnvironmentFault where the file cannot be read."""
        self.file, self.rows = file, {}
        try:
            text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
        except OSError as error:
            raise EnvironmentFault(str(file), f"cannot be read ({error.strerror})", "choose another folder") from None
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                self.rows[entry["key"]] = entry["row"]
            except (ValueError, KeyError, TypeError):
                continue
        self._whole = text.endswith("\n") or not text

    def add(self, key: str, row: dict) -> None:
        """Keep a row, on disk at once. Raises EnvironmentFault where the disk refuses."""
        self.rows[key] = row
        line = json.dumps({"key": key, "row": row}) + "\n"  # Python's JSON has words for infinity and NaN
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(line if self._whole else "\n" + line)
        except OSError as error:
            raise EnvironmentFault(str(self.file), f"cannot be written ({error.strerror})", "free space") from None
        self._whole = True


def rows(series: Series, cache: Cache, layers: str = "", principal_rank: int | None = None) -> list[dict]:
    """One row a layer and step, step 0 (the base) included where the base is known; `layers`: a regex to keep by.

    A layer's weight is decomposed once for all steps, and not at all where its rows are in the cache. Raises
    InputError where no layer is left.
    """
    pattern = _pattern(layers)
    of_base = _stamp(series.base)
    found = [(point, source.changes(point, series.base)) for point in series.points]
    places = {name: names for _, each in found for name, (names, _) in each.items()}
    names = sorted((name for name in places if pattern.search(name)), key=natural)
    if not names:
        wrong = f"{layers!r} matches no layer of {series.label}"
        raise InputError("--layers", wrong, f"its first is {next(iter(places), 'none')}")
    out = []
    total = sum(name in each for name in names for _, each in found)
    with tqdm(total=total, desc=series.label, unit="layer") as bar:
        for name in names:
            original, rank = _original(series.base, places[name]), principal_rank
            for point, each in found:
                if name not in each:
                    continue
                key = _key(point.key, name, of_base, principal_rank)
                if key not in cache.rows:
                    change = each[name][1]()
                    cache.add(key, measure(change, original(), principal_rank) | {"rank": change.rank})
                rank = principal_rank or cache.rows[key]["rank"]
                out.append(_named(series, point.step, name, cache.rows[key]))
                bar.update()
            if series.base is not None:
                key = _key("base", name, of_base, rank)
                if key not in cache.rows:
                    cache.add(key, base_row(original(), rank))
                out.append(_named(series, 0, name, cache.rows[key]))
    return sorted(out, key=lambda row: row["step"])


def cosine_rows(
    series: Series, cache: Cache, compute: Callable[[Point], dict[str, float]] | None, about: str, layers: str = ""
) -> list[dict]:
    """{run, method, step, layer, cosine} from the run's log, or with `compute` anew at every point.

    about: what else the computed ones depend on, for the cache.
    """
    by_step = series.cosines
    if compute is not None:
        by_step = {}
        for point in tqdm(series.points, desc=f"{series.label}, gradients", unit="checkpoint"):
            key = _key(point.key, f"cosines {about}", "", None)
            if key not in cache.rows:
                cache.add(key, compute(point))
            by_step[point.step] = cache.rows[key]
    pattern = _pattern(layers)
    return [
        _named(series, step, name, {"cosine": value})
        for step, values in sorted(by_step.items()) for name, value in values.items() if pattern.search(name)
    ]  # fmt: skip


def _pattern(layers: str) -> re.Pattern[str]:
    try:
        return re.compile(layers)
    except re.error as error:
        raise InputError("--layers", f"{layers!r} is no regular expression ({error})", "mend it") from None


def _original(base: Base | None, names: tuple[str, str]) -> Callable[[], Original | None]:
    """The base weight's Original, read at the first call; None without a base."""
    held: list[Original | None] = []

    def get() -> Original | None:
        if not held:
            held.append(None if base is None else Original(base.weight(*names)))
        return held[0]

    return get


def _stamp(base: Base | None) -> str:
    """What changes with a base's weights."""
    files = [] if base is None else sorted(base.folder.rglob("*.safetensors"))
    return repr([(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files])


def _key(point: str, layer: str, base: str, rank: int | None) -> str:
    return hashlib.sha256(repr((_VERSION, point, layer, base, rank)).encode()).hexdigest()[:32]


def _named(series: Series, step: int, layer: str, row: dict) -> dict:
    return {"run": series.label, "method": series.method, "step": step, "layer": layer, **row}


def write_csv(file: Path, columns: Iterable[str], lines: Iterable[Iterable]) -> Path:
    """Write a CSV whole or not at all; None is an empty cell. Returns its path."""
    sheet = io.StringIO()
    writer = csv.writer(sheet)
    writer.writerow(columns)
    writer.writerows(lines)
    write_bytes(file, sheet.getvalue().encode())
    return file


def layer_lines(rows: Iterable[dict]) -> Iterator[list]:
    """The rows in COLUMNS' order."""
    for row in rows:
        yield ["inf" if row.get(c) == math.inf else row.get(c) for c in COLUMNS]
