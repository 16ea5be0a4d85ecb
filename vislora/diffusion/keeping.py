"""--drift_steps and --keep best: how far a run is from its base, and which of its checkpoints it leaves as the adapter.

The rule is `vislora.sweep.keep`'s: of the checkpoints whose images of the subject are as good as the best one's, the
one that drifted least. All are scored at the end, from checkpoints/ and samples/, so a resumed run chooses the same.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from vislora import distributed, world
from vislora.diffusion.dataset import ImageSet, concepts_of
from vislora.diffusion.models import DiffusionModels
from vislora.diffusion.options import DreamBoothOptions
from vislora.diffusion.validation import Validation
from vislora.errors import InputError, printable
from vislora.handle import Handle
from vislora.metrics.drift import DenoisingDrift, unrelated_prompts
from vislora.metrics.subjects import token_and_noun
from vislora.training import checkpoint
from vislora.training.run import RunFolder

if TYPE_CHECKING:  # their networks take a second to import, which only --keep best should cost
    from vislora.metrics.backbones import Backbone
    from vislora.sweep.keep import Point

PICTURE = "keep.png"
_FLAG = "--keep best"
log = logging.getLogger("vislora")


def of_world(options: DreamBoothOptions) -> bool:
    """Whether the run's model is the embedded world's."""
    return Path(options.pretrained_model_name_or_path).resolve() == world.TINY_SD.resolve()


def drift_of(options: DreamBoothOptions, models: DiffusionModels, adapter: Handle) -> DenoisingDrift:
    """The run's measure of drift, on prompts without the last word of any of its class prompts, under the run's seed:
    eval/subject_driven.py, which has its own seed and nouns, gives another number. Attach the adapter before."""
    prompts = [concept.class_prompt or concept.instance_prompt or "" for concept in concepts_of(options)]
    nouns = [prompt.rstrip(".").split()[-1] for prompt in prompts if prompt.rstrip(".").split()]
    unrelated = unrelated_prompts(of_world(options), nouns[0] if nouns else "")
    unrelated = [prompt for prompt in unrelated if not {*nouns} & {*prompt.split()}]
    return DenoisingDrift(models, adapter, unrelated, options.seed, side=options.resolution)


def keeper_of(options: DreamBoothOptions, method: Any, prompts: Sequence[str]) -> Keeper | None:
    """What chooses for --keep best; None for last. prompts: the run's validation prompts.

    Raises InputError where a run of these options has nothing to choose by: before a diffusion model is loaded.
    """
    o = options
    if o.keep == "last":
        return None
    if not getattr(method, "trains", True):
        raise InputError(_FLAG, f"--adapter {o.adapter} trains nothing to choose from", "leave it out")
    if o.concepts_list is not None:
        raise InputError(_FLAG, "scores one subject, --concepts_list has several", "take one of the two")
    if not prompts:
        raise InputError(_FLAG, "there are no images to score", "give --validation_prompt, prompts with the token")
    for name in ("instance_prompt", "class_prompt"):
        if getattr(o, name) is None:
            wrong = f"needs --{name}: the token is what the instance prompt has and the class prompt has not"
            raise InputError(_FLAG, wrong, 'give both, such as "a photo of sks dog" and "a photo of a dog"')
    try:
        token, _ = token_and_noun(o.instance_prompt, o.class_prompt)
    except InputError as error:
        raise InputError(_FLAG, error.wrong, 'give such as "a photo of sks dog" and "a photo of a dog"') from error
    trained = o.instance_prompt.rstrip(".")
    asked = [i for i, prompt in enumerate(prompts) if prompt.rstrip(".") != trained]
    held_out = [i for i in asked if {*token.split()} <= {*prompts[i].replace(",", " ").split()}]
    if not held_out:
        wrong = f"no --validation_prompt beside the instance prompt, which is trained on, holds the token {token!r}"
        raise InputError(_FLAG, wrong, "add some that do")
    from vislora.metrics import backbones

    source, remedy = backbones.PAPERS, "let it be fetched from the hub once, or leave it out"
    if of_world(o):
        source, remedy = backbones.WORLD, "take a whole clone, build it by assets/build, or leave it out"
    try:
        return Keeper(o, held_out, backbones.dino("s16", "full", source))
    except InputError as error:  # whose remedies are the flags of eval/
        raise InputError(_FLAG, f"{error.subject} {error.wrong}", remedy) from error


@dataclass(frozen=True)
class Kept:
    """The choice, and the points that it was made from, in the order of their steps."""

    point: Point
    points: list[Point]
    prompts: int
    network: str

    @property
    def step(self) -> int:
        return self.point.step

    def metrics(self) -> dict[str, Any]:
        """For metrics.json. fidelity: mean cosine of DINO features to the photos', prompt by prompt."""
        curve = [{"step": p.step, "fidelity": list(p.fidelity), "drift_denoising": p.drift} for p in self.points]
        return {"kept_step": self.step, "kept_by": self.network, "keep_curve": curve}

    def sentence(self) -> str:
        """For the model card."""
        return (
            f"Of {len(self.points)} checkpoints this is the one after step {self.step}: its denoising drift from the "
            f"base, {self.point.drift:.3g}, is the least among those whose DINO fidelity on {self.prompts} validation "
            f"prompts is within one standard error of the best ({PICTURE})."
        )

    def draw(self, file: Path) -> None:
        """The curve of fidelity over drift, the steps at its points, with a ring around the chosen one."""
        from matplotlib.figure import Figure  # no global state, no display

        figure = Figure(figsize=(6, 4.2), layout="constrained")
        axis = figure.subplots()
        axis.plot([p.drift for p in self.points], [p.mean for p in self.points], marker="o", color="tab:blue")
        ring = dict(markersize=16, fillstyle="none", color="tab:red", label="kept")
        axis.plot(self.point.drift, self.point.mean, "o", **ring)
        for p in self.points:
            axis.annotate(str(p.step), (p.drift, p.mean), xytext=(7, 7), textcoords="offset points", fontsize=8)
        axis.set(xlabel="denoising drift from the base", ylabel="DINO to the photos, mean over prompts",
                 title="checkpoints by step")  # fmt: skip
        axis.margins(0.12)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
        figure.savefig(file, dpi=120)


@dataclass
class Keeper:
    """Scores a run's checkpoints and leaves the best in its adapter. held_out: the prompts that count, by number.

    These have the token and are not the instance prompt."""

    options: DreamBoothOptions
    held_out: list[int]
    dino: Backbone

    def choose(
        self, adapter: Handle, folder: RunFolder, validation: Validation, sampler, photos: ImageSet,
        drift: DenoisingDrift, total: int,
    ) -> Kept | None:  # fmt: skip
        """Score the checkpoints of a run that has made `total` steps; afterwards `adapter` is the kept one.

        Those that the options ask for count, whatever a signal left besides. Images that a stage lacks are drawn. A
        checkpoint that is missing, damaged or not finite is left out with a warning; InputError where none is left.
        Processes that hold shards call it together; the first chooses, and the others return None.
        """
        from vislora.metrics.cache import Cache
        from vislora.sweep.keep import Point, fidelity, keep

        self.dino.network.to(drift.models.device)
        paths, cache, points = [photo.path for photo in photos.photos], Cache(None), []
        every = self.options.checkpointing_steps
        for step in tqdm([*range(every, total, every), total], desc="scoring checkpoints"):
            try:
                self._show(step, adapter, folder)
            except InputError as error:
                log.warning("%s: %s -> left out of the choice", printable(error.subject), printable(error.wrong))
                continue
            validation.sheet(sampler, step)
            drifted = drift.measure()["drift_denoising"]
            if not validation.writes:  # has no images to score
                continue
            seen = fidelity(folder.samples / f"step-{step:06d}", paths, self.held_out, self.dino, cache)
            point = Point(step, seen, drifted)
            if all(map(math.isfinite, (*point.fidelity, point.drift))):
                points.append(point)
            else:
                log.warning("step %d: its scores are not finite -> left out of the choice", step)
        kept = Kept(keep(points), points, len(self.held_out), self.dino.identifier) if validation.writes else None
        chosen = torch.tensor(kept.step if kept else 0, device=drift.models.device)
        if validation.together:
            distributed.from_first(chosen)
        self._show(int(chosen), adapter, folder)
        if kept:
            kept.draw(folder.path / PICTURE)
        return kept

    def _show(self, step: int, adapter: Handle, folder: RunFolder) -> None:
        """Bring `adapter` to that checkpoint; where an average is kept, to its average."""
        saved = checkpoint.load(folder.checkpoints / f"checkpoint-{step}")
        tensors = saved.tensors["adapter"]
        for name, average in saved.tensors.get("ema", {}).items():
            if name.startswith("average|"):
                tensors[name.removeprefix("average|")] = average
        adapter.load_tensors(tensors)
        adapter.step = saved.state["adapter_step"]
