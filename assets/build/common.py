"""What the stages share: folders, safetensors checkpoints, seeds, progress lines and image grids."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
# Outside the repository, so that a fresh clone goes on where the last one was.
WORK = Path(os.environ.get("VISLORA_WORLD_WORK", Path.home() / ".cache" / "vislora" / "world"))
WORLD = HERE.parent / "world"
_START = time.time()


def setup(threads: int = 2) -> None:
    """Make the work folder and fix the number of threads."""
    WORK.mkdir(parents=True, exist_ok=True)
    WORLD.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)


def say(text: str) -> None:
    """A progress line with the wall clock and the minutes since the start."""
    print(f"[{time.strftime('%H:%M:%S')} +{(time.time() - _START) / 60:.1f}m] {text}", flush=True)


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], meta: dict | None = None) -> None:
    """Write tensors and string metadata, replacing the file only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, part,
              metadata={k: json.dumps(v) for k, v in (meta or {}).items()})
    part.chmod(0o644)
    part.replace(path)


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Read what `save_tensors` wrote."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as handle:
        meta = handle.metadata() or {}
    return load_file(path), {k: json.loads(v) for k, v in meta.items()}


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The per-parameter state of AdamW as flat tensors."""
    state = optimizer.state_dict()["state"]
    return {f"opt.{i}.{k}": torch.as_tensor(v).float() for i, entry in state.items() for k, v in entry.items()}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Put back what `pack_optimizer` took."""
    state: dict[int, dict] = {}
    for key, value in tensors.items():
        if key.startswith("opt."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def grid(images: list[Image.Image], columns: int, scale: int = 2, labels: list[str] | None = None) -> Image.Image:
    """A contact sheet, each image enlarged and, if labels are given, named below."""
    from PIL import ImageDraw

    side = images[0].width * scale
    height = side + (14 if labels else 0)
    rows = (len(images) + columns - 1) // columns
    sheet = Image.new("RGB", (columns * (side + 2), rows * (height + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = (i % columns) * (side + 2), (i // columns) * (height + 2)
        sheet.paste(image.resize((side, side), Image.NEAREST), (x, y))
        if labels:
            draw.text((x + 1, y + side + 1), labels[i][: side // 6], fill="black")
    return sheet


def to_images(batch: torch.Tensor) -> list[Image.Image]:
    """Images in [-1, 1], NCHW -> PIL."""
    array = ((batch.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    return [Image.fromarray(a) for a in array]
