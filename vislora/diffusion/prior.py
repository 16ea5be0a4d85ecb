"""Class images for prior preservation: made by the base model up to a number, and kept for the next run."""

from __future__ import annotations

import errno
import io
import json
import os
import re
from hashlib import sha256
from pathlib import Path

from PIL import Image, PngImagePlugin
from tqdm.auto import tqdm

from vislora.diffusion.models import DiffusionModels
from vislora.diffusion.sample import render
from vislora.errors import EnvironmentFault, InputError
from vislora.training.random import generator

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
OURS = re.compile(r"class-(\d{6})-([0-9a-f]{16})\.png")  # index and the start of the file's sha256
HEADER = "vislora"  # the PNG text entry that says what an image was made from


def ensure_class_images(
    models: DiffusionModels | object,
    folder: str | Path,
    prompt: str,
    count: int,
    seed: int = 0,
    batch_size: int = 4,
    steps: int = 25,
    guidance: float = 7.5,
    height: int | None = None,
    width: int | None = None,
    progress: bool = True,
) -> list[Path]:
    """Exactly `count` images of `prompt` from `folder`, after making those that are missing.

    Files that the user put there come first, in the order of their names, and are never changed. The rest are
    made by `models` (a DiffusionModels or a pipeline; attach no adapter before) and named by index and
    content. Image i depends on (seed, i) and its place in a fixed division into batches, so that an
    interrupted run goes on to the very set that an uninterrupted one makes. Files that are not whole images
    are passed over.

    InputError when count or batch_size is below 1, `folder` is a file, or it holds images that were made from
    another prompt. EnvironmentFault when it cannot be written.
    """
    if count < 1 or batch_size < 1:
        raise InputError("class images", f"count={count}, batch_size={batch_size}", "both are at least 1")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(str(folder), "is a file", "give a folder for the class images")
    theirs, ours = _existing(folder, prompt)
    edited = {int(name[1]) for name in (OURS.fullmatch(file.name) for file in theirs) if name}
    # Images made now have the lowest indices, but for those of edited images, whose names they could take.
    wanted = [index for index in range(count + len(edited)) if index not in edited][: max(0, count - len(theirs))]
    missing = [index for index in wanted if index not in ours]
    if missing:
        ours_to_ask = isinstance(models, DiffusionModels)
        pipeline, more = (models.pipeline(), models.drawing) if ours_to_ask else (models, None)
        with tqdm(total=len(missing), desc="class images", disable=not progress) as bar:
            # Whole batches of a fixed division: rounding depends on the batch, and the names on every bit.
            for start in sorted({index - index % batch_size for index in missing}):
                batch = range(start, min(start + batch_size, wanted[-1] + 1))
                seeds = [generator(seed, "class image", index).initial_seed() for index in batch]
                prompts = [prompt] * len(batch)
                images = render(pipeline, prompts, seeds, steps, guidance, batch_size, height, width, more=more)
                for index, image in zip(batch, images, strict=True):
                    if index in missing:
                        made = {"prompt": prompt, "seed": seed, "index": index, "steps": steps}
                        ours[index] = _write(folder, index, image, made | {"guidance": guidance})
                        bar.update()
    return [*theirs, *(ours[index] for index in wanted)][:count]


def _existing(folder: Path, prompt: str) -> tuple[list[Path], dict[int, Path]]:
    """The user's valid images, sorted, and ours by index. One of ours that was edited since is the user's."""
    theirs: list[Path] = []
    ours: dict[int, Path] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else []:
        if file.name.startswith(".") or file.suffix.lower() not in SUFFIXES or not file.is_file():
            continue
        try:
            content = file.read_bytes()
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                image.load()
                header = image.info.get(HEADER)
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
            continue
        name = OURS.fullmatch(file.name)
        if name is None or header is None or name[2] != sha256(content).hexdigest()[:16]:
            theirs.append(file)
            continue
        made = json.loads(header)  # ours to the last bit, as the hash says
        if made["prompt"] != prompt:
            wrong = f"holds class images of {made['prompt']!r}, and {prompt!r} is wanted"
            raise InputError(str(folder), wrong, "give another --class_data_dir, or remove class-*.png from it")
        ours[int(name[1])] = file
    return theirs, ours


def _write(folder: Path, index: int, image: Image.Image, made: dict) -> Path:
    """Write one image under a temporary name, then rename: no half-written file ever has an image's name."""
    info = PngImagePlugin.PngInfo()
    info.add_text(HEADER, json.dumps(made))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    content = buffer.getvalue()
    file = folder / f"class-{index:06d}-{sha256(content).hexdigest()[:16]}.png"
    part = folder / f".{file.name}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        remedy = "free some space" if error.errno == errno.ENOSPC else "check the folder's permissions"
        raise EnvironmentFault(str(file), f"cannot be written ({error.strerror})", remedy) from error
    return file
