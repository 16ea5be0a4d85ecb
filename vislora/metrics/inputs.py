"""What is scored, from the command's options: a run, an adapter with its base, or folders of images."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vislora import world
from vislora.data.concepts import Concept, read_concepts
from vislora.data.images import EXTENSIONS
from vislora.errors import InputError, printable
from vislora.metrics.draw import MANIFEST
from vislora.metrics.options import ScoreOptions
from vislora.metrics.pictures import examine, listing
from vislora.metrics.score import Group, Scored
from vislora.metrics.subjects import Subject, chosen, dataset, read_templates, token_and_noun
from vislora.training import checkpoint
from vislora.training.run import RunFolder

TOKEN = "sks"
_NUMBERED = re.compile(r"(\d+)_(\w+)")
log = logging.getLogger("vislora")


@dataclass(frozen=True)
class Setup:
    """base: the model's folder or hub id; adapter: what `vislora.load` reads, None for the base alone; subjects with
    the word for each; settings: the run's config.yaml, empty without a run; output: the folder of results; checkpoint:
    of the run, whose tensors take the place of the adapter's."""

    base: str
    adapter: Path | None
    subjects: list[tuple[Subject, str]]
    settings: dict[str, Any]
    output: Path
    checkpoint: Path | None = None

    @property
    def of_world(self) -> bool:
        return Path(self.base).resolve() == world.TINY_SD.resolve()


def setup(options: ScoreOptions) -> Setup:
    """From --run, or --adapter and --base. InputError for what is missing or does not fit."""
    o, settings = options, {}
    if o.run is not None:
        settings = RunFolder(Path(o.run)).read_config()
        if "pretrained_model_name_or_path" not in settings:
            wrong = "is of no DreamBooth run: it names no pretrained_model_name_or_path"
            raise InputError(str(RunFolder(Path(o.run)).config_file), wrong, "name the folder of one")
    base = o.base or settings.get("pretrained_model_name_or_path") or str(world.TINY_SD)
    trained = None if settings.get("adapter") == "none" else o.run
    adapter = o.adapter if o.adapter is not None else trained
    adapter = None if adapter in (None, "none") else Path(adapter)
    if adapter is not None and not adapter.exists():
        raise InputError(f"--adapter {adapter}", "does not exist", "name an adapter's file or folder, or none")
    output, place = Path(o.output_dir or o.run) / "eval", None
    if o.checkpoint is not None:
        root = RunFolder(Path(o.run)).checkpoints
        try:
            place = checkpoint.resolve(root, o.checkpoint)
        except InputError as error:  # which speaks of resuming
            raise InputError(f"--checkpoint {o.checkpoint}", error.wrong, f"name one in {root}, or latest") from error
        output = output if o.output_dir else output / place.name
    return Setup(base, adapter, _subjects(o, settings), settings, output, place)


def checkpoints(options: ScoreOptions) -> list[tuple[int, Path]]:
    """(step, folder) of all that --run has, oldest first, but for the one that is its final adapter: of the last step,
    or of the step that --keep best kept. InputError where there is none."""
    run = RunFolder(Path(options.run))
    last = _steps(run)
    found = [(step, path) for step, path in checkpoint.listed(run.checkpoints) if step != last]
    if not found:
        wrong = f"{run.checkpoints} holds none beside the final adapter's"
        raise InputError("--checkpoint all", wrong, "train with --checkpointing_steps N, or leave it out")
    return found


def last_step(run: str, before: Sequence[tuple[int, Any]]) -> int:
    """The step of a run's final adapter, as its metrics.json says; after all of `before` where that is missing."""
    return _steps(RunFolder(Path(run))) or before[-1][0] + 1


def _steps(run: RunFolder) -> int | None:
    try:
        told = json.loads(run.metrics_file.read_text(encoding="utf-8"))
        return int(told.get("kept_step", told["steps"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _subjects(options: ScoreOptions, settings: dict[str, Any]) -> list[tuple[Subject, str]]:
    """The subjects with their tokens: the run's, or those of the data."""
    o, templates = options, None if options.prompts is None else read_templates(options.prompts)
    if o.real is not None:
        places = [Subject(name, place, "", ()) for name, place in _photos(Path(o.real)).items()]
        concepts = [Concept(str(s.photos), settings.get("instance_prompt"), settings.get("class_prompt"))
                    for s in chosen(places, o.subjects)]  # fmt: skip
    elif settings.get("concepts_list"):
        concepts = read_concepts(settings["concepts_list"])
    elif settings.get("instance_data_dir"):
        concepts = [Concept(settings["instance_data_dir"], settings.get("instance_prompt"),
                            settings.get("class_prompt"))]  # fmt: skip
    else:
        known = chosen(dataset(o.data), o.subjects)
        return [(Subject(s.name, s.photos, o.class_noun or s.noun, templates or s.templates), o.token or TOKEN)
                for s in known]  # fmt: skip
    found = [_of_concept(o, concept, templates) for concept in concepts]
    names = [subject.name for subject in chosen([subject for subject, _ in found], o.subjects)]
    return [(subject, token) for subject, token in found if subject.name in names]


def _of_concept(o: ScoreOptions, concept: Concept, templates: tuple[str, ...] | None) -> tuple[Subject, str]:
    """A folder of photos as a subject: the data's where it is one of those, else by its prompts."""
    photos = Path(concept.instance_data_dir)
    known = {s.photos.resolve(): s for s in dataset(None)} | {s.name: s for s in (dataset(o.data) if o.data else ())}
    same = known.get(photos.name) or known.get(photos.resolve())
    noun, token = o.class_noun or (same and same.noun), o.token
    if token is None and concept.instance_prompt is None and noun:
        token = TOKEN
    if token is None or not noun:
        of_class = concept.class_prompt or (f"a photo of a {noun}" if noun else None)
        told = token_and_noun(concept.instance_prompt or "", of_class)
        token, noun = token or told[0], noun or told[1]
    templates = templates or (same and same.templates)
    if not templates:
        wrong = "is no subject of the world's, and no prompts are given"
        raise InputError(str(photos), wrong, "add --prompts FILE, or --data with a copy of google/dreambooth")
    return Subject(photos.name, photos, noun, templates), token


def folders(options: ScoreOptions) -> list[Scored]:
    """Images and photos as they lie in --generated and --real (or --data), by subject.

    --generated is a folder of images, or of a folder a subject; run folders are looked into. A manifest.json, or
    <prompt>_<number>.png with --prompts or --data, says which prompt an image is of. InputError where counts or names
    do not match, saying which.
    """
    o, place = options, Path(options.generated)
    own = _by_subject(place)
    known = {s.name: s for s in (dataset(o.data) if o.data else ())}
    if o.real is not None:
        real = _photos(Path(o.real))
    else:
        real = {name: subject.photos for name, subject in known.items()}
    if len(own) == 1 and len(real) == 1:  # one subject, whatever the folders are called
        own = {next(iter(real)): next(iter(own.values()))}
    names = list(o.subjects) or sorted(own)
    for name in names:
        if name not in own or name not in real:
            side = "--generated" if name not in own else "--real"
            held = sorted(own if name not in own else real)
            wrong = f"has no folder for {name!r} among its {len(held)}: {', '.join(held[:5])}"
            raise InputError(side, wrong, "give a folder of equal name on both sides, or choose by --subjects")
    templates = None if o.prompts is None else read_templates(o.prompts)
    return [
        Scored(name, examine(listing(real[name])), _groups(o, own[name], known.get(name), templates)) for name in names
    ]


def _photos(folder: Path) -> dict[str, Path]:
    """{subject: folder of photos}: the folder itself where photos lie in it, else its sub-folders."""
    alone = folder.is_dir() and any(part.suffix.lower() in EXTENSIONS for part in folder.iterdir())
    return {folder.name: folder} if alone else _by_subject(folder)


def _by_subject(folder: Path) -> dict[str, Path]:
    """{subject: folder of images}: the folder itself, or its sub-folders; a run's images are in its eval/images."""
    if not folder.is_dir():
        raise InputError(str(folder), "no such folder", "name a folder of images")
    inner = folder / "eval" / "images"
    if inner.is_dir():
        folder = inner
    if (folder / MANIFEST).is_file():
        return {_manifest(folder).get("subject", folder.name): folder}
    results = folder / "eval"  # of an earlier scoring of this very folder
    parts = [part for part in sorted(folder.iterdir())
             if part.is_dir() and not part.name.startswith(".") and part != results]  # fmt: skip
    if not parts:
        return {folder.name: folder}
    found = {}
    for part in parts:
        for name, place in _by_subject(part).items():
            if name in found:
                raise InputError(str(folder), f"holds {name} twice, in {found[name]} and {place}", "keep one of them")
            found[name] = place
    return found


def _manifest(folder: Path) -> dict:
    file = folder / MANIFEST
    if not file.is_file():
        return {}
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        assert isinstance(told["images"], dict)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise InputError(str(file), f"cannot be read ({error})", "draw the images again, or remove it") from None
    return told


def _named(folder: Path, told: dict) -> list[Path]:
    """The folder's images, where there is a manifest those that it names: others are of another adapter, or of more
    images a prompt. InputError where one that it names is missing."""
    found = listing(folder)
    if not told:
        return found
    images = told["images"]
    missing = sorted({*images} - {path.name for path in found})
    if missing:
        wrong = f"names {len(missing)} images that are not there: {', '.join(missing[:5])}"
        raise InputError(str(folder / MANIFEST), wrong, "draw the images again, or remove it")
    others = [path.name for path in found if path.name not in images]
    if others:
        shown = ", ".join(others[:5]) + (", …" if len(others) > 5 else "")
        _warn(f"{folder}: {len(others)} images that {MANIFEST} does not name passed over: {shown}")
    return [path for path in found if path.name in images]


def _warn(words: str) -> None:
    log.warning("%s", printable(words))


def _groups(o: ScoreOptions, folder: Path, subject: Subject | None, templates: tuple[str, ...] | None) -> list[Group]:
    """The folder's images by prompt."""
    told, token = _manifest(folder), o.token or TOKEN
    noun = o.class_noun or told.get("class_noun") or (subject and subject.noun)
    templates = templates or told.get("templates") or (subject and subject.templates)
    if templates and not noun:
        _warn(f"{folder}: the subject's class is not known, CLIP-T is left out -> give --class_noun")
    paths: dict[str, list[Path]] = {}
    for path in _named(folder, told):
        number = _NUMBERED.fullmatch(path.stem)
        own = told["images"][path.name] if told else None
        key = own["group"] if own else int(number[1]) if number and templates else None
        if key is None and templates:
            wrong = f"does not say which of the {len(templates or ())} prompts it is of"
            raise InputError(str(path), wrong, "name images <prompt>_<number>.png, prompts counted from 0")
        paths.setdefault(key, []).append(path)
    if templates and len(paths) > len(templates) or any(templates and key >= len(templates) for key in paths):
        wrong = f"has images of prompts up to number {max(paths)}, and there are {len(templates)}"
        raise InputError(str(folder), wrong, "count from 0, and give the prompts that they were drawn from")
    sizes = {key: len(own) for key, own in paths.items()}
    lacking = [key for key in range(len(templates or ())) if key not in paths]
    if lacking or len(set(sizes.values())) > 1:
        odd = [key for key, size in sizes.items() if size != max(sizes.values())]
        wrong = f"{len(lacking)} of {len(templates or ())} prompts have no image, {len(odd)} have fewer than others"
        first = f" (such as number {(lacking + odd)[0]})"
        raise InputError(str(folder), wrong + first, "draw the missing ones, or leave those prompts out")
    groups = []
    for key, own in sorted(paths.items(), key=lambda item: item[0] or 0):
        text, prompt = None, "all"
        if templates:
            prompt = templates[key]
            text = Subject(folder.name, folder, noun, ()).text(prompt, token, o.clip_t_text) if noun else None
        groups.append(Group(prompt, text, examine(own)))
    return groups
