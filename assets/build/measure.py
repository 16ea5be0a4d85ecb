"""Stage `measure`: the quality bars of every shipped model, written to world/measured.json."""

from __future__ import annotations

import json

import numpy as np
import scenes
import torch
import train_clip
import train_dino
import train_lpips
import train_vae
import train_vit
import world
from classify import accuracy, single_objects
from common import WORK, WORLD, grid, load_tensors, say
from rendered import to_float

PAIRS, STEPS, GUIDANCE = 100, 25, 4.0


def pairs(seed: int = 5) -> list[tuple[str, str]]:
    """100 (object, background) pairs: every object at least twice, backgrounds as evenly as that allows."""
    rng = np.random.default_rng(seed)
    objects, backs = list(world.OBJECTS), list(world.BACKGROUNDS)
    chosen: list[tuple[str, str]] = []
    while len(chosen) < PAIRS:
        for name in rng.permutation(objects):
            pair = (str(name), backs[len(chosen) % len(backs)])
            if pair not in chosen and len(chosen) < PAIRS:
                chosen.append(pair)
    return chosen


def prompts() -> list[str]:
    """One plain caption a pair."""
    return [f"{world.article(obj)} {world.BACKGROUNDS[back][0]}" for obj, back in pairs()]


def sample(texts: list[str], seed: int = 0, batch: int = 25) -> list:
    """Images of the exported pipeline, DDIM."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(WORLD / "tiny-sd", safety_checker=None, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.to(memory_format=torch.channels_last)
    images = []
    for start in range(0, len(texts), batch):
        part = texts[start:start + batch]
        rng = [torch.Generator().manual_seed(seed * 1000 + start + i) for i in range(len(part))]
        images += pipe(part, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=rng).images
    return images


@torch.no_grad()
def named(model, tok, images: list, kind: str) -> list[str]:
    """What tiny-clip calls each image, among the 48 objects or the 12 backgrounds."""
    names, vectors = train_clip.classifier(model, tok, kind)
    x = to_float(torch.from_numpy(np.stack([np.asarray(image) for image in images])))
    return [names[i] for i in (model.encode_image(x, normalize=True) @ vectors.T).argmax(1).tolist()]


def share(found: list[str], wanted: list[str]) -> float:
    """The share of right names."""
    return sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)


def classifiers() -> dict:
    """tiny-vit, tiny-dino and the LPIPS trunk as they ship, each on what it never saw."""
    import timm

    timm.layers.set_fused_attn(True)
    vit, dino = (timm.create_model(f"local-dir:{WORLD / name}", pretrained=True).eval()
                 for name in ("tiny-vit", "tiny-dino"))
    held, truth, _ = single_objects("heldout")
    names = train_dino.identities()
    triples = train_lpips.measure()
    found = accuracy(lambda x: vit(train_vit.shrunk(x)), held, truth)
    return {"vit_heldout_top1": found, "dino_identities": len(names),
            "dino_nearest_on_unseen_backgrounds": train_dino.nearest(dino, train_dino.probes(names)),
            "lpips_triples_in_order": triples.pop("all"), "lpips_by_distortion": triples}


def run() -> None:
    """Measure, print, and write the figures and a labelled grid."""
    model, tok = train_clip.load()
    model.eval()
    images, specs = train_clip.heldout()
    plain = [i for i, s in enumerate(specs) if not (s.prop or s.second or s.accessory)]
    real = [scenes.render(specs[i]) for i in plain]
    nouns, places = [world.noun(specs[i].object) for i in plain], [specs[i].background for i in plain]
    result = {
        "clip_retrieval_top1_of_100": train_clip.retrieval(model, tok, images, specs),
        "clip_real_scenes_object": share(named(model, tok, real, "object"), nouns),
        "clip_real_scenes_background": share(named(model, tok, real, "background"), places),
        "vae_heldout_l1": train_vae.heldout_l1(),
    }
    result |= classifiers()
    wanted, texts = pairs(), prompts()
    drawn = sample(texts)
    objects, backs = (named(model, tok, drawn, kind) for kind in ("object", "background"))
    result["sd_objects_named_right"] = share(objects, [obj for obj, _ in wanted])
    result["sd_backgrounds_named_right"] = share(backs, [back for _, back in wanted])
    result["sd_wrong"] = [f"{text}: seen as {o}, {b}" for text, (wo, wb), o, b
                          in zip(texts, wanted, objects, backs, strict=True) if (o, b) != (wo, wb)]
    result["sd_training_step"] = load_tensors(WORK / "unet_ema.safetensors")[1]["step"]
    marks = [("" if o == wo and b == wb else "! ") + f"{wo}/{wb}" for (wo, wb), o, b
             in zip(wanted, objects, backs, strict=True)]
    grid(drawn, 12, labels=marks).save(WORK / "measure.png")
    (WORLD / "measured.json").write_text(json.dumps(result, indent=1) + "\n")
    for key, value in result.items():
        say(f"{key}: {value}")
