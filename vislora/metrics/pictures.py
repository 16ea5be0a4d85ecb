"""Image files as scoring sees them: in the order of their names, known by content, read the same way ever after."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from vislora.data.images import EXTENSIONS, MASK, read
from vislora.errors import InputError


@dataclass(frozen=True)
class Picture:
    """A readable image file. `sha256`: of its bytes; `black`: every pixel is zero, as a safety checker leaves it."""

    path: Path
    sha256: str
    black: bool


def listing(folder: str | Path) -> list[Path]:
    """The image files of a folder, by name; hidden ones, masks and other files are passed over.

    InputError where there is no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(str(folder), "no such folder", "name a folder of images")
    found = sorted(
        path for path in folder.iterdir()
        if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".") and not path.stem.endswith(MASK)
    )  # fmt: skip
    if not found:
        raise InputError(str(folder), "holds no image", "put PNG or JPEG files there")
    return found


def examine(paths: Iterable[str | Path]) -> list[Picture]:
    """Every file as a Picture, each decoded once. One InputError names all that cannot be read (up to five)."""
    pictures, bad = [], []
    for path in map(Path, paths):
        try:
            digest = sha256(path.read_bytes()).hexdigest()
            pictures.append(Picture(path, digest, read(path).getbbox() is None))
        except (InputError, OSError) as error:
            bad.append((path, getattr(error, "wrong", None) or str(error)))
    if bad:
        shown = "; ".join(f"{path} {wrong}" for path, wrong in bad[:5])
        raise InputError("images", f"{len(bad)} cannot be read: {shown}", "draw or copy these again, or remove them")
    return pictures
