"""Images from prompts and seeds, and the labelled grids that a run leaves behind."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

from vislora.diffusion.latents import decode
from vislora.errors import InputError

CELL, LARGEST = 128, 512  # pixels a side: of the smallest cell, and of the largest that is not enlarged
GAP, LABEL_WIDTH, FONT, TITLE_FONT = 8, 168, 15, 20  # pixels
INK, PAPER = (20, 20, 20), (255, 255, 255)


@contextmanager
def evaluating(*modules: torch.nn.Module) -> Iterator[None]:
    """Eval mode within; on leaving, by an exception too, every submodule has its own training flag back."""
    flags = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, training in flags:
            part.training = training


def render(
    pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int = 25,
    guidance: float = 7.5,
    batch_size: int = 4,
    height: int | None = None,
    width: int | None = None,
    progress: str | None = None,
    more: Mapping[str, object] | None = None,
) -> list[Image.Image]:
    """One image for each pair (prompts[i], seeds[i]); `height`, `width` in pixels, None for the model's own.

    Image i starts from a generator of its own: it does not depend on its batch, beyond the rounding of
    batched arithmetic. Global random state is neither read nor moved. `progress`: the label of a progress
    bar, if one is wanted; `more`: other words of the pipeline's call. Warns when a latent is not finite, for such
    an image comes out black. InputError when the lists differ in length or a count is below 1.
    """
    if len(prompts) != len(seeds):
        raise InputError("render", f"{len(prompts)} prompts and {len(seeds)} seeds", "give a seed for each")
    if steps < 1 or batch_size < 1:
        raise InputError("render", f"steps={steps}, batch_size={batch_size}", "both are at least 1")
    images: list[Image.Image] = []
    bar = tqdm(total=len(prompts), desc=progress, disable=progress is None)
    models = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    # A network that trains in compiled graphs would get new ones here, for these batches: minutes for a few images.
    with bar, evaluating(*models), torch.compiler.set_stance("force_eager"):
        for start in range(0, len(prompts), batch_size):
            chosen = slice(start, start + batch_size)
            latents = pipeline(
                prompt=list(prompts[chosen]),
                # On the CPU on every machine, so that a seed means the same image everywhere.
                generator=[torch.Generator().manual_seed(int(seed)) for seed in seeds[chosen]],
                num_inference_steps=steps,
                guidance_scale=guidance,
                height=height,
                width=width,
                output_type="latent",
                **(more or {}),
            ).images
            if latents.ndim == 3:  # Flux's, packed two by two
                sides = (side or pipeline.default_sample_size * pipeline.vae_scale_factor for side in (height, width))
                latents = pipeline._unpack_latents(latents, *sides, pipeline.vae_scale_factor)
            if not latents.isfinite().all():
                warnings.warn("latents are not finite, images are black: try bfloat16 or float32", stacklevel=2)
            # Decoded here because the VAE may be in another precision than the denoiser.
            images += pipeline.image_processor.postprocess(decode(pipeline.vae, latents), output_type="pil")
            bar.update(len(latents))
    return images


def labelled_grid(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    title: str = "",
) -> Image.Image:
    """A sheet of images under column labels and beside row labels, both wrapped. Rows may differ in length.

    Small images are enlarged by a whole factor, to at least 128 pixels a cell; images over 512 are shrunk.
    InputError when there are no images, or when labels do not match the rows or columns.
    """
    columns = max(map(len, rows), default=0)
    for labels, count, kind in ((row_labels, len(rows), "rows"), (column_labels, columns, "columns")):
        if labels and len(labels) != count:
            raise InputError("grid", f"{len(labels)} labels for {count} {kind}", "give one for each, or none")
    return _sheet(rows, row_labels, column_labels, title, _cell(rows))


def _cell(rows: Sequence[Sequence[Image.Image]]) -> int:
    """Pixels a side of the cells of a grid: a multiple of the largest image's side. InputError without images."""
    side = min(max((max(image.size) for row in rows for image in row), default=0), LARGEST)
    if side == 0:
        raise InputError("grid", "there are no images in it", "give at least one")
    return side * -(-CELL // side)


def _sheet(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str,
    cell: int,
) -> Image.Image:
    """The grid of `labelled_grid` with cells of `cell` pixels a side."""
    columns = max(map(len, rows))
    left = GAP + (LABEL_WIDTH + GAP if any(row_labels) else 0)
    canvas_width = left + columns * (cell + GAP)

    font, title_font = ImageFont.load_default(FONT), ImageFont.load_default(TITLE_FONT)
    title_text = _wrap(title, title_font, canvas_width - 2 * GAP)
    heads = [_wrap(label, font, cell) for label in column_labels]
    beside = [_wrap(label, font, LABEL_WIDTH) for label in row_labels] or [""] * len(rows)
    title_height = _height(title_text, title_font) + GAP if title_text else 0
    head_height = max((_height(text, font) + GAP for text in heads if text), default=0)
    heights = [max(cell if row else 0, _height(text, font)) for row, text in zip(rows, beside, strict=True)]

    canvas_height = GAP + title_height + head_height + sum(height + GAP for height in heights)
    sheet = Image.new("RGB", (canvas_width, canvas_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((GAP, GAP), title_text, INK, title_font)
    top = GAP + title_height
    for column, text in enumerate(heads):
        middle = left + column * (cell + GAP) + cell // 2
        draw.multiline_text((middle, top + head_height - GAP), text, INK, font, anchor="md", align="center")
    top += head_height
    for row, text, height in zip(rows, beside, heights, strict=True):
        draw.multiline_text((GAP, top + (height - _height(text, font)) // 2), text, INK, font)
        for column, image in enumerate(row):
            shown = _fit(image, cell)
            x, y = left + column * (cell + GAP), top + (height - cell) // 2
            sheet.paste(shown, (x + (cell - shown.width) // 2, y + (cell - shown.height) // 2))
        top += height + GAP
    return sheet


def comparison_grid(
    photos: Sequence[Image.Image],
    prompts: Sequence[str],
    stages: Mapping[str, Sequence[Sequence[Image.Image]]],
    title: str = "",
) -> Image.Image:
    """The training photos in the first row, then a row for each prompt: before, during and after training.

    stages[name][i] are the images of prompts[i] at the stage `name` ("before", "step 200", "after"), one for
    each seed and in the same order at every stage. No more photos are shown than there are columns, or five.
    InputError when a stage lacks a prompt's images or stages have different numbers of them.
    """
    if not stages or not prompts:
        raise InputError("grid", f"{len(stages)} stages, {len(prompts)} prompts", "give at least one of each")
    shapes = {name: [len(images) for images in stage] for name, stage in stages.items()}
    seeds = max((max(shape, default=0) for shape in shapes.values()), default=0)
    for name, shape in shapes.items():
        if shape != [seeds] * len(prompts):
            wrong = f"stage {name!r} has {shape} images for {len(prompts)} prompts"
            raise InputError("grid", wrong, f"{seeds} images for each prompt, as in the other stages")
    labels = [name if seeds == 1 else f"{name} ({k + 1})" for name in stages for k in range(seeds)]
    body = [[image for stage in stages.values() for image in stage[i]] for i in range(len(prompts))]
    cell = _cell(body)  # the photos' too, whatever their size
    sheets = [_sheet(body, prompts, labels, "" if photos else title, cell)]
    if photos:
        shown = photos[: max(len(labels), 5)]
        count = "" if len(shown) == len(photos) else f" ({len(shown)} of {len(photos)})"
        sheets.insert(0, _sheet([shown], [f"training photos{count}"], (), title, cell))
    sheet = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), PAPER)
    top = 0
    for part in sheets:
        sheet.paste(part, (0, top))
        top += part.height
    return sheet


def _fit(image: Image.Image, cell: int) -> Image.Image:
    """`image` in RGB, enlarged by the largest whole factor that fits a cell, or shrunk into it."""
    image, factor = image.convert("RGB"), cell // max(image.size)
    if factor > 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    if factor == 0:
        image.thumbnail((cell, cell), Image.Resampling.LANCZOS)
    return image


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """`text` broken into lines of at most `width` pixels: between words, or within one that is too long."""
    # Pillow's own font knows no accents: better a bare letter than an empty box.
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    lines, line = [], ""
    for word in text.split():
        if line and font.getlength(f"{line} {word}") > width:
            lines.append(line)
            line = ""
        line = f"{line} {word}" if line else word
        while font.getlength(line) > width and len(line) > 1:
            cut = next(n for n in range(len(line) - 1, 0, -1) if n == 1 or font.getlength(line[:n]) <= width)
            lines.append(line[:cut])
            line = line[cut:]
    return "\n".join([*lines, line] if line else lines)


def _height(text: str, font: ImageFont.FreeTypeFont) -> int:
    if not text:
        return 0
    box = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font)
    return int(box[3]) + 1
