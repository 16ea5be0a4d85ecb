"""The DreamBooth script in this process, as tests/scripts has it."""

from scripts.conftest import model, place, run, script  # noqa: F401
