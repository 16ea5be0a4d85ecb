"""A PEFT configuration as it is written in a file, checked before PEFT sees it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from ..config import read_yaml
from ..errors import InputError, near

FLAG = "--peft_config"
# Types that are no change of layers which a closed model could run with, and why.
REFUSED = {
    **dict.fromkeys(
        ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"),
        "learns a prompt, not layers",
    ),
    "ADAPTION_PROMPT": "learns prompts inside one family of language models",
    "SHADOW": "trains a second model beside the first",
    "XLORA": "mixes adapters that are trained already",
    "POLY": "needs a task's number with every call",
    "TRAINABLE_TOKENS": "trains rows of an embedding, of which the update is not a matrix's",
    "ADAMSS": "keeps a schedule of which PEFT gives no state to resume from",
}
# What says where a file came from, or what a trained adapter has come to: nothing to start training with.
_DROPPED = (
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "runtime_config",
    "task_type",
)  # fmt: skip


def supported() -> list[str]:
    """The types of the installed PEFT that can be injected, sorted."""
    return sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING if kind.value not in REFUSED)


def read(given: Path | str | Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a JSON or YAML file, or in a mapping, as plain data with a known peft_type and known keys.

    PEFT's own adapter_config.json is accepted as it is. Raises InputError for anything unknown, with near misses.
    """
    if isinstance(given, Mapping):
        subject, settings = "peft_config", json.loads(json.dumps(given, default=_plain))
    else:
        subject, settings = f"{FLAG} {given}", _from_file(Path(given))
    kind = settings.get("peft_type")
    kinds = supported()
    if not isinstance(kind, str) or kind.upper() not in PeftType.__members__:
        hint = near(str(kind).upper(), kinds)
        wrong = "names no peft_type" if kind is None else f"peft_type {kind!r} is unknown{hint}"
        raise InputError(subject, wrong, f"one of {', '.join(kinds)}")
    kind = kind.upper()
    if kind in REFUSED or kind not in kinds:
        why = REFUSED.get(kind, "has no configuration in this PEFT")
        raise InputError(subject, f"peft_type {kind} {why}", f"one of {', '.join(kinds)}")
    known = [f.name for f in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]) if f.init]
    start = settings.get("init_lora_weights")
    if start in ("eva", "corda", "lora_ga"):
        wrong = f"init_lora_weights {start!r} starts from data, which PEFT gathers before it injects"
        raise InputError(subject, wrong, "take another start; lora_ga is a method of vislora too")
    if settings.get("monteclora_config") is not None:
        wrong = "monteclora_config adds a loss to every forward, which nothing outside PEFT's own loops does"
        raise InputError(subject, wrong, "leave it out")
    strange = [key for key in settings if key not in known and key not in _DROPPED]
    if strange:
        has = ", ".join(key for key in known if key not in _DROPPED)
        raise InputError(subject, f"{kind} has no key {strange[0]!r}{near(strange[0], known)}", f"it has {has}")
    return {"peft_type": kind} | {k: v for k, v in settings.items() if k not in _DROPPED and k != "peft_type"}


def _from_file(file: Path) -> dict[str, Any]:
    if file.suffix != ".json":
        return {key: _number(value) for key, value in read_yaml(file, FLAG).items()}
    try:
        settings = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{FLAG} {file}", f"cannot be read ({error.strerror})", "name a JSON or YAML file") from None
    except ValueError as error:
        raise InputError(f"{FLAG} {file}", f"is no JSON ({error})", "mend it, or name a YAML file .yaml") from None
    if not isinstance(settings, dict):
        raise InputError(f"{FLAG} {file}", "is no JSON object", 'write {"peft_type": "LORA", ...}')
    return settings


def _number(value: Any) -> Any:
    """1e-4 is text to YAML."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value) else value


def make(settings: Mapping[str, Any]) -> PeftConfig:
    """PEFT's configuration object of `read`'s settings. Raises InputError for what PEFT refuses."""
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(settings["peft_type"])]
    try:
        return cls(**{key: value for key, value in settings.items() if key != "peft_type"})
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise InputError("peft_config", f"{settings['peft_type']}: {brief(error)}", "mend the configuration") from None


def brief(error: BaseException) -> str:
    """PEFT's message on one line, cut to a length that can be read."""
    return " ".join(str(error).split())[:300]


def _plain(value: Any) -> Any:
    """JSON of what PEFT's `to_dict` holds beside JSON: sets."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise InputError("peft_config", f"holds {value!r}", "give plain data")
