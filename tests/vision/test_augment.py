"""Batches: the library's own pipeline, chance by position, mixing, schedules."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tiny_vit import coloured, image_folder

from vislora.training.schedule import by_name
from vislora.vision import augment, data
from vislora.vision.models import Preprocess
from vislora.vision.options import ClassificationOptions


def photo() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.mark.parametrize("crop_pct", [0.9, 1.0])
def test_evaluation_is_timms_own_transform(crop_pct):
    p = Preprocess(32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bicubic", crop_pct)
    theirs = timm.data.create_transform(
        (3, 32, 32), mean=p.mean, std=p.std, interpolation="bicubic", crop_pct=crop_pct, crop_mode="center"
    )
    torch.testing.assert_close(augment.evaluation(p)(photo()), theirs(photo()), atol=1e-5, rtol=1e-5)


def test_squash_resizes_both_sides():
    p = Preprocess(32, squash=True, interpolation="bilinear")
    expected = np.asarray(photo().resize((32, 32), Image.Resampling.BILINEAR), dtype=np.float32)
    got = (augment.evaluation(p)(photo()) * 0.5 + 0.5) * 255
    assert np.abs(got.permute(1, 2, 0).numpy() - expected).max() < 1e-3


HEAVY = ClassificationOptions(crop_scale=0.3, hflip=0.5, auto_augment="randaugment", random_erasing=0.5,
                              mixup_alpha=0.2, cutmix_alpha=1.0)  # fmt: skip


def test_chance_is_a_function_of_seed_and_position(tmp_path):
    images = data.load(str(image_folder(tmp_path / "set", train=5)), "train")
    make = augment.training(Preprocess(16), HEAVY)
    stream = augment.Stream(images, make, 0)
    state = torch.random.get_rng_state()
    one = [stream[p] for p in (7, 8, 27)]
    assert torch.equal(state, torch.random.get_rng_state())
    torch.rand(3)
    two = [augment.Stream(images, make, 0)[p] for p in (7, 8, 27)]
    assert all(torch.equal(a, b) and c == d for (a, c), (b, d) in zip(one, two, strict=True))
    assert one[0][1] == one[2][1] or not torch.equal(one[0][0], one[2][0])  # 7 and 27: other epochs, other draws
    assert any(not torch.equal(stream[p][0], augment.Stream(images, make, 1)[p][0]) for p in range(5))
    places = [[0, 1, 2], [3, 4, 5]]
    alone, helped = (list(augment.batches(stream, places, w, torch.device("cpu"))) for w in (0, 2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(alone, helped, strict=True))


def test_no_augmentation_is_the_evaluation_pipeline():
    p, image = Preprocess(16), coloured(0, 0)
    assert torch.equal(augment.training(p, ClassificationOptions())(image), augment.evaluation(p)(image))
    mirrored = augment.training(p, ClassificationOptions(hflip=1.0))(image)
    torch.testing.assert_close(mirrored, augment.evaluation(p)(image).flip(-1))
    erased = augment.training(p, ClassificationOptions(random_erasing=1.0))(image)
    gone = erased != augment.evaluation(p)(image)
    assert 0 < gone.any(0).float().mean() < 0.5 and not erased[gone].any()
    for words in ({"auto_augment": "trivialaugment"}, {"auto_augment": "randaugment"}, {"crop_scale": 0.2}):
        with augment.seeded(0, "test", 1):
            changed = augment.training(p, ClassificationOptions(**words))(image)
        assert changed.shape == mirrored.shape and not torch.equal(changed, augment.evaluation(p)(image))


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing_makes_shares_of_classes(alphas):
    mix = augment.mixer(ClassificationOptions(mixup_alpha=alphas[0], cutmix_alpha=alphas[1]), 5)
    images, labels = torch.rand(6, 3, 8, 8), torch.arange(6) % 5
    mixed, shares = mix(images, labels, 3)
    again, _ = mix(images, labels, 3)
    assert torch.equal(mixed, again) and shares.shape == (6, 5) and not torch.equal(mixed, images)
    torch.testing.assert_close(shares.sum(-1), torch.ones(6))
    loss = augment.cross_entropy(torch.zeros(6, 5), shares, 0.1)
    assert loss.item() == pytest.approx(np.log(5), rel=1e-5)
    logits = torch.randn(6, 5)
    spread = 0.9 * shares + 0.1 / 5
    by_hand = -(spread * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(augment.cross_entropy(logits, shares, 0.1), by_hand)
    plain = augment.mixer(ClassificationOptions(), 5)
    assert plain(images, labels, 3)[1] is labels


def test_one_cycle_is_torchs_without_its_momentum():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    torchs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.5, total_steps=40, pct_start=0.1, cycle_momentum=False
    )
    ours = by_name("one_cycle", 40, 0.1)
    for step in range(40):
        assert 0.5 * ours(step) == pytest.approx(torchs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        if step < 39:
            torchs.step()
    assert by_name("one_cycle", 1, 0.1)(0) > 0 and max(by_name("one_cycle", 3, 0.0)(s) for s in range(3)) == 1


def test_other_schedules():
    cosine, linear, constant = (by_name(n, 20, 0.25) for n in ("cosine", "linear", "constant"))
    assert all(f(0) == 0 and f(5) == 1 for f in (cosine, linear, constant))
    assert cosine(20) == pytest.approx(0) and linear(20) == 0 and constant(20) == 1
    assert cosine(12.5) == pytest.approx(0.5) and linear(12.5) == pytest.approx(0.5)
    assert by_name("cosine", 20, 0.0)(0) == 1


def test_options_refuse_what_no_run_could_use():
    from vislora.errors import InputError

    for words in ({"hflip": 2.0}, {"crop_scale": 0.0}, {"ema_decay": 1.0}, {"learning_rate": 0.0}, {"eval_steps": 0},
                  {"final_model": "best", "train_val_split": 0.0}, {"randaugment_magnitude": 40},
                  {"optimizer_damping": 1.0}, {"randaugment_ops": 3}, {"randaugment_magnitude": 5},
                  {"no_ema_warmup": True}, {"warmup_steps": -1}, {"knn": True, "source_unlabelled": True}):  # fmt: skip
        with pytest.raises(InputError) as error:
            ClassificationOptions(**({"ema_warmup": False} if "no_ema_warmup" in words else words))
        assert "->" in str(error.value) and f"--{next(iter(words))}" in str(error.value)
