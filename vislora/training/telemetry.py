"""What each logging step records of the adapter, and where it goes: metrics.jsonl and accelerate's trackers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
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

from vislora.errors import InputError, near, printable
from vislora.handle import Handle
from vislora.measure import norms
from vislora.training.run import RunFolder

_PLAIN = ("none", "all")
_log = logging.getLogger("vislora")


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

        def start(tracker: GeneralTracker) -> None:
            tracker.start()
            if settings is not None and not isinstance(tracker, TensorBoardTracker):  # it would log a run of its own
                tracker.store_init_configuration(dict(settings))

        self._each(start)

    def _each(self, act: Callable[[GeneralTracker], None]) -> None:
        """`act` on every tracker. One that fails (no network, a full disk) is told of and left out from then on: the
        run goes on, and its own files hold the same numbers."""
        for tracker in list(self.trackers):
            try:
                act(tracker)
            except Exception as error:  # whatever a tracker's library raises
                self.trackers.remove(tracker)
                wrong = printable(f"--report_to {tracker.name}: failed ({error!r:.200})")
                _log.warning("%s -> the run goes on without it", wrong)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._each(lambda tracker: tracker.finish())

    def write(self, step: int, values: Mapping[str, float], by_site: Mapping[str, Mapping[str, float]]) -> None:
        """Log scalars, and under "layers" what `layers` measured of each site."""
        self.folder.log(step, {**values, "layers": by_site})
        flat = {f"{key}/{site}": value for site, measured in by_site.items() for key, value in measured.items()}
        self._each(lambda tracker: tracker.log({**values, **flat}, step=step))

    def images(self, step: int, title: str, image: Image.Image | None) -> None:
        """Put a sheet of images beside the curves, where the tracker has a place for it."""
        if image is None:
            return

        def put(tracker: GeneralTracker) -> None:
            if isinstance(tracker, TensorBoardTracker):
                tracker.log_images({title: np.asarray(image.convert("RGB"))[None]}, step, dataformats="NHWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({title: [image]}, step=step)

        self._each(put)


def _other(make: type, folder: RunFolder) -> GeneralTracker:
    """A tracker that is no tensorboard, for the project "vislora"."""
    return make("vislora", folder.logs) if make.requires_logging_directory else make("vislora")
