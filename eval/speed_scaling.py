"""How the cost of a training step grows: with the rank, the number of layers, the tokens, and the processes.

    python eval/speed_scaling.py rank         32 layers of 512, 512 tokens, ranks 4 to 256
    python eval/speed_scaling.py layers       4 to 64 layers, rank 16
    python eval/speed_scaling.py tokens       64 to 4,096 tokens, rank 16
    python eval/speed_scaling.py processes    one step of DDP, of 1, 2, 4 ... processes with a batch each
    python eval/speed_scaling.py compile      tiny-sd's UNet in compiled graphs over one without, and the compiling

The first three compare with the frozen model, as eval/speed.py does: variants take turns, on one CPU thread and in its
processor time, or by a GPU's events. `processes` goes by the clock, over gloo with one thread each or nccl with a GPU
each; whoever has fewer cores than processes measures their lack.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path

import torch
from cost import show
from speed import measure, spread
from speed_models import Host, noise
from speed_variants import Variant
from torch import distributed as group
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel
from turns import in_turns_seconds

from vislora import world
from vislora.errors import InputError, run_script

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VARIANTS = ["peft:lora", "lora", "nb_lora", "dora", "od_lora", "sorsa"]
OF_PART = {"processes": ["lora", "nb_lora", "full"], "compile": ["lora", "nb_lora", "od_lora", "sorsa"]}
WIDTH = 512
GROWTH = {  # what grows: its values; the rest stays at the middle of these
    "rank": (4, 16, 64, 128, 256),
    "layers": (4, 16, 64),
    "tokens": (64, 256, 1024, 4096),
}
USUAL = {"rank": 16, "layers": 32, "tokens": 512}


def stack(layers: int, tokens: int, width: int = WIDTH) -> Host:
    """`layers` square linear layers of `width`, one after the other, over `tokens` rows.

    Their weights keep the size of what goes through: by torch's own, a third of its square at every layer, gradients
    would soon be denormal numbers, which a CPU is slow with.
    """

    def build() -> nn.Module:
        model = nn.ModuleDict({f"layer{i}": nn.Linear(width, width, bias=False) for i in range(layers)})
        for layer in model.values():
            nn.init.normal_(layer.weight, std=width**-0.5)
        return model

    def call(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        x = inputs[0]
        for layer in model.values():
            x = layer(x)
        return x

    targets = [f"layer{i}" for i in range(layers)]
    return Host(f"{layers} layers", build, lambda: (noise(tokens, width),), call, targets)


def growth(part: str, args) -> list[dict]:
    """Rows of `measure`, with `part` and its value."""
    rows, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for value in args.values or GROWTH[part]:
            at = USUAL | {part: value}
            host = stack(at["layers"], at["tokens"], args.width)
            found = measure(host, at["rank"], ["frozen", *args.variants], args.pairs, "float32", DEVICE)
            frozen = found[0]["seconds"]
            for row in found:
                rows.append({"part": part, "value": value, "variant": row["variant"], "ms": 1000 * row["seconds"],
                             "over frozen": row["over frozen"], "added ms": 1000 * (row["seconds"] - frozen),
                             "saved MiB": (row["saved"] - found[0]["saved"]) / 2**20})  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    return rows


def growth_table(rows: list[dict]) -> str:
    part, values = rows[0]["part"], list(dict.fromkeys(row["value"] for row in rows))
    of = {(row["variant"], row["value"]): row for row in rows}
    out = [[f"step / frozen, by {part}", *map(str, values), "more saved, MiB, at the last"]]
    for name in dict.fromkeys(row["variant"] for row in rows):
        own = [of[name, value] for value in values]
        if name == "frozen":
            cells = [f"{row['ms']:.1f}" for row in own]
        else:
            cells = [f"{row['over frozen'][0]:.3f}" for row in own]
        out.append([name + ", ms" * (name == "frozen"), *cells, f"{own[-1]['saved MiB']:.1f}"])
    return show(out)


def processes(part: str, args) -> list[dict]:
    """Seconds of a step of one process and of several, each with a batch of its own, and what is sent a step."""
    most = torch.cuda.device_count() if DEVICE == "cuda" else os.cpu_count()
    counts = args.values or [n for n in (1, 2, 4, 8) if n <= max(most, 2)]
    if DEVICE == "cuda" and max(counts) > most:
        raise InputError("--values", f"{max(counts)} processes, and there are {most} GPUs", "take no more than these")
    rows = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
            free.bind(("localhost", 0))
            where = f"tcp://localhost:{free.getsockname()[1]}"
            free.close()
            multiprocessing.spawn(_train, (count, where, folder, args.variants, args.pairs, args.width), nprocs=count)
            rows += json.loads((Path(folder) / "rows.json").read_text())
    one = {row["variant"]: row["ms"] for row in rows if row["value"] == counts[0]}
    return [row | {"over the first": row["ms"] / one[row["variant"]]} for row in rows]


def _train(rank: int, count: int, where: str, folder: str, variants: list[str], pairs: int, width: int) -> None:
    """One of `count` processes; the first writes the medians to `folder`."""
    torch.set_num_threads(1)
    device = f"cuda:{rank}" if DEVICE == "cuda" else "cpu"
    group.init_process_group("nccl" if DEVICE == "cuda" else "gloo", init_method=where, rank=rank, world_size=count)
    host, rows = stack(USUAL["layers"], USUAL["tokens"], width), []
    for name in variants:
        variant = Variant(host, name, USUAL["rank"], torch.float32, device)
        trained = [p for p in variant.model.parameters() if p.requires_grad]
        inner, seconds = variant.model, []
        shared = DistributedDataParallel(_Called(host, inner), device_ids=None if device == "cpu" else [rank])
        for turn in range(pairs + 2):
            group.barrier()
            began = time.perf_counter()
            loss = shared(*variant.inputs).float().square().mean()
            (loss if variant.penalty is None else loss + variant.penalty()).backward()
            variant.optimizer.step()
            variant.optimizer.zero_grad()
            variant.inputs[0].grad = None
            group.barrier()  # on a GPU it waits for the device
            if turn >= 2:
                seconds.append(time.perf_counter() - began)
        rows.append({"part": "processes", "value": count, "variant": name, "ms": 1000 * statistics.median(seconds),
                     "sent MiB": sum(p.nbytes for p in trained) / 2**20})  # fmt: skip
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps(rows))
    group.destroy_process_group()


class _Called(nn.Module):
    """A host's model as one module whose forward is the host's call, for DDP to wrap."""

    def __init__(self, host: Host, model: nn.Module):
        super().__init__()
        self.host, self.model = host, model

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.host.call(self.model, inputs)


def processes_table(rows: list[dict]) -> str:
    out = [["variant", "processes", "ms a step", "over the first", "gradients, MiB"]]
    for row in sorted(rows, key=lambda row: (row["variant"], row["value"])):
        out.append([row["variant"], row["value"], row["ms"], row["over the first"], row["sent MiB"]])
    return show(out)


def compiled(part: str, args) -> list[dict]:
    """tiny-sd's UNet: a step in compiled graphs over one without, and the seconds of the first compiled step."""
    from diffusers import UNet2DConditionModel

    config = UNet2DConditionModel.load_config(world.TINY_SD / "unet")

    def build() -> nn.Module:
        return UNet2DConditionModel.from_config(config).to(memory_format=torch.channels_last)

    def inputs() -> tuple[torch.Tensor, ...]:
        side, text = config["sample_size"], config["cross_attention_dim"]
        times = torch.tensor([3, 200, 500, 700])
        return noise(4, config["in_channels"], side, side), times, noise(4, 77, text, seed=1)

    host = Host("tiny-sd", build, inputs, lambda m, x: m(*x).sample, ["to_q", "to_k", "to_v", "to_out.0"])
    rows, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in ["frozen", *args.variants]:
            torch._dynamo.reset()
            plain, graph = (Variant(host, name, USUAL["rank"], torch.float32, DEVICE) for _ in range(2))
            graph.model.compile()
            began = time.perf_counter()
            graph.step()
            first = time.perf_counter() - began
            seconds = in_turns_seconds({"plain": plain.step, "compiled": graph.step}, args.pairs, DEVICE)
            ratio = spread(seconds["compiled"], seconds["plain"])
            rows.append({"part": part, "variant": name, "compiled / plain": ratio,
                         "plain ms": 1000 * statistics.median(seconds["plain"]), "first step s": first})  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    return rows


def compiled_table(rows: list[dict]) -> str:
    out = [["variant", "compiled / plain", "quartiles", "plain, ms", "first step, s"]]
    for row in rows:
        middle, low, high = row["compiled / plain"]
        out.append([row["variant"], f"{middle:.3f}", f"{low:.3f}-{high:.3f}", row["plain ms"], row["first step s"]])
    return show(out)


def plot(rows: list[dict], path: Path) -> None:
    """The step over the frozen model's, a line a variant; of processes, over the first number's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes, part = figure.subplots(), rows[0]["part"]
    for name in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == name]
        y = [row["over the first"] if part == "processes" else row["over frozen"][0] for row in own]
        axes.plot([row["value"] for row in own], y, marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel(part)
    axes.set_ylabel("step / that of the fewest" if part == "processes" else "step / frozen model's")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


PARTS = {**dict.fromkeys(GROWTH, (growth, growth_table)), "processes": (processes, processes_table),
         "compile": (compiled, compiled_table)}  # fmt: skip


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--values", type=int, nargs="+", help="of what grows; none: those above")
    parser.add_argument("--variants", nargs="+", help="none: LoRA, PEFT's, NB-LoRA, DoRA, OD-LoRA, SORSA, by part")
    parser.add_argument("--width", type=int, default=WIDTH, help="of the layers")
    parser.add_argument("--pairs", type=int, default=20, help="measured turns")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--plot", type=Path, help="draw the ratios here (PNG)")
    args = parser.parse_args([word for word in argv if word != "--debug"])
    if args.pairs < 1:
        raise InputError("--pairs", f"{args.pairs} measures nothing", "take 1 or more, 20 for a ratio to trust")
    if args.values and (args.part == "compile" or min(args.values) < 1):
        raise InputError("--values", f"{args.values} beside {args.part}", "leave it out, or take numbers from 1 on")
    if args.plot and args.part == "compile":
        raise InputError("--plot", "has no axis beside compile", "leave it out")
    args.variants = args.variants or OF_PART.get(args.part, VARIANTS)
    began, (run, table) = time.perf_counter(), PARTS[args.part]
    rows = run(args.part, args)
    print(table(rows))
    print(f"{args.pairs} turns, {DEVICE}, torch {torch.__version__}, {time.perf_counter() - began:.0f} s")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    run_script(main)
