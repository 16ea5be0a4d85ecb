"""Cosines computed anew at a checkpoint, against the probe on a model that was put together by hand."""

from __future__ import annotations

import pytest
import torch
import yaml
from script_runs import photograph

import vislora
from vislora import config, probe
from vislora.adapters import get
from vislora.diffusion import conditioning, models
from vislora.diffusion.dataset import instance_set
from vislora.diffusion.options import DreamBoothOptions
from vislora.spectrum import source, table
from vislora.spectrum.gradients import computer
from vislora.training import checkpoint
from vislora.training.random import generator
from vislora.training.resume import save_state
from vislora.training.run import RunFolder


@pytest.fixture
def run(folder, tmp_path):
    """A DreamBooth run of two steps, which left a checkpoint of each."""
    photograph(tmp_path / "photos")
    options = DreamBoothOptions(
        pretrained_model_name_or_path=str(folder), instance_data_dir=str(tmp_path / "photos"), instance_prompt="a b",
        adapter="sorsa", train_batch_size=2, targets=("attn2.to_q", "attn2.to_v"),
    )  # fmt: skip
    unet = models.load(folder).unet
    adapter = vislora.attach({"unet": unet}, "sorsa", targets={"unet": options.target_words()}, rank=2)
    optimizer = torch.optim.SGD(adapter.param_groups(1e-2))
    adapter.bind(optimizer, 2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    settings = config.to_dict(options, adapter.method)
    place = RunFolder(tmp_path / "run")
    for step in (1, 2):
        for parameter in adapter.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        save_state(place.checkpoints, step, adapter, optimizer, schedule, None, {"config": settings}, None)
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(settings))
    return place


def test_cosines_at_a_checkpoint(run, folder, tmp_path):
    series, cache = source.of_run(run.path), table.Cache(tmp_path / "rows")
    rows = table.cosine_rows(series, cache, computer(run, 2), "2")
    assert {row["step"] for row in rows} == {1, 2} and len(rows) == 2 * len({row["layer"] for row in rows})

    by_hand = models.load(folder)
    adapter = vislora.attach({"unet": by_hand.unet}, get("sorsa")(rank=2),
                             targets={"unet": ("attn2.to_q", "attn2.to_v")})  # fmt: skip
    adapter.load_tensors(checkpoint.load(run.checkpoints / "checkpoint-2").tensors["adapter"])
    options = DreamBoothOptions(instance_data_dir=str(tmp_path / "photos"), instance_prompt="a b")
    photos = instance_set(options, 32)
    photos.use(by_hand, False)
    by_hand.unet.train()

    def backward():  # four samples at once are two batches of two
        batch = photos.draw(0, 4, by_hand.device)
        told = conditioning.encode(by_hand, conditioning.tokenize(by_hand, batch.prompts))
        streams = [generator(0, "noise", q) for q in range(4)]
        steps = torch.stack([torch.randint(1000, (), generator=g) for g in streams])
        noise = torch.stack([torch.randn(batch.latents[0].shape, generator=g) for g in streams])
        noisy = by_hand.scheduler.add_noise(batch.latents, noise, steps)
        (by_hand.predict(by_hand.unet, noisy, steps, told) - noise).square().mean().backward()

    expected = probe.cosines(adapter, backward)
    assert {row["layer"]: row["cosine"] for row in rows if row["step"] == 2} == pytest.approx(expected, abs=1e-4)

    again = table.cosine_rows(series, table.Cache(tmp_path / "rows"), _never, "2")
    assert again == rows  # from the cache


def _never(point):
    raise AssertionError("it is in the cache")
