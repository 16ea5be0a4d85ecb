"""Adapters in whole pipelines: several at once, swapping, scales, merging, offloading, casting, saving."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.hooks import apply_group_offloading
from stock_loras import attach
from tiny_pipelines import build, image

import vislora
from vislora.errors import InputError

FAMILIES = ["sd1", "sdxl", "sd3", "flux"]
DENOISER = {"sd1": "unet", "sdxl": "unet", "sd3": "transformer", "flux": "transformer"}
SCALE = {"unet": "cross_attention_kwargs", "transformer": "joint_attention_kwargs"}


def pipeline(name: str, folder):
    if name != "sd1":
        return build(name)
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, feature_extractor=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def on(pipe, name: str, method="lora", adapter_name="default", seed=1, **options):
    """An adapter on the denoiser's attention that moves the image."""
    adapter = vislora.attach(pipe, method, targets={DENOISER[name]: "attention"}, name=adapter_name, rank=2, **options)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g))
    return adapter


def near(a, b, base, tolerance=1e-3) -> bool:
    """Whether two images differ by little of what the adapter changed."""
    return bool((a - b).norm() <= tolerance * (a - base).norm())


@pytest.mark.parametrize("name", FAMILIES)
def test_several_weights_scales_and_merging(name, folder):
    pipe = pipeline(name, folder)
    base = image(pipe)
    one, two = on(pipe, name), on(pipe, name, "nb_lora", "second", seed=2, p=2, delta=1.0)
    both = image(pipe)
    one.weight = two.weight = 0.0
    assert torch.equal(image(pipe), base), "weight 0 is the base"
    one.weight = 0.6
    alone = image(pipe)
    two.weight = 0.5
    mixed = image(pipe)
    assert not torch.equal(alone, base) and not torch.equal(mixed, both) and not torch.equal(mixed, alone)
    deltas = {key: delta + two.deltas()[key] for key, delta in one.deltas().items()}
    with one.merged(), two.merged():
        assert near(mixed, image(pipe), base)
        parts = {key: dict(pipe.components[key.partition(".")[0]].named_modules()) for key in deltas}
        for key, delta in deltas.items():
            weight = parts[key][key.partition(".")[2]].weight
            assert weight.shape == delta.shape
    assert torch.equal(image(pipe), mixed), "unmerged, bit for bit"
    word = SCALE[DENOISER[name]]
    one.weight = two.weight = 1.0
    assert torch.equal(image(pipe, **{word: {"scale": 0.0}}), base)
    half = image(pipe, **{word: {"scale": 0.5}})
    one.weight = two.weight = 0.5
    assert near(half, image(pipe), base, 1e-4)
    one.detach()
    two.detach()
    assert torch.equal(image(pipe), base)


@pytest.mark.parametrize("name", ["sd1", "flux"])
def test_hot_swapping(name, folder, tmp_path):
    """One adapter for another between two images, without building the pipeline again; both at hand, one at a time."""
    pipe = pipeline(name, folder)
    base, images = image(pipe), {}
    for seed in (1, 2):
        adapter = on(pipe, name, seed=seed)
        images[seed] = image(pipe)
        adapter.export(tmp_path / str(seed), "diffusers")
        adapter.detach()
    for seed in (1, 2, 1):
        adapter = vislora.load(pipe, tmp_path / str(seed))
        assert near(images[seed], image(pipe), base)
        adapter.detach()
    held = {seed: vislora.load(pipe, tmp_path / str(seed), name=f"n{seed}", weight=0.0) for seed in (1, 2)}
    for seed in (2, 1):
        held[seed].weight = 1.0
        assert near(images[seed], image(pipe), base)
        held[seed].weight = 0.0
    with pytest.raises(InputError, match="taken"):
        vislora.load(pipe, tmp_path / "1", name="n1")


def test_diffusers_own_switches_raise_or_leave_ours_alone(folder):
    pipe = pipeline("sd1", folder)
    base, adapter = image(pipe), on(pipe, "sd1")
    own = image(pipe)
    with pytest.raises(ValueError, match="'default'.* not in the list of present adapters"):
        pipe.set_adapters("default", 0.5)
    with pytest.raises(InputError, match="fuse_lora: .*adapter.merge"):
        pipe.fuse_lora()
    assert torch.equal(image(pipe), own)
    pipe.disable_lora()  # theirs; of ours, adapter.disabled()
    pipe.unload_lora_weights()
    assert torch.equal(image(pipe), own)
    adapter.detach()
    pipe.fuse_lora()
    assert torch.equal(image(pipe), base)


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_ours_beside_a_lora_of_diffusers(first, folder, tmp_path):
    pipe = pipeline("sd1", folder)
    base, other = image(pipe), on(pipe, "sd1", seed=5)
    other.export(tmp_path)
    other.detach()
    if first == "theirs":
        pipe.load_lora_weights(tmp_path, adapter_name="theirs")
        theirs = image(pipe)
        with pytest.raises(InputError, match="base_layer|PEFT|peft|lora_A"):
            on(pipe, "sd1", seed=1)  # whose own factors would be taken for the model's linears
        assert torch.equal(image(pipe), theirs)
        return
    adapter = on(pipe, "sd1", seed=1)
    own = image(pipe)
    pipe.load_lora_weights(tmp_path, adapter_name="theirs")
    both = image(pipe)
    assert not near(own, both, base, 0.05)
    pipe.set_adapters("theirs", 0.0)
    assert near(own, image(pipe), base)
    pipe.set_adapters("theirs", 1.0)
    adapter.weight = 0.0
    theirs = image(pipe)
    adapter.weight = 1.0
    assert not near(theirs, base, both, 0.05)
    pipe.unload_lora_weights()
    assert torch.equal(image(pipe), own)
    adapter.detach()
    assert torch.equal(image(pipe), base)


@pytest.mark.parametrize("name,method", [("sd1", "dora"), ("sd1", "nb_lora"), ("sd3", "vera"), ("flux", "pissa")])
def test_accelerates_offloading(name, method, folder, tmp_path):
    """What enable_sequential_cpu_offload does, with the CPU as the device that computes: between their forwards
    modules hold nothing."""
    pipe = pipeline(name, folder)
    options = {"p": 2, "delta": 1.0} if method == "nb_lora" else {}
    base, adapter = image(pipe), on(pipe, name, method, **options)
    own, root = image(pipe), getattr(pipe, DENOISER[name])
    before = {key: delta.clone() for key, delta in adapter.deltas().items()}
    cpu_offload(root, execution_device="cpu")
    assert all(p.is_meta for p in adapter.parameters()) and all(p.is_meta for p in root.parameters())
    assert close(image(pipe), own)
    adapter.weight = 0.0
    assert torch.equal(image(pipe), base)
    adapter.weight = 1.0
    with pytest.raises(InputError, match="merge: .* is offloaded"):
        adapter.merge()
    adapter.save(tmp_path)
    assert all(torch.equal(delta, before[key]) for key, delta in adapter.deltas().items())
    remove_hook_from_module(root, recurse=True)
    assert close(image(pipe), own)
    adapter.detach()
    again = vislora.load(pipe, tmp_path)
    assert close(image(pipe), own)
    again.detach()
    assert torch.equal(image(pipe), base)


def close(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Equal to rounding: layers whose weights are elsewhere take the plain way, which sums in another order."""
    return bool((one - two).norm() < 1e-5 * two.norm())


@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
@pytest.mark.parametrize("method", ["lora", "nb_lora", "dora"])
def test_diffusers_group_offloading(method, level, folder, tmp_path):
    """Groups of which the disk keeps the numbers, so that what is used without being fetched is noticed."""
    pipe = pipeline("sd1", folder)
    options = {"p": 2, "delta": 1.0} if method == "nb_lora" else {}
    on(pipe, "sd1", method, **options)
    own, more = image(pipe), {} if level == "leaf_level" else {"num_blocks_per_group": 1}
    disk = {} if method == "dora" else {"offload_to_disk_path": str(tmp_path)}
    apply_group_offloading(
        pipe.unet, torch.device("cpu"), torch.device("cpu"), offload_type=level, **more, **disk
    )
    if disk:
        with torch.no_grad():  # what stands there now is what the allocator left
            for parameter in pipe.unet.parameters():
                parameter.data.fill_(float("nan"))
    assert close(image(pipe), own) and close(image(pipe), own)


def test_dora_over_a_disk_is_refused(folder, tmp_path):
    pipe = pipeline("sd1", folder)
    adapter = on(pipe, "sd1", "dora")
    apply_group_offloading(pipe.unet, torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level",
                           offload_to_disk_path=str(tmp_path))  # fmt: skip
    with pytest.raises(InputError, match="is offloaded to a disk"):
        image(pipe)
    with pytest.raises(InputError, match="merge: .* is offloaded"):
        adapter.merge()


@pytest.mark.parametrize("method", vislora.methods())
def test_casting_a_pipeline(method, folder):
    """pipe.to(dtype) takes the adapter along; what it adds is then of that precision."""
    pipe = pipeline("sd1", folder)
    x, t, text = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), 500, torch.ones(1, 4, 32)

    def run(dtype):
        with torch.no_grad():
            return pipe.unet(x.to(dtype), t, text.to(dtype)).sample.float()

    adapter = attach(pipe, "sd1", method, {"unet": "attention"}, **({"rank": 2} if method != "vera" else {}))
    before = adapter.deltas()
    pipe.to(torch.bfloat16)
    assert {p.dtype for p in adapter.parameters()} == {torch.bfloat16}
    for name, delta in adapter.deltas().items():
        assert (delta - before[name]).norm() < 0.05 * before[name].norm(), name
    with adapter.disabled():
        low = run(torch.bfloat16)
    moved = run(torch.bfloat16) - low
    assert torch.isfinite(moved).all() and moved.norm() > 0


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_merged_pipeline_is_saved_whole(name, folder, tmp_path):
    pipe = pipeline(name, folder)
    base, adapter = image(pipe), on(pipe, name)
    own = image(pipe)
    adapter.merge()
    pipe.save_pretrained(tmp_path / "merged")
    adapter.unmerge()
    assert torch.equal(image(pipe), own)
    adapter.detach(merge=True)
    assert near(own, image(pipe), base)
    pipe.save_pretrained(tmp_path / "whole")
    for kind in ("merged", "whole"):
        again = DiffusionPipeline.from_pretrained(tmp_path / kind)
        again.set_progress_bar_config(disable=True)
        assert near(own, image(again), base)
