"""What each paper's numbers are, by name: which network, which transform, which pairs, which mean.

oft: `oft-db/eval.py` of OFT (Qiu et al. 2023), whose columns ETHER and NB-LoRA print too; its published numbers are of
Hugging Face's dino-vits16, whose LayerNorms have an eps of 1e-12, and timm's, which is taken here, 1e-6. dreambooth:
Ruiz et al. 2023; its transform, not stated there, is that of DINO's hub code. customconcept: CustomConcept101 of
Custom Diffusion.
dreambench_pp: DreamBench++'s DINO and CLIP columns, with one source image a subject; its DINOv2 and GPT are not here.
"""

from __future__ import annotations

from dataclasses import dataclass

from vislora.errors import InputError, near


@dataclass(frozen=True)
class Protocol:
    """dino, clip: short names of `vislora.metrics.backbones`; dino_transform: full (the image squashed, bilinear) or
    crop (256 bicubic, cut 224). reduction: of `vislora.metrics.cells`. CLIP-T is clip_t_scale times the cosine, which
    counts as clip_t_floor where it is less. first_real: pairs are with a subject's first photo alone."""

    name: str
    dino: str = "s16"
    dino_transform: str = "crop"
    clip: str = "B32"
    reduction: str = "subject"
    clip_t_scale: float = 1.0
    clip_t_floor: float | None = None
    first_real: bool = False


PROTOCOLS = {
    p.name: p
    for p in (
        Protocol("oft", dino_transform="full", clip="L14", reduction="flat"),
        Protocol("dreambooth"),
        Protocol("customconcept", clip_t_scale=2.5, clip_t_floor=0.0),
        Protocol("dreambench_pp", dino="s8", clip_t_scale=100.0, first_real=True),
    )
}


def get(name: str) -> Protocol:
    """The protocol of that name; InputError for another."""
    if name not in PROTOCOLS:
        raise InputError("--protocol", f"{name!r} is unknown{near(name, PROTOCOLS)}", f"one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
