"""Stage `unet`: the denoiser and the text encoder, trained together on cached latents."""

from __future__ import annotations

import json
import math
import time

import torch
import train_vae
import words
from common import WORK, grid, load_tensors, pack_optimizer, save_tensors, say, to_images, unpack_optimizer
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextConfig, CLIPTextModel

UNET = dict(
    sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(64, 128, 176),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=128, attention_head_dim=4, norm_num_groups=16,
)
SCHEDULER = dict(
    num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
    prediction_type="epsilon", clip_sample=False, set_alpha_to_one=False, steps_offset=1,
)
STEPS, BATCH, RATE, WARM, EMA, DROPOUT, GAMMA, LIFT = 12000, 32, 1e-3, 200, 0.999, 0.1, 5.0, 6.0
CHECKPOINT, WEIGHTS = WORK / "unet.safetensors", WORK / "unet_ema.safetensors"
PREVIEW = (
    "a dog on grass", "a car on snow", "a fish in the water", "a photo of a bird on sand", "a robot on a brick wall",
    "a rocket in the night sky", "a cake on a wooden floor", "a clock on a plain pink background",
    "a house at sunset", "a photo of an umbrella on a checkerboard", "a strawberry on a plain blue background",
    "a penguin on a plain yellow background", "a small car on grass", "a blue tinted cat on snow",
    "an apple and a bus on sand", "a fox wearing a crown on grass",
)


def text_config() -> CLIPTextConfig:
    """The text encoder: CLIP's, small, over the world's own vocabulary."""
    tok = words.tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tok), hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=words.LENGTH, projection_dim=128, hidden_act="quick_gelu",
        bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id,
    )


def models() -> torch.nn.ModuleDict:
    """Both trained parts, freshly initialised."""
    torch.manual_seed(1)
    unet = UNet2DConditionModel(**UNET).to(memory_format=torch.channels_last)
    # Products in bfloat16 are twice as fast on CPUs that have them in hardware, fused attention's backward is not.
    unet.set_attn_processor(AttnProcessor())
    return torch.nn.ModuleDict({"unet": unet, "text_encoder": CLIPTextModel(text_config())})


def rate(step: int, progress: float) -> float:
    """Warm-up, level until 40 % of the run, then a half cosine to 1 %."""
    decay = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, (progress - 0.4) / 0.6))))
    return min(1.0, (step + 1) / WARM) * (0.01 + 0.99 * decay)


class Data:
    """Latents and token ids of the train split; every batch is a function of its step."""

    def __init__(self):
        cached, _ = load_tensors(WORK / "latents.safetensors")
        factor = train_vae.load_vae().config.scaling_factor
        self.mean, self.std = cached["mean"] * factor, cached["std"] * factor
        self.ids = words.token_ids(json.loads((WORK / "train.json").read_text()))
        self.empty = words.token_ids([""])
        self.alphas = DDIMScheduler(**SCHEDULER).alphas_cumprod
        snr = self.alphas / (1 - self.alphas)
        self.chance = (snr.clamp(max=GAMMA) / snr).clamp(min=0.1)
        self.weight = snr.rsqrt().clamp(1.0, LIFT)

    def batch(self, step: int):
        """Noisy latents, steps, noise, token ids (10 % of them of the empty caption) and loss weights.

        Min-SNR weights are the chances with which steps are drawn, not factors of the loss: the same mean gradient
        with less noise, since no part of a batch counts for next to nothing.  The weights raise the steps of much
        noise, where an error of the noise hides a large error of the image and only the caption can tell what to
        draw: without them colours follow the starting noise for the first thousands of steps.
        """
        rng = torch.Generator().manual_seed(10_000_000 + step)
        pick = torch.randint(len(self.mean), (BATCH,), generator=rng)
        noise = torch.randn(2, BATCH, *self.mean.shape[1:], generator=rng)
        x = self.mean[pick] + self.std[pick] * noise[0]
        t = torch.multinomial(self.chance, BATCH, replacement=True, generator=rng)
        alpha = self.alphas[t].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * x + (1 - alpha).sqrt() * noise[1]
        ids = torch.where(torch.rand(BATCH, 1, generator=rng) < DROPOUT, self.empty, self.ids[pick])
        return noisy.contiguous(memory_format=torch.channels_last), t, noise[1], ids, self.weight[t]


@torch.no_grad()
def sample(nets, vae, prompts, steps=25, guidance=4.0, seed=0) -> list:
    """Images by DDIM with classifier-free guidance: what the pipeline does, without its overhead."""
    scheduler = DDIMScheduler(**SCHEDULER)
    scheduler.set_timesteps(steps)
    text = nets["text_encoder"](words.token_ids([""] * len(prompts) + list(prompts))).last_hidden_state
    x = torch.randn(len(prompts), 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    for t in scheduler.timesteps:
        double = torch.cat([x, x]).contiguous(memory_format=torch.channels_last)
        free, cond = nets["unet"](double, t, text).sample.chunk(2)
        x = scheduler.step(free + guidance * (cond - free), t, x).prev_sample
    return to_images(vae.decode(x / vae.config.scaling_factor).sample)


def load_ema() -> torch.nn.ModuleDict:
    """The averaged weights of the newest checkpoint."""
    nets = models()
    nets.load_state_dict(load_tensors(WEIGHTS)[0])
    return nets.eval()


def train(steps: int = STEPS, minutes: float = 95) -> None:
    """Train; ends, annealed, after `steps` or after `minutes` in all, whichever comes first.

    A finished run goes on when it is called again with a later end; the rate rises to what it is at that progress.
    """
    data, vae, nets = Data(), train_vae.load_vae(), models()
    weights = list(nets.parameters())
    optimizer = torch.optim.AdamW(weights, lr=RATE, betas=(0.9, 0.99), weight_decay=1e-2)
    step, spent = 0, 0.0
    if CHECKPOINT.exists():
        tensors, meta = load_tensors(CHECKPOINT)
        if meta["done"] and (meta["step"] >= steps or meta["seconds"] >= 60 * minutes - 1):
            return say(f"unet: already trained for {meta['step']} steps, {meta['seconds'] / 60:.0f} minutes")
        nets.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("net.")})
        unpack_optimizer(optimizer, tensors)
        step, spent = meta["step"], meta["seconds"]
    average = [p.detach().clone() for p in weights]
    if CHECKPOINT.exists():
        named = load_tensors(WEIGHTS)[0]
        average = [named[name].clone() for name, _ in nets.named_parameters()]
    sizes = {name: round(sum(p.numel() for p in net.parameters()) / 1e6, 2) for name, net in nets.items()}
    say(f"unet: {sizes} M parameters, step {step} of {steps}")
    start, clock, total, done = time.time() - spent, time.time(), 0.0, False
    while not done:
        progress = max(step / steps, (time.time() - start) / (60 * minutes))
        done = progress >= 1
        for group in optimizer.param_groups:
            group["lr"] = RATE * rate(step, progress)
        noisy, t, noise, ids, weight = data.batch(step)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = nets["unet"](noisy, t, nets["text_encoder"](ids).last_hidden_state).sample.float()
        loss = ((predicted - noise).square().mean((1, 2, 3)) * weight).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        step += 1
        torch._foreach_lerp_(average, [p.detach() for p in weights], 1 - min(EMA, (1 + step) / (10 + step)))
        total += loss.item()
        if step % 50 == 0:
            say(f"unet {step}: loss {total / 50:.4f} {(time.time() - clock) / 50:.2f} s/step {100 * progress:.1f} %")
            clock, total = time.time(), 0.0
        if step % 250 == 0 or done:
            state = {**nets.state_dict()}
            averaged = {**state, **dict(zip((n for n, _ in nets.named_parameters()), average, strict=True))}
            meta = {"step": step, "seconds": time.time() - start, "done": done}
            save_tensors(WEIGHTS, averaged, meta)
            save_tensors(CHECKPOINT, {**{f"net.{k}": v for k, v in state.items()}, **pack_optimizer(optimizer)}, meta)
        if step % 500 == 0 or done:
            grid(sample(load_ema(), vae, PREVIEW), 8, labels=list(PREVIEW)).save(WORK / f"unet_{step:05d}.png")
            clock = time.time()
