"""Small files written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ..errors import EnvironmentFault


def write_bytes(path: Path, content: bytes) -> None:
    """Through a temporary file and a rename. Raises EnvironmentFault where the disk refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as opened:
                opened.write(content)
            os.chmod(temporary, 0o644)  # mkstemp's own mode hides the file from other users
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        raise EnvironmentFault(str(path), f"cannot be written ({error})", "free space or choose another") from None
