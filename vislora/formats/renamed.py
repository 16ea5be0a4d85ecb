"""The names that transformers gives to some models' weights as it loads them, beside those in their files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch


def module_names(folder: Path, stored: Iterable[str]) -> dict[str, str]:
    """{tensor's name in the model: its name in the files}, where transformers renames and does no more than that.

    The model is built of `folder`'s configuration, without storage and without code from the folder. {} where there is
    none that transformers knows.
    """
    file = folder / "config.json"
    try:
        kind = json.loads(file.read_text(encoding="utf-8"))["architectures"][0]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return {}
    import transformers  # takes seconds
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    made = getattr(transformers, str(kind), None)
    if made is None or not hasattr(made, "config_class"):
        return {}
    try:
        with torch.device("meta"):
            model = made(made.config_class.from_pretrained(folder))
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError):  # a damaged or newer configuration
        return {}
    renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    own, found = model.state_dict(), {}
    for name in stored:
        new, _ = rename_source_key(name, renamings, [], model.base_model_prefix, own)
        if new in own:
            found[new] = name
    return found
