"""Masks: how much each place of a photo counts in the loss, by a grey image of its own or its transparency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from vislora.data.images import EXTENSIONS, FORMATS, MASK, Photo
from vislora.errors import InputError


@dataclass(frozen=True)
class Mask:
    """Where a photo's mask is: an image of its own, white where the photo counts, or the photo's own transparency."""

    path: Path
    is_alpha: bool
    sha256: str

    def read(self) -> Image.Image:
        """The mask, upright, mode L: 0 counts nothing, 255 fully. InputError when it cannot be read."""
        try:
            with Image.open(self.path, formats=FORMATS) as image:
                upright = ImageOps.exif_transpose(image)
                return upright.convert("RGBA").getchannel("A") if self.is_alpha else upright.convert("L")
        except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
            raise InputError(str(self.path), f"cannot be read as a mask ({error})", "save it as a grey PNG") from error


def find_masks(photos: Sequence[Photo], folder: str | None) -> list[Mask]:
    """The mask of each photo: the image of its stem in `folder`; without one, the image beside the photo whose stem is
    the photo's and "-masklabel"; else the photo's own transparency.

    InputError for photos that have none, and for a mask of another size than its photo.
    """
    found, missing = [], []
    for photo in photos:
        place = Path(folder) if folder else photo.path.parent
        stem = photo.path.stem if folder else photo.path.stem + MASK
        files = [p for p in sorted(place.glob("*")) if p.stem == stem and p.suffix.lower() in EXTENSIONS]
        with Image.open(photo.path, formats=FORMATS) as image:
            is_alpha = not files and folder is None and image.has_transparency_data
        if not files and not is_alpha:
            missing.append(photo.path.name)
            continue
        path = files[0] if files else photo.path
        mask = Mask(path, is_alpha, sha256(path.read_bytes()).hexdigest())
        if mask.read().size != photo.size:
            wrong = f"is {mask.read().size}, its photo {photo.size}"
            raise InputError(str(path), wrong, "give the mask its photo's width and height")
        found.append(mask)
    if missing:
        more = ", …" if len(missing) > 5 else ""
        wrong = f"{len(missing)} of {len(photos)} photos have no mask: {', '.join(missing[:5])}{more}"
        remedy = f"write STEM{MASK}.png beside each, name their --conditioning_data_dir, or make them transparent"
        raise InputError("--masked_loss", wrong, remedy)
    return found
