"""What each logging step records of the adapter, and where it goes: metrics.jsonl and tensorboard."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

import numpy as np
from PIL import Image

from vislora.handle import Handle
from vislora.measure import norms
from vislora.training.run import RunFolder


def layers(adapter: Handle) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """(per site: norm of the update, its ratio to the weight's, share of the bound; the largest of each).

    `norm` is the Frobenius norm, `spectral` the largest singular value, `ratio` Frobenius over Frobenius. `share` is
    there only for methods with a bound: the bounded Schatten norm over its bound.
    """
    by_site, largest = {}, {}
    for name, n in norms(adapter).items():
        by_site[name] = {"norm": n.frobenius, "spectral": n.spectral, "ratio": n.ratio}
        if n.share is not None:
            by_site[name]["share"] = n.share
        for key, value in by_site[name].items():
            largest[key] = max(largest.get(key, 0.0), value)
    return by_site, {f"largest_{key}": value for key, value in largest.items()}


def alignment(cosines: Mapping[str, float]) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """What `Log.write` takes of the gradient probe's {site: cosine}: (their mean, each site's)."""
    mean = sum(cosines.values()) / len(cosines)
    return {"cosine": mean}, {name: {"cosine": value} for name, value in cosines.items()}


class Log:
    """`with Log(folder, "tensorboard") as log`: one line of metrics.jsonl a logged step, and tensorboard's curves."""

    def __init__(self, folder: RunFolder, report_to: str):
        self.folder = folder
        self.writer = None
        if report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter  # a second to import

            self.writer = SummaryWriter(str(folder.logs))

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.writer is not None:
            self.writer.close()

    def write(self, step: int, values: Mapping[str, float], by_site: Mapping[str, Mapping[str, float]]) -> None:
        """Log scalars, and under "layers" what `layers` measured of each site."""
        self.folder.log(step, {**values, "layers": by_site})
        if self.writer is None:
            return
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        for site, measured in by_site.items():
            for key, value in measured.items():
                self.writer.add_scalar(f"{key}/{site}", value, step)

    def images(self, step: int, title: str, image: Image.Image | None) -> None:
        """Put a sheet of images beside the curves."""
        if self.writer is not None and image is not None:
            self.writer.add_image(title, np.asarray(image.convert("RGB")), step, dataformats="HWC")
