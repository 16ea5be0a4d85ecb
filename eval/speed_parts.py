"""What is paid beside a training step: NB-LoRA's Cayley map, loading and swapping adapters, merging, merged inference.

    python eval/speed_parts.py cayley     all layers in chunks against one by one, forward and backward
    python eval/speed_parts.py files      loading, swapping and merging against diffusers with PEFT, on the world's UNet
    python eval/speed_parts.py inference  the merged and the unmerged UNet's forward against the base's
    python eval/speed_parts.py step       what of a method's step its operations explain, and what the optimizer takes

Sides take turns in one process, on one thread of a CPU and in its processor time, or by the clock on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from cost import show
from diffusers import StableDiffusionPipeline
from speed import spread
from speed_models import HOSTS
from speed_variants import Variant
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from turns import IN_PLACE, in_turns_seconds

import vislora
from vislora import adapters, linalg, world
from vislora.errors import InputError, run_script
from vislora.update import Update

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def cayley_map(pairs: int, sizes: list[tuple[int, int, int]] | None = None) -> list[dict]:
    """All updates of L layers of width d at rank r and their gradients, over the same layer by layer: by the formula's
    own derivative, and by autograd's. And the map alone, of factors stacked already, under autograd's one by one.
    """
    rows = []
    for width, rank, layers in sizes or SIZES:
        model = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers)).to(DEVICE)
        words = {"rank": rank, "p": 1, "delta": float(rank)}
        adapter = vislora.attach(model, "nb_lora", targets="all-linear", **words)
        part = next(iter(adapter.parts.values()))
        tensors = [part.tensors_of(site) for site in part.sites]
        kind = adapters.get("nb_lora")
        sides = {"together": lambda part=part: _backward(part())}
        for how in ("custom", "autodiff"):
            method = kind(**words, backward=how)
            sides[how] = lambda method=method, tensors=tensors: _backward([method.factors(t) for t in tensors])
        single = [(t.A.detach().requires_grad_(), t.B.detach().requires_grad_()) for t in tensors]
        stacks = [tuple(torch.stack([single[i][j] for i in group]).detach().requires_grad_() for j in (0, 1))
                  for group in part.groups()]  # fmt: skip
        sides["map, one by one"] = lambda single=single: _map(single, "autodiff")
        sides["map, stacked"] = lambda stacks=stacks: _map(stacks, "custom")
        seconds = in_turns_seconds(sides, pairs, DEVICE)
        ratios = {f"{how}, one by one / together": spread(seconds[how], seconds["together"])
                  for how in ("custom", "autodiff")}  # fmt: skip
        alone = spread(seconds["map, one by one"], seconds["map, stacked"])
        ratios["the map alone, autodiff one by one / stacked"] = alone
        rows.append({"what": f"d {width}, r {rank}, {layers} layers"} | ratios)
        adapter.detach()
    return rows


def _map(pairs: list[tuple[Tensor, Tensor]], how: str) -> None:
    """The Cayley map of each and its derivative towards both, for gradients as dense as a loss gives."""
    for down, up in pairs:
        made = linalg.cayley(down, up, how)
        torch.autograd.grad(made, (down, up), made)


def _backward(updates: list[Update]) -> None:
    torch.stack([update.up.sum() + update.down.sum() for update in updates]).sum().backward()


def files(pairs: int) -> list[dict]:
    """diffusers' seconds over ours: an adapter of rank 16 into a pipeline, another in its place, into the weights."""
    with _pipelines() as (ours, theirs, saved):
        at = itertools.count()

        def load_ours() -> None:
            vislora.load(ours, saved[0], name=f"n{next(at)}").detach()

        def load_theirs() -> None:
            theirs.load_lora_weights(saved[0], adapter_name="fresh")
            theirs.delete_adapters("fresh")

        rows = [_row("load and take away", load_ours, load_theirs, pairs)]
        own = [vislora.load(ours, file, name=name, weight=0.0) for name, file in zip("ab", saved, strict=True)]
        for name, file in zip("ab", saved, strict=True):
            theirs.load_lora_weights(file, adapter_name=name)
        turns = {"ours": itertools.cycle((0, 1)), "theirs": itertools.cycle("ab")}

        def swap_ours() -> None:
            chosen = next(turns["ours"])
            own[chosen].weight, own[1 - chosen].weight = 1.0, 0.0

        rows.append(_row("swap", swap_ours, lambda: theirs.set_adapters(next(turns["theirs"])), pairs))
        own[1].detach()
        own[0].weight = 1.0
        theirs.set_adapters("a")
        theirs.delete_adapters("b")

        def fold_ours() -> None:
            own[0].merge()
            own[0].unmerge()

        def fold_theirs() -> None:
            theirs.fuse_lora()
            theirs.unfuse_lora()

        return [*rows, _row("merge and unmerge", fold_ours, fold_theirs, pairs)]


def inference(pairs: int) -> list[dict]:
    """The UNet's forward, adapted and merged, over the base's; and how far apart what both make is."""
    with _pipelines() as (ours, theirs, saved), torch.no_grad():
        adapter = vislora.load(ours, saved[0])
        config = ours.unet.config
        noise = torch.Generator().manual_seed(0)
        x = torch.randn(4, config.in_channels, config.sample_size, config.sample_size, generator=noise).to(DEVICE)
        text = torch.randn(4, 77, config.cross_attention_dim, generator=noise).to(DEVICE)

        def run(unet: nn.Module) -> Tensor:
            return unet(x, 500, text).sample

        def over_base(what: str) -> dict:
            sides = {"base": lambda: run(theirs.unet), "ours": lambda: run(ours.unet)}
            seconds = in_turns_seconds(sides, pairs, DEVICE)
            return {"what": what, "ratio": spread(seconds["ours"], seconds["base"])}

        rows, unmerged = [over_base("unmerged / base")], run(ours.unet)
        adapter.merge()
        apart = ((run(ours.unet) - unmerged).abs().max() / unmerged.abs().max()).item()
        rows.append(over_base("merged, with the adapter still at hand / base"))
        adapter.detach(merge=True)
        return [*rows, over_base("merged for good / base"), {"what": "merged and unmerged", "apart, relative": apart}]


def step(pairs: int, size: str = "usual") -> list[dict]:
    """Of methods at rank 16, over the frozen model: the operations of their products, and the time of a step without
    the optimizer and with it."""
    rows = []
    for name in ("sd15", "vit_b") if DEVICE == "cuda" else ("unet", "vit"):
        host = HOSTS[name](size)
        rank = min(16, host.ranks[0])
        every = {kind: Variant(host, kind, rank, torch.float32, DEVICE) for kind in ("frozen", *STEPS)}
        operations, sides = {}, {}
        for kind, variant in every.items():
            variant.step()
            with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
                variant.backward()
            operations[kind] = counter.get_total_flops()
            sides |= {(kind, True): variant.step, (kind, False): lambda variant=variant: _plain(variant)}
        seconds = in_turns_seconds(sides, pairs, DEVICE)
        frozen = seconds["frozen", True]
        for kind in STEPS:
            rows.append({"what": f"{name}, {kind} over frozen", "operations": operations[kind] / operations["frozen"],
                         "forward and backward": spread(seconds[kind, False], frozen),
                         "with the optimizer": spread(seconds[kind, True], frozen)})  # fmt: skip
    return rows


def _plain(variant: Variant) -> None:
    """A step without its optimizer's."""
    variant.backward()
    variant.model.zero_grad()
    variant.inputs[0].grad = None


def _row(what: str, ours: Callable, theirs: Callable, pairs: int) -> dict:
    seconds = in_turns_seconds({"ours": ours, "theirs": theirs}, pairs, DEVICE)
    return {"what": what, "diffusers / ours": spread(seconds["theirs"], seconds["ours"]),
            "ours, ms": 1000 * sorted(seconds["ours"])[pairs // 2]}  # fmt: skip


@contextlib.contextmanager
def _pipelines() -> Iterator[tuple[StableDiffusionPipeline, StableDiffusionPipeline, list[Path]]]:
    """Two pipelines of the world's model, and two LoRA files of rank 16 for them, as diffusers writes them."""
    log, made = logging.getLogger("vislora"), []
    level = log.level
    log.setLevel(logging.ERROR)  # where an exported file is
    for _ in range(2):
        pipe = StableDiffusionPipeline.from_pretrained(world.TINY_SD, safety_checker=None, local_files_only=True)
        pipe.unet.to(memory_format=torch.channels_last)
        made.append(pipe.to(DEVICE))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, at every second adapter
        saved = []
        for seed in range(2):
            adapter = vislora.attach(made[0].unet, adapters.get("lora")(rank=16), seed=seed)
            noise = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for p in adapter.parameters():
                    p.copy_(0.05 * torch.randn(p.shape, generator=noise))
            saved.append(adapter.export(Path(folder) / str(seed), format="diffusers"))
            adapter.detach()
        try:
            yield made[0], made[1], saved
        finally:
            log.setLevel(level)


PARTS = {"cayley": cayley_map, "files": files, "inference": inference, "step": step}
STEPS = ("lora", "nb_lora", "dora", "od_lora", "sorsa")
SIZES = [(320, 16, 128), (768, 16, 128), (768, 64, 128), (768, 128, 32)]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--pairs", type=int, default=20, help="measured turns")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args([word for word in argv if word != "--debug"])
    if args.pairs < 1:
        raise InputError("--pairs", f"{args.pairs} measures nothing", "take 1 or more, 20 for a ratio to trust")
    torch.set_num_threads(1)
    began = time.perf_counter()
    rows = PARTS[args.part](args.pairs)
    for row in rows:
        print("\n".join(_lines(row)), flush=True)
    print(f"{args.pairs} pairs, {DEVICE}, torch {torch.__version__}, {time.perf_counter() - began:.0f} s")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _lines(row: dict) -> list[str]:
    table = [[row["what"], "median", "quartiles"]]
    for name, value in row.items():
        if isinstance(value, list):
            table.append([name, f"{value[0]:.3f}", f"{value[1]:.3f}-{value[2]:.3f}"])
        elif name != "what":
            table.append([name, f"{value:.4g}", ""])
    return show(table).splitlines()


if __name__ == "__main__":
    run_script(main)
