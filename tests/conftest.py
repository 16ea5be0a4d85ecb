"""Tests run in as many processes as there are cores, so each keeps to one thread."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Stable Diffusion of random weights, on disk."""
    from tiny_sd import tiny_sd

    return tiny_sd(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def pipe(folder):
    """Its pipeline, fresh for every test."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, feature_extractor=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe
