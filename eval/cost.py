"""What methods cost: the papers' tables of time, memory and operations, ours printed beside theirs.

    python eval/cost.py methods        every method's step against LoRA's, on the embedded world's UNet
    python eval/cost.py nb_lora_4      NB-LoRA, table 4: the Cayley map's backward, automatic against custom
    python eval/cost.py nb_lora_5      NB-LoRA, table 5: DoRA, PiSSA and NB-LoRA over ranks 2 to 256
    python eval/cost.py nb_lora_6      NB-LoRA, table 6: an m x n product against an r x r inverse
    python eval/cost.py od_lora_6      OD-LoRA, table 6: the overhead of OD-LoRA over LoRA
    python eval/cost.py sorsa_4        SORSA (2409.00055), figure 4: equation 7, equation 14, factors apart
    python eval/cost.py lora_sb_5      LoRA-SB, table 5: what the start costs, as a share of an epoch
    python eval/cost.py lora_sb_6      LoRA-SB, table 6: operations of one forward, at the paper's own sizes

Times and bytes are of this machine, on a small Llama by default (--size 7b takes Llama 2's, random, in bfloat16); the
papers' were taken on large GPUs, so compare the ratios. Variants take turns in one process; times are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from cost_papers import PAPERS, RANKS, architecture
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from turns import IN_PLACE, Trainee, in_turns, now

import vislora
from vislora import world
from vislora.errors import InputError, run_script

SIZES = {  # hidden, intermediate, layers, heads
    "small": (1024, 2752, 2, 8),
    "7b": (4096, 11008, 32, 32),
}


def llama(args) -> tuple[Callable[[], nn.Module], Callable[[nn.Module], torch.Tensor]]:
    """(build, loss) of a random Llama of --size over --tokens random tokens; every linear but the head is adapted."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, wide, layers, heads = SIZES[args.size]
    config = LlamaConfig(hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers, vocab_size=2048,
                         num_attention_heads=heads, num_key_value_heads=heads, use_cache=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    ids = torch.randint(0, 2048, (1, args.tokens), generator=torch.Generator().manual_seed(0)).to(device)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(device, dtype)

    return build, lambda model: model(ids, labels=ids).loss


def methods(args) -> list[list]:
    """Every method on the world's UNet at its own defaults, but rank 16."""
    from diffusers import UNet2DConditionModel

    folder = world.TINY_SD / "unet"
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(4, 4, 16, 16, generator=generator), torch.randn(4, 32, 128, generator=generator)
    times, noise = torch.tensor([10, 200, 500, 900]), torch.randn(4, 4, 16, 16, generator=generator)

    def build() -> nn.Module:
        return UNet2DConditionModel.from_pretrained(folder).to(memory_format=torch.channels_last)

    def loss(model: nn.Module) -> torch.Tensor:
        return (model(x, times, text).sample - noise).square().mean()

    trainees = {name: Trainee(build, loss, name, rank=16) for name in vislora.methods()}
    seconds = in_turns(trainees, args.repeats)
    rows = []
    for name, trainee in trainees.items():
        trained = sum(p.numel() for p in trainee.adapter.parameters())
        rows.append([name, seconds[name] / seconds["lora"], 1000 * seconds[name], trained, trainee.start_seconds])
    return [["method", "step / LoRA's", "ms a step", "trained", "start, s"], *sorted(rows, key=lambda row: row[1])]


def nb_lora_4(args) -> list[list]:
    build, loss = llama(args)
    rank = max(args.ranks)
    own = {how: Trainee(build, loss, "nb_lora", rank=rank, p=1, delta=float(rank), backward=how)
           for how in ("autodiff", "custom")}
    seconds, size = in_turns(own, args.repeats), {name: t.held_bytes() for name, t in own.items()}
    paper = PAPERS["nb_lora_4"]
    rows = [["backward", "time / autodiff", "paper's", "memory / autodiff", "paper's"]]
    for how in own:
        rows.append([how, seconds[how] / seconds["autodiff"], paper[how][0] / paper["autodiff"][0],
                     size[how] / size["autodiff"], paper[how][1] / paper["autodiff"][1]])
    return rows


def nb_lora_5(args) -> list[list]:
    build, loss = llama(args)
    paper = PAPERS["nb_lora_5"]
    rows = [["rank", "method", "time / PiSSA", "paper's", "memory / PiSSA", "paper's", "ms a step"]]
    for rank in args.ranks:
        own = {"dora": Trainee(build, loss, "dora", rank=rank),
               "pissa": Trainee(build, loss, "pissa", rank=rank, niter=1),  # a rough start costs the same steps
               "nb_lora": Trainee(build, loss, "nb_lora", rank=rank, p=1, delta=float(rank))}
        seconds, size = in_turns(own, args.repeats), {name: t.held_bytes() for name, t in own.items()}
        at = RANKS.index(rank)
        for name in own:
            rows.append([rank, name, seconds[name] / seconds["pissa"],
                         paper[name]["time"][at] / paper["pissa"]["time"][at], size[name] / size["pissa"],
                         paper[name]["memory"][at] / paper["pissa"]["memory"][at], 1000 * seconds[name]])
    return rows


def _median_us(call: Callable[[], torch.Tensor], repeats: int) -> float:
    """Median microseconds of a call, after two that warm up."""
    times = []
    for turn in range(repeats + 2):
        began = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if turn >= 2:
            times.append(time.perf_counter() - began)
    return 1e6 * statistics.median(times)


def nb_lora_6(args) -> list[list]:
    m, n = 4096, 4 * 4096
    device = "cuda" if torch.cuda.is_available() else "cpu"
    paper = PAPERS["nb_lora_6"]
    rows = [["rank", "product, us", "inverse, us", "inverse / product", "paper's"]]
    for rank in args.ranks:
        A, B = torch.randn(rank, n, device=device), torch.randn(rank, m, device=device)
        M = torch.eye(rank, device=device) + torch.randn(rank, rank, device=device) / rank**0.5
        product = _median_us(lambda A=A, B=B: B.mT @ A, args.repeats)
        inverse = _median_us(lambda M=M: torch.linalg.inv_ex(M).inverse, 20 * args.repeats)
        theirs = paper["inverse"][RANKS.index(rank)] / paper["product"][RANKS.index(rank)]
        rows.append([rank, product, inverse, inverse / product, theirs])
    return rows


def sorsa_4(args) -> list[list]:
    """A layer as wide as --size's, on --tokens inputs: equation 7, equation 14, and what vislora does."""
    n, device = SIZES[args.size][0], "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(args.tokens, n, device=device)
    rows = [["rank", "x (U diag(S) V)^T, us", "x ((U * S) V)^T, us", "over the first", "((x V^T) * S) U^T, us",
             "over the first"]]  # fmt: skip
    for rank in args.ranks:
        U, S, V = torch.randn(n, rank, device=device), torch.rand(rank, device=device), torch.randn(rank, n).to(device)
        forms = (lambda U=U, S=S, V=V: x @ (U @ torch.diag(S) @ V).mT, lambda U=U, S=S, V=V: x @ ((U * S) @ V).mT,
                 lambda U=U, S=S, V=V: ((x @ V.mT) * S) @ U.mT)  # fmt: skip
        first, second, third = (_median_us(form, args.repeats) for form in forms)
        rows.append([rank, first, second, second / first, third, third / first])
    return rows


def od_lora_6(args) -> list[list]:
    build, loss = llama(args)
    steps = max(40, 4 * args.repeats)  # a whole schedule: the refreshes are part of what a step costs
    own = {"lora": Trainee(build, loss, "lora", steps, rank=32),
           "od_lora": Trainee(build, loss, "od_lora", steps, rank=32, init_rounds=1, init_steps=2)}
    seconds = {name: [] for name in own}
    for _ in range(steps):
        for name, trainee in own.items():
            began = now(trainee.model)
            trainee.step()
            seconds[name].append(now(trainee.model) - began)
    size = {name: t.held_bytes() for name, t in own.items()}
    mean = {name: statistics.fmean(values[2:]) for name, values in seconds.items()}
    rows = [["task", "time a step / LoRA", "memory / LoRA"],
            [f"this machine, {steps} steps", mean["od_lora"] / mean["lora"], size["od_lora"] / size["lora"]]]
    for task, row in PAPERS["od_lora_6"].items():
        rows.append([f"paper, {task}", row["od_lora"][0] / row["lora"][0], row["od_lora"][1] / row["lora"][1]])
    return rows


def lora_sb_5(args) -> list[list]:
    build, loss = llama(args)
    batches = 2
    own = {"lora_sb": Trainee(build, loss, "lora_sb", rank=64, init_batches=batches)}
    step = in_turns(own, args.repeats)["lora_sb"]
    epoch = 1000 * batches * step  # the start sees a thousandth of the epoch's batches
    rows = [["model", "start, s", "epoch, s", "share"],
            [f"{args.size} Llama here, epoch = {1000 * batches} measured steps", own["lora_sb"].start_seconds, epoch,
             own["lora_sb"].start_seconds / epoch]]
    for model, (start, whole) in PAPERS["lora_sb_5"].items():
        rows.append([f"paper, {model}", start, whole, start / whole])
    return rows


def lora_sb_6(args) -> list[list]:
    rows = [["model", "method", "rank", "GMACs", "paper's", "LoRA-SB / LoRA", "paper's"]]
    for model, entries in PAPERS["lora_sb_6"].items():
        reference = None
        for method, rank, theirs in entries:
            macs = _forward_macs(model, method, rank) / 1e9
            reference = reference or (macs, theirs)
            rows.append([model, method, rank, macs, theirs, macs / reference[0], theirs / reference[1]])
    return rows


def _forward_macs(model: str, method: str, rank: int) -> float:
    """Multiply-accumulates of a forward over 256 tokens at full size, counted on tensors without storage.

    In bfloat16, as these models train, where updates always go through thin products.
    """
    with torch.device("meta"):
        net, targets = architecture(model)
    net = net.to(torch.bfloat16)
    vislora.attach(net, method, targets=targets, rank=rank)
    ids, mask = torch.zeros(1, 256, dtype=torch.long, device="meta"), torch.zeros(1, 1, 256, 256, device="meta")
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter, torch.no_grad():
        net(input_ids=ids, attention_mask=mask.to(torch.bfloat16))  # a mask made here: making one would read values
    return counter.get_total_flops() / 2


TABLES = {f.__name__: f for f in (methods, nb_lora_4, nb_lora_5, nb_lora_6, sorsa_4, od_lora_6, lora_sb_5, lora_sb_6)}


def show(rows: list[list]) -> str:
    """The rows as aligned text."""
    text = [[cell if isinstance(cell, str) else f"{cell:,}" if isinstance(cell, int) else f"{cell:.4g}" for cell in row]
            for row in rows]
    widths = [max(len(row[i]) for row in text) for i in range(len(text[0]))]
    return "\n".join("  ".join(c.ljust(w) if i == 0 else c.rjust(w)
                               for i, (c, w) in enumerate(zip(row, widths, strict=True))) for row in text)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS), help="of nb_lora_4, 5 and 6 and sorsa_4")
    parser.add_argument("--repeats", type=int, default=7, help="measured turns")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the Llama")
    parser.add_argument("--tokens", type=int, default=256, help="a step")
    parser.add_argument("--threads", type=int, help="CPU threads; none: torch's choice")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args([word for word in argv if word != "--debug"])
    unknown = sorted(set(args.ranks) - set(RANKS))
    if unknown:
        raise InputError("--ranks", f"{unknown} are not in the papers' tables", f"take some of {list(RANKS)}")
    if args.repeats < 1:
        raise InputError("--repeats", f"{args.repeats} measures nothing", "take 1 or more")
    if args.threads:
        torch.set_num_threads(args.threads)
    began = time.perf_counter()
    rows = TABLES[args.table](args)
    print(f"{args.table} ({torch.get_num_threads()} CPU threads"
          f"{', ' + torch.cuda.get_device_name() if torch.cuda.is_available() else ''}, torch {torch.__version__}, "
          f"{time.perf_counter() - began:.0f} s)\n{show(rows)}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
