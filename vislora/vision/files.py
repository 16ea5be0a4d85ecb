"""Images in files: all there when a set is opened, and the same files whenever one is read."""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vislora.data import images
from vislora.errors import DataChanged, InputError


@dataclass(frozen=True)
class Files:
    """Image files, and of each the bytes and the nanosecond of its last change when the set was opened.

    What keeps both is taken for unchanged: no content is hashed, since a set may have millions.
    """

    paths: tuple[Path, ...]
    sizes: tuple[int, ...]
    times: tuple[int, ...]

    @classmethod
    def of(cls, paths: Iterable[Path]) -> Files:
        """The files as they are now. Raises InputError for one that is missing, not a regular file, or empty."""
        paths, found = tuple(paths), []
        for path in paths:
            try:
                about = path.stat()
            except OSError as error:
                raise InputError(str(path), f"cannot be read ({error.strerror})", "put it there") from error
            if not stat.S_ISREG(about.st_mode) or not about.st_size:
                wrong = "is empty (0 bytes)" if stat.S_ISREG(about.st_mode) else "is not a regular file"
                raise InputError(str(path), wrong, "replace or remove it")
            found.append((about.st_size, about.st_mtime_ns))
        return cls(paths, tuple(size for size, _ in found), tuple(time for _, time in found))

    def unchanged(self, i: int) -> Path:
        """The path of file i. Raises DataChanged where it is gone, or has another size or time than at first."""
        path = self.paths[i]
        try:
            about = path.stat()
        except OSError as error:
            raise DataChanged(str(path), f"is gone since the run began ({error.strerror})", "put it back") from error
        if (about.st_size, about.st_mtime_ns) != (self.sizes[i], self.times[i]):
            raise DataChanged(str(path), "has changed since the run began", "put the old file back, or start anew")
        return path

    def read(self, i: int) -> Image.Image:
        """Image i in RGB, as `images.read` has it; DataChanged as `unchanged`."""
        return images.read(self.unchanged(i))
