"""Any method of the installed PEFT that can be injected into a model, from its own configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from ..errors import InputError
from ..site import Site, find
from ._baseline import Baseline, Found


@dataclass(frozen=True)
class Peft(Baseline):
    """A PEFT configuration: peft_type, and that type's options in PEFT's own words.

    Targets are the configuration's target_modules; where it names none, those given beside it, or the model's preset.
    """

    word: ClassVar[str] = "peft"

    peft_config: Path  # JSON or YAML with a peft_type and its options, or PEFT's adapter_config.json
    settings: dict[str, Any] = field(init=False, repr=False)  # what it says; in Python a mapping may take its place

    def __post_init__(self):
        from ._peft_config import read  # PEFT takes seconds to import

        object.__setattr__(self, "settings", read(self.peft_config))

    def options(self) -> dict[str, Any]:
        return dict(self.settings)

    @property
    def kind(self) -> str:
        """PEFT's name of the type, such as LORA."""
        return self.settings["peft_type"]

    @property
    def roles(self) -> Mapping[str, str]:
        """As a method's: names what an exported file may have beside the two factors."""
        return {"lora_magnitude_vector": "magnitude"} if self.settings.get("use_dora") else {}

    def has_penalty(self) -> bool:
        return self.kind == "ADALORA" or self.settings.get("kasa_config") is not None

    def find(self, root: nn.Module, targets) -> list[Site]:
        if self.settings.get("target_modules") is not None:
            if targets is not None:
                wrong = f"{targets!r} beside target_modules in the PEFT configuration"
                raise InputError("targets", wrong, "keep one of the two")
            return []
        if targets is None and self.settings.get("target_parameters") is not None:
            return []
        sites = find(root, targets)
        for site in sites:
            if site.rows is not None:
                wrong = f"{site.name} is a block of rows; PEFT adapts whole modules"
                raise InputError("targets", wrong, f"name the whole matrix, {site.path}")
        return sites

    def build(self, found: Found, name: str, seed: int):
        from ._peft_handle import PeftHandle

        own = {c: {"target_modules": [s.path for s in sites]} if sites else {} for c, (_, sites) in found.items()}
        return PeftHandle(name, self, {c: (root, {**self.settings, **own[c]}) for c, (root, _) in found.items()}, seed)
