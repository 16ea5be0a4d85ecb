"""NB-LoRA's figure 11 (arXiv 2501.19050, appendix D): which updates NB-LoRA and DeLoRA can reach.

    python eval/reachable.py -o reachable        reachable.png and reachable.csv, a minute on a CPU

The updates are the 2 x 2 matrices diag(x, y), rank 2, p = 1: |dW|_S1 = |x| + |y|. For every point of a grid both
methods' own factors are fitted to it; a point counts as reached where the fit comes within a tolerance. DeLoRA's
update is gamma / r times unit rank-one terms, less its start W0 = gamma0 / r times such terms, here diag(1, 1) gamma0
/ 2: on the boundary of its set, so that dW = 0 is too. With gamma = gamma0 = delta / 2 both have the bound delta.
The paper draws shapes and states no numbers; its panels are gamma = delta / 2, a larger fixed gamma, and a free one.
Our DeLoRA scales the subtracted start by the trained strength, as its authors' code does; here, as in the paper, the
start stays what it was.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from vislora.adapters.delora import DeLoRA
from vislora.adapters.nb_lora import NBLoRA
from vislora.errors import InputError, run_script
from vislora.formats.disk import write_bytes
from vislora.spectrum.table import write_csv

DELTA, TOLERANCE, SIZE = 1.0, 0.02, 2  # the bound; of the fit, as a share of it; of the matrices
STARTS = 10  # random starts of every fit: from few, some points' fits all stay in saddles
PANELS = {  # title: (gamma of the fixed start, of what trains, whether that is free up to it)
    "gamma = delta / 2: the same bound": (0.5, 0.5, False),
    "gamma = delta, fixed": (0.5, 1.0, False),
    "gamma free, up to delta + gamma0;\nbound delta + 2 gamma0": (0.5, 1.5, True),
}


def nb_lora(t: dict[str, Tensor]) -> Tensor:
    """NB-LoRA's updates (points, 2, 2) at delta."""
    delta = torch.full(t["A"].shape[:1], DELTA, dtype=t["A"].dtype)
    return NBLoRA(rank=SIZE, p=1, delta=DELTA).factors(SimpleNamespace(**t, delta=delta)).product()


def delora(gamma0: float, gamma: float, free: bool) -> Callable[[dict[str, Tensor]], Tensor]:
    """DeLoRA's updates (points, 2, 2) from the start diag(1, 1) gamma0 / 2."""
    method, ones = DeLoRA(rank=SIZE, form="zero"), torch.ones(SIZE, dtype=torch.float64)

    def one(A: Tensor, B: Tensor, s: Tensor) -> Tensor:
        strength = gamma * (1 + torch.sin(s[0])) / 2 if free else torch.tensor(gamma, dtype=A.dtype)
        return method.factors(SimpleNamespace(A=A, B=B, strength=strength, columns=ones)).product()

    start = gamma0 / SIZE * torch.eye(SIZE, dtype=torch.float64)
    return lambda t: torch.func.vmap(one)(t["A"], t["B"], t["s"]) - start


def reached(update: Callable[[dict[str, Tensor]], Tensor], targets: Tensor, steps: int) -> Tensor:
    """Which of the targets (points, 2, 2) some parameters come near to, by Adam from a few random starts each."""
    generator = torch.Generator().manual_seed(0)
    many = targets.repeat(STARTS, 1, 1)
    shapes = {"A": (SIZE, SIZE), "B": (SIZE, SIZE), "s": (SIZE,)}
    free = {name: torch.randn(len(many), *shape, generator=generator, dtype=torch.float64).requires_grad_()
            for name, shape in shapes.items()}  # fmt: skip
    optimizer = torch.optim.Adam(free.values(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best = torch.full((len(many),), torch.inf, dtype=torch.float64)
    for _ in range(steps):
        off = (update(free) - many).square().sum((1, 2))
        best = torch.minimum(best, off.detach().sqrt())
        optimizer.zero_grad()
        off.sum().backward()
        optimizer.step()
        schedule.step()
    return best.view(STARTS, -1).amin(0) <= TOLERANCE * DELTA


def draw(points: list[float], found: dict[str, tuple[Tensor, Tensor]], png: Path) -> list[Path]:
    """A panel for each choice of gamma, NB-LoRA's set over DeLoRA's. Returns the paths written."""
    figure = Figure(figsize=(4.2 * len(found), 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    title = "Updates diag(x, y) that a method can reach: a good set is centred on 0 (+) and fills its bound"
    figure.suptitle(title, size=12)
    lines = []
    for axis, (title, sets) in zip(figure.subplots(1, len(found), sharey=True), found.items(), strict=True):
        for reach, color in zip(sets[::-1], ("#0072b2", "#d55e00"), strict=True):
            axis.contourf(points, points, reach.double().mT, levels=[0.5, 1.5], colors=[color], alpha=0.45)
        axis.plot(0, 0, marker="+", color="black", ms=10)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("x / delta")
        axis.set_aspect("equal")
        name = " ".join(title.split())
        lines += [[name, x, y, int(sets[0][i, j]), int(sets[1][i, j])]
                  for i, x in enumerate(points) for j, y in enumerate(points)]  # fmt: skip
    figure.axes[0].set_ylabel("y / delta")
    handles = [Patch(color="#d55e00", alpha=0.45, label="NB-LoRA, p = 1, bound delta"),
               Patch(color="#0072b2", alpha=0.45, label="DeLoRA, started from gamma0 = delta / 2")]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=2, borderaxespad=1.5)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    write_bytes(png, picture.getvalue())
    columns = ("panel", "x", "y", "nb_lora_reaches", "delora_reaches")
    return [png, write_csv(png.with_suffix(".csv"), columns, lines)]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=49, help="of the grid, along each side")
    parser.add_argument("--fit_steps", type=int, default=300, help="of Adam, for every point")
    parser.add_argument("-o", "--output_dir", type=Path, default=Path("reachable"))
    args = parser.parse_args([word for word in argv if word != "--debug"])
    for flag in ("points", "fit_steps"):
        if getattr(args, flag) < 2:
            raise InputError(f"--{flag}", f"{getattr(args, flag)} is below 2", "give 2 or more")
    points = torch.linspace(-2, 2, args.points, dtype=torch.float64)
    grid = torch.diag_embed(torch.cartesian_prod(points, points)) * DELTA
    square = (args.points, args.points)
    of_nb_lora = reached(nb_lora, grid, args.fit_steps).view(square)
    found = {}
    for title, choice in PANELS.items():
        found[title] = of_nb_lora, reached(delora(*choice), grid, args.fit_steps).view(square)
        area = (4 / (args.points - 1)) ** 2
        shown = [f"{area * s.sum().item():.2f}" for s in found[title]]
        print(f"{' '.join(title.split())}: area NB-LoRA {shown[0]}, DeLoRA {shown[1]}, in units of delta squared")
    for written in draw(points.tolist(), found, args.output_dir / "reachable.png"):
        print(f"wrote {written}")


if __name__ == "__main__":
    run_script(main)
