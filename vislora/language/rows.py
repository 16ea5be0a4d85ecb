"""Rows of a data set as dictionaries: local json, jsonl, csv, parquet, folders, or a hub id, with slices.

What only `datasets` can read (its own saved folders, the hub) needs that package, the rest does not.
"""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

from vislora.errors import EnvironmentFault, InputError, near

Row = dict[str, Any]
_SLICE = re.compile(r"([\w.-]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")
_KINDS = (".jsonl", ".json", ".csv", ".parquet")


def read_rows(source: str, split: str = "train", config: str | None = None, flag: str = "--dataset_name") -> list[Row]:
    """The rows of `source` in its own order.

    split: "train", or a part of it as `datasets` writes it: "train[:1000]", "train[10%:20%]", "train[-50:]". A single
    file is its own only split, whatever the word. A folder holds SPLIT.jsonl (or .json, .csv, .parquet), or what
    `Dataset.save_to_disk` wrote. config: a hub data set's configuration, such as "main".
    Raises InputError for what cannot be read, has no rows, or a slice that is none.
    """
    name, start, stop = _parts(split, flag)
    path = Path(source)
    if path.is_file():
        rows = _read_file(path, flag)
    elif path.is_dir():
        rows = _read_folder(path, name, flag)
    elif path.suffix in _KINDS or source.startswith((".", "/", "~")):
        raise InputError(f"{flag} {source}", "no such file or folder", "check the path")
    else:
        rows = _read_hub(source, name, config, flag)
    low, high = (_place(bound, len(rows), default) for bound, default in ((start, 0), (stop, len(rows))))
    rows = rows[low:high]
    if not rows:
        raise InputError(f"{flag} {source}", f"has no rows in {split}", "take another split or slice")
    return rows


def _parts(split: str, flag: str) -> tuple[str, str | None, str | None]:
    match = _SLICE.fullmatch(split)
    if not match:
        raise InputError(flag, f"{split!r} is no split", 'write "train", "train[:1000]" or "train[10%:20%]"')
    return match[1], match[2], match[3]


def _place(bound: str | None, count: int, default: int) -> int:
    """A slice's bound as an index; percentages are rounded to the nearest row, as `datasets` does."""
    if bound is None:
        return default
    number = round(count * int(bound[:-1]) / 100) if bound.endswith("%") else int(bound)
    return max(0, count + number) if number < 0 else min(number, count)


def _read_file(path: Path, flag: str) -> list[Row]:
    if path.suffix not in _KINDS:
        raise InputError(f"{flag} {path}", f"{path.suffix or 'no ending'} is not read", f"give {', '.join(_KINDS)}")
    try:
        if path.suffix == ".parquet":
            return _parquet(path, flag)
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            return list(csv.DictReader(text.splitlines(keepends=True)))
        if path.suffix == ".json":
            return _checked(path, flag, _listed(json.loads(text)))
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        return _checked(path, flag, [_line(path, number, line) for number, line in lines])
    except OSError as error:
        raise InputError(f"{flag} {path}", f"cannot be read ({error.strerror})", "check the file") from None
    except InputError:
        raise
    except (ValueError, csv.Error, RecursionError) as error:
        raise InputError(f"{flag} {path}", f"cannot be read ({str(error)[:160]})", "check the file") from None


def _parquet(path: Path, flag: str) -> list[Row]:
    from pyarrow import ArrowException, parquet

    try:
        return parquet.read_table(path).to_pylist()
    except (ArrowException, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{flag} {path}", f"cannot be read ({reason})", "copy it again") from None


def _line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}:{number}", f"is not JSON ({error})", "one JSON object a line") from None


def _listed(data: Any) -> Any:
    """A JSON file's rows: the file is a list, or an object with one list under "data" or a like word."""
    if isinstance(data, dict):
        lists = [value for value in data.values() if isinstance(value, list)]
        return lists[0] if len(lists) == 1 else data
    return data


def _checked(path: Path, flag: str, rows: Any) -> list[Row]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{flag} {path}", "does not hold a list of objects", "write one object a row")
    return rows


def _read_folder(path: Path, split: str, flag: str) -> list[Row]:
    saved = [path / split, path]
    for place in saved:
        if (place / "state.json").is_file() and (place / "dataset_info.json").is_file():
            return _datasets(flag).load_from_disk(str(place)).to_list()
    files = [path / f"{split}{kind}" for kind in _KINDS if (path / f"{split}{kind}").is_file()]
    if not files:
        names = sorted(p.stem for p in path.iterdir() if p.suffix in _KINDS or (p / "state.json").is_file())
        wrong = f"holds no {split}{near(split, names)}"
        raise InputError(f"{flag} {path}", wrong, f"it holds {', '.join(names[:8]) or 'no data file'}")
    return _read_file(files[0], flag)


def _read_hub(source: str, split: str, config: str | None, flag: str) -> list[Row]:
    try:
        return _datasets(flag).load_dataset(source, config, split=split).to_list()
    except (OSError, ValueError, RuntimeError) as error:
        brief = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise EnvironmentFault(f"{flag} {source}", f"cannot be had ({brief})", "name a local file or folder") from error


def _datasets(flag: str):
    try:
        import datasets
    except ImportError:
        raise EnvironmentFault(flag, "needs the package datasets", 'pip install "vislora[datasets]"') from None
    datasets.disable_progress_bars()
    return datasets


def holdout(rows: list[Row], percentage: float, maximum: int | None = None) -> tuple[list[Row], list[Row]]:
    """(all but the last rows, the last `percentage` % of them, at least one and at most `maximum`)."""
    count = max(1, math.floor(len(rows) * percentage / 100))
    count = min(count, maximum or count)
    return rows[:-count], rows[-count:]
