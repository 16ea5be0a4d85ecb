"""Run a grid of trainings with their evaluations, and put what came out into one table.

    python eval/sweep.py --config configs/sweeps/figure6.yaml
    python eval/sweep.py --config configs/sweeps/figure6.yaml --dry_run
    python eval/sweep.py --config configs/sweeps/figure6.yaml --only method=nb_lora,seed=0
    python eval/sweep.py --config configs/sweeps/figure6.yaml --report
    python eval/sweep.py --config configs/sweeps/all.yaml --minutes 100

What the file holds is told in vislora/sweep/plan.py. Every run (a cell) is a process of its own in a folder that is
named by its content, so that an interrupted sweep goes on where it was, a changed one runs what changed, and a failed
cell stops nothing. The table is written anew after every cell: cells.csv, table.csv, table.json, table.md.

A file with `plans` (vislora/sweep/report.py) runs several sweeps, each in the folder that it has alone, and writes one
report with a verdict for each claim. --quick makes every sweep of it small, to see that all of it runs.
"""

from __future__ import annotations

import argparse
import os
import queue
import signal
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from vislora.errors import InputError, run_script
from vislora.sweep import report as reports
from vislora.sweep import table
from vislora.sweep.cells import Place, Runner
from vislora.sweep.plan import Cell, Plan, read

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str]) -> None:
    args = parse(argv)
    for number in (signal.SIGINT, signal.SIGTERM, *([signal.SIGALRM] if args.minutes else [])):
        signal.signal(number, _interrupt)
    if args.minutes:
        signal.setitimer(signal.ITIMER_REAL, 60 * args.minutes)
    try:
        if reports.is_report(args.config):
            failed = several(reports.read(args.config, args.quick), args)
        elif args.quick:
            raise InputError("--quick", f"{args.config} is one sweep", "name a file with plans, or leave it out")
        else:
            plan = read(args.config)
            failed = single(plan, Path(args.output_dir or f"runs/sweeps/{plan.name}"), args)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if failed:
        print(f"{len(failed)} cells failed: {'; '.join(failed[:5])}", file=sys.stderr)
        sys.exit(1)


def single(plan: Plan, sweep: Path, args: argparse.Namespace) -> list[str]:
    """Run one sweep, or do with it what the flags ask for; returns the labels of the cells that failed."""
    sweep.mkdir(parents=True, exist_ok=True)
    runner = Runner(plan, sweep, ROOT)
    # Rows need their method's tuning, whatever subjects and seeds are asked for.
    tuning = plan.tuning_cells(args.only.get("method"))
    if args.report:
        report(plan, sweep, tuning, args.only)
        return []
    if args.dry_run:
        show(plan, sweep, [*tuning, *(cell for cell in plan.cells({}) if cell.matches(args.only))], args.workers)
        return []
    try:
        failed = work(plan, sweep, runner, tuning, tuning, args.workers)
        chosen = choices(plan, sweep, tuning)
        cells = [cell for cell in plan.cells(chosen) if cell.matches(args.only)]
        failed += work(plan, sweep, runner, cells, [*tuning, *cells], args.workers, chosen)
    except KeyboardInterrupt:
        runner.stop()
        raise
    report(plan, sweep, tuning, args.only)
    return failed


def several(whole: reports.Report, args: argparse.Namespace) -> list[str]:
    """Run the sweeps of a report one after another, and write it anew after each; returns the failed cells' labels.

    A sweep that cannot go on, its tuning having failed, does not stop those after it.
    """
    place, failed = Path(args.output_dir or ("runs/sweeps/quick" if args.quick else "runs/sweeps")), []
    try:
        for name, plan in whole.plans.items():
            print(f"\n== {name}: {plan.title or plan.name}", flush=True)
            try:
                failed += [f"{name}: {label}" for label in single(plan, place / name, args)]
            except InputError as error:
                failed.append(f"{name}: {error}")
            if not args.dry_run and not args.report:
                conclude(whole, place, args)
    finally:
        if not args.dry_run:
            print(f"\n{conclude(whole, place, args)}")
    return failed


def conclude(whole: reports.Report, place: Path, args: argparse.Namespace) -> str:
    """Write the report of what has ended so far; returns its verdicts in words."""
    ran = {}
    for name, plan in whole.plans.items():
        tuning = plan.tuning_cells(args.only.get("method"))
        chosen = choices(plan, place / name, tuning, partly=True)
        cells = [*tuning, *plan.cells(chosen)]
        ran[name] = reports.Ran(table.rows(plan, place / name, cells), len({cell.folder for cell in cells}), chosen)
    note = "A quick report: it shows that everything runs, and its verdicts mean nothing." * args.quick
    page = reports.write(whole, place / whole.name, ran, note)
    return f"{(page.parent / 'report.md').read_text()}\nwritten to {page.parent}; look at {page}"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sweep.py", description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="the sweep's YAML file")
    parser.add_argument("--output_dir", help="where cells and tables go (runs/sweeps/NAME)")
    parser.add_argument("--workers", type=int, help="cells at a time: one a GPU, or as many shares of the CPU's cores")
    parser.add_argument("--only", default="", help="method=NAME,seed=0,...: these, and the tuning of their methods")
    parser.add_argument("--dry_run", action="store_true", help="list the cells and the time that is left")
    parser.add_argument("--report", action="store_true", help="run nothing: tables, pictures and page of what is there")
    parser.add_argument("--minutes", type=float, help="stop after so many, as a signal would; run again to go on")
    parser.add_argument("--quick", action="store_true", help="of a file of several sweeps: each as small as it says")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    pairs = [part.split("=", 1) for part in args.only.split(",") if part]
    if any(len(pair) != 2 for pair in pairs):
        raise InputError("--only", f"{args.only!r} is no list of NAME=VALUE", "as in --only method=lora,seed=0")
    args.only = dict(pairs)
    if args.workers is not None and args.workers < 1:
        raise InputError("--workers", f"{args.workers} is less than 1", "give the number of cells at a time")
    if args.minutes is not None and not args.minutes > 0:
        raise InputError("--minutes", f"{args.minutes} is not positive", "give the minutes after which to stop")
    args.workers = args.workers or max(1, _gpus())
    return args


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def environments(workers: int) -> list[dict[str, str]]:
    """What each worker's processes see: one GPU, or their share of the cores.

    Threads that spin while they wait lose their cores' time to each other where anything else runs beside them.
    """
    if gpus := _gpus():
        return [{"CUDA_VISIBLE_DEVICES": str(i % gpus)} for i in range(workers)]
    share = max(1, len(os.sched_getaffinity(0)) // workers)
    return [{"OMP_NUM_THREADS": str(share), "OMP_WAIT_POLICY": "PASSIVE"}] * workers


def work(plan: Plan, sweep: Path, runner: Runner, cells: list[Cell], shown: list[Cell], workers: int,
         chosen: dict[str, dict[str, Any]] | None = None) -> list[str]:  # fmt: skip
    """Run the cells that are not done yet; returns the labels of those that failed. `shown` are in the table."""
    cells = list({cell.folder: cell for cell in cells}.values())
    waiting = [cell for cell in cells if not _is_done(sweep, cell)]
    free: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for environment in environments(workers):
        free.put(environment)

    def one(cell: Cell):
        environment = free.get()
        try:
            return None if runner.stopped else runner.run(cell, environment)
        finally:
            free.put(environment)

    pool = ThreadPoolExecutor(workers)
    pending: dict[Future, Cell] = {pool.submit(one, cell): cell for cell in waiting}
    begun, failed, done = time.monotonic(), [], len(cells) - len(waiting)
    try:
        while pending:
            for future in wait(pending, timeout=1, return_when=FIRST_COMPLETED).done:
                cell, outcome = pending.pop(future), future.result()
                done += 1
                rate = (time.monotonic() - begun) / (len(waiting) - len(pending))
                left = f"{rate * len(pending) / 60:.0f} min left" if pending else "last one"
                end = f"{outcome.seconds:.0f} s" if outcome.ok else f"FAILED: {outcome.last}"
                print(f"[{done}/{len(cells)}, {left}] {cell.label}: {end}", flush=True)
                failed += [] if outcome.ok else [cell.label]
                table.write(plan, sweep, table.rows(plan, sweep, shown), chosen or {})
    except KeyboardInterrupt:
        runner.stop()
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown()
    if not waiting:
        table.write(plan, sweep, table.rows(plan, sweep, shown), chosen or {})
    return failed


def _is_done(sweep: Path, cell: Cell) -> bool:
    outcome = Place(sweep, cell).outcome()
    return outcome is not None and outcome.ok


def report(plan: Plan, sweep: Path, tuning: list[Cell], only: dict[str, str]) -> None:
    """Tables, pictures and the page, from what has ended; of a method whose tuning is not done, no more than that."""
    from vislora.sweep import draw, page  # half a second to import

    chosen = choices(plan, sweep, tuning, partly=True)
    cells = [*tuning, *(cell for cell in plan.cells(chosen) if cell.matches(only))]
    found = table.rows(plan, sweep, cells)
    table.write(plan, sweep, found, chosen)
    drawn = draw.draw(plan, sweep, found)
    written = page.write(plan, sweep, found, chosen, drawn, len({cell.folder for cell in cells}))
    print(f"\n{(sweep / 'table.md').read_text()}\nwritten to {sweep}; look at {written}")


def choices(plan: Plan, sweep: Path, tuning: list[Cell], partly: bool = False) -> dict[str, dict[str, Any]]:
    """For each method, the settings that its tuning runs chose; said, since the table rests on them.

    partly: pass over the methods that have none yet, which is an error otherwise.
    """
    found, chosen = table.rows(plan, sweep, tuning), {}
    for setting in plan.tune:
        for method in {cell.method: None for cell in tuning if cell.tuning == setting.name}:
            value = table.choose(setting, found, method)
            if value is None and partly:
                continue
            if value is None:
                wrong = f"no run of {method!r} gave {setting.by}"
                raise InputError(f"tune, {setting.name}", wrong, "see the logs of its cells, mend, run again")
            chosen.setdefault(method, {})[setting.name] = value
            if not partly:
                tried = setting.values_for(method)
                edge = len(tried) > 1 and value in (tried[0], tried[-1])
                print(f"{method}: {setting.name} = {value}, by {setting.by}{' (at the end of its list)' * edge}")
        for method, other in setting.like.items():
            if setting.name in chosen.get(other, {}):
                chosen.setdefault(method, {})[setting.name] = chosen[other][setting.name]
    return chosen


def show(plan: Plan, sweep: Path, cells: list[Cell], workers: int) -> None:
    """List the cells, and how long the rest will take by the finished ones' mean."""
    cells = list({cell.folder: cell for cell in cells}.values())
    outcomes = [Place(sweep, cell).outcome() for cell in cells]
    for cell, outcome in zip(cells, outcomes, strict=True):
        print(f"{'done  ' if outcome and outcome.ok else 'failed' if outcome else 'to run'} {cell.label}")
    times = [outcome.seconds for outcome in outcomes if outcome and outcome.ok]
    left = len(cells) - len(times)
    guess = f"about {sum(times) / len(times) * left / workers / 60:.0f} min" if times else "no finished cell to tell by"
    print(f"{len(cells)} cells, {left} to run: {guess}")
    if plan.tune:
        print("cells after tuning are listed with the settings they have before it")


def _interrupt(number: int, frame) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    run_script(main)
