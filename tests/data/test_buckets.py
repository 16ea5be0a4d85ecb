"""Aspect-ratio buckets, cuts of any shape, masks and concepts."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from vislora.data.buckets import bucket_sizes, bucketed_indices, epoch_length, nearest
from vislora.data.concepts import Concept, read_concepts
from vislora.data.crops import cut, plan
from vislora.data.images import scan
from vislora.data.masks import find_masks
from vislora.errors import InputError


@pytest.mark.parametrize("resolution, step", [(512, 64), (1024, 64), (32, 8)])
def test_buckets_are_multiples_of_about_equal_area(resolution, step):
    sizes = bucket_sizes(resolution, step)
    assert (resolution, resolution) in sizes and len(set(sizes)) == len(sizes) > 2
    for height, width in sizes:
        assert height % step == 0 == width % step and height * width <= resolution**2
        assert (height + step) * width > resolution**2 or (width + step) * height > resolution**2
        assert (width, height) in sizes and resolution / 2 <= min(height, width)
    with pytest.raises(InputError, match="--bucket_reso_steps: 48 does not divide --resolution 512"):
        bucket_sizes(512, 48)


def test_a_photo_goes_to_the_nearest_shape():
    sizes = bucket_sizes(512, 64)
    assert sizes[nearest((600, 600), sizes)] == (512, 512)
    height, width = sizes[nearest((1500, 1000), sizes)]
    best = min(abs(math.log(h / w) - math.log(1.5)) for h, w in sizes)
    assert height > width and abs(math.log(height / width) - math.log(1.5)) == best


def test_batches_are_of_one_bucket_and_every_photo_is_seen():
    groups = [0, 0, 0, 1, 1, 2, 0]
    count, length = 2, epoch_length(groups, 2)
    assert length == 2 * (2 + 1 + 1)
    for epoch in range(3):
        seen = []
        for position in range(epoch * length, (epoch + 1) * length, count):
            batch = bucketed_indices(5, position, count, groups, "order")
            assert len({groups[i] for i in batch}) == 1
            assert batch == bucketed_indices(5, position, count, groups, "order")
            seen += batch
        assert set(seen) == set(range(7))
    first, second = ([bucketed_indices(5, p, 2, groups, "order") for p in range(e * length, e * length + length, 2)]
                     for e in (0, 1))  # fmt: skip
    assert first != second


def test_a_cut_of_any_shape_keeps_what_it_says(tmp_path):
    ramp = np.zeros((60, 100, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(100)[None] * 2, np.arange(60)[:, None] * 4
    image = Image.fromarray(ramp)
    for seed in range(8):
        chosen = plan((60, 100), (60, 40), False, True, torch.Generator().manual_seed(seed))
        tensor = (cut(image, chosen) + 1) * 127.5
        assert tensor.shape == (3, 60, 40) and chosen.scaled == (60, 100)
        columns = (tensor[0, 0] / 2).round().int().tolist()
        expected = list(range(chosen.left, chosen.left + 40))
        assert columns == (expected[::-1] if chosen.mirror else expected)
        mirrored = np.asarray(image)[:, ::-1] if chosen.mirror else np.asarray(image)
        top, left = chosen.corner()  # of the photo as the image shows it
        assert (mirrored[top : top + 60, left : left + 40] == tensor.permute(1, 2, 0).round().numpy()).all()
    assert plan((60, 100), (120, 40), True, False).scaled == (120, 200)


def photo(path, alpha=None, size=(48, 40)):
    noise = np.random.default_rng(len(path.name)).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    if alpha is not None:
        image.putalpha(alpha)
    image.save(path)


def test_masks_beside_the_photo_in_a_folder_or_its_transparency(tmp_path):
    photos, masks = tmp_path / "photos", tmp_path / "masks"
    photos.mkdir(), masks.mkdir()
    half = Image.new("L", (48, 40), 0)
    half.paste(255, (0, 0, 24, 40))
    photo(photos / "a.png")
    photo(photos / "b.png", alpha=half)
    half.save(photos / "a-masklabel.png")
    found = scan(photos, 32)
    assert [p.path.name for p in found] == ["a.png", "b.png"]  # a mask is no photo
    for mask in find_masks(found, None):
        assert (np.asarray(mask.read()) == np.asarray(half)).all()
    for name in ("a", "b"):
        Image.new("L", (48, 40), 7).save(masks / f"{name}.png")
    assert {np.asarray(mask.read()).max() for mask in find_masks(found, str(masks))} == {7}
    (masks / "b.png").unlink()
    with pytest.raises(InputError, match="--masked_loss: 1 of 2 photos have no mask: b.png"):
        find_masks(found, str(masks))
    Image.new("L", (40, 48)).save(photos / "a-masklabel.png")
    with pytest.raises(InputError, match="a-masklabel.png: is .40, 48., its photo .48, 40."):
        find_masks(found, None)


def test_concepts(tmp_path):
    file = tmp_path / "concepts.json"
    file.write_text(json.dumps([{"instance_data_dir": "dog", "instance_prompt": "a sks dog", "class_prompt": "a dog"},
                                {"instance_data_dir": "cat"}]))  # fmt: skip
    assert read_concepts(str(file)) == [Concept("dog", "a sks dog", "a dog"), Concept("cat")]
    for text, words in (
        ("[", "is not JSON"), ("[]", "is not a list of concepts"), ('{"a": 1}', "is not a list of concepts"),
        ('[{"instance_prompt": "a"}]', "concept 1: names no instance_data_dir"),
        ('[{"instance_data_dir": "a", "class_promt": "a"}]', "class_promt.*did you mean class_prompt"),
        ('[{"instance_data_dir": "a", "class_prompt": 3}]', "class_prompt is a int"),
    ):  # fmt: skip
        file.write_text(text)
        with pytest.raises(InputError, match=words):
            read_concepts(str(file))
    with pytest.raises(InputError, match="gone.json: cannot be read"):
        read_concepts(str(tmp_path / "gone.json"))
