"""Images of the validation prompts before, during and after training, and the sheets that show them side by side."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from vislora import distributed
from vislora.data.images import read
from vislora.diffusion.models import DiffusionModels
from vislora.diffusion.options import DreamBoothOptions
from vislora.diffusion.sample import comparison_grid, labelled_grid, render
from vislora.errors import InputError
from vislora.training.random import generator

_STAGE = re.compile(r"step-(\d{6})")
GRID = "grid.png"
_MADE = "vislora"  # the key, in a drawn PNG, of how it was drawn


def _told(file: Path) -> str | None:
    try:
        with Image.open(file) as image:
            return image.info.get(_MADE)
    except OSError:
        return None


def prompts_of(words: Sequence[str]) -> list[str]:
    """The prompts that --validation_prompt gives: as they are, or the lines of one .txt file.

    Raises InputError for a file that is missing, not UTF-8 or empty.
    """
    if len(words) != 1 or not words[0].endswith(".txt"):
        return list(words)
    try:
        lines = Path(words[0]).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--validation_prompt {words[0]}", f"cannot be read ({error})", "name a UTF-8 file") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"--validation_prompt {words[0]}", "holds no prompt", "write one a line")
    return prompts


class Validation:
    """Draws `prompts`, each with the same seeds at every stage, into `folder`/step-<step>/ and sheets beside it.

    together: all processes draw, whose model is in shards, and the first writes; else one draws.
    """

    def __init__(
        self, options: DreamBoothOptions, prompts: Sequence[str], photos: Sequence[Path], folder: Path,
        models: DiffusionModels, together: bool = False,
    ):  # fmt: skip
        self.options, self.prompts, self.folder = options, list(prompts), folder
        self.device, self.together, self.writes = models.device, together, not together or distributed.is_first()
        self.guidance, self.more, self.side = models.guidance, models.drawing, options.resolution or models.resolution
        self.photos = [read(path) for path in photos[:8]] if self.prompts else []
        self.seeds = [
            generator(options.seed, "validation", i).initial_seed() for i in range(options.num_validation_images)
        ]

    def draw(self, pipeline, step: int) -> Image.Image | None:
        """Draw the stage after `step` optimizer steps; returns its sheet, None without prompts or where another process
        writes."""
        if not self.prompts:
            return None
        o, flat = self.options, [(prompt, seed) for prompt in self.prompts for seed in self.seeds]
        images = render(
            pipeline, [p for p, _ in flat], [s for _, s in flat], o.validation_inference_steps, self.guidance,
            o.sample_batch_size, self.side, self.side, f"samples at step {step}" if self.writes else None, self.more,
        )  # fmt: skip
        if not self.writes:
            return None
        count = len(self.seeds)
        stage = [images[i * count : (i + 1) * count] for i in range(len(self.prompts))]
        place = self.folder / f"step-{step:06d}"
        shutil.rmtree(place, ignore_errors=True)  # of other prompts, perhaps
        place.mkdir(parents=True)
        for i, row in enumerate(stage):
            for k, image in enumerate(row):
                made = PngInfo()
                made.add_itxt(_MADE, self._made(i, k))
                image.save(place / f"{i:02d}-{k:02d}.png", pnginfo=made)
        sheet = labelled_grid(stage, self.prompts, [f"seed {k + 1}" for k in range(count)], f"after {step} steps")
        sheet.save(self.folder / f"step-{step:06d}.png")
        return sheet

    def sheet(self, pipeline, step: int) -> Image.Image | None:
        """The stage's sheet as it was drawn, by this run or before it was resumed; else it is drawn now."""
        drawn = self._drawn(step)
        if not (distributed.first_says(drawn, self.device) if self.together else drawn):
            return self.draw(pipeline, step)
        if not self.writes:
            return None
        with Image.open(self.folder / f"step-{step:06d}.png") as image:
            return image.convert("RGB")

    def _drawn(self, step: int) -> bool:
        """Whether the stage is whole, and of these prompts and seeds."""
        place, every = self.folder / f"step-{step:06d}", range(len(self.seeds))
        wanted = {f"{i:02d}-{k:02d}.png": self._made(i, k) for i in range(len(self.prompts)) for k in every}
        there = {path.name: _told(path) for path in place.glob("*.png")}
        return place.with_suffix(".png").is_file() and there == wanted

    def rewind(self, step: int) -> None:
        """Drop the stages after `step`, which a resumed run draws again."""
        for later in (found for found in self._stages() if found > step):
            shutil.rmtree(self.folder / f"step-{later:06d}", ignore_errors=True)
            (self.folder / f"step-{later:06d}.png").unlink(missing_ok=True)

    def _made(self, prompt: int, seed: int) -> str:
        """What an image is a function of, beside the weights."""
        o = self.options
        return json.dumps({
            "prompt": self.prompts[prompt], "seed": self.seeds[seed], "steps": o.validation_inference_steps,
            "guidance": self.guidance, "side": self.side,
        })  # fmt: skip

    def compare(self, last: int) -> Path | None:
        """Write grid.png: the photos, then each prompt before, half-way and after step `last`. None without prompts, or
        where another process writes."""
        steps = sorted(s for s in self._stages() if s <= last and self._drawn(s)) if self.writes else ()
        if not self.prompts or not steps:
            return None
        middle = steps[len(steps) // 2]
        columns = min(len(self.seeds), 2)
        stages = {}
        for step in sorted({steps[0], middle, steps[-1]}):
            name = "before" if step == 0 else "after" if step == last else f"step {step}"
            stages[name] = [row[:columns] for row in self._read(step)]
        path = self.folder / GRID
        comparison_grid(self.photos, self.prompts, stages).save(path)
        return path

    def _stages(self) -> list[int]:
        names = (_STAGE.fullmatch(p.name) for p in self.folder.iterdir()) if self.folder.is_dir() else ()
        return [int(match[1]) for match in names if match]

    def _read(self, step: int) -> list[list[Image.Image]]:
        place = self.folder / f"step-{step:06d}"
        return [
            [Image.open(place / f"{i:02d}-{k:02d}.png").convert("RGB") for k in range(len(self.seeds))]
            for i in range(len(self.prompts))
        ]
