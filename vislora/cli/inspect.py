"""vislora inspect: what an adapter did to every layer, from its factors alone."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch

from ..errors import InputError
from ..formats import Base, LoraFile, read
from ..formats.spectrum import Spectrum, Verdict, check_certificate, spectrum, stated_base
from ._base import add_base, open_base
from ._table import console, natural, number, say, table


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="an adapter: ours, diffusers', kohya's, or PEFT's folder")
    add_base(parser, "adds ratios")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the norms; FILE.csv beside it holds them")


def run(args: argparse.Namespace) -> None:
    """Print; then raise InputError where the certificate in the header is not the tensors'."""
    if args.plot and args.plot.suffix != ".png":
        raise InputError(f"--plot {args.plot}", "is no .png", "name it FILE.png")
    base = open_base(args.base)
    file = read(args.file, base)
    rows, spectra = measured(file, base)
    verdict = check_certificate(file, spectra, base is not None)
    if args.json:
        print(json.dumps(report(file, rows, verdict), indent=1, allow_nan=False))
    else:
        show(file, rows, verdict)
    if args.plot:
        from .plot import draw

        for written in draw(rows, args.plot):
            print(f"wrote {written}", file=sys.stderr)
    if verdict.status == "broken":
        raise InputError(f"{file.path}: certificate", verdict.why, "trust the table, not the header; export it again")


@torch.no_grad()
def measured(file: LoraFile, base: Base | None) -> tuple[list[dict], dict[str, Spectrum]]:
    """One row of plain values for each layer, and {layer: Spectrum}. Raises InputError where the base is another."""
    if base:
        base.require(file.path, file.layers, stated_base(file))
    rows, spectra = [], {}
    for layer in sorted(file.layers, key=lambda layer: natural(layer.name)):
        weight = base.weight(layer.component, layer.path) if base else None
        found = spectra[layer.name] = spectrum(layer, weight)
        row = {
            "name": layer.name,
            "component": layer.component,
            "path": layer.path,
            "shape": list(layer.shape),
            "rank": layer.rank,
            "scale": layer.scale,
            "dtype": str(layer.up.dtype).removeprefix("torch."),
            "dora": layer.magnitude is not None,
            "spectral": found.spectral,
            "frobenius": found.frobenius,
            "nuclear": found.nuclear,
            "effective_rank": found.effective_rank,
        }
        if layer.name in file.bounds:
            row["p"], row["bound"] = file.bounds[layer.name]
            row["p"] = "inf" if row["p"] == math.inf else row["p"]
            row["norm"] = found.norm(file.bounds[layer.name][0])
        if weight is not None:
            row["weight_frobenius"] = torch.linalg.vector_norm(weight).item()
            row["ratio"] = found.frobenius / row["weight_frobenius"] if row["weight_frobenius"] else None
        rows.append(row)
    return rows, spectra


def report(file: LoraFile, rows: list[dict], verdict: Verdict) -> dict:
    """What --json prints."""
    components = dict.fromkeys(row["component"] for row in rows)
    return {
        "file": str(file.path),
        "format": file.format,
        "about": file.about,
        "components": {c: sum(row["component"] == c for row in rows) for c in components},
        "certificate": {"status": verdict.status, "why": verdict.why},
        "layers": rows,
    }


def show(file: LoraFile, rows: list[dict], verdict: Verdict) -> None:
    """The table for people."""
    with_base = "ratio" in rows[0]
    head = {"layer": "left", "shape": "right", "rank": "right", "scale": "right", "spectral": "right",
            "Frobenius": "right", "nuclear": "right", "eff. rank": "right"}  # fmt: skip
    head |= {"|dW|/|W|": "right"} if with_base else {}
    cells = []
    for row in rows:
        shape = "{} x {}".format(*row["shape"])
        norms = [number(row[key]) for key in ("scale", "spectral", "frobenius", "nuclear", "effective_rank")]
        cells.append([row["name"], shape, str(row["rank"]), *norms, *([number(row["ratio"])] if with_base else [])])
    console().print(table(head, cells))
    print()
    say(f"{file.path}: {file.format}{', ' + file.about if file.about else ''}")
    counts = report(file, rows, verdict)["components"]
    types = sorted({row["dtype"] for row in rows})
    ranks = sorted({row["rank"] for row in rows})
    of_rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    layers = ", ".join(f"{count} in {component or 'the model'}" for component, count in counts.items())
    say(f"layers: {layers}; {of_rank}, {', '.join(types)}")
    for key in ("spectral", "frobenius", "nuclear", *(["ratio"] if with_base else [])):
        top = max(rows, key=lambda row: row[key] or 0.0)
        say(f"largest {key}: {number(top[key])} at {top['name']}")
    if any(row["dora"] for row in rows) and not with_base:
        say("DoRA: the low-rank part alone is measured; its magnitudes need --base")
    if file.bounds:
        shares = {row["name"]: row["norm"] / file.bounds[row["name"]][1] for row in rows}
        top = max(shares, key=shares.get)
        p, delta = file.bounds[top]
        say(f"bound by construction: p {p:g}; largest share {number(shares[top])} of {number(delta)} at {top}")
    say(f"certificate: {verdict.status}{', ' + verdict.why if verdict.why else ''}")
