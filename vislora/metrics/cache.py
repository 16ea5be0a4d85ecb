"""What was computed of an image, kept by content: a small safetensors file for each image's bytes and each way of
looking at it. Files cut short are computed again."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from vislora.errors import EnvironmentFault


def default_folder() -> Path:
    """vislora's folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vislora"


class Cache:
    """Tensors by (view, key). view: which network with which weights, after which transform; key: what it looked at.

    folder None: nothing outlives the process. EnvironmentFault when the folder cannot be written.
    """

    def __init__(self, folder: str | Path | None):
        self.folder = None if folder is None else Path(folder) / "features"
        self._held: dict[tuple[str, str], torch.Tensor] = {}

    def get(self, view: str, key: str) -> torch.Tensor | None:
        """The tensor, or None where it is not known."""
        if (view, key) not in self._held and self.folder is not None:
            with suppress(OSError, SafetensorError, KeyError):
                self._held[view, key] = load(self._file(view, key).read_bytes())["value"]
        return self._held.get((view, key))

    def put(self, view: str, key: str, value: torch.Tensor) -> None:
        value = value.detach().float().cpu().contiguous().clone()
        self._held[view, key] = value
        if self.folder is None:
            return
        file = self._file(view, key)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=file.parent)
            try:
                with os.fdopen(handle, "wb") as stream:
                    stream.write(save({"value": value}))
                os.replace(temporary, file)
            finally:
                Path(temporary).unlink(missing_ok=True)
        except OSError as error:
            wrong = f"cannot be written ({error.strerror})"
            raise EnvironmentFault(str(self.folder), wrong, "name another --cache_dir") from error

    def _file(self, view: str, key: str) -> Path:
        name = sha256(key.encode()).hexdigest()
        return self.folder / sha256(view.encode()).hexdigest()[:24] / name[:2] / f"{name}.safetensors"
