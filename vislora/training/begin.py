"""What is settled right before a run's first step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vislora import config
from vislora.handle import Handle
from vislora.training import checkpoint
from vislora.training.run import RunFolder

_COPIES = 3  # of what trains: itself, and AdamW's two moments


def begin(folder: RunFolder, options: Any, adapter: Handle) -> None:
    """Write the run's config.yaml, which `--config` takes to repeat it.

    Raises EnvironmentFault where the disk has no room for two checkpoints: an older one goes only after a newer stands.
    """
    trained = sum(p.numel() * p.element_size() for p in adapter.parameters())
    checkpoint.require_space(folder.path, 2 * _COPIES * trained)
    again = replace(options, output_dir=None, resume_from_checkpoint=None)
    folder.write_config(config.to_dict(again, adapter.method))
