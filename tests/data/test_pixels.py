"""Reading photos: the pixels that a viewer shows, from every kind of file; then crops as tensors."""

import struct

import numpy as np
import pytest
import torch
from PIL import Image

from vislora.data import images
from vislora.data.crops import cut, plan
from vislora.data.images import read, scan

RAMP = np.stack(np.broadcast_arrays(np.arange(0, 240, 5)[:, None], np.arange(0, 192, 4)[None], 77), -1).astype(np.uint8)
PHOTO = Image.fromarray(RAMP)  # 48x48, no symmetry


def pixels(path):
    image = read(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def oriented(tag):
    """The stored pixels that orientation `tag` turns into RAMP, by the definition of the EXIF standard."""
    rows_from, columns_from = {1: "TL", 2: "TR", 3: "BR", 4: "BL", 5: "LT", 6: "RT", 7: "RB", 8: "LB"}[tag]
    stored = RAMP
    if rows_from in "LR":  # the stored 0th row is the visual left or right column
        stored = stored.transpose(1, 0, 2)
        rows_from, columns_from = {"L": "T", "R": "B"}[rows_from], {"T": "L", "B": "R"}[columns_from]
    return stored[:: -1 if rows_from == "B" else 1, :: -1 if columns_from == "R" else 1].copy()


@pytest.mark.case("I09")
@pytest.mark.parametrize("fmt", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_exif_orientations(tmp_path, tag, fmt):
    exif = Image.Exif()
    exif[0x0112] = tag
    extra = {"lossless": True} if fmt == "WEBP" else {"quality": 100, "subsampling": 0} if fmt == "JPEG" else {}
    rows = oriented(tag)[:, :40] if tag < 5 else oriented(tag)
    Image.fromarray(rows.copy()).save(tmp_path / "x.png", fmt, exif=exif, **extra)
    upright = pixels(tmp_path / "x.png")
    if tag >= 5:
        assert np.abs(upright - RAMP).max() <= (4 if fmt == "JPEG" else 0)
    else:
        assert scan(tmp_path, 32)[0].size == (40, 48)
        shown = {1: RAMP[:, :40], 2: RAMP[:, 8:], 3: RAMP[:, 8:], 4: RAMP[:, :40]}[tag]
        assert np.abs(upright - shown).max() <= (4 if fmt == "JPEG" else 0)


def over_white(rgb, alpha):
    alpha = np.asarray(alpha)[..., None] / 255
    return np.rint(rgb * alpha + 255 * (1 - alpha))


@pytest.mark.case("I11", "I12", "I13")
def test_transparency_shows_white_and_hidden_colours_do_not(tmp_path):
    alpha = np.tile(np.arange(48, dtype=np.uint8) * 5, (48, 1))
    rgba = Image.fromarray(np.dstack([RAMP, alpha]))
    rgba.save(tmp_path / "rgba.png")
    assert np.abs(pixels(tmp_path / "rgba.png") - over_white(RAMP, alpha)).max() <= 1
    grey = RAMP[..., :1]
    Image.fromarray(np.dstack([grey, alpha])).save(tmp_path / "la.png")
    assert np.abs(pixels(tmp_path / "la.png") - over_white(grey.repeat(3, -1), alpha)).max() <= 1
    indexed = Image.fromarray((np.arange(2304).reshape(48, 48) % 4).astype(np.uint8)).convert("P")
    indexed.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    indexed.save(tmp_path / "p.png", transparency=bytes([0, 255, 128, 255]))
    assert pixels(tmp_path / "p.png")[0, :4].tolist() == [[255] * 3, [200, 0, 0], [127, 227, 127], [0, 0, 200]]
    indexed.save(tmp_path / "p.gif", transparency=1)
    assert pixels(tmp_path / "p.gif")[0, :2].tolist() == [[9] * 3, [255] * 3]
    Image.fromarray(RAMP).save(tmp_path / "key.png", transparency=tuple(map(int, RAMP[3, 5])))
    expected = RAMP.astype(int)
    expected[3, 5] = 255
    assert (pixels(tmp_path / "key.png") == expected).all()
    assert (
        np.asarray(Image.open(tmp_path / "rgba.png").convert("RGB"))[0, 0, 2] == 77
    )  # what a plain convert would show


@pytest.mark.case("I14", "I15")
def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    deep = (np.arange(2304, dtype=np.uint32).reshape(48, 48) * 28).astype(np.uint16)
    expected = np.rint(deep / 257.0)[..., None].repeat(3, -1)
    for name in ("x.png", "x.tif"):
        Image.fromarray(deep).save(tmp_path / name)
        assert (pixels(tmp_path / name) == expected).all()
    Image.fromarray(deep).save(tmp_path / "inverted.tif", tiffinfo={262: 0})
    assert (pixels(tmp_path / "inverted.tif") == 255 - expected).all()
    Image.fromarray(deep).save(tmp_path / "key.png", transparency=int(deep[2, 2]))
    assert pixels(tmp_path / "key.png")[2, 2].tolist() == [255] * 3
    assert (pixels(tmp_path / "key.png")[3:] == expected[3:]).all()


@pytest.mark.case("I15")
def test_twelve_bit_tiff(tmp_path):
    values = [(i * 37) % 4096 for i in range(48 * 48)]
    packed = b"".join(((a << 12) | b).to_bytes(3, "big") for a, b in zip(values[::2], values[1::2], strict=True))
    tags = [(256, 48), (257, 48), (258, 12), (259, 1), (262, 1), (273, 200), (277, 1), (278, 48), (279, len(packed))]
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags))
    head += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags) + b"\0" * 4
    (tmp_path / "x.tif").write_bytes(head.ljust(200, b"\0") + packed)
    expected = np.rint(np.array(values).reshape(48, 48) / 4095 * 255)
    assert (pixels(tmp_path / "x.tif")[..., 1] == expected).all()
    assert scan(tmp_path, 32)[0].mode == "I;16"


@pytest.mark.case("I10", "I17")
def test_one_bit_grey_palette_and_cmyk(tmp_path):
    bits = (np.indices((48, 48)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(bits).convert("1").save(tmp_path / "bit.png")
    assert (pixels(tmp_path / "bit.png") == bits[..., None]).all()
    PHOTO.convert("L").save(tmp_path / "grey.png")
    assert (pixels(tmp_path / "grey.png") == np.asarray(PHOTO.convert("L"))[..., None]).all()
    for name in ("cmyk.tif", "cmyk.jpg"):  # the JPEG is written with Adobe's inversion
        PHOTO.convert("CMYK").save(tmp_path / name, quality=100, subsampling=0)
        assert np.abs(pixels(tmp_path / name) - RAMP).max() <= 4


def matrix_profile(primaries, gamma):
    """An ICC profile of an RGB display: XYZ columns (D50) and one gamma, built by hand."""

    def fixed(value):
        return struct.pack(">i", round(value * 65536))

    curve = b"curv" + b"\0" * 4 + struct.pack(">IH", 1, round(gamma * 256)) + b"\0" * 2
    tags = {
        b"wtpt": b"XYZ " + b"\0" * 4 + fixed(0.9642) + fixed(1.0) + fixed(0.8249),
        b"desc": b"desc" + b"\0" * 4 + struct.pack(">I", 2) + b"x\0" + b"\0" * 78,
        b"cprt": b"text" + b"\0" * 4 + b"x\0\0\0",
    }
    for name, column in zip((b"r", b"g", b"b"), primaries, strict=True):
        tags[name + b"XYZ"] = b"XYZ " + b"\0" * 4 + b"".join(map(fixed, column))
        tags[name + b"TRC"] = curve
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    header = (
        struct.pack(
            ">I4sI4s4s4s12s4s", start + len(body), b"\0" * 4, 0x02400000, b"mntr", b"RGB ", b"XYZ ", b"\0" * 12, b"acsp"
        ).ljust(68, b"\0")
        + fixed(0.9642)
        + fixed(1.0)
        + fixed(0.8249)
    )
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


ADOBE_RGB = np.array([(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)])
DISPLAY_P3 = np.array([(0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)])
SRGB = np.array([(0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)])


def to_srgb(rgb, primaries, gamma):
    """The reference in float64: linear light, to XYZ, to sRGB's primaries, sRGB's curve."""
    linear = (rgb / 255) ** gamma @ primaries @ np.linalg.inv(SRGB)
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.case("I30")
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize("primaries, gamma", [(ADOBE_RGB, 563 / 256), (DISPLAY_P3, 2.2)], ids=["adobe", "p3"])
def test_a_colour_profile_is_converted_to_srgb(tmp_path, mode, primaries, gamma):
    rgb = (60 + RAMP // 3).astype(np.uint8)  # inside sRGB, away from black where 8-bit curves are coarse
    profile = matrix_profile(primaries, gamma)
    image = Image.fromarray(rgb).convert(mode)
    image.save(tmp_path / "x.png", icc_profile=profile)
    plain = np.asarray(image.convert("RGB"))
    expected = to_srgb(plain, primaries, gamma)
    assert np.abs(expected - plain).max() > 5
    assert np.abs(pixels(tmp_path / "x.png") - expected).max() < 2


@pytest.mark.case("I31")
def test_an_srgb_profile_and_a_damaged_one_change_nothing(tmp_path):
    for profile in (images._SRGB.tobytes(), b"rubbish" * 30, matrix_profile(ADOBE_RGB, 2.2)[:200]):
        PHOTO.save(tmp_path / "x.png", icc_profile=profile)
        assert (pixels(tmp_path / "x.png") == RAMP).all()


def test_a_cmyk_profile_of_another_kind_of_image_is_passed_over(tmp_path):
    PHOTO.convert("CMYK").save(tmp_path / "x.tif", icc_profile=images._SRGB.tobytes())
    assert np.abs(pixels(tmp_path / "x.tif") - RAMP).max() <= 1


def gen(seed):
    return torch.Generator().manual_seed(seed)


def crop_resize(image, resolution, center, flip, generator=None):
    """The square of `resolution` pixels."""
    return cut(image, plan(image.size[::-1], (resolution, resolution), center, flip, generator))


def test_crop_resize_without_scaling_is_the_pixels(tmp_path):
    tensor = crop_resize(PHOTO, 48, True, False)
    assert tensor.shape == (3, 48, 48) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert torch.equal(((tensor + 1) * 127.5).round(), torch.from_numpy(RAMP.copy()).permute(2, 0, 1).float())
    wide = crop_resize(Image.fromarray(RAMP[:20]), 20, True, False)
    assert torch.equal(((wide + 1) * 127.5).round(), torch.from_numpy(RAMP[:20, 14:34].copy()).permute(2, 0, 1).float())
    white, black = (crop_resize(Image.new("RGB", (9, 9), c), 9, True, False) for c in ("white", "black"))
    assert white.unique().tolist() == [1.0] and black.unique().tolist() == [-1.0]


@pytest.mark.parametrize("size", [(100, 64), (64, 100), (33, 32), (31, 250), (7, 7)])
def test_crop_resize_gives_the_square_with_the_short_side_whole(size):
    ramp = Image.linear_gradient("L").resize(size).convert("RGB")
    tensor = crop_resize(ramp, 32, False, True, gen(0))
    assert tensor.shape == (3, 32, 32) and tensor.min() >= -1 and tensor.max() <= 1
    if size[0] > size[1]:  # the gradient runs down the short side: all of it is there
        assert tensor[0, 0].max() < -0.9 and tensor[0, -1].min() > 0.9


def test_random_crops_reach_every_place_and_flips_half_of_the_time():
    image = Image.fromarray(RAMP[:40])  # 48x40: nine places
    lefts, flips = [], 0
    for seed in range(300):
        row = ((crop_resize(image, 40, False, True, gen(seed))[1, 0] + 1) * 127.5 / 4).round().int()
        mirrored = bool(row[0] > row[-1])
        flips += mirrored
        lefts.append(int(row.min()))
    counts = np.bincount(lefts, minlength=9)
    assert len(counts) == 9 and counts.min() >= 15 and 120 < flips < 180


def test_draws_are_the_generators_and_one_option_does_not_shift_another():
    image = Image.fromarray(RAMP[:40])
    assert torch.equal(crop_resize(image, 40, False, True, gen(3)), crop_resize(image, 40, False, True, gen(3)))
    for seed in range(8):
        both, crop = crop_resize(image, 40, False, True, gen(seed)), crop_resize(image, 40, False, False, gen(seed))
        assert torch.equal(both, crop) or torch.equal(both, crop.flip(-1))
        used = gen(seed)
        crop_resize(image, 40, True, False, used)
        other = gen(seed)
        crop_resize(image, 40, False, True, other)
        assert torch.equal(used.get_state(), other.get_state())
    before = torch.get_rng_state()
    crop_resize(image, 40, False, True, gen(1))
    assert torch.equal(before, torch.get_rng_state())
    for options in ((False, False), (True, True)):
        with pytest.raises(ValueError, match="needs a generator"):
            crop_resize(image, 40, *options)
