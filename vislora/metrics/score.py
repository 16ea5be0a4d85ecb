"""From pictures to a protocol's numbers: which pairs count, with intervals, and what they are a function of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version

import numpy as np
import torch

from vislora.errors import InputError
from vislora.metrics import backbones, features
from vislora.metrics.backbones import Backbone
from vislora.metrics.cache import Cache
from vislora.metrics.cells import Cells
from vislora.metrics.perceptual import perceptual
from vislora.metrics.pictures import Picture
from vislora.metrics.protocols import Protocol

PACKAGES = ("torch", "torchvision", "timm", "open_clip_torch", "lpips", "diffusers", "transformers", "pillow", "numpy")


@dataclass
class Group:
    """The generated images of one prompt. `text`: what CLIP-T compares them with, None where it is not known."""

    prompt: str
    text: str | None
    pictures: list[Picture]


@dataclass
class Compared:
    """Images of one prompt beside the base model's from the same seeds. `kind`: unrelated or class."""

    prompt: str
    kind: str
    adapted: list[Picture]
    base: list[Picture]


@dataclass
class Scored:
    """What is scored of a subject: its photos, the images of it, those of its class, and those drift is read from."""

    name: str
    real: list[Picture]
    groups: list[Group]
    classes: list[Group] = field(default_factory=list)
    drift: list[Compared] = field(default_factory=list)


class Networks:
    """Each network that `protocols` ask for, once. source: of `vislora.metrics.backbones`. dino, clip: networks in
    place of the protocols' own. Making it raises what a missing network raises."""

    def __init__(
        self, protocols: Sequence[Protocol], source: str = backbones.WORLD, dino: str | None = None,
        clip: str | None = None, device: torch.device | str = "cpu",
    ):  # fmt: skip
        self.protocols, self.source, self.made = list(protocols), source, {}
        self.of = {}  # protocol's name: (DINO, CLIP)
        for p in self.protocols:
            own = source == backbones.WORLD  # whose networks stand for every name
            how = "full" if own and dino is None else p.dino_transform
            eyes = dino or ("s16" if own else p.dino)
            words = clip or ("B32" if own else p.clip)
            self.of[p.name] = (
                self._once(("dino", eyes, how), lambda: backbones.dino(eyes, how, source, device)),  # noqa: B023
                self._once(("clip", words), lambda: backbones.clip(words, source, device)),  # noqa: B023
            )
        self.perceptual = perceptual(source, device)

    def _once(self, key: tuple, make: Callable[[], Backbone]) -> Backbone:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]


@dataclass
class Scorer:
    """Scores subjects by any of the networks' protocols from one pass over their pictures.

    compat: OFT's defects: a subject is compared with images of every subject whose name ends with its own (dog with
    backpack_dog), four images a prompt count, the first by name, and all-black ones are left out. more: cells of other
    metrics. part, share: as in `vislora.metrics.features`. InputError for a subject without photos or images.
    """

    subjects: Sequence[Scored]
    networks: Networks
    cache: Cache
    compat: bool = False
    more: dict[str, Cells] = field(default_factory=dict)
    batch_size: int = 32
    part: tuple[int, int] = (0, 1)
    share: Callable[[dict], dict] = dict
    resamples: int = 1000

    def __post_init__(self):
        for subject in self.subjects:
            drawn = sum(len(group.pictures) for group in subject.groups)
            if not subject.real or not drawn:
                wrong = f"has {len(subject.real)} photos and {drawn} generated images"
                raise InputError(f"subject {subject.name}", wrong, "give both, in folders of equal names")
        self.scored = [self._counted(subject) for subject in self.subjects]

    def _counted(self, subject: Scored) -> Scored:
        """The subject with the images that count."""
        if not self.compat:
            return subject
        groups = []
        for group in subject.groups:
            ordered = sorted(group.pictures, key=lambda p: p.path.name)[:4]
            groups.append(Group(group.prompt, group.text, [p for p in ordered if not p.black]))
        real = [p for p in subject.real if not p.black]
        return Scored(subject.name, real, groups, subject.classes, subject.drift)

    def _matched(self, subject: Scored) -> list[Group]:
        """The groups that the subject's photos are compared with."""
        if not self.compat:
            return subject.groups
        return [group for other in self.scored if other.name.endswith(subject.name) for group in other.groups]

    def look(self) -> None:
        """Pass every picture through the networks that have not seen it."""
        pictures = [p for s in self.scored for p in s.real]
        pictures += [p for s in self.scored for g in (*s.groups, *s.classes) for p in g.pictures]
        pictures += [p for s in self.scored for c in s.drift for p in (*c.adapted, *c.base)]
        words = {"batch_size": self.batch_size, "part": self.part, "share": self.share}
        features.embed(pictures, list(self.networks.made.values()), self.cache, **words)
        _ = self.lpips

    @cached_property
    def lpips(self) -> dict[str, Cells]:
        """LPIPS: real x generated, within a prompt, and between real images, without and with an image's own pair."""
        jobs, pairs = [], []
        for s in self.scored:
            jobs += [("lpips_real", s.name, g.prompt) for g in self._matched(s)]
            pairs += [(g.pictures, s.real) for g in self._matched(s)]
            jobs += [("lpips_div", s.name, g.prompt) for g in s.groups]
            pairs += [(g.pictures, g.pictures) for g in s.groups]
            jobs.append(("real", s.name, "real"))
            pairs.append((s.real, s.real))
        cells = {name: Cells() for name in ("lpips_real", "lpips_div", "exclude_self", "include_self")}
        found = features.compare(pairs, self.networks.perceptual, self.cache, self.part, self.share)
        for (kind, subject, prompt), values in zip(jobs, found, strict=True):
            if kind == "real":
                _add_real(cells, subject, values)
            else:
                own = values[np.triu_indices(len(values), 1)] if kind == "lpips_div" else values
                cells[kind].add(subject, prompt, own)
        return cells

    def cells(self, protocol: Protocol) -> tuple[dict[str, Cells], dict[str, dict[str, Cells]]]:
        """({metric: its cells}, {"exclude_self": {metric: the real images'}, "include_self": …})."""
        dino, clip = self.networks.of[protocol.name]
        found = {name: Cells() for name in ("dino", "clip_i", "clip_t", "pres")}
        real = {name: {"exclude_self": Cells(), "include_self": Cells()} for name in ("dino", "clip_i")}
        for s in self.scored:
            photos = s.real[:1] if protocol.first_real else s.real
            if photos:
                for name, backbone in (("dino", dino), ("clip_i", clip)):
                    whole = self._features(s.real, backbone)
                    _add_real(real[name], s.name, whole @ whole.T)
                    for group in self._matched(s):
                        if group.pictures:
                            similar = self._features(group.pictures, backbone) @ whole[: len(photos)].T
                            found[name].add(s.name, group.prompt, similar)
                for group in s.classes:
                    own = self._features(group.pictures, dino) @ self._features(photos, dino).T
                    found["pres"].add(s.name, group.prompt, own)
            self._add_texts(found["clip_t"], s, clip, protocol)
            for one in s.drift:
                for name, backbone in (("drift_dino", dino), ("drift_clip", clip)):
                    a, b = (self._features(side, backbone) for side in (one.adapted, one.base))
                    for key in (name, f"{name}_{one.kind}"):
                        found.setdefault(key, Cells()).add(s.name, one.prompt, np.maximum(1 - (a * b).sum(1), 0))
        found |= self.more
        found["lpips_real"], found["lpips_div"] = self.lpips["lpips_real"], self.lpips["lpips_div"]
        rows = {
            how: {**{name: cells[how] for name, cells in real.items()}, "lpips_real": self.lpips[how]}
            for how in ("exclude_self", "include_self")
        }
        return found, rows

    def _add_texts(self, cells: Cells, subject: Scored, clip: Backbone, protocol: Protocol) -> None:
        groups = [group for group in subject.groups if group.text is not None and group.pictures]
        if not groups:
            return
        texts = clip.texts([group.text for group in groups]).double().numpy()
        for group, text in zip(groups, texts, strict=True):
            values = self._features(group.pictures, clip) @ text
            if protocol.clip_t_floor is not None:
                values = np.maximum(values, protocol.clip_t_floor)
            cells.add(subject.name, group.prompt, protocol.clip_t_scale * values)

    def _features(self, pictures: Sequence[Picture], backbone: Backbone) -> np.ndarray:
        return features.matrix(pictures, backbone, self.cache)

    def result(self, protocol: Protocol) -> dict:
        """Metrics and the real rows with intervals, metrics by subject and by prompt, counts and the record; plain."""
        found, real = self.cells(protocol)
        way = protocol.reduction
        metrics = {name: cells.mean(way) for name, cells in found.items()}
        by = [{}, {}]
        for axis in (0, 1):
            for name, cells in found.items():
                for key, value in cells.by(axis).items():
                    by[axis].setdefault(key, {})[name] = value
        return {
            "protocol": protocol.name,
            "compat": self.compat,
            "metrics": metrics,
            "intervals": {name: cells.interval(way, self.resamples) for name, cells in found.items()},
            "real": {how: {name: cells.mean(way) for name, cells in row.items()} for how, row in real.items()},
            "real_intervals": {
                how: {name: cells.interval(way, self.resamples) for name, cells in row.items()}
                for how, row in real.items()
            },
            "counts": self.counts(found, real),
            "black_files": [str(p.path) for own in self._pictures().values() for p in own if p.black],
            "record": self.record(protocol),
            "per_subject": by[0],
            "per_prompt": by[1],
        }

    def counts(self, found: dict[str, Cells], real: dict[str, dict[str, Cells]]) -> dict[str, int | str]:
        """How many subjects, images and pairs there were. `prompts`: of each subject, "least-most" where they differ;
        `black`: all-black generated images, counted before any is left out, `black_real` and `black_drift` photos and
        images of class and unrelated prompts, the base's too."""
        kinds = self._pictures()
        prompts = sorted(len(s.groups) for s in self.subjects)
        return {
            "subjects": len(self.subjects),
            "prompts": prompts[0] if prompts[0] == prompts[-1] else f"{prompts[0]}-{prompts[-1]}",
            "generated": len(kinds["black"]),
            "real": len(kinds["black_real"]),
            "pairs": found["dino"].count,
            "pairs_within_a_prompt": found["lpips_div"].count,
            "real_pairs": real["exclude_self"]["dino"].count,
            "real_pairs_with_self": real["include_self"]["dino"].count,
            **{name: sum(p.black for p in pictures) for name, pictures in kinds.items()},
        }

    def _pictures(self) -> dict[str, list[Picture]]:
        """{name of `counts`: the pictures among which it counts the black ones}."""
        forgotten = [p for s in self.subjects for c in s.drift for p in (*c.adapted, *c.base)]
        forgotten += [p for s in self.subjects for g in s.classes for p in g.pictures]
        return {
            "black": [p for s in self.subjects for g in s.groups for p in g.pictures],
            "black_real": [p for s in self.subjects for p in s.real],
            "black_drift": list({p.path: p for p in forgotten}.values()),  # the base's are all subjects'
        }

    def record(self, protocol: Protocol) -> dict:
        """Everything beside the images that the numbers are a function of."""
        dino, clip = self.networks.of[protocol.name]
        world = self.networks.source == backbones.WORLD
        return {
            "dino": dino.identifier,
            "dino_transform": dino.transform.name,
            "clip": clip.identifier,
            "clip_activations": clip.activations,
            "clip_transform": clip.transform.name,
            "lpips": self.networks.perceptual.identifier,
            "lpips_column": "lpips_world" if world else "lpips",
            "lpips_transform": self.networks.perceptual.transform.name,
            "views": [dino.view, clip.view, self.networks.perceptual.view],
            "reduction": protocol.reduction,
            "clip_t_scale": protocol.clip_t_scale,
            "clip_t_floor": protocol.clip_t_floor,
            "pairs": "first photo" if protocol.first_real else "all photos",
            "texts": {s.name: {g.prompt: g.text for g in s.groups} for s in self.subjects},
            "intervals": f"95 % percentile bootstrap over subjects, then prompts, {self.resamples} resamples",
            "precision": "float32, sums in float64",
            "versions": {name: version(name) for name in PACKAGES},
        }


def _add_real(cells: dict[str, Cells], subject: str, values: np.ndarray) -> None:
    cells["include_self"].add(subject, "real", values)
    cells["exclude_self"].add(subject, "real", values[~np.eye(len(values), dtype=bool)])
