"""The sheet of generated images: a block a subject, a row a method, a column a prompt, the scores under each image."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vislora.data.images import EXTENSIONS, read
from vislora.errors import InputError
from vislora.sweep.cells import Place
from vislora.sweep.pictures import Images
from vislora.sweep.series import Sample, samples
from vislora.sweep.table import Row

CELL, GAP, MARGIN, LABEL, TEXT = 144, 8, 12, 150, 13  # pixels
PAPER, INK, PALE = "white", "black", "#606060"
DEFAULT_PROMPTS = 5


def draw(picture: Images, sweep: Path, found: Sequence[Row]) -> tuple[bytes, list[list]] | None:
    """(PNG, lines of the CSV); None where no run has images. Of several seeds the first is shown."""
    blocks: dict[str, dict[str, tuple[Row, dict[int, Sample]]]] = {}
    for row in sorted(found, key=lambda row: row.cell.seed):
        of_run = samples(Place(sweep, row.cell).run, picture.images, picture.result)
        name = ", ".join([row.cell.method, *(f"{k} {v}" for k, v in row.cell.varied.items() if k not in picture.where)])
        if of_run:
            blocks.setdefault(row.cell.subject or "", {}).setdefault(name, (row, {s.number: s for s in of_run}))
    if not blocks:
        return None
    names = list(dict.fromkeys(_name for row in found for block in blocks.values() for _name in block
                               if block[_name][0].cell.method == row.cell.method))  # fmt: skip
    sheets, lines = [], [["subject", "method", "seed", "number", "prompt", "file", *picture.scores]]
    for subject, block in blocks.items():
        block = {name: block[name] for name in names if name in block}
        numbers = picture.prompts or _spread(sorted({n for _, images in block.values() for n in images}))
        sheets.append(_block(picture, subject, block, numbers))
        for name, (row, images) in block.items():
            for one in (images[number] for number in numbers if number in images):
                lines.append([subject, name, row.cell.seed, one.number, one.prompt,
                              one.file.relative_to(sweep).as_posix(), *(one.scores.get(s, "") for s in picture.scores)])
    whole = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), PAPER)
    top = 0
    for part in sheets:
        whole.paste(part, (0, top))
        top += part.height
    out = io.BytesIO()
    whole.save(out, "PNG", optimize=True)
    return out.getvalue(), lines


def _spread(numbers: list[int]) -> list[int]:
    """A few of the prompts, evenly chosen."""
    count = min(DEFAULT_PROMPTS, len(numbers))
    return [numbers[i * len(numbers) // count] for i in range(count)]


def _block(picture: Images, subject: str, block: dict[str, tuple[Row, dict[int, Sample]]],
           numbers: list[int]) -> Image.Image:  # fmt: skip
    font, small = ImageFont.load_default(TEXT), ImageFont.load_default(TEXT - 1)
    line = TEXT + 3
    prompts = {n: one.prompt for _, images in block.values() for n, one in images.items()}
    heads = {n: textwrap.wrap(prompts.get(n, f"prompt {n}"), CELL // 7) for n in numbers}
    photos = _photos(picture, next(iter(block.values()))[0], len(numbers))
    title = 30 if subject else 0
    head = MARGIN + title + (CELL + GAP if photos else 0) + line * max(map(len, heads.values())) + GAP
    step = CELL + line * -(-len(picture.scores) // 2) + GAP
    size = (MARGIN * 2 + LABEL + len(numbers) * (CELL + GAP), head + len(block) * step + MARGIN)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    if subject:
        pen.text((MARGIN, MARGIN), subject, INK, ImageFont.load_default(20))
    if photos:
        pen.text((MARGIN, MARGIN + title), "photos", PALE, font)
    for column, photo in enumerate(photos):
        sheet.paste(photo, (_left(column), MARGIN + title))
    for column, number in enumerate(numbers):
        pen.text((_left(column), head - GAP - line * len(heads[number])), "\n".join(heads[number]), INK, font)
    for index, (name, (_, images)) in enumerate(block.items()):
        top = head + index * step
        pen.text((MARGIN, top), "\n".join(textwrap.wrap(name, LABEL // 8)), INK, font)
        for column, number in enumerate(numbers):
            place = (_left(column), top)
            if (one := images.get(number)) is None:
                pen.rectangle((*place, place[0] + CELL - 1, top + CELL - 1), outline="#d0d0d0")
                continue
            sheet.paste(_fit(one.file), place)
            words = [f"{s} {one.scores[s]:.2f}" if s in one.scores else f"{s} -" for s in picture.scores]
            pairs = ["   ".join(words[i : i + 2]) for i in range(0, len(words), 2)]
            pen.text((place[0], top + CELL + 1), "\n".join(pairs), PALE, small)
    return sheet


def _left(column: int) -> int:
    return MARGIN + LABEL + column * (CELL + GAP)


def _photos(picture: Images, row: Row, most: int) -> list[Image.Image]:
    """The subject's own photos, from the folder that the setting names; none where it cannot be read."""
    folder = Path(str(row.cell.settings.get(picture.photos, "")))
    if not row.cell.settings.get(picture.photos) or not folder.is_dir():
        return []
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS)[:most]
    try:
        return [_fit(file) for file in files]
    except InputError:
        return []


def _fit(file: Path) -> Image.Image:
    """The image in a square cell; small ones keep their pixels."""
    image = read(file)
    scale = CELL / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    fitted = image.resize(size, Image.Resampling.NEAREST if scale > 1.5 else Image.Resampling.LANCZOS)
    cell = Image.new("RGB", (CELL, CELL), "#f0f0f0")
    cell.paste(fitted, ((CELL - size[0]) // 2, (CELL - size[1]) // 2))
    return cell
