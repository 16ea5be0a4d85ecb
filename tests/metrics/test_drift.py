"""Denoising drift, against forwards by hand; every family; and seeds and processes of drawing."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny_families
import torch

import vislora
from vislora.diffusion import models
from vislora.metrics import draw
from vislora.metrics.drift import DenoisingDrift

PROMPTS = ["a cup", "two trees"]


def rough(models_, scale: float = 1.0):
    handle = vislora.attach({models_.family.denoiser: models_.denoiser}, "lora", rank=2)
    with torch.no_grad():
        for i, p in enumerate(handle.parameters()):
            p.copy_(scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return handle


def test_it_is_the_relative_square_of_the_difference(folder):
    own = models.load(folder)
    handle = rough(own)
    state, training = torch.random.get_rng_state(), own.denoiser.training
    measured = DenoisingDrift(own, handle, PROMPTS, repeats=3, steps=2, batch_size=4)
    found = measured.measure()["drift_denoising"]
    assert torch.equal(state, torch.random.get_rng_state()) and own.denoiser.training == training

    ratios = []
    for i, prompt in enumerate(p for p in PROMPTS for _ in range(3)):
        ids = own.tokenizer([prompt], padding="max_length", return_tensors="pt", truncation=True).input_ids
        text = own.text_encoder(ids)[0]
        noisy, t = measured.noised.noisy[i : i + 1], measured.noised.timesteps[i : i + 1]
        with torch.no_grad():
            adapted = own.denoiser(noisy, t, text).sample
            with handle.disabled():
                base = own.denoiser(noisy, t, text).sample
        ratios.append(((adapted - base).square().sum() / base.square().sum()).item())
    assert found == pytest.approx(sum(ratios) / 6, rel=1e-4) and found > 0
    assert [p for p, _ in measured.values()] == [p for p in PROMPTS for _ in range(3)]
    assert len(set(measured.noised.timesteps.tolist())) > 1
    again = DenoisingDrift(own, handle, PROMPTS, repeats=3, steps=2).measure()["drift_denoising"]
    assert again == pytest.approx(found, rel=1e-4)  # a function of the seed, not of the batch
    handle.weight = 0.0
    assert measured.measure()["drift_denoising"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux"])
def test_every_family_has_it(kind, tmp_path):
    own = models.load(tiny_families.build(kind, tmp_path / kind))
    small, large = (_drift(own, scale) for scale in (0.05, 0.5))
    assert 0 < small < large


def _drift(own, scale: float) -> float:
    handle = rough(own, scale)
    found = DenoisingDrift(own, handle, PROMPTS, repeats=1, steps=1).measure()["drift_denoising"]
    handle.detach()
    return found


def test_two_processes_draw_what_one_does(folder, tmp_path):
    own = models.load(folder)
    way = draw.Sampling.of(own, "dpm", 1, own.resolution)
    jobs = draw.jobs([f"word {i}" for i in range(5)], 2, 0)
    assert len({job.seed for job in jobs}) == 2
    assert [job.file for job in jobs[:3]] == ["000_0.png", "000_1.png", "001_0.png"]
    assert draw.draw(own, jobs, tmp_path / "one", way, 4) == 10
    counts = [draw.draw(own, jobs, tmp_path / "two", way, 4, (rank, 2)) for rank in range(2)]
    assert counts == [6, 4]
    for job in jobs:
        assert (tmp_path / "one" / job.file).read_bytes() == (tmp_path / "two" / job.file).read_bytes()
    assert draw.draw(own, jobs, tmp_path / "two", way, 4) == 0


def test_the_digest_is_of_the_weights(folder):
    own = models.load(folder)
    before = draw.digest(own)
    assert draw.digest(models.load(folder)) == before != draw.digest(models.load(folder, dtype=torch.bfloat16))
    handle = rough(own)
    with torch.no_grad():
        next(p for n, p in own.vae.named_parameters()).add_(1.0)
    handle.detach()
    assert draw.digest(own) != before


def test_the_sampling_is_of_the_noise_schedule_and_the_text_length(folder, tmp_path):
    def of(path, **words) -> draw.Sampling:
        own = models.load(path, **words)
        return draw.Sampling.of(own, "euler" if own.family.flow else "dpm", 2, own.resolution)

    plain = of(folder)
    assert plain == of(folder)
    by_words = [of(folder, noise={"prediction_type": "v_prediction"}),
                of(folder, noise={"prediction_type": "v_prediction", "rescale_betas_zero_snr": True})]  # fmt: skip
    place = shutil.copytree(folder, tmp_path / "other")
    file = place / "scheduler" / "scheduler_config.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps({**told, "_diffusers_version": "0.1.0"}))
    assert of(place) == plain  # the library's version alone draws no other image
    file.write_text(json.dumps({**told, "beta_end": 0.02}))
    assert len({plain.schedule, of(place).schedule, *(s.schedule for s in by_words)}) == 4

    t5 = tiny_families.build("sd3", tmp_path / "sd3")
    assert of(t5, sequence=8) != of(t5, sequence=16)
