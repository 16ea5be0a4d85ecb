"""Stage `clip`: a small open_clip model, trained contrastively on scenes of all sprites (subjects included)."""

from __future__ import annotations

import json
import math
import shutil
import time

import scenes
import torch
import torch.nn.functional as F
import words
import world
from common import WORK, WORLD, load_tensors, pack_optimizer, save_tensors, say, unpack_optimizer
from rendered import split, to_float

TARGET = WORLD / "tiny-clip"
CHECKPOINT = WORK / "clip.safetensors"
STEPS, BATCH, RATE, CONTEXT = 3000, 64, 2e-3, 20
NORM = dict(image_size=64, mean=[0.5] * 3, std=[0.5] * 3)


def model_config() -> dict:
    """open_clip's model_cfg: a RegNet image tower for 64x64 and a two-layer text tower."""
    tok = words.tokenizer()
    return {
        "embed_dim": 128,
        "vision_cfg": {"timm_model_name": "regnetx_002", "timm_model_pretrained": False, "timm_pool": "",
                       "timm_proj": "linear", "image_size": 64},
        "text_cfg": {"context_length": CONTEXT, "vocab_size": len(tok), "width": 128, "heads": 4, "layers": 2,
                     "hf_tokenizer_name": "tiny-clip"},
    }


def write_folder(model: torch.nn.Module | None) -> None:
    """Config, tokenizer and, if there is a model, float16 weights: what open_clip's `local-dir:` loads."""
    TARGET.mkdir(parents=True, exist_ok=True)
    prep = {"size": [64, 64], "mode": "RGB", "mean": NORM["mean"], "std": NORM["std"], "interpolation": "bicubic",
            "resize_mode": "shortest"}
    config = {"model_cfg": model_config(), "preprocess_cfg": prep}
    (TARGET / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")
    words.tokenizer()
    for path in words.FOLDER.iterdir():
        shutil.copy(path, TARGET / path.name)
    if model is not None:
        half = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
        save_tensors(TARGET / "open_clip_model.safetensors", half)


def load(weights: bool = True):
    """The model and tokenizer as any user of open_clip loads them."""
    import open_clip

    name = f"local-dir:{TARGET}"
    model = open_clip.create_model(name, load_weights=weights)
    return model, open_clip.get_tokenizer(name)


def augment(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Shift, blur, noise and brightness, so that the blur of decoded samples is nothing new."""
    dy, dx = torch.randint(-4, 5, (2,), generator=rng).tolist()
    x = F.pad(x, (4, 4, 4, 4), mode="replicate")[..., 4 + dy:68 + dy, 4 + dx:68 + dx]
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = torch.rand(len(x), 1, 1, 1, generator=rng)
    x = torch.where(torch.rand(len(x), 1, 1, 1, generator=rng) < 0.5, x, share * x + (1 - share) * soft)
    gain = 1 + 0.2 * (torch.rand(len(x), 1, 1, 1, generator=rng) - 0.5)
    shift = 0.2 * (torch.rand(len(x), 1, 1, 1, generator=rng) - 0.5)
    noise = torch.rand(len(x), 1, 1, 1, generator=rng) * 0.08 * torch.randn(x.shape, generator=rng)
    return (x * gain + shift + noise).clamp(-1, 1).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def retrieval(model, tok, images: torch.Tensor, specs: list, group: int = 100) -> float:
    """Share of scenes whose own plain caption ranks first among those of a group of 100 scenes."""
    texts = [scenes.caption(spec) for spec in specs]
    right = 0
    for start in range(0, len(texts) - group + 1, group):
        own = texts[start:start + group]
        image = model.encode_image(to_float(images[start:start + group]), normalize=True)
        best = (image @ model.encode_text(tok(own), normalize=True).T).argmax(1).tolist()
        right += sum(own[j] == own[i] for i, j in enumerate(best))
    return right / (len(texts) // group * group)


@torch.no_grad()
def classifier(model, tok, kind: str) -> tuple[list[str], torch.Tensor]:
    """Zero-shot class vectors of the 48 objects or the 12 backgrounds, averaged over the other factor."""
    places = {name: phrases[0] for name, phrases in world.BACKGROUNDS.items()}
    names = list(world.OBJECTS) if kind == "object" else list(places)
    vectors = []
    for name in names:
        pairs = [(name, bg) for bg in places] if kind == "object" else [(obj, name) for obj in world.OBJECTS]
        text = model.encode_text(tok([f"{world.article(o)} {places[b]}" for o, b in pairs]), normalize=True)
        vectors.append(F.normalize(text.mean(0), dim=0))
    return names, torch.stack(vectors)


def heldout(count: int = 1000) -> tuple[torch.Tensor, list]:
    """Held-out scenes of all sprites and their specs."""
    images, _ = split("clip_heldout")
    first = world.SPLITS["clip_heldout"]["first_seed"]
    return images[:count], [scenes.spec_from_seed(first + i, "all") for i in range(count)]


def train(steps: int = STEPS, minutes: float = 25) -> None:
    """Train with a symmetric contrastive loss; ends annealed, or at once when retrieval reaches 97 %."""
    write_folder(None)
    images, captions = split("clip_train")
    held, specs = heldout(500)
    torch.manual_seed(2)
    model, tok = load(weights=False)
    model = model.to(memory_format=torch.channels_last)
    ids = words.token_ids(captions)[:, :CONTEXT]  # the longest caption has 17 tokens
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.02)
    step, spent = 0, 0.0
    if CHECKPOINT.exists():
        tensors, meta = load_tensors(CHECKPOINT)
        if meta["done"]:
            return say("clip: already trained")
        model.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("net.")})
        unpack_optimizer(optimizer, tensors)
        step, spent = meta["step"], meta["seconds"]
    say(f"clip: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, step {step} of {steps}")
    start, clock, done = time.time() - spent, time.time(), False
    while not done:
        progress = max(step / steps, (time.time() - start) / (60 * minutes))
        done = progress >= 1
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 100) * (0.01 + 0.495 * (1 + math.cos(math.pi * min(1, progress))))
        rng = torch.Generator().manual_seed(20_000_000 + step)
        pick = torch.randint(len(images), (BATCH,), generator=rng)
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            image = model.encode_image(augment(to_float(images[pick]), rng)).float()
            text = model.encode_text(ids[pick]).float()
        logits = model.logit_scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
        target = torch.arange(BATCH)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.logit_scale.data.clamp_(0, math.log(100))
        step += 1
        if step % 20 == 0:
            say(f"clip {step}: loss {loss.item():.3f} {(time.time() - clock) / 20:.2f} s/step")
            clock = time.time()
        if step % 100 == 0 or done:
            model.eval()
            score = retrieval(model, tok, held, specs)
            done = done or score >= 0.97
            say(f"clip {step}: retrieval {score:.3f} over {len(specs)} held-out scenes")
            write_folder(model)
            save_tensors(CHECKPOINT, {**{f"net.{k}": v for k, v in model.state_dict().items()},
                                      **pack_optimizer(optimizer)},
                         {"step": step, "seconds": time.time() - start, "done": done, "retrieval": score})
