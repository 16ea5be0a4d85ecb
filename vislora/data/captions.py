"""Captions: one text per photo, from metadata.jsonl, from .txt files beside the photos, or one prompt for all."""

from __future__ import annotations

import codecs
import json
import logging
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vislora.data.images import Photo
from vislora.errors import InputError, printable

METADATA = "metadata.jsonl"
_MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",  # before UTF-16, whose mark begins alike
          codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
_RESAVE = "save it as UTF-8 (iconv -f {} -t UTF-8)"
log = logging.getLogger("vislora")


def captions(photos: Sequence[Photo], folder: str | Path, instance_prompt: str | None,
             column: str = "text") -> list[str]:
    """The caption of each photo, in the order of `photos`; runs of white space become one space.

    `folder`/metadata.jsonl, where there is one, has a line {"file_name": …, `column`: …} for every photo; else a .txt
    file of a photo's stem holds its caption; else all get `instance_prompt`. InputError when some photos have a caption
    and others none, for text that is empty, not UTF-8 or holds control characters, and for a bad line (file:line). One
    warning for captions of photos that are not there.
    """
    folder, stems = Path(folder), {photo.path.stem for photo in photos}
    metadata = folder / METADATA
    sidecars = {path.stem: path for path in sorted(folder.glob("*.txt")) if not path.name.startswith(".")}
    if metadata.is_file():
        named = _read_metadata(metadata, column)
        keys, source = [photo.path.name for photo in photos], METADATA
        if stems & sidecars.keys():
            _warn(f"{folder}: {METADATA} is used; the .txt captions beside it are not")
    elif stems & sidecars.keys():
        named = {stem: _clean(_read(path), str(path)) for stem, path in sidecars.items() if stem in stems}
        keys, source = [photo.path.stem for photo in photos], "a .txt file"
    else:
        _warn_orphans(folder, [path.name for path in sidecars.values()])
        if instance_prompt is None:
            raise InputError("--instance_prompt", f"is not given, and {folder} holds no captions",
                             f"give one prompt for all photos, or write {METADATA} or a .txt file for each photo")
        return [_clean(instance_prompt, "--instance_prompt")] * len(photos)
    missing = [photo.path.name for photo, key in zip(photos, keys, strict=True) if key not in named]
    if missing:
        more = ", …" if len(missing) > 5 else ""
        raise InputError(str(folder), f"{len(missing)} of {len(photos)} photos have no caption: "
                         f"{', '.join(missing[:5])}{more}", f"write each a caption in {source}")
    known = set(keys)
    if source == METADATA:
        _warn_orphans(metadata, [name for name in named if name not in known])
    else:
        _warn_orphans(folder, [path.name for stem, path in sidecars.items() if stem not in known])
    return [named[key] for key in keys]


def warn_of_token(texts: Sequence[str], instance_prompt: str | None, class_prompt: str | None, where: str) -> None:
    """One warning where captions lack the token, which is what the instance prompt says and the class prompt does not:
    what is learnt from such photos is the class. Nothing where one of the prompts is not given."""
    if instance_prompt is None or class_prompt is None:
        return
    token = [word for word in instance_prompt.split() if word not in class_prompt.split()]
    if not token:
        _warn(f"{where}: the instance prompt has no word that the class prompt lacks -> add a token, such as sks")
        return
    lacking = [text for text in texts if not {*token} <= {*text.replace(",", " ").replace(".", " ").split()}]
    if lacking:
        _warn(f"{where}: {len(lacking)} of {len(texts)} captions lack the token {' '.join(token)!r}, first "
              f"{lacking[0]!r}")


def check_tokens(tokenizer: Any, texts: Sequence[str], source: str | Sequence[str], limit: int | None = None) -> int:
    """Warn of each different text that is longer than the tokenizer's limit, showing the tail that the model never
    sees; returns how many there are. `tokenizer` is a transformers one; `source` names where all texts, or each, are
    from. `limit`: tokens that are read, None for the tokenizer's own; one without a limit passes everything."""
    limit = tokenizer.model_max_length if limit is None else limit
    if limit > 10**6:  # transformers' word for "no limit" is 1e30
        return 0
    room = limit - tokenizer.num_special_tokens_to_add(pair=False)
    sources = [source] * len(texts) if isinstance(source, str) else source
    long = 0
    for text, where in dict(zip(reversed(texts), reversed(sources), strict=True)).items():
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) > room:
            long += 1
            tail = tokenizer.decode(ids[room:]).strip()
            _warn(f'{where}: {len(ids)} tokens, the model reads {room}; lost: "{tail}"')
    return long


def _read_metadata(path: Path, column: str) -> dict[str, str]:
    """file_name -> caption. InputError, as file:line, for what is no such entry."""
    found: dict[str, str] = {}
    for number, line in enumerate(_read(path).split("\n"), 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(where, f"is not JSON ({error})", 'write {"file_name": "a.jpg", "text": "…"}') from None
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
            raise InputError(where, "names no file_name", 'write {"file_name": "a.jpg", "text": "…"}')
        if not isinstance(entry.get(column), str):
            others = ", ".join(sorted(entry.keys() - {"file_name"})) or "nothing else"
            raise InputError(where, f"has no text {column!r} (it has {others})", "name its key with --caption_column")
        if entry["file_name"] in found:
            raise InputError(where, f"captions {entry['file_name']} again", "keep one line for each photo")
        found[entry["file_name"]] = _clean(entry[column], where)
    return found


def _read(path: Path) -> str:
    """A text file's content. InputError unless it is readable UTF-8, with or without a byte-order mark."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(str(path), f"cannot be read ({error.strerror})", "check its permissions") from error
    for mark, name in _MARKS.items():
        if data.startswith(mark):
            raise InputError(str(path), f"is {name}", _RESAVE.format(name))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = f"is not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start})"
        raise InputError(str(path), wrong, _RESAVE.format("CP1252")) from None


def _clean(text: str, where: str) -> str:
    """`text` with single spaces. InputError when it is empty or holds control characters or lone surrogates."""
    for place, char in enumerate(text):
        if char not in "\t\n\r" and unicodedata.category(char) in ("Cc", "Cs"):
            raise InputError(where, f"holds the control character U+{ord(char):04X} at character {place + 1}",
                             "remove it; a NUL after each letter means UTF-16: save as UTF-8")
    text = " ".join(text.split())
    if not text:
        raise InputError(where, "is an empty caption", "write what the photo shows, or remove it")
    return text


def _warn_orphans(where: Path, names: Sequence[str]) -> None:
    if names:
        more = ", …" if len(names) > 5 else ""
        _warn(f"{where}: {len(names)} captions without their photo: {', '.join(names[:5])}{more}")


def _warn(words: str) -> None:
    log.warning("%s", printable(words))
