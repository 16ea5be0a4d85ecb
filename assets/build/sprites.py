"""Stage `sprites`: fetch the package, ship the chosen sprites, write world.json and the subjects' photos."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from dataclasses import replace

import scenes
import world
from common import WORK, WORLD, grid, say
from PIL import Image

MIT_TEXT = """\
The sprites in this folder are taken from {package} {version} (npm), which packages the
Fluent Emoji ("Familiar, friendly, and modern emoji from Microsoft"). They were reduced to {size} pixels.
Both the package and Microsoft's Fluent Emoji are under the MIT licence:

    Copyright (c) 2023 LobeHub (the package)
    Copyright (c) Microsoft Corporation (the artwork)

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation
the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and
to permit persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of
the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO
THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF
CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS
IN THE SOFTWARE.
"""

#: The backgrounds of a subject's five photos.
PHOTO_BACKGROUNDS = ("wooden floor", "grass", "yellow", "snow", "blue")


def fetch():
    """The unpacked package's folder; fetched by the ordinary npm client when it is not there."""
    folder = WORK / "package"
    if not (folder / "assets").is_dir():
        tarballs = sorted(WORK.glob("*fluent-emoji-3d*.tgz"))
        if not tarballs:
            say("fetching the sprite package with npm pack")
            subprocess.run(["npm", "pack", f"{world.PACKAGE}@{world.PACKAGE_VERSION}"], cwd=WORK, check=True)
            tarballs = sorted(WORK.glob("*fluent-emoji-3d*.tgz"))
        with tarfile.open(tarballs[0]) as archive:
            archive.extractall(WORK, filter="data")
    return folder


def write_sprites() -> None:
    """The chosen sprites as small lossless webp, with the licence."""
    source = fetch() / "assets"
    target = WORLD / "sprites"
    target.mkdir(parents=True, exist_ok=True)
    for name, code in world.sprites().items():
        image = Image.open(source / f"{code}.webp").convert("RGBA")
        image.resize((world.SPRITE_SIZE,) * 2, Image.LANCZOS).save(target / f"{name}.webp", lossless=True, method=6)
    text = MIT_TEXT.format(package=world.PACKAGE, version=world.PACKAGE_VERSION, size=world.SPRITE_SIZE)
    (target / "LICENSE").write_text(text)


def subject_specs(name: str) -> list[scenes.SceneSpec]:
    """Five plain scenes of a subject: different backgrounds, sizes, places and flips."""
    first = world.SPLITS["subjects"]["first_seed"] + 100 * list(world.SUBJECTS).index(name)
    specs = []
    for i, back in enumerate(PHOTO_BACKGROUNDS):
        spec = scenes.spec_from_seed(first + i, pool="all", object=name, background=back, kind="plain")
        size = 0.52 + 0.06 * ((2 * i) % 5)
        x, y = (min(max(v, size / 2 + 0.03), 0.97 - size / 2) for v in (spec.x, spec.y))
        specs.append(replace(spec, flip=bool(i % 2), size=size, x=x, y=y))
    return specs


def run() -> None:
    """The whole stage."""
    write_sprites()
    (WORLD / "world.json").write_text(json.dumps(world.as_json(), indent=1) + "\n")
    sheet = []
    for name in world.SUBJECTS:
        folder = WORLD / "subjects" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for i, spec in enumerate(subject_specs(name)):
            image = scenes.render(spec)
            image.save(folder / f"{i:02d}.png", optimize=True)
            sheet.append(image)
    grid(sheet, 5).save(WORK / "subjects.png")
    count = sum(1 for _ in (WORLD / "sprites").glob("*.webp"))
    say(f"{count} sprites, {len(world.SUBJECTS)} subjects, world.json written")
    examples = [scenes.render_scene(seed) for seed in range(60)]
    grid([image for image, _ in examples], 10, labels=[text for _, text in examples]).save(WORK / "scenes.png")
    (WORK / "captions.txt").write_text("\n".join(text for _, text in examples) + "\n")
