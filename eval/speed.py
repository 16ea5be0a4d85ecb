"""What a training step costs with every method, as paired ratios of steps that take turns in one process.

    python eval/speed.py --json speed.json --plot speed.png      everything, hours on one core
    python eval/speed.py --quick                                 the UNet and the ViT, r 16, the methods of the goals
    python eval/speed.py --check                                 the goals alone; status 1 past one of them + 0.03

Each is compared with the frozen model, forward and backward to its input; "joined" is that model with its frozen q, k
and v as one product, where its own library can do that, "joined:lora" LoRA on the joined layers: what one update for
all three would cost. One CPU thread and its processor time, or a GPU's events.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from cost import show
from speed_goals import check, wanted
from speed_models import FULL, HOSTS, SMALL
from speed_variants import Variant, counts, model_of, names

from vislora.errors import InputError, run_script

QUICK = {"hosts": ["unet", "vit"], "variants": ["frozen", "peft:lora", "lora", "nb_lora", "dora", "full"]}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HEAD = ["model", "r", "variant", "step / frozen", "IQR", "/ PEFT's LoRA", "ms", "ops", "casts", "saved", "peak"]


def measure(host, rank: int, chosen: list[str], pairs: int, dtype: str, device: str, batch: int = 1) -> list[dict]:
    """One row for each variant on one model at one rank.

    Turns alternate their direction, so that no variant always follows the same one; the first two warm up.
    """
    base = model_of(host, DTYPES[dtype], device)
    variants = {name: Variant(host, name, rank, DTYPES[dtype], device, base, batch) for name in chosen}
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    for turn in range(pairs + 2):
        for name in chosen if turn % 2 else chosen[::-1]:
            took = variants[name].seconds()
            if turn >= 2:
                seconds[name].append(took)
    rows = []
    for name in chosen:
        row = {"model": host.name, "rank": rank, "dtype": dtype, "variant": name, "pairs": pairs, "batch": batch,
               "seconds": statistics.median(seconds[name]), **counts(variants[name])}
        for reference in ("frozen", "norms", "peft:lora", "lora"):
            if reference in seconds:
                row[f"over {reference}"] = spread(seconds[name], seconds[reference])
        rows.append(row)
    for row in rows:
        row |= {f"{what} over frozen": row[what] / rows[0][what] for what in ("saved", "peak")}
    return rows


def spread(own: list[float], reference: list[float]) -> list[float]:
    """Median and quartiles [median, lower, upper] of the ratios of pairs."""
    ratios = [a / b for a, b in zip(own, reference, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return [statistics.median(ratios), quartiles[0], quartiles[2]]


def table(rows: list[dict]) -> str:
    out = [HEAD]
    for row in rows:
        frozen, peft = row["over frozen"], row.get("over peft:lora", [float("nan")])
        out.append([label(row), str(row["rank"]), row["variant"], f"{frozen[0]:.3f}",
                    f"{frozen[1]:.3f}-{frozen[2]:.3f}", f"{peft[0]:.3f}", f"{1000 * row['seconds']:.1f}",
                    str(row["ops"]), str(row["casts"]), f"{row['saved over frozen']:.3f}",
                    f"{row['peak over frozen']:.3f}"])  # fmt: skip
    return show(out)


def label(row: dict) -> str:
    """The model, its dtype and its batch, where these are not the usual ones."""
    batch = f" x{row['batch']}" if row["batch"] > 1 else ""
    return row["model"] + (" bf16" if row["dtype"] == "bfloat16" else "") + batch


def plot(rows: list[dict], path: Path) -> None:
    """Bars of step / frozen with their quartiles, a panel for each model and rank."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((label(row), row["rank"]) for row in rows))
    tallest = max(sum((label(row), row["rank"]) == panel for row in rows) for panel in panels)
    figure = Figure(figsize=(4.2 * len(panels), 1.2 + 0.24 * tallest), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        own = [row for row in rows if (label(row), row["rank"]) == panel and row["variant"] != "frozen"]
        own.sort(key=lambda row: -row["over frozen"][0])
        middle = [row["over frozen"][0] for row in own]
        sides = [[m - row["over frozen"][1] for m, row in zip(middle, own, strict=True)],
                 [row["over frozen"][2] - m for m, row in zip(middle, own, strict=True)]]  # fmt: skip
        kinds = {"peft": "tab:orange", "full": "tab:gray", "join": "tab:gray"}
        colours = [kinds.get(row["variant"][:4], "tab:blue") for row in own]
        axes.barh([row["variant"] for row in own], middle, xerr=[[max(0, s) for s in side] for side in sides],
                  color=colours, height=0.7)  # fmt: skip
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xlim(left=min(0.9, *middle))
        axes.set_title(f"{panel[0]}, r = {panel[1]}", fontsize=9)
        axes.set_xlabel("step / frozen model's", fontsize=8)
        axes.tick_params(labelsize=7)
    figure.savefig(path, dpi=110)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", nargs="+", choices=HOSTS, help="models; none: those for the CPU or the GPU at hand")
    parser.add_argument("--variants", nargs="+", choices=names(), default=names())
    parser.add_argument("--ranks", type=int, nargs="+", help="none: each model's own")
    parser.add_argument("--pairs", type=int, default=20, help="measured turns")
    parser.add_argument("--batch", type=int, default=1, help="times a model's usual batch: more to do for the device")
    parser.add_argument("--dtype", choices=DTYPES, help="of the base; none: float32, bfloat16 on a GPU")
    parser.add_argument("--size", choices=("usual", "tiny"), default="usual", help="tiny: to see that it runs")
    parser.add_argument("--quick", action="store_true", help="a few minutes' choice of models and variants")
    parser.add_argument("--check", action="store_true", help="measure what the goals need, and fail past one + 0.03")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--plot", type=Path, help="draw the ratios here (PNG)")
    args = parser.parse_args([word for word in argv if word != "--debug"])
    if args.pairs < 1:
        raise InputError("--pairs", f"{args.pairs} measures nothing", "take 1 or more, 20 for a ratio to trust")
    if args.batch < 1:
        raise InputError("--batch", f"{args.batch} is no number of batches", "take 1 or more")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.hosts = args.hosts or list(FULL if device == "cuda" else SMALL)
    args.dtype = args.dtype or ("bfloat16" if device == "cuda" else "float32")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows, began = [], time.perf_counter()
        for name, rank, chosen, dtype in wanted(args.hosts, args.size) if args.check else plan(args):
            host = HOSTS[name](args.size)
            found = measure(host, rank, chosen, args.pairs, dtype, device, args.batch)
            print(table(found), flush=True)
            rows += found
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        if args.plot:
            plot(rows, args.plot)
        where = torch.cuda.get_device_name() if device == "cuda" else "one CPU thread"
        print(f"{args.pairs} pairs, {where}, torch {torch.__version__}, {time.perf_counter() - began:.0f} s")
        if args.check and not check(rows):
            raise SystemExit(1)
    finally:
        torch.set_num_threads(threads)


def plan(args) -> list[tuple[str, int, list[str], str]]:
    """(model, rank, variants, dtype) of every measurement asked for; the frozen model is always among the variants."""
    hosts = QUICK["hosts"] if args.quick and args.hosts == list(SMALL) else args.hosts
    chosen = QUICK["variants"] if args.quick else args.variants
    out = []
    for name in hosts:
        host = HOSTS[name](args.size)
        without = ("frozen", *host.without, *(() if host.joined else ("joined", "joined:lora")))
        own = [v for v in chosen if v not in without]
        ranks = args.ranks or (host.ranks[:1] if args.quick else host.ranks)
        out += [(name, rank, ["frozen", *own], args.dtype) for rank in ranks]
    return out


if __name__ == "__main__":
    run_script(main)
