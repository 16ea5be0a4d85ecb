"""What training did to the weights, layer by layer and step by step: the papers' analyses of one or several runs.

    python eval/spectrum.py --run runs/0001                       one run: every checkpoint against the base
    python eval/spectrum.py --run runs/0001 runs/0002 runs/0003   methods on one plot
    python eval/spectrum.py --run runs/0001 --gradients 4         cosines of gradients too, on the run's own photos
    python eval/spectrum.py --adapter a.safetensors b.safetensors --base MODEL      files of any tool

Written into --output_dir (the first run's folder, spectrum/), each picture with its numbers as CSV:

    change            SORSA 2409.00055, equations 1 to 4 and figure 2: change of singular values and vectors
    change_by_layer   the same, where in the network
    condition         both SORSA versions: condition number of the whole adapted weight and of its principal part
    orthonormality    how far the bases that a method keeps orthonormal are off
    update_norms      NB-LoRA's figures 2, 4 and 5: Schatten norms of the update; weight_norms: figure 9, of the weight
    bound             share of the norm bound in use
    cosine            OD-LoRA's figures 2 and 4: full against equivalent gradient, from the run's log (--probe_steps)
                      or computed anew by --gradients
    singular_values   OD-LoRA's figures 5 and 6: histogram of the update's singular values
    layers.csv        every number of every layer and step; summary.json: each run's last step

SVDs run on the CPU in float64. What is measured is kept in rows.jsonl there, so a cut analysis goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from vislora.cli._table import console, number, table
from vislora.errors import InputError, run_script
from vislora.formats import Base
from vislora.formats.disk import write_bytes
from vislora.spectrum import plots, source
from vislora.spectrum.table import COLUMNS, Cache, cosine_rows, layer_lines, rows, write_csv

SUMMARY = {  # column: how layers are summed up
    "d_sigma": plots.mean, "d_vectors": plots.mean, "condition": plots.median, "condition_principal": plots.median,
    "off_orthonormal": plots.mean, "nuclear": max, "frobenius": max, "spectral": max, "ratio": plots.mean,
    "share": max, "effective_rank": plots.mean, "cosine": plots.mean,
}  # fmt: skip


def main(argv: list[str]) -> None:
    args = parse(argv)
    base = Base(args.base) if args.base else None
    if args.run:
        every = [source.of_run(folder, base) for folder in args.run]
    else:
        every = [source.of_files(args.adapter, base)]
    every = named(every, args.labels)
    if args.steps:
        every = [series.with_steps(args.steps) for series in every]
    out = args.output_dir or (args.run[0] if args.run else Path()) / "spectrum"
    cache = Cache(out / "rows.jsonl")
    measured, cosines = [], []
    for series in every:
        if series.base is None:
            print(f"{series.label}: its base is no folder here, so what needs the base is left out; name it by --base")
        measured += rows(series, cache, args.layers, args.principal_rank)
        compute = computer_of(series, args.gradients) if args.gradients else None
        cosines += cosine_rows(series, cache, compute, f"{args.gradients}", args.layers)
    written = plots.draw_all(measured, cosines, out, args.bins)
    joined = [*measured, *cosines]
    written.append(write_csv(out / "layers.csv", COLUMNS, layer_lines(joined)))
    last = {series.label: summary([row for row in joined if row["run"] == series.label]) for series in every}
    write_bytes(out / "summary.json", (json.dumps(last, indent=1) + "\n").encode())
    show(last)
    print(f"wrote {len(written) + 1} files into {out}")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="spectrum.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=Path, nargs="+", help="folders of runs")
    what.add_argument("--adapter", type=Path, nargs="+", help="files or folders of one training, in its order")
    parser.add_argument("--base", type=Path, metavar="MODEL", help="the base's folder; none: the run's own")
    parser.add_argument("--labels", nargs="+", help="names in the legend, one a run; none: the method's")
    parser.add_argument("--steps", type=int, nargs="+", help="of these steps alone")
    parser.add_argument("--layers", default="", metavar="REGEX", help="of the layers in whose names it is found alone")
    parser.add_argument("--principal_rank", type=int, help="of the principal part; none: each method's own rank")
    parser.add_argument("--gradients", type=int, metavar="N", help="compute cosines anew, on N batches a checkpoint")
    parser.add_argument("--bins", type=int, default=40, help="of the histograms")
    parser.add_argument("-o", "--output_dir", type=Path, help="none: spectrum/ in the first run, or here")
    args = parser.parse_args([word for word in argv if word != "--debug"])
    for flag in ("principal_rank", "gradients", "bins"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise InputError(f"--{flag}", f"{value} is below 1", "give 1 or more")
    return args


def computer_of(series: source.Series, batches: int):
    from vislora.spectrum.gradients import computer  # diffusers takes seconds to import

    return computer(series.run, batches)


def named(every: list[source.Series], labels: list[str] | None) -> list[source.Series]:
    """The series under labels of their own: those given, or the method's, with the folder's where two are of one."""
    if labels is not None and len(labels) != len(every):
        raise InputError("--labels", f"{len(labels)} for {len(every)} curves", "give one for each")
    methods = [series.method for series in every]
    for i, series in enumerate(every):
        twice = not series.method or methods.count(series.method) > 1
        own = f"{series.method} {series.label}".strip() if twice else series.method
        series.label = labels[i] if labels else own
    if len({series.label for series in every}) < len(every):
        raise InputError("--labels", "two curves have one name", "give each its own")
    return every


def summary(measured: list[dict]) -> dict[str, float]:
    """{column: over all layers} at the last step that has it; infinities as text, for JSON."""
    out: dict[str, float | str] = {}
    for column, over in SUMMARY.items():
        held = [row for row in measured if row.get(column) is not None]
        last = max((row["step"] for row in held), default=None)
        if last is not None:
            value = over([row[column] for row in held if row["step"] == last])
            out |= {"step": max(last, out.get("step", 0)), column: value if math.isfinite(value) else str(value)}
    return out


def show(last: dict[str, dict]) -> None:
    """The table for people."""
    present = [column for column in SUMMARY if any(column in found for found in last.values())]
    head = {"run": "left", "step": "right"} | dict.fromkeys(present, "right")
    cells = [[run, str(found.get("step", "-")), *(number(_float(found.get(c))) for c in present)]
             for run, found in last.items()]  # fmt: skip
    console().print(table(head, cells))


def _float(value: float | str | None) -> float | None:
    return None if value is None else float(value)


if __name__ == "__main__":
    run_script(main)
