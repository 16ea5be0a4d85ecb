"""What each logging step records of the adapter, and where it goes: metrics.jsonl and accelerate's trackers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType

import numpy as np
from accelerate.tracking import (
    LOGGER_TYPE_TO_CLASS,
    GeneralTracker,
    TensorBoardTracker,
    filter_trackers,
    get_available_trackers,
)
from accelerate.utils import LoggerType
from PIL import Image
from torch import Tensor

from vislora.errors import InputError, near
from vislora.handle import Handle
from vislora.measure import norms
from vislora.training.run import RunFolder

_PLAIN = ("none", "all")


def layers(adapter: Handle) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """(per site: norm of the update, its ratio to the weight's, share of the bound; the largest of each).

    `norm` is the Frobenius norm, `spectral` the largest singular value, `nuclear` the sum of them, `ratio` Frobenius
    over Frobenius; `up` and `down` are the factors' Frobenius norms. `share` is there only for methods with a bound:
    the bounded Schatten norm over its bound.
    """
    by_site, largest = {}, {}
    for name, n in norms(adapter).items():
        seen = {"norm": n.frobenius, "spectral": n.spectral, "ratio": n.ratio, "share": n.share,
                "nuclear": n.nuclear, "up": n.up, "down": n.down}  # fmt: skip
        by_site[name] = {key: value for key, value in seen.items() if value is not None}
        for key, value in by_site[name].items():
            largest[key] = max(largest.get(key, 0.0), value)
    return by_site, {f"largest_{key}": value for key, value in largest.items()}


def alignment(cosines: Mapping[str, float]) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """What `Log.write` takes of the gradient probe's {site: cosine}: (their mean, each site's)."""
    mean = sum(cosines.values()) / len(cosines)
    return {"cosine": mean}, {name: {"cosine": value} for name, value in cosines.items()}


class Meter:
    """From one line of the log to the next: the means of what each step gives, and the seconds of a step."""

    def __init__(self):
        self._sums: dict[str, Tensor] = {}
        self._steps, self._since = 0, time.perf_counter()

    def add(self, parts: Mapping[str, Tensor]) -> None:
        """Take in a step's scalars; nothing waits for the device."""
        self._sums = {name: self._sums.get(name, 0) + value.detach() for name, value in parts.items()}
        self._steps += 1

    def read(self) -> dict[str, float]:
        """The means and "seconds_per_step" over the steps since the last reading; begins anew."""
        values = {name: float(value) / self._steps for name, value in self._sums.items()}
        values["seconds_per_step"] = (time.perf_counter() - self._since) / self._steps
        self.__init__()
        return values

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Seconds inside are no step's."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start


def require_trackers(report_to: str) -> None:
    """Raise InputError unless accelerate knows the tracker and its package is installed."""
    if report_to not in _PLAIN and report_to not in LoggerType.list():
        wrong = f"{report_to!r} is no tracker{near(report_to, [*_PLAIN, *LoggerType.list()])}"
        raise InputError("--report_to", wrong, f"take one of {', '.join([*_PLAIN, *LoggerType.list()[1:]])}")
    if report_to not in _PLAIN and LoggerType(report_to) not in get_available_trackers():
        wrong, remedy = f"{report_to} is not installed", f"pip install {report_to}, or take tensorboard"
        raise InputError("--report_to", wrong, remedy)


class Log:
    """`with Log(folder, "tensorboard") as log`: one line of metrics.jsonl a logged step, and the curves of accelerate's
    trackers: "tensorboard", "wandb", another of theirs, "all" that are installed, or "none"."""

    def __init__(self, folder: RunFolder, report_to: str, settings: Mapping[str, object] | None = None):
        """settings: the run's plain configuration, for trackers that show it."""
        require_trackers(report_to)
        self.folder, self.trackers = folder, []
        for kind in filter_trackers([] if report_to == "none" else report_to, folder.logs):
            make = LOGGER_TYPE_TO_CLASS[str(kind)]
            self.trackers.append(make("", folder.logs) if make is TensorBoardTracker else _other(make, folder))
        for tracker in self.trackers:
            tracker.start()
            if settings is not None and not isinstance(tracker, TensorBoardTracker):  # it would log a run of its own
                tracker.store_init_configuration(dict(settings))

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for tracker in self.trackers:
            tracker.finish()

    def write(self, step: int, values: Mapping[str, float], by_site: Mapping[str, Mapping[str, float]]) -> None:
        """Log scalars, and under "layers" what `layers` measured of each site."""
        self.folder.log(step, {**values, "layers": by_site})
        flat = {f"{key}/{site}": value for site, measured in by_site.items() for key, value in measured.items()}
        for tracker in self.trackers:
            tracker.log({**values, **flat}, step=step)

    def images(self, step: int, title: str, image: Image.Image | None) -> None:
        """Put a sheet of images beside the curves, where the tracker has a place for it."""
        for tracker in self.trackers if image is not None else ():
            if isinstance(tracker, TensorBoardTracker):
                tracker.log_images({title: np.asarray(image.convert("RGB"))[None]}, step, dataformats="NHWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({title: [image]}, step=step)


def _other(make: type, folder: RunFolder) -> GeneralTracker:
    """A tracker that is no tensorboard, for the project "vislora"."""
    return make("vislora", folder.logs) if make.requires_logging_directory else make("vislora")
