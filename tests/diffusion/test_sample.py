"""Rendering by (prompt, seed), and the grids."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_sd import tiny_sd

from vislora.diffusion.models import load
from vislora.diffusion.sample import comparison_grid, evaluating, labelled_grid, render
from vislora.errors import InputError

PROMPTS, SEEDS = ["a dog", "a cat", "a bus on sand"], [5, 6, 7]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return load(tiny_sd(tmp_path_factory.mktemp("tiny-sd")))


@pytest.fixture(scope="module")
def images(models):
    return render(models.pipeline(), PROMPTS, SEEDS, steps=3, batch_size=3)


def difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_an_image_is_the_same_in_any_batch(models, images, batch_size):
    order = [2, 0, 1]
    again = render(
        models.pipeline(), [PROMPTS[i] for i in order], [SEEDS[i] for i in order], steps=3, batch_size=batch_size
    )
    for i, image in zip(order, again, strict=True):
        assert difference(image, images[i]) <= 1  # rounding may differ between batch sizes
    assert images[0].size == (32, 32)


def test_prompt_and_seed_both_matter(models, images):
    other_seed, other_prompt = render(models.pipeline(), ["a dog", "a red apple"], [50, 5], steps=3)
    assert difference(other_seed, images[0]) > 5
    assert difference(other_prompt, images[0]) > 0


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_render_draws_what_the_stock_pipeline_draws(models, sampler):
    ours = render(models.pipeline(sampler), ["a dog"], [5], steps=3, guidance=5.0, height=16, width=32)[0]
    stock = models.pipeline(sampler)(
        "a dog",
        generator=torch.Generator().manual_seed(5),
        num_inference_steps=3,
        guidance_scale=5.0,
        height=16,
        width=32,
    )
    assert difference(ours, stock.images[0]) <= 1 and ours.size == (32, 16)


def test_random_state_and_training_flags_are_left_as_they_were(models):
    models.unet.train()
    models.unet.mid_block.eval()
    flags = [part.training for part in models.unet.modules()]
    states = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    seen = []
    hook = models.unet.register_forward_pre_hook(
        lambda unet, _: seen.append(any(part.training for part in unet.modules()) or torch.is_grad_enabled())
    )
    try:
        render(models.pipeline(), ["a dog"], [1], steps=2)
        assert seen == [False, False]
        assert [part.training for part in models.unet.modules()] == flags
        assert torch.equal(torch.random.get_rng_state(), states[0])
        assert random.getstate() == states[1]
        assert (np.random.get_state()[1] == states[2]).all()
        with pytest.raises(RuntimeError, match="stop"), evaluating(models.unet):
            assert not models.unet.training
            raise RuntimeError("stop")
        assert [part.training for part in models.unet.modules()] == flags
    finally:
        hook.remove()
        models.unet.eval()


def test_half_precision_with_the_vae_in_float32(tmp_path, images):
    half = load(tiny_sd(tmp_path), dtype=torch.float16)
    image = render(half.pipeline(), PROMPTS[:1], SEEDS[:1], steps=3)[0]
    assert difference(image, images[0]) < 16


def test_latents_that_overflow_are_not_passed_over_in_silence(models):
    bias = models.unet.conv_out.bias
    kept = bias.detach().clone()
    try:
        bias.data.fill_(float("nan"))
        with pytest.warns(Warning) as caught:
            render(models.pipeline(), ["a dog"], [1], steps=2)
        assert any("latents are not finite" in str(entry.message) for entry in caught)
    finally:
        bias.data.copy_(kept)


def test_render_refuses_unequal_lists(models):
    with pytest.raises(InputError, match="2 prompts and 1 seeds"):
        render(models.pipeline(), ["a", "b"], [1])
    with pytest.raises(InputError, match="steps=0"):
        render(models.pipeline(), ["a"], [1], steps=0)


def test_small_images_are_enlarged_by_a_whole_factor():
    image = noise(48, 48)
    sheet = np.asarray(labelled_grid([[image]]))
    assert sheet.shape == (144 + 16, 144 + 16, 3)
    assert (sheet[8:-8:3, 8:-8:3] == np.asarray(image)).all()
    assert (sheet[8:-8, 8:-8] == np.asarray(image).repeat(3, 0).repeat(3, 1)).all()


def test_large_images_are_shrunk_and_left_unchanged():
    image = noise(1500, 1000)
    assert labelled_grid([[image]]).size == (512 + 16, 512 + 16)
    assert image.size == (1500, 1000)


def test_labels_take_room_and_long_ones_are_wrapped():
    rows = [[noise(64, 64, 0), noise(64, 64, 1)], [noise(64, 64, 2)]]
    bare = labelled_grid(rows)
    short = labelled_grid(rows, ["one", "two"], ["a", "b"], "title")
    long = labelled_grid(rows, ["one " * 60, "x" * 300], ["word " * 12, "b"], "title " * 40)
    assert bare.width < short.width == long.width
    assert bare.height < short.height < long.height
    margin = np.asarray(short)[:, 8:168]
    assert (margin < 128).any()  # ink
    assert (np.asarray(long)[:, :4] == 255).all() and (np.asarray(long)[:, -4:] == 255).all()
    accents = labelled_grid(rows, ["e\u0301t\u00e9", "b"])
    assert accents.tobytes() == labelled_grid(rows, ["ete", "b"]).tobytes()  # the font has no accented letters


def test_grids_refuse_what_does_not_fit():
    with pytest.raises(InputError, match="no images"):
        labelled_grid([[]])
    with pytest.raises(InputError, match="1 labels for 2 columns"):
        labelled_grid([[noise(8, 8)] * 2], column_labels=["one"])
    with pytest.raises(InputError, match="stage 'after' has \\[1\\] images for 2 prompts"):
        comparison_grid([], ["a", "b"], {"before": [[noise(8, 8)]] * 2, "after": [[noise(8, 8)]]})
    with pytest.raises(InputError, match="0 stages"):
        comparison_grid([], ["a"], {})


def test_comparison_shows_photos_first_and_every_stage_in_order():
    colours = {"before": (200, 0, 0), "after": (0, 0, 200)}
    stages = {name: [[Image.new("RGB", (64, 64), colour)]] * 2 for name, colour in colours.items()}
    photos = [Image.new("RGB", (3000, 2000), (0, 160, 0))] * 7
    sheet = np.asarray(comparison_grid(photos, ["a dog", "a cat"], stages, "run"))

    def boxes(colour):
        return np.argwhere((sheet == colour).all(-1))

    green, red, blue = boxes((0, 160, 0)), boxes((200, 0, 0)), boxes((0, 0, 200))
    assert len(red) == len(blue) == 2 * 128 * 128
    assert len(green) == 5 * 128 * 85  # five photos of seven, 3 : 2 in a cell of 128
    assert green[:, 0].max() < red[:, 0].min()
    assert red[:, 1].max() < blue[:, 1].min()
