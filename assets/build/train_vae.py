"""Stages `vae`, `latents` and `decoder`: the autoencoder (4x down, 4 channels), the cached latents of the train
split, and more training of the decoder alone, which leaves the latents (and so the UNet's work) as they are."""

from __future__ import annotations

import math
import time

import torch
import torch.nn.functional as F
from common import WORK, grid, load_tensors, pack_optimizer, save_tensors, say, to_images, unpack_optimizer
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from rendered import object_masks, split, to_float

CONFIG = dict(
    in_channels=3, out_channels=3, latent_channels=4, sample_size=64, block_out_channels=(32, 64, 64),
    layers_per_block=1, norm_num_groups=8, mid_block_add_attention=False, act_fn="silu",
    down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
)
STEPS, BATCH, RATE, KL, OBJECT = 10000, 16, 1e-3, 1e-6, 3.0
CHECKPOINT, FINAL = WORK / "vae.safetensors", WORK / "vae_final.safetensors"
DECODER = WORK / "vae_decoder.safetensors"


def rate(step: int, progress: float) -> float:
    """Linear warm-up, then a half cosine over the progress of the run, to nearly nothing."""
    return min(1.0, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def load_vae() -> AutoencoderKL:
    """The autoencoder of the last stage done; after `latents`, normalised and with its measured scaling factor."""
    tensors, meta = load_tensors(next(path for path in (DECODER, FINAL, CHECKPOINT) if path.exists()))
    vae = AutoencoderKL(**CONFIG, scaling_factor=meta.get("scaling_factor", 1.0))
    vae.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("opt.")})
    return vae.to(memory_format=torch.channels_last).eval()


def heldout_l1() -> float:
    """The held-out L1 (of values in [-1, 1]) that the last stage measured."""
    return load_tensors(DECODER if DECODER.exists() else FINAL)[1]["heldout_l1"]


def colour_loss(x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """How badly the mean colour of each 4x4 patch follows linearly from its latent (least squares over the batch).

    Without it the first thousand steps draw shapes and leave the colours of small objects to chance.
    """
    wanted = F.avg_pool2d(x, 4).permute(0, 2, 3, 1).reshape(-1, 3)
    known = F.pad(mean.permute(0, 2, 3, 1).reshape(-1, mean.shape[1]), (0, 1), value=1.0)
    with torch.no_grad():
        gram = known.T @ known + 1e-3 * torch.eye(known.shape[1])
        solution = torch.linalg.solve(gram, known.T @ wanted)
    return F.mse_loss(known @ solution, wanted)


def losses(x: torch.Tensor, mask: torch.Tensor, y: torch.Tensor, posterior) -> tuple[torch.Tensor, torch.Tensor]:
    """L1 + L1 of image gradients + squares, objects weighing OBJECT times as much, + patch colours + a tiny KL.

    Also the plain L1 for the log. Objects fill a fifth of a scene: unweighted, textures get what the latents can hold.
    """
    weight = torch.where(mask[:, None], OBJECT, 1.0)
    weight = weight / weight.mean()
    off = y - x
    dx = (off[..., 1:] - off[..., :-1]).abs() * weight[..., 1:]
    dy = (off[..., 1:, :] - off[..., :-1, :]).abs() * weight[..., 1:, :]
    total = ((off.abs() + off.square()) * weight).mean() + 0.5 * (dx.mean() + dy.mean())
    return total + colour_loss(x, posterior.mean) + KL * posterior.kl().mean(), off.abs().mean()


def preview(vae: AutoencoderKL, name: str) -> float:
    """Held-out L1, and a grid of scenes over their reconstructions."""
    images, _ = split("heldout")
    x = to_float(images[:64])
    with torch.no_grad():
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample
    rows = []
    for start in (0, 12, 24):
        rows += to_images(x[start:start + 12]) + to_images(y[start:start + 12])
    grid(rows, 12).save(WORK / name)
    return F.l1_loss(y, x).item()


def train(steps: int = STEPS, minutes: float = 90) -> None:
    """Train the autoencoder on train scenes; ends, annealed, after `steps` or `minutes`, whichever is first."""
    images, masks = split("train")[0], object_masks("train")
    split("heldout")
    torch.manual_seed(0)
    vae = AutoencoderKL(**CONFIG).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=1e-3)
    step, spent = 0, 0.0
    if CHECKPOINT.exists():
        tensors, meta = load_tensors(CHECKPOINT)
        vae.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("opt.")})
        if meta["done"]:
            return say("vae: already trained")
        unpack_optimizer(optimizer, tensors)
        step, spent = meta["step"], meta["seconds"]
    say(f"vae: {sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters, step {step} of {steps}")
    start, clock = time.time() - spent, time.time()
    done = False
    while not done:
        progress = max(step / steps, (time.time() - start) / (60 * minutes))
        done = progress >= 1
        for group in optimizer.param_groups:
            group["lr"] = RATE * rate(step, progress)
        generator = torch.Generator().manual_seed(step)
        pick = torch.randint(len(images), (BATCH,), generator=generator)
        x = to_float(images[pick])
        with torch.autocast("cpu", torch.bfloat16):
            moments = vae.encode(x).latent_dist.parameters.float()
            posterior = DiagonalGaussianDistribution(moments)
            y = vae.decode(posterior.sample(generator)).sample.float()
        loss, l1 = losses(x, masks[pick], y, posterior)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            say(f"vae {step}: loss {loss.item():.4f} l1 {l1.item():.4f} {(time.time() - clock) / 50:.2f} s/step")
            clock = time.time()
        if step % 250 == 0 or done:
            held = preview(vae, "vae.png")
            say(f"vae {step}: held-out l1 {held:.4f}")
            save_tensors(CHECKPOINT, {**vae.state_dict(), **({} if done else pack_optimizer(optimizer))},
                         {"step": step, "seconds": time.time() - start, "done": done, "heldout_l1": held})


def normalise(vae: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give every latent channel zero mean and one common spread, folded into the two 1x1 convolutions.

    The autoencoder's output is unchanged; the latents become easier to model.  Returns the shift and the scale.
    """
    total = (mean.var((0, 2, 3)) + (std ** 2).mean((0, 2, 3))).sqrt()
    shift, scale = mean.mean((0, 2, 3)), total.log().mean().exp() / total
    enc, dec = vae.quant_conv, vae.post_quant_conv
    enc.weight[:4] *= scale.view(4, 1, 1, 1)
    enc.bias[:4] = (enc.bias[:4] - shift) * scale
    enc.bias[4:] += 2 * scale.log()
    dec.bias += dec.weight[:, :, 0, 0] @ shift
    dec.weight /= scale.view(1, 4, 1, 1)
    return shift, scale


@torch.no_grad()
def encoded(vae: AutoencoderKL) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and spreads (N, 4, 16, 16) of the posteriors of the train split."""
    images, _ = split("train")
    parts = [vae.encode(to_float(images[at:at + 100])).latent_dist for at in range(0, len(images), 100)]
    return torch.cat([p.mean for p in parts]).contiguous(), torch.cat([p.std for p in parts]).contiguous()


@torch.no_grad()
def cache_latents() -> None:
    """Cache the latents of the train split, normalised channel by channel, and measure the scaling factor."""
    if (WORK / "latents.safetensors").exists():
        return say("latents: already cached")
    vae = load_vae()
    mean, std = encoded(vae)
    probe = to_float(split("train")[0][:8])
    before = vae.decode(vae.encode(probe).latent_dist.mode()).sample
    shift, scale = (v.view(1, 4, 1, 1) for v in normalise(vae, mean, std))
    change = (vae.decode(vae.encode(probe).latent_dist.mode()).sample - before).abs().max().item()
    mean, std = (mean - shift) * scale, std * scale
    factor = 1 / (mean.var() + (std ** 2).mean()).sqrt().item()
    save_tensors(FINAL, vae.state_dict(), {**load_tensors(CHECKPOINT)[1], "scaling_factor": factor})
    save_tensors(WORK / "latents.safetensors", {"mean": mean, "std": std})
    say(f"latents: {tuple(mean.shape)}, scaling_factor {factor:.4f}, change by folding {change:.1e}, "
        f"channel std {[round(v, 3) for v in (mean * factor).std((0, 2, 3)).tolist()]}, "
        f"mean posterior std x factor {std.mean().item() * factor:.4f}")


def refine_decoder(steps: int = 2500, minutes: float = 20) -> None:
    """Train the decoder alone on fixed latents; ends, annealed, after `steps` or `minutes`."""
    images, masks = split("train")[0], object_masks("train")
    vae = load_vae()
    meta = load_tensors(DECODER if DECODER.exists() else FINAL)[1]
    if meta.get("decoder_done"):
        return say("decoder: already trained")
    weights = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=RATE, betas=(0.9, 0.99), weight_decay=1e-3)
    step, spent = meta.get("decoder_step", 0), meta.get("decoder_seconds", 0.0)
    if step:
        unpack_optimizer(optimizer, load_tensors(DECODER)[0])
    start, clock, done = time.time() - spent, time.time(), False
    while not done:
        progress = max(step / steps, (time.time() - start) / (60 * minutes))
        done = progress >= 1
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * RATE * rate(step, progress)
        generator = torch.Generator().manual_seed(30_000_000 + step)
        pick = torch.randint(len(images), (BATCH,), generator=generator)
        x = to_float(images[pick])
        with torch.no_grad():
            posterior = vae.encode(x).latent_dist
        with torch.autocast("cpu", torch.bfloat16):
            y = vae.decode(posterior.sample(generator)).sample.float()
        loss, l1 = losses(x, masks[pick], y, posterior)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            say(f"decoder {step}: loss {loss.item():.4f} l1 {l1.item():.4f} {(time.time() - clock) / 50:.2f} s/step")
            clock = time.time()
        if step % 250 == 0 or done:
            held = preview(vae, "vae.png")
            say(f"decoder {step}: held-out l1 {held:.4f}")
            meta.update(heldout_l1=held, decoder_step=step, decoder_seconds=time.time() - start, decoder_done=done)
            save_tensors(DECODER, {**vae.state_dict(), **({} if done else pack_optimizer(optimizer))}, meta)
