"""Scores on features made by hand: pairs, counts, defects and protocols, each against plain loops in float64."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vislora.errors import InputError
from vislora.metrics import score as module
from vislora.metrics.cache import Cache
from vislora.metrics.features import embed
from vislora.metrics.pictures import Picture, examine, listing
from vislora.metrics.protocols import PROTOCOLS
from vislora.metrics.score import Compared, Group, Networks, Scored, Scorer

NAMES = ["backpack", "backpack_dog", "cat", "dog", *(f"s{i}" for i in range(26))]
COUNTS = dict(zip(NAMES, [6, 6, 5, 5] + [4] * 2 + [5] * 16 + [6] * 8, strict=True))  # as google/dreambooth's
WIDTH = 12


class Eyes:
    """In place of a backbone: features are in the cache already, texts are directions."""

    identifier = view = activations = "eyes"
    transform = SimpleNamespace(name="none")

    def texts(self, texts):
        x = torch.stack([torch.randn(WIDTH, generator=torch.Generator().manual_seed(len(t) + 40)) for t in texts])
        return torch.nn.functional.normalize(x, dim=-1)


@pytest.fixture
def by_hand(monkeypatch):
    """Networks, a cache, picture(name, black) with its feature in it; LPIPS is a distance of features."""
    cache, eyes = Cache(None), Eyes()

    def picture(name: str, black: bool = False) -> Picture:
        g = torch.Generator().manual_seed(sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**31)
        cache.put("eyes", name, torch.nn.functional.normalize(torch.randn(WIDTH, generator=g) + 0.7, dim=0))
        return Picture(Path(name), name, black)

    def compare(groups, network, cache, part, share):
        x = [[np.stack([vector(p) for p in side]) if side else np.zeros((0, WIDTH)) for side in g] for g in groups]
        return [((a[:, None] - b[None]) ** 2).sum(-1) for a, b in x]

    def vector(p: Picture) -> np.ndarray:
        x = cache.get("eyes", p.sha256).double().numpy()
        return x / np.linalg.norm(x)

    monkeypatch.setattr(module.features, "compare", compare)
    of = {name: (eyes, eyes) for name in PROTOCOLS}
    networks = SimpleNamespace(of=of, made={"e": eyes}, perceptual=eyes, source="world")
    return SimpleNamespace(networks=networks, cache=cache, picture=picture, vector=vector)


def dreambooth(picture, images: int = 4) -> list[Scored]:
    """30 subjects with 158 photos, 25 prompts, `images` of each."""
    return [
        Scored(name, [picture(f"{name} {i}") for i in range(count)],
               [Group(f"a {{}} {p}", f"a {name} {p}", [picture(f"{name} {p} {k}.png") for k in range(images)])
                for p in range(25)])
        for name, count in COUNTS.items()
    ]  # fmt: skip


def test_the_papers_counts(by_hand):
    subjects = dreambooth(by_hand.picture)
    plain = Scorer(subjects, by_hand.networks, by_hand.cache).result(PROTOCOLS["oft"])
    assert plain["counts"] == {
        "subjects": 30, "prompts": 25, "generated": 3000, "real": 158, "pairs": 15_800, "black": 0,
        "black_real": 0, "black_drift": 0,
        "pairs_within_a_prompt": 30 * 25 * 6, "real_pairs": 684, "real_pairs_with_self": 842,
    }  # fmt: skip
    compat = Scorer(subjects, by_hand.networks, by_hand.cache, compat=True).result(PROTOCOLS["oft"])
    assert compat["counts"]["pairs"] == 16_300  # dog is compared with backpack_dog's images too
    others = [name for name in NAMES if name != "dog"]
    for name in others:
        assert compat["per_subject"][name]["dino"] == plain["per_subject"][name]["dino"]
    assert compat["per_subject"]["dog"]["dino"] != plain["per_subject"]["dog"]["dino"]

    v, first = by_hand.vector, {s.name: s for s in subjects}
    dog = [v(a) @ v(b) for name in ("dog", "backpack_dog") for g in first[name].groups for a in g.pictures
           for b in first["dog"].real]  # fmt: skip
    assert compat["per_subject"]["dog"]["dino"] == pytest.approx(np.mean(dog), abs=1e-12)
    flat = [v(a) @ v(b) for s in subjects for g in s.groups for a in g.pictures for b in s.real]
    assert plain["metrics"]["dino"] == plain["metrics"]["clip_i"] == pytest.approx(np.mean(flat), abs=1e-12)
    per_subject = [np.mean([v(a) @ v(b) for g in s.groups for a in g.pictures for b in s.real]) for s in subjects]
    other = Scorer(subjects, by_hand.networks, by_hand.cache).result(PROTOCOLS["dreambooth"])
    assert other["metrics"]["dino"] == pytest.approx(np.mean(per_subject), abs=1e-12)
    within = [((v(g.pictures[i]) - v(g.pictures[j])) ** 2).sum() for s in subjects for g in s.groups
              for i in range(4) for j in range(i)]  # fmt: skip
    assert plain["metrics"]["lpips_div"] == pytest.approx(np.mean(within), abs=1e-12)
    reals = [((v(a) - v(b)) ** 2).sum() for s in subjects for a in s.real for b in s.real if a is not b]
    assert plain["real"]["exclude_self"]["lpips_real"] == pytest.approx(np.mean(reals), abs=1e-12)
    low, high = plain["intervals"]["dino"]
    assert low < plain["metrics"]["dino"] < high
    for how in ("exclude_self", "include_self"):
        for name, value in plain["real"][how].items():
            low, high = plain["real_intervals"][how][name]
            assert low < value < high, (how, name)
    rng, own = np.random.default_rng(1), [[v(a) @ v(b) for a in s.real for b in s.real if a is not b] for s in subjects]
    means = [np.mean(np.concatenate([own[i] for i in rng.integers(0, 30, 30)])) for _ in range(2000)]
    low, high = np.quantile(means, [0.025, 0.975])  # subjects are drawn, whose photos stay together
    assert plain["real_intervals"]["exclude_self"]["dino"] == pytest.approx([low, high], abs=0.15 * (high - low))


def test_the_record_has_every_subject_s_texts(by_hand):
    def subject(name: str, noun: str, prompts: list[str]) -> Scored:
        groups = [Group(p, p.format(noun), [by_hand.picture(f"{name} {p}")]) for p in prompts]
        return Scored(name, [by_hand.picture(f"{name} 0"), by_hand.picture(f"{name} 1")], groups)

    def of(*prompts: list[str]) -> dict:
        subjects = [subject(*pair, own) for pair, own in zip((("rex", "dog"), ("tin", "can")), prompts, strict=True)]
        return Scorer(subjects, by_hand.networks, by_hand.cache).result(PROTOCOLS["oft"])

    same = of(["a {} here", "a red {}"], ["a {} here", "a red {}"])
    assert same["record"]["texts"] == {"rex": {"a {} here": "a dog here", "a red {}": "a red dog"},
                                       "tin": {"a {} here": "a can here", "a red {}": "a red can"}}  # fmt: skip
    # As google/dreambooth's lists for objects and for what is alive: equally long, and only some prompts are in both.
    mixed = of(["a {} here", "a red {}"], ["a {} here", "a {} in a box"])
    assert same["counts"]["prompts"] == mixed["counts"]["prompts"] == 2
    assert of(["a {} here", "a red {}"], ["a {} here"])["counts"]["prompts"] == "1-2"


def test_compat_takes_four_images_and_no_black_ones(by_hand):
    pictures = [by_hand.picture(f"{k}.png", black=k == 1) for k in range(8)]
    subject = Scored("dog", [by_hand.picture("real"), by_hand.picture("dark", True)], [Group("p", "t", pictures[::-1])])
    plain = Scorer([subject], by_hand.networks, by_hand.cache).result(PROTOCOLS["oft"])
    compat = Scorer([subject], by_hand.networks, by_hand.cache, compat=True).result(PROTOCOLS["oft"])
    assert (plain["counts"]["pairs"], compat["counts"]["pairs"]) == (16, 3)  # 0, 2, 3 against the one photo with light
    for result in (plain, compat):
        assert (result["counts"]["black"], result["counts"]["black_real"]) == (1, 1)
        assert result["black_files"] == ["1.png", "dark"]
    v = by_hand.vector
    mean = np.mean([v(pictures[k]) @ v(subject.real[0]) for k in (0, 2, 3)])
    assert compat["metrics"]["dino"] == pytest.approx(mean, abs=1e-12)


def test_protocols_scale_texts_and_choose_photos(by_hand):
    picture, v = by_hand.picture, by_hand.vector
    groups = [Group(f"p{i}", f"{'t' * i}", [picture(f"g{i}{k}") for k in range(2)]) for i in range(1, 4)]
    subject = Scored("s", [picture("r0"), picture("r1")], groups)
    scorer = Scorer([subject], by_hand.networks, by_hand.cache)
    cosines = [float(v(p) @ Eyes().texts([g.text])[0].double().numpy()) for g in groups for p in g.pictures]
    assert min(cosines) < 0 < max(cosines)
    expected = {"oft": np.mean(cosines), "dreambooth": np.mean(cosines), "dreambench_pp": 100 * np.mean(cosines),
                "customconcept": np.mean([2.5 * max(c, 0) for c in cosines])}  # fmt: skip
    results = {name: scorer.result(PROTOCOLS[name]) for name in expected}
    for name, value in expected.items():
        assert results[name]["metrics"]["clip_t"] == pytest.approx(value, abs=1e-6), name
    assert results["dreambench_pp"]["counts"]["pairs"] == 6 and results["oft"]["counts"]["pairs"] == 12
    one = np.mean([v(p) @ v(subject.real[0]) for g in groups for p in g.pictures])
    assert results["dreambench_pp"]["metrics"]["dino"] == pytest.approx(one, abs=1e-12)


def test_pres_and_drift(by_hand):
    picture, v = by_hand.picture, by_hand.vector
    names = "abcd"
    subject = Scored(
        "s", [picture("r0"), picture("r1")], [Group("p", None, [picture("g")])],
        [Group("a class", None, [picture(n, n == "d") for n in names])],
        [Compared("u", "unrelated", [picture("x"), picture("y", True)], [picture("x0"), picture("y0")]),
         Compared("c", "class", [picture("z")], [picture("z0", True)])],
    )  # fmt: skip
    result = Scorer([subject], by_hand.networks, by_hand.cache).result(PROTOCOLS["oft"])
    assert result["counts"]["black_drift"] == 3 and sorted(result["black_files"]) == ["d", "y", "z0"]
    found = result["metrics"]
    pres = np.mean([v(picture(n)) @ v(r) for n in names for r in subject.real])
    off = [1 - v(picture(n)) @ v(picture(n + "0")) for n in "xyz"]
    assert found["pres"] == pytest.approx(pres, abs=1e-12)
    assert found["drift_dino"] == found["drift_clip"] == pytest.approx(np.mean(off), abs=1e-12)
    assert found["drift_dino_unrelated"] == pytest.approx(np.mean(off[:2]), abs=1e-12)
    assert found["drift_dino_class"] == pytest.approx(off[2], abs=1e-12)
    assert found["clip_t"] is None  # there is no text


def test_nothing_to_compare_is_refused(by_hand):
    with pytest.raises(InputError, match="subject s: has 1 photos and 0 generated images"):
        Scorer([Scored("s", [by_hand.picture("r")], [Group("p", None, [])])], by_hand.networks, by_hand.cache)


def test_batches_order_and_processes_change_nothing(noise, small_world, tmp_path):
    files = noise("all", [f"{i:02d}.png" for i in range(11)])
    pictures = examine(listing(files))
    networks = Networks([PROTOCOLS["oft"], PROTOCOLS["dreambooth"]])
    assert len(networks.made) == 2  # the world's stand for every name

    def scored(batch_size: int, order: list[Picture], part=(0, 1), share=dict, cache=None) -> dict:
        groups = [Group("a {}", "a dog", order[2:8]), Group("b {}", "a red dog", order[8:])]
        own = Scorer([Scored("s", order[:2], groups)], networks, cache or Cache(None), batch_size=batch_size, part=part,
                     share=share)  # fmt: skip
        own.look()
        return own.result(PROTOCOLS["oft"])["metrics"]

    first = scored(32, pictures)
    for other in (scored(1, pictures), scored(4, pictures)):
        assert other == {k: v if v is None else pytest.approx(v, abs=1e-6) for k, v in first.items()}
    mixed = [*pictures[:2][::-1], *pictures[2:8][::-1], *pictures[8:][::-1]]
    assert scored(3, mixed) == {k: v if v is None else pytest.approx(v, abs=1e-6) for k, v in first.items()}

    parts = []
    for rank in range(2):
        embed(pictures, list(networks.made.values()), Cache(None), 4, (rank, 2), lambda f: parts.append(f) or f)
    parts = parts[1::2]  # after what is lacking
    assert len(parts[0]) + len(parts[1]) == 22 and not parts[0].keys() & parts[1].keys()
    scored(4, pictures, cache=Cache(tmp_path / "c"))
    kept = scored(4, pictures, cache=Cache(tmp_path / "c"), part=(7, 8))  # a process without a share of the work
    assert kept == {k: v if v is None else pytest.approx(v, abs=1e-6) for k, v in first.items()}
    for file in (tmp_path / "c").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:20])
    assert scored(4, pictures, cache=Cache(tmp_path / "c")) == {
        k: v if v is None else pytest.approx(v, abs=1e-6) for k, v in first.items()
    }
