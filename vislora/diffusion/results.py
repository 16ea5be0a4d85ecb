"""What a run leaves beside its files: metrics.json, the model card, and a few lines on where to look."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path

from vislora import config, measure
from vislora.diffusion.card import run_card
from vislora.diffusion.conditioning import warn_of_cuts
from vislora.diffusion.keeping import PICTURE, Kept
from vislora.diffusion.models import DiffusionModels
from vislora.diffusion.options import DreamBoothOptions
from vislora.diffusion.validation import Validation
from vislora.errors import InputError
from vislora.export import read_certificate
from vislora.handle import Handle
from vislora.training.run import RunFolder


def conclude(
    folder: RunFolder,
    options: DreamBoothOptions,
    adapter: Handle,
    steps: int,
    grid: Path | None,
    pipeline: str,
    exported: Path | None = None,
    error: float | None = None,
    copy: Path | None = None,
    kept: Kept | None = None,
) -> None:
    """Write metrics and card after `steps` steps, and say where things are.

    exported: the file or folder that stock tools load, `error` off when read back, None where it was not.
    pipeline: the diffusers class.
    copy: the same for ComfyUI and A1111. kept: the checkpoint that was chosen, None for the last step.
    """
    in_file = exported is not None and exported.is_file()  # the certificate is of what it holds
    certificate = read_certificate(exported) if in_file else measure.certificate(adapter)
    share, lost = certificate["largest_share"], certificate["largest_lost"]
    folder.write_metrics({
        "steps": steps,
        "trainable_parameters": sum(p.numel() for p in adapter.parameters()),
        "largest_norm": certificate["largest_norm"],
        "largest_share": share, "largest_lost": lost,
        "diffusers_export_error": error,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        **(kept.metrics() if kept else {}),
    })  # fmt: skip
    form = "adapter" if folder.adapter.exists() else "base"
    if exported is not None:
        form = "components" if exported.is_dir() else "lora"
    card = run_card(folder.path, options, certificate, grid, pipeline, form, kept.sentence() if kept else None)
    folder.readme.write_text(card, encoding="utf-8")
    print()
    if kept:
        print(f"kept       step {kept.step} of {steps} ({folder.path / PICTURE})")
    else:
        (folder.path / PICTURE).unlink(missing_ok=True)  # of a choice before this run was resumed
    if folder.adapter.exists():
        print(f"adapter    {folder.adapter}")
    if exported is not None:
        cost = f"lost: {lost:.1%} of a layer; " if in_file else ""
        read = f"read back by stock diffusers, off by {error:.0e}" if error is not None else "not read back from shards"
        print(f"diffusers  {exported} ({cost}{read})")
    if copy is not None:
        print(f"kohya      {copy} (for ComfyUI and A1111)")
    if share is not None:
        print(f"bound      at most {share:.1%} of any layer's bound is in use")
    print(f"look at    {grid or folder.path}")


def draw_base(
    options: DreamBoothOptions,
    adapter: Handle,
    diffusion: DiffusionModels,
    photos: list[Path],
    prompts: list[str],
    folder: RunFolder,
) -> None:
    """The whole run of an adapter that trains nothing: the base's images, metrics, a card."""
    print(f"vislora: --adapter {adapter.method_name} trains nothing: the base's images are drawn, no step is made")
    if options.resume_from_checkpoint is not None:
        wrong = f"--adapter {adapter.method_name} makes no steps to go on with"
        raise InputError("--resume_from_checkpoint", wrong, "leave it out")
    warn_of_cuts(diffusion, prompts)
    folder.write_config(config.to_dict(replace(options, output_dir=None), adapter.method))
    validation = Validation(options, prompts, photos, folder.samples, diffusion)
    validation.draw(diffusion.pipeline(), 0)
    conclude(folder, options, adapter, 0, validation.compare(0), diffusion.pipeline_class)
