"""LPIPS as distances between vectors, against lpips itself."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from urllib.error import URLError

import lpips
import pytest
import torch
from safetensors.torch import save_file

from vislora.errors import InputError
from vislora.metrics import backbones
from vislora.metrics.cache import Cache
from vislora.metrics.features import compare, embed, matrix
from vislora.metrics.perceptual import Perceptual, distances, perceptual
from vislora.metrics.pictures import examine, listing
from vislora.metrics.transforms import Transform

FILE = "alexnet-owt-7be5be79.pth"


@pytest.mark.parametrize(("net", "heads"), [("alex", True), ("squeeze", True), ("squeeze", False)])
def test_equal_to_lpips_on_pairs(net, heads):
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        own = Perceptual(lpips.LPIPS(net=net, lpips=heads, pretrained=heads, pnet_rand=True, verbose=False), "it",
                         Transform(64, "bilinear"))
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(3, 3, 64, 64, generator=g) * 2 - 1, torch.rand(3, 3, 64, 64, generator=g) * 2 - 1
    (a, weights), (b, _) = own.embed(x), own.embed(y)
    for i in range(3):
        theirs = own.network(x[i : i + 1].expand(3, -1, -1, -1), y).flatten()
        assert torch.allclose(distances(a[i], b, weights), theirs, rtol=1e-4, atol=1e-6)
        assert theirs.min() > 1e-3
    assert distances(a[0], a[:1], weights).item() == 0


def test_groups_are_compared_once_and_kept(noise, tmp_path, monkeypatch):
    world = perceptual()
    files = examine(listing(noise("a", [f"{i}.png" for i in range(5)])))
    cache = Cache(tmp_path / "cache")
    groups = [(files[:2], files[2:]), (files, files)]
    first, second = compare(groups, world, cache)
    assert first.shape == (2, 3) and second.shape == (5, 5)
    assert abs(second - second.T).max() < 1e-6 and (second.diagonal() == 0).all()
    assert first == pytest.approx(second[:2, 2:], abs=1e-6)
    monkeypatch.setattr(world, "embed", None)  # would fail if it were asked
    again = compare(groups, world, Cache(tmp_path / "cache"))
    assert (again[0] == first).all() and (again[1] == second).all()


def test_processes_share_the_groups(noise):
    world = perceptual()
    files = examine(listing(noise("a", [f"{i}.png" for i in range(4)])))
    groups = [([a], files) for a in files]
    whole = compare(groups, world, Cache(None))
    parts = []

    def keep(found: dict) -> dict:
        if None in found.values():  # what is lacking
            return found
        parts.append(found)
        raise InterruptedError

    for rank in range(2):
        with pytest.raises(InterruptedError):
            compare(groups, world, Cache(None), (rank, 2), keep)
    assert [len(part) for part in parts] == [2, 2] and not parts[0].keys() & parts[1].keys()
    joined = compare(groups, world, Cache(None), (8, 9), lambda found: {**found, **parts[0], **parts[1]})
    assert all((a == b).all() for a, b in zip(whole, joined, strict=True))


def test_processes_whose_caches_differ_still_see_everything(noise, small_world):
    """Two threads in the place of two processes, each of which has seen one picture already, and not the same."""
    dino, world = backbones.dino("s16", "full"), perceptual()
    files = examine(listing(noise("a", [f"{i}.png" for i in range(5)])))
    groups = [([a], files) for a in files]
    whole, caches = Cache(None), [Cache(None), Cache(None)]
    embed(files, [dino], whole)
    expected = compare(groups, world, whole)
    for cache, seen in zip(caches, (files[0], files[3]), strict=True):
        embed([seen], [dino], cache)
        compare([([seen], files)], world, cache)
    told, meeting = [{}, {}], Barrier(2, timeout=120)

    def work(rank: int) -> list:
        def share(found: dict) -> dict:
            told[rank] = found
            meeting.wait()
            both = {**told[0], **told[1]}
            meeting.wait()
            return both

        embed(files, [dino], caches[rank], 2, (rank, 2), share)
        return compare(groups, world, caches[rank], (rank, 2), share)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(work, range(2)))
    for cache, rows in zip(caches, found, strict=True):
        assert matrix(files, dino, cache) == pytest.approx(matrix(files, dino, whole), abs=1e-6)
        assert all(a == pytest.approx(b, abs=1e-6) for a, b in zip(rows, expected, strict=True))


def test_a_missing_trunk_says_what_belongs_where(tmp_path):
    with pytest.raises(InputError, match=rf"alexnet.safetensors: no such file.*torchvision's {FILE}"):
        perceptual(str(tmp_path))
    (tmp_path / "alexnet.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InputError, match="is no trunk for LPIPS"):
        perceptual(str(tmp_path))


def test_offline_the_papers_trunk_is_torchvision_s_file_in_its_cache(trunk, tmp_path, monkeypatch):
    def unreachable(*args, **options):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    found = perceptual("papers")
    assert found.identifier == "lpips 0.1 alex" and found.transform.name.startswith("full512_bilinear")
    state = {name: tensor for name, tensor in torch.load(trunk / FILE).items() if name.startswith("features")}
    assert torch.equal(found.network.net.slice1[0].weight, state["features.0.weight"])
    save_file(state, tmp_path / "alexnet.safetensors")
    assert perceptual(str(tmp_path)).view == found.view
    (trunk / FILE).unlink()
    with pytest.raises(InputError, match=rf"^{FILE}: .*no network.* -> put it into {trunk}, or .*alexnet.safetensors"):
        perceptual("papers")
