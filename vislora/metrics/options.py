"""The options of eval/subject_driven.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vislora.errors import InputError
from vislora.metrics import protocols
from vislora.metrics.backbones import CLIP, DINO, PAPERS, WORLD
from vislora.options import option

_INPUT, _DATA, _DRAW, _SCORE, _RUN = "what to score", "subjects and prompts", "images", "scoring", "run"


@dataclass(frozen=True)
class ScoreOptions:
    """One of `run`, `adapter` and `generated` says what is scored."""

    run: str | None = option(None, "the folder of a DreamBooth run", group=_INPUT)
    base: str | None = option(
        None, "the model that --adapter belongs to, a folder or hub id; none: the run's, or the world's", group=_INPUT
    )
    adapter: str | None = option(
        None, "an adapter's file or folder, ours, diffusers', kohya's or PEFT's, in place of the run's; none: the base "
        "model alone", group=_INPUT,
    )  # fmt: skip
    checkpoint: str | None = option(
        None, "of --run, in place of its final adapter: latest or a folder such as checkpoint-300; results go to "
        "eval/checkpoint-300; all: every one and the final adapter, for scores over steps", group=_INPUT,
    )  # fmt: skip
    generated: str | None = option(
        None, "a folder of images, or of subjects' folders of images, <prompt>_<number>.png; nothing is drawn",
        group=_INPUT,
    )  # fmt: skip

    real: str | None = option(
        None, "the subject's photos, or subjects' folders of photos; none: the run's, or those of --data", group=_DATA
    )
    data: str | None = option(
        None, "a copy of google/dreambooth, whose classes and prompts are read; none: the world's", group=_DATA
    )
    subjects: tuple[str, ...] = option((), "score these alone, by their folders' names", group=_DATA)
    prompts: str | None = option(
        None, 'a file of prompts, one a line, with {} for the subject: "a {} in the snow"', group=_DATA
    )
    token: str | None = option(None, "the subject's word; none: from the run's prompts, or sks", group=_DATA)
    class_noun: str | None = option(None, "the class's noun; none: from data or the run's prompts", group=_DATA)

    images: int = option(4, "for each prompt", group=_DRAW)
    scheduler: str | None = option(None, "dpm or ddim, of flow matching euler; none: dpm, or euler", group=_DRAW)
    steps: int | None = option(None, "sampler steps of an image; none: 25, of the world's model 10", group=_DRAW)
    guidance_scale: float | None = option(None, "none: the run's, or the family's", group=_DRAW)
    resolution: int | None = option(None, "side of the images in pixels; none: the run's, or the model's", group=_DRAW)
    batch_size: int | None = option(None, "images at a time; none: 25 up to 256 pixels, else 4", group=_DRAW)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "of the model that draws; none: the run's. Scores are float32", group=_DRAW
    )
    revision: str | None = option(None, "of a hub model", group=_DRAW)
    variant: str | None = option(None, "of the weight files, such as fp16", group=_DRAW)

    protocol: tuple[str, ...] = option(
        ("oft", "dreambooth"), f"the first is the result, the others stand beside it: {', '.join(protocols.PROTOCOLS)}",
        group=_SCORE,
    )  # fmt: skip
    compat: bool = option(False, "with the defects of OFT's script (dog and backpack_dog, first four, black)",
                          group=_SCORE)  # fmt: skip
    include_self: bool = option(
        False, "print the real images' row with each paired with itself too, as NB-LoRA's table has it", group=_SCORE
    )
    backbones: str = option(
        WORLD, "world (its small networks), papers (their hub names), or a folder of the papers' weight files",
        group=_SCORE,
    )  # fmt: skip
    dino: str | None = option(
        None, "another DINO: of the papers' s16, b16, s8, dinov2_s, dinov2_b, or a name of timm's or a folder",
        group=_SCORE,
    )  # fmt: skip
    clip: str | None = option(
        None, "another CLIP: of the papers' L14, B32, or a name of open_clip's or a folder", group=_SCORE
    )
    clip_t_text: Literal["without_token", "with_token", "class"] = option(
        "without_token", "what CLIP-T compares an image with: its prompt, or the class alone", group=_SCORE
    )
    drift: bool = option(
        True, "draw unrelated and class prompts too, for drift and PRES; drift_denoising is by this --seed, not the "
        "number that a run logs by its own", group=_SCORE,
    )  # fmt: skip
    drift_images: int = option(2, "for each of those prompts", group=_SCORE)
    resamples: int = option(1000, "of the bootstrap", group=_SCORE)

    seed: int = option(0, "all chance is a function of it", group=_RUN)
    output_dir: str | None = option(
        None, "results go to eval/ in it; none: the run's folder, or the one of --generated", group=_RUN
    )
    cache_dir: str | None = option(
        None, "features, and the base's images for drift, by content; none: vislora in the user's cache", group=_RUN
    )
    cpu_threads: int | None = option(None, "threads to compute with; none: all cores", group=_RUN)

    def __post_init__(self):
        for name in ("images", "drift_images", "resamples", "steps", "batch_size", "resolution", "cpu_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name}", f"{value} is below 1", "give 1 or more")
        if self.guidance_scale is not None and not self.guidance_scale >= 0:
            raise InputError("--guidance_scale", f"{self.guidance_scale} is negative", "give 0 or more")
        if not self.protocol:
            raise InputError("--protocol", "names none", f"some of {', '.join(protocols.PROTOCOLS)}")
        for name in self.protocol:
            protocols.get(name)
        for name, theirs in (("dino", DINO), ("clip", CLIP)):  # for which the world's one network would stand, unsaid
            if self.backbones == WORLD and (value := getattr(self, name)) in theirs:
                wrong = f"{value} is a network of the papers', and --backbones is {WORLD}"
                raise InputError(f"--{name}", wrong, f"add --backbones {PAPERS} or a folder of their weights")
        if self.generated is not None:
            for name in ("run", "base", "adapter", "checkpoint"):
                if getattr(self, name) is not None:
                    raise InputError(f"--{name}", "stands beside --generated, which draws nothing", "give one of them")
            if self.real is None and self.data is None:
                wrong = "has nothing to be compared with"
                raise InputError("--generated", wrong, "add --real FOLDER, or --data with google/dreambooth's copy")
        elif self.run is None and self.adapter is None:
            wrong = "none of --run, --adapter and --generated is given"
            raise InputError("subject_driven.py", wrong, "name a run's folder by --run; see --help")
        elif self.checkpoint is not None and (self.run is None or self.adapter is not None):
            raise InputError("--checkpoint", "is one of a run", "give its --run, and no --adapter")
        elif self.run is None and self.output_dir is None:
            raise InputError("--output_dir", "is needed where no run is named", "name a folder for the results")
