"""Which adapter kept the subject without ruining the model? DINO, CLIP-I, CLIP-T, LPIPS, PRES and drift, as the papers.

A run on the embedded world, scored offline by the world's own networks:

    python eval/subject_driven.py --run runs/0001

A LoRA file of any tool on Stable Diffusion, on a subject of google/dreambooth, by the papers' networks:

    python eval/subject_driven.py --adapter dog.safetensors --base stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --data dreambooth --subjects dog --backbones papers --output_dir scores/dog

Images that lie in folders already, one a subject (several processes: accelerate launch eval/subject_driven.py ...):

    python eval/subject_driven.py --generated images --real dreambooth/dataset --backbones papers

The result is eval/subject_driven.json of the run (or of --output_dir), the images eval/images/<prompt>_<number>.png.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

import vislora
from vislora import config, world
from vislora.diffusion import models, objective
from vislora.diffusion.options import DreamBoothOptions
from vislora.errors import EnvironmentFault, run_script
from vislora.metrics import draw, drift, inputs, over_steps, protocols
from vislora.metrics.cache import Cache, default_folder
from vislora.metrics.cells import Cells
from vislora.metrics.options import ScoreOptions
from vislora.metrics.pictures import examine, listing
from vislora.metrics.score import Compared, Group, Networks, Scored, Scorer
from vislora.training import checkpoint
from vislora.training.cores import use_cores

RESULT = "subject_driven.json"
_COLUMNS = ("dino", "clip_i", "clip_t", "lpips_real", "lpips_div", "pres", "drift_dino", "drift_clip",
            "drift_denoising")  # fmt: skip
_SCHEDULE = ("prediction_type", "rescale_betas_zero_snr")
_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def main(argv: list[str]) -> None:
    argv = [word for word in argv if word != "--debug"]
    options, _ = config.parse(ScoreOptions, argv, prog="subject_driven.py", description=__doc__.splitlines()[0])
    accelerator = Accelerator()
    use_cores(accelerator.num_processes, options.cpu_threads)
    points = []
    if options.checkpoint == "all":
        place = Path(options.output_dir or options.run)
        for step, path in inputs.checkpoints(options):
            own = str(place / path.name) if options.output_dir else None
            points.append((step, score(replace(options, checkpoint=path.name, output_dir=own), accelerator)))
        options = replace(options, checkpoint=None)
    first = score(options, accelerator, points)
    if points and accelerator.is_main_process:
        points.append((inputs.last_step(options.run, points), first))
        picture = over_steps.write(place / "eval", sorted(points, key=lambda point: point[0]))
        best, dino = first["biased_best"], first["biased_best"]["metrics"]["dino"]
        print(f"over steps {picture}")
        print(f"The highest DINO, {dino:.4f}, is step {best['step']}'s: chosen by what is reported, so biased.")


def score(options: ScoreOptions, accelerator: Accelerator, before: Sequence[tuple[int, dict]] = ()) -> dict | None:
    """Draw, score, print and write one result, and return it on the main process. before: earlier steps' results, of
    which with this one the best is told."""
    # What can be known to be wrong is found before anything is drawn.
    setup = None if options.generated else inputs.setup(options)
    output = Path(options.output_dir or options.generated) / "eval" if setup is None else setup.output
    asked = [protocols.get(name) for name in dict.fromkeys(options.protocol)]
    networks = Networks(asked, options.backbones, options.dino, options.clip, accelerator.device)
    cache = Cache(options.cache_dir or default_folder())

    part = accelerator.process_index, accelerator.num_processes
    more, record = {}, {"clip_t_text": options.clip_t_text, "vislora": vislora.__version__}
    if setup is None:
        subjects = inputs.folders(options)
    else:
        subjects, more, drawn = Drawing(options, setup, accelerator, output).go()
        record |= drawn
    scorer = Scorer(subjects, networks, cache, options.compat, more, part=part, share=_shared,
                    resamples=options.resamples)  # fmt: skip
    scorer.look()
    if not accelerator.is_main_process:
        return None
    results = [scorer.result(protocol) for protocol in asked]
    for result in results:
        result["record"] |= record
    first = {**results[0], "protocols": {result["protocol"]: result for result in results[1:]}}
    if before:
        first["biased_best"] = over_steps.best_of([*before, (inputs.last_step(options.run, before), first)])
    print(table(results, options.include_self))
    _write(output / RESULT, first)
    print(f"\nresult     {output / RESULT}")
    return first


class Drawing:
    """The images of every subject, of its class and of unrelated prompts, by the adapted model and by its base."""

    def __init__(self, options: ScoreOptions, setup: inputs.Setup, accelerator: Accelerator, output: Path):
        o, said = options, setup.settings
        self.options, self.setup, self.accelerator, self.output = options, setup, accelerator, output
        trained = replace(DreamBoothOptions(), **{key: said[key] for key in _SCHEDULE if key in said})
        precision = o.mixed_precision or said.get("mixed_precision") or "no"
        if precision == "fp16" and accelerator.device.type == "cpu":
            precision = "no"
        guidance = o.guidance_scale if o.guidance_scale is not None else said.get("guidance_scale")
        if guidance is None and setup.of_world:
            guidance = world.defaults("dreambooth")["guidance_scale"]
        self.models = models.load(
            setup.base, o.revision or said.get("revision"), o.variant or said.get("variant"),
            _DTYPES[precision], accelerator.device, guidance=guidance,
            sequence=said.get("max_sequence_length"), noise=objective.schedule_changes(trained),
            quantization=said.get("base_quantization") or "none",
        )  # fmt: skip
        flow = self.models.family.flow
        side = o.resolution or said.get("resolution") or self.models.resolution
        self.batch_size = o.batch_size or (25 if side <= 256 else 4)
        self.base = draw.Sampling.of(
            self.models, o.scheduler or ("euler" if flow else "dpm"), o.steps or (10 if setup.of_world else 25), side
        )
        self.adapter, self.sampling = None, self.base
        if setup.adapter is not None:
            parts = {name: self.models.parts[name] for name in (self.models.family.denoiser, *self.models.family.clip)}
            self.adapter = vislora.load(parts, setup.adapter)
            if setup.checkpoint is not None:
                self.adapter.load_tensors(checkpoint.load(setup.checkpoint).tensors["adapter"])
            weights = setup.checkpoint or setup.adapter / "adapter"
            self.sampling = replace(self.base, adapter=draw.file_digest(weights if weights.exists() else setup.adapter))

    def go(self) -> tuple[list[Scored], dict[str, Cells], dict]:
        """(subjects with their pictures, cells of what is not measured on pictures, what to record of the drawing)."""
        o, several = self.options, len(self.setup.subjects) > 1
        scored, more = [], {"drift_denoising": Cells()} if o.drift else {}
        for subject, token in self.setup.subjects:
            prompts = [subject.prompt(template, token) for template in subject.templates]
            jobs = draw.jobs(prompts, o.images, o.seed)
            folder = self.output / "images" / subject.name if several else self.output / "images"
            self._draw(jobs, folder, self.sampling, subject.name)
            if self.accelerator.is_main_process:
                about = {"subject": subject.name, "class_noun": subject.noun, "token": token,
                         "templates": subject.templates, "vislora": vislora.__version__}  # fmt: skip
                draw.write_manifest(folder, jobs, self.sampling, about)
            groups = [
                Group(template, subject.text(template, token, o.clip_t_text),
                      examine(folder / job.file for job in jobs if job.group == i))
                for i, template in enumerate(subject.templates)
            ]  # fmt: skip
            one = Scored(subject.name, examine(listing(subject.photos)), groups)
            if o.drift:
                self._drift(subject, one, more["drift_denoising"])
            scored.append(one)
        return scored, more, {
            **{"adapter_digest" if k == "adapter" else k: v for k, v in vars(self.sampling).items()},
            "base": self.setup.base, "adapter": str(self.setup.checkpoint or self.setup.adapter or "none"),
            "batch_size": self.batch_size, "images": o.images, "drift_images": o.drift_images if o.drift else 0,
            "seed": o.seed, "tokens": {subject.name: token for subject, token in self.setup.subjects},
        }  # fmt: skip

    def _draw(self, jobs: list[draw.Job], folder: Path, sampling: draw.Sampling, what: str) -> None:
        """What is missing of `jobs`, by all processes."""
        alone = sampling == self.base and self.adapter is not None
        part = self.accelerator.process_index, self.accelerator.num_processes
        with self.adapter.disabled() if alone else nullcontext():
            draw.draw(self.models, jobs, folder, sampling, self.batch_size, part, f"images of {what}")
        self.accelerator.wait_for_everyone()

    def _drift(self, subject, one: Scored, cells: Cells) -> None:
        """Draw unrelated and class prompts by the adapted model and by its base, and hold the denoisers together."""
        kinds = {prompt: "unrelated" for prompt in drift.unrelated_prompts(self.setup.of_world, subject.noun)}
        kinds |= {prompt: "class" for prompt in drift.class_prompts(subject.noun, subject.templates)}
        jobs = [  # named by prompt: the base's images serve every run on it
            replace(job, file=f"{hashlib.sha256(job.prompt.encode()).hexdigest()[:12]}_{job.file.split('_')[1]}")
            for job in draw.jobs(list(kinds), self.options.drift_images, self.options.seed, "drift images")
        ]
        way = hashlib.sha256(repr(self.base).encode()).hexdigest()[:16]
        shared = Path(self.options.cache_dir or default_folder()) / "base" / way
        own = self.output / "drift" if self.adapter is not None else shared
        self._draw(jobs, shared, self.base, "the base model")
        if self.adapter is not None:
            self._draw(jobs, own, self.sampling, "unrelated and class prompts")
        for prompt, kind in kinds.items():
            files = [job.file for job in jobs if job.prompt == prompt]
            adapted, base = (examine(place / file for file in files) for place in (own, shared))
            one.drift.append(Compared(prompt, kind, adapted, base))
            if kind == "class":
                one.classes.append(Group(prompt, None, adapted))
        if self.adapter is not None and self.accelerator.is_main_process:
            unrelated = [prompt for prompt, kind in kinds.items() if kind == "unrelated"]
            measured = drift.DenoisingDrift(
                self.models, self.adapter, unrelated, self.options.seed, side=self.base.side
            )  # fmt: skip
            for prompt, value in measured.values():
                cells.add(one.name, prompt, value)
        elif self.adapter is None:
            cells.add(one.name, "the base itself", 0.0)


def _shared(found: dict) -> dict:
    """The dicts of all processes as one, on each of them."""
    return {key: value for each in gather_object([found]) for key, value in each.items()}


def table(results: list[dict], include_self: bool) -> str:
    """The protocols' metrics with their intervals, and the real images' rows, as aligned text."""
    name = {"lpips_real": "_real", "lpips_div": "_div"}
    column = results[0]["record"]["lpips_column"]
    rows = [["metric", *(result["protocol"] + (" compat" if result["compat"] else "") for result in results)]]
    for metric in (m for m in _COLUMNS if results[0]["metrics"].get(m) is not None):
        cells = [_shown(result["metrics"][metric], result["intervals"][metric]) for result in results]
        rows.append([column + name[metric] if metric in name else metric, *cells])
    for how in ("exclude_self", "include_self")[: 1 + include_self]:
        for metric in ("dino", "clip_i", "lpips_real"):
            shown = column if metric == "lpips_real" else metric
            cells = [_shown(result["real"][how][metric], result["real_intervals"][how][metric]) for result in results]
            rows.append([f"real images, {shown}" + (" with self-pairs" if how == "include_self" else ""), *cells])
    counts = results[0]["counts"]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append(f"{counts['generated']} images of {counts['prompts']} prompts, {counts['subjects']} subjects")
    if black := results[0]["black_files"]:
        said = f"{counts['black']} images, {counts['black_real']} photos, {counts['black_drift']} images for drift"
        lines.append(f"ALL BLACK: {said}: {', '.join(black[:5])}{', …' if len(black) > 5 else ''}")
    return "\n".join(lines)


def _shown(value: float | None, interval: list[float] | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" + (f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")


def _write(file: Path, result: dict) -> None:
    temporary = file.with_name(f".{file.name}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        wrong = f"cannot be written ({error.strerror})"
        raise EnvironmentFault(str(file), wrong, "name another --output_dir") from error


if __name__ == "__main__":
    run_script(main)
