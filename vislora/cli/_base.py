"""--base: a model's folder, or the hub's model of an id, by its library's own download."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from ..errors import InputError
from ..formats import Base

# What a model's folder holds beside a pipeline's parts; no weights but safetensors.
_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]


def add_base(parser: argparse.ArgumentParser, why: str) -> None:
    parser.add_argument("--base", metavar="MODEL", help=f"the base model, its folder or hub id: {why}")


def open_base(word: str | None) -> Base | None:
    """Raises InputError, or EnvironmentFault where the hub cannot be reached, for what is no model."""
    return None if word is None else Base(_folder(word))


def _folder(word: str) -> Path:
    if Path(word).exists():
        return Path(word)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", word):
        wrong = "is no folder, and no hub id (owner/name)"
        raise InputError(f"--base {word}", wrong, "give a diffusers or transformers model's folder")
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    from ..diffusion.hub import hub_errors

    with hub_errors(f"--base {word}", None, None):
        try:
            hf_hub_download(word, "model_index.json")
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:  # a model of one part
            return Path(snapshot_download(word, allow_patterns=_PATTERNS))
        from diffusers import DiffusionPipeline

        return Path(DiffusionPipeline.download(word))
