"""Photos: every file is opened, decoded and judged before a model loads, and read the same way ever after.

What a reader of pixels would get wrong in silence is put right here (EXIF orientation, transparency, 16-bit depth,
CMYK, colour profiles) or refused by name (float values, truncated files, formats outside `FORMATS`).
"""

from __future__ import annotations

import io
import logging
import struct
import warnings
import zlib
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from vislora.errors import DataChanged, InputError, printable

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # Pillow's other decoders (EPS, PSD, …) are never reached
EXTENSIONS = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
UNSUPPORTED = {".heic", ".heif", ".avif", ".eps", ".ps", ".pdf", ".svg", ".psd", ".jxl", ".jp2", ".ico", ".tga", ".ppm",
               ".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".exr", ".hdr"}
ARCHIVES = {".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"}  # which nothing here unpacks
SIDECARS = {".txt", ".json", ".jsonl"}
MASK = "-masklabel"  # ends the stem of a mask beside its photo, as OneTrainer has it
MAX_PIXELS = 89_478_485  # 256 MiB of RGB; Pillow's own threshold
MAX_ASPECT = 8
BACKGROUND = (255, 255, 255)  # shows through transparent pixels
_CONVERT = "convert it to PNG or JPEG, or remove it"
_UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_90}  # EXIF orientation -> what turns the photo upright
_NO_WHITE = {"F": "float values", "I": "signed or 32-bit values", "LAB": "CIELAB values"}
_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
# What Pillow's decoders raise for damaged files: one damaged byte can surface as any of these.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError, struct.error, zlib.error)
BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)
log = logging.getLogger("vislora")


@dataclass(frozen=True)
class Photo:
    """A file that `scan` accepted. `size` is (width, height) in pixels, upright; `mode` and `format` are Pillow's."""

    path: Path
    sha256: str
    size: tuple[int, int]
    mode: str
    format: str


def scan(folder: str | Path, resolution: int) -> list[Photo]:
    """Every photo of `folder` (not of its sub-folders), sorted by name, each decoded once.

    Hidden files, Thumbs.db, folders, text sidecars and masks are passed over. InputError, with the file's name, for a
    file that cannot be used: unreadable, damaged, of another format, leading out of the folder, above MAX_PIXELS,
    longer than 1:8, or with a side below resolution / 4 pixels. One warning each for animations, sides below
    `resolution`, damaged EXIF or ICC blocks, equal files and files of unknown kind.
    """
    folder = Path(folder)
    if not folder.exists():
        raise InputError(str(folder), "no such folder", "name a folder of photos")
    if not folder.is_dir():
        kind = "an archive, which is not unpacked" if folder.suffix.lower() in ARCHIVES else "not a folder"
        raise InputError(str(folder), f"is {kind}", "name the folder that holds the photos")
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise InputError(str(folder), f"cannot be listed ({error.strerror})", "check its permissions") from error
    photos, others, first_of = [], [], {}
    for name in names:
        path = folder / name
        kind = path.suffix.lower()
        if name.startswith(".") or name.lower() in ("thumbs.db", "desktop.ini") or path.is_dir() or kind in SIDECARS:
            continue
        if path.stem.endswith(MASK):
            continue
        if not is_image(path):
            others.append(name)
            continue
        photo = _examine(path, folder, resolution)
        photos.append(photo)
        original = first_of.setdefault(photo.sha256, name)
        if original != name:
            _warn(path, f"is the same file as {original}; it counts twice")
    if others:
        _warn(folder, f"{len(others)} files that are no photos passed over: {', '.join(others[:5])}")
    if not photos:
        wrong = f"holds no photo among its {len(names)} files" if names else "is empty"
        raise InputError(str(folder), wrong, f"put {', '.join(FORMATS)} files there")
    log.info("%s: %d photos, %d other entries", printable(str(folder)), len(photos), len(names) - len(photos))
    return photos


def is_image(path: Path) -> bool:
    """Whether its name's ending is of an image. InputError for images of kinds that are not read, and for archives."""
    kind = path.suffix.lower()
    if kind in UNSUPPORTED:
        raise InputError(str(path), f"is a {kind} file", _CONVERT)
    if kind in ARCHIVES:
        raise InputError(str(path), "is an archive, which is not unpacked", "unpack it yourself and remove it")
    return kind in EXTENSIONS


def _examine(path: Path, folder: Path, resolution: int) -> Photo:
    """One file as a Photo, with its warnings; InputError when it cannot be used."""
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError
        raise InputError(str(path), "is a broken or circular link", "replace it by the file itself") from error
    if not target.is_relative_to(folder.resolve()):
        raise InputError(str(path), f"is a link out of the folder, to {target}", "copy the file into the folder")
    if not target.is_file():
        raise InputError(str(path), "is not a regular file", "remove it")
    data = _bytes(path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        image = _decode(data, path)
        exif_fault = _exif_is_damaged(image) or any("EXIF" in str(w.message) for w in said)
        size = _upright(image).size
    if exif_fault:
        _warn(path, "its EXIF block is damaged; the photo is taken as it stands")
    if _profile(image) == "damaged":
        _warn(path, "its colour profile is damaged; its colours are taken as sRGB")
    if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a phone's photo with a preview behind it
        _warn(path, "holds several frames; the first is used")
    short, long = sorted(size)
    shape = f"is {size[0]}x{size[1]} pixels"
    if long > MAX_ASPECT * short:
        raise InputError(str(path), f"{shape}, longer than 1:{MAX_ASPECT}", "crop it")
    if 4 * short < resolution:
        raise InputError(str(path), f"{shape}, less than a quarter of --resolution {resolution}", "use a larger photo")
    if short < resolution:
        _warn(path, f"{shape}, below --resolution {resolution}; it is enlarged")
    return Photo(path, sha256(data).hexdigest(), size, image.mode, image.format)


def verify(photo: Photo) -> None:
    """DataChanged unless the file still holds the bytes that `scan` saw."""
    try:
        digest = sha256(photo.path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataChanged(str(photo.path), f"is gone since the run began ({error.strerror})", "put it back") from error
    if digest != photo.sha256:
        raise DataChanged(str(photo.path), "has changed since the run began", "put the old file back, or start anew")


def read(path: str | Path) -> Image.Image:
    """The photo as upright 8-bit sRGB on white.

    EXIF orientation is applied; transparent pixels show BACKGROUND; 12- and 16-bit grey is scaled to 8 bits; an
    embedded colour profile is converted to sRGB (a damaged one is passed over). InputError when it cannot be read.
    """
    return decode(_bytes(Path(path)), path)


def decode(data: bytes, name: str | Path) -> Image.Image:
    """The same of a file's bytes; `name` stands for it in errors."""
    with warnings.catch_warnings():  # `scan` has told of a damaged EXIF block, by the file's name
        warnings.simplefilter("ignore")
        image = _decode(data, name)
        upright = _upright(image)
    try:
        return _to_srgb(upright, _profile(image))
    except DAMAGED as error:
        raise InputError(str(name), f"cannot be read as RGB ({error})", _CONVERT) from error


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(str(path), f"cannot be read ({error.strerror})", "check its permissions") from error
    if not data:
        raise InputError(str(path), "is empty (0 bytes)", "replace or remove it")
    return data


def _decode(data: bytes, path: str | Path) -> Image.Image:
    """The first frame, decoded, 8 bits deep. InputError for what is damaged, too large or has no fixed range."""
    too_large = f"more than the limit of {MAX_PIXELS} pixels"
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise InputError(str(path), f"is {image.width}x{image.height}, {too_large}", "scale it down")
        image.load()
    except InputError:
        raise
    except BOMB as error:
        raise InputError(str(path), f"has {too_large}", "scale it down") from error
    except Image.UnidentifiedImageError as error:
        raise InputError(str(path), f"is not a {', '.join(FORMATS)} image", _CONVERT) from error
    except DAMAGED as error:
        raise InputError(str(path), f"cannot be decoded ({error})", "replace or remove it") from error
    if image.mode in _NO_WHITE:
        raise InputError(str(path), f"holds {_NO_WHITE[image.mode]}, whose white is not known", "convert it to 8 bits")
    return image


def _exif_is_damaged(image: Image.Image) -> bool:
    """True when there is an EXIF block that is no TIFF structure. Pillow drops such a block without a word."""
    block = (image.info.get("exif") or b"").removeprefix(b"Exif\0\0")
    return bool(block) and block[:4] not in (b"II*\0", b"MM\0*")


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says (Pillow has turned a TIFF already and dropped the tag)."""
    try:
        turn = _UPRIGHT.get(image.getexif().get(0x0112))
    except DAMAGED:
        return image
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.info = image.info  # transparency and profile
    return turned


def _profile(image: Image.Image) -> ImageCms.ImageCmsProfile | str | None:
    """The embedded colour profile, "damaged" (also when it is of other colours than the image), or None."""
    block = image.info.get("icc_profile")
    if not block:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(block))
        ImageCms.profileToProfile(Image.new(_colours(image), (1, 1)), profile, _SRGB, outputMode="RGB")
    except (OSError, ImageCms.PyCMSError):
        return "damaged"
    return profile


def _colours(image: Image.Image) -> str:
    """The mode that the pixels' colours have without alpha and palette: what a profile of the file describes."""
    if image.mode in ("L", "LA", "La", "1") or image.mode.startswith("I;16"):
        return "L"
    return "CMYK" if image.mode == "CMYK" else "RGB"


def _to_srgb(image: Image.Image, profile: ImageCms.ImageCmsProfile | str | None) -> Image.Image:
    alpha = None
    if image.mode.startswith("I;16"):
        image, alpha = _to_8_bits(image)
    elif image.has_transparency_data:
        image = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode))
        grey, image = _colours(image) == "L", image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("RGB").convert("L" if grey else "RGB")
    colours = image.convert(_colours(image))
    if isinstance(profile, ImageCms.ImageCmsProfile):
        colours = ImageCms.profileToProfile(colours, profile, _SRGB, outputMode="RGB")
    colours = colours.convert("RGB")
    if alpha is None:
        return colours
    return Image.composite(colours, Image.new("RGB", colours.size, BACKGROUND), alpha)


def _to_8_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Grey of 12 or 16 bits as "L", scaled by its full range and rounded, and its alpha (None: opaque)."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(258, (16,))[0]  # TIFF's BitsPerSample; every other 16-bit grey file is full range
    values = np.asarray(image).astype(np.float32)
    key = image.info.get("transparency")  # PNG: the one grey value that is transparent
    alpha = None if key is None else Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
    grey = np.minimum(np.rint(values * (255 / (2**bits - 1))), 255).astype(np.uint8)
    if tags.get(262) == 0:  # TIFF's WhiteIsZero, which Pillow leaves as it is at this depth
        grey = 255 - grey
    return Image.fromarray(grey), alpha


def _warn(path: Path, words: str) -> None:
    log.warning("%s", printable(f"{path}: {words}"))
