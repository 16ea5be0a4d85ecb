"""Run folders: one run each, found again on resume, and a stop on signals with the right status."""

import json
import logging
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml

from vislora.errors import EnvironmentFault, InputError
from vislora.training import checkpoint
from vislora.training import run as run_module
from vislora.training.run import InterruptFlag, RunFolder


def fork(child):
    """Run child(write) in a forked process; returns its pid and a readable file of the lines that it writes."""
    out, into = os.pipe()
    pid = os.fork()
    if pid:
        os.close(into)
        return pid, os.fdopen(out)
    try:
        child(lambda text: os.write(into, f"{text}\n".encode()))
    finally:
        os._exit(1)  # a child must not go on with the tests, whatever happens


def finished(path):
    """A folder as a run leaves it."""
    with RunFolder.create(str(path), None) as folder:
        folder.write_config({"seed": 0})
        checkpoint.save(folder.checkpoints, 4, {"adapter": {"a": torch.zeros(1)}}, {}, None)
    return path


def test_numbered_folders_are_fresh_even_when_runs_start_together(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: RunFolder.create(None, None, tmp_path / "runs"), range(16)))
    assert sorted(f.path.name for f in folders) == [f"{i:04d}" for i in range(1, 17)]
    (tmp_path / "runs" / "0999").mkdir()
    (tmp_path / "runs" / "notes").mkdir()
    assert RunFolder.create(None, None, tmp_path / "runs").path.name == "1000"


def test_names_of_the_files():
    folder = RunFolder(Path("out"))
    names = [
        folder.config_file,
        folder.adapter,
        folder.checkpoints,
        folder.samples,
        folder.metrics_file,
        folder.lines_file,
        folder.logs,
        folder.readme,
    ]
    assert [str(n) for n in names] == [
        "out/" + n
        for n in (
            "config.yaml",
            "adapter",
            "checkpoints",
            "samples",
            "metrics.json",
            "metrics.jsonl",
            "logs",
            "README.md",
        )
    ]


@pytest.mark.case("C10")
def test_a_folder_that_holds_a_run_or_strangers_is_refused_and_untouched(tmp_path):
    held = finished(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("x")
    (tmp_path / "c").write_text("x")
    before = sorted(map(str, tmp_path.rglob("*")))
    with pytest.raises(InputError, match="a: holds another run -> .*--output_dir.*--resume_from_checkpoint latest"):
        RunFolder.create(str(held), None)
    with pytest.raises(InputError, match=r"b: is not empty \(thesis.tex\)"):
        RunFolder.create(str(tmp_path / "b"), None)
    with pytest.raises(InputError, match="c: is a file"):
        RunFolder.create(str(tmp_path / "c"), None)
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_an_empty_folder_or_one_with_hidden_files_only_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".DS_Store").write_text("")
    with RunFolder.create(str(tmp_path / "out"), None) as folder:
        assert folder.path == tmp_path / "out"
    with RunFolder.create(str(tmp_path / "deep" / "er"), None) as folder:
        assert folder.path.is_dir()


def test_resume_needs_a_run_that_is_there(tmp_path):
    held, other = finished(tmp_path / "a"), finished(tmp_path / "b")
    for which in ("latest", "checkpoint-4", str(held / "checkpoints" / "checkpoint-4")):
        with RunFolder.create(str(held), which) as folder:
            assert folder.read_config() == {"seed": 0}
    with pytest.raises(InputError, match="latest: no run is named"):
        RunFolder.create(None, "latest", tmp_path / "runs")
    with pytest.raises(InputError, match="none holds no run"):
        RunFolder.create(str(tmp_path / "none"), "latest")
    with pytest.raises(InputError, match="checkpoint-5: no such folder .did you mean checkpoint-4"):
        RunFolder.create(str(held), "checkpoint-5")
    with pytest.raises(InputError, match="a: holds another run than the one of"):
        RunFolder.create(str(held), str(other / "checkpoints" / "checkpoint-4"))
    with pytest.raises(InputError, match="no such folder"):
        RunFolder.create(None, "missing", tmp_path / "runs")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    elsewhere = str(held / "checkpoints" / "checkpoint-4")  # going on with a checkpoint in a new folder
    assert RunFolder.create(str(tmp_path / "new"), elsewhere).path == tmp_path / "new"
    assert RunFolder.create(None, elsewhere, tmp_path / "runs").path == tmp_path / "runs" / "0001"


@pytest.mark.case("F25", "F26")
def test_a_second_run_in_the_folder_is_refused_and_a_dead_one_is_no_obstacle(tmp_path):
    held = finished(tmp_path / "a")

    def run(write):
        folder = RunFolder.create(str(held), "latest")
        worker = os.fork()  # a loader worker that outlives the run: the lock must not live on in it
        if not worker:
            write(os.getpid())  # here the fork's hooks have run
        time.sleep(20)
        folder.close()

    pid, lines = fork(run)
    with lines:
        worker = int(lines.readline())
    try:
        with pytest.raises(EnvironmentFault, match=f"a: is in use by process {pid} on .* -> wait until"):
            RunFolder.create(str(held), "latest")
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.kill(worker, 0)  # the worker is still there
        RunFolder.create(str(held), "latest").close()
    finally:
        os.kill(worker, signal.SIGKILL)
    with RunFolder.create(str(held), "latest"):
        with pytest.raises(EnvironmentFault, match=f"in use by process {os.getpid()} "):
            RunFolder.create(str(held), "latest")
    RunFolder.create(str(held), "latest").close()


def test_config_survives_yaml(tmp_path):
    folder = RunFolder(tmp_path)
    config = {"b": 1e-05, "a": [1, "no"], "p": float("inf"), "n": None, "name": "Zoë", "flag": True, "text": "1e-4"}
    folder.write_config(config)
    assert folder.read_config() == config and list(folder.read_config()) == list(config)
    folder.config_file.write_text("- 1")
    with pytest.raises(InputError, match="holds no mapping"):
        folder.read_config()
    folder.config_file.write_text("a: [")
    with pytest.raises(InputError, match="cannot be read"):
        folder.read_config()


def test_log_appends_strict_json_and_rewind_cuts_what_came_later(tmp_path):
    folder = RunFolder(tmp_path)
    folder.rewind(3)  # no file yet
    for step in range(1, 6):
        folder.log(step, {"loss": step / 3 if step != 2 else float("nan"), "rates": [1e-4, float("inf")]})
        assert len(folder.lines_file.read_text().splitlines()) == step  # on disk at once
    with folder.lines_file.open("a") as file:
        file.write('{"step": 2, "lo')
    folder.rewind(3)
    lines = [json.loads(line) for line in folder.lines_file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0] == {"step": 1, "loss": 1 / 3, "rates": [1e-4, "inf"]} and lines[1]["loss"] == "nan"
    folder.log(4, {})
    assert folder.lines_file.read_text().endswith('{"step": 4}\n')
    folder.log(4, {"eval_loss": 1.0, "other": 2})
    folder.log(3, {"eval_loss": 2.0})
    folder.rewind(4, "eval_")  # of step 4 alone
    assert [json.loads(line) for line in folder.lines_file.read_text().splitlines()][3:] == [
        {"step": 4}, {"step": 3, "eval_loss": 2.0}
    ]


@pytest.mark.case("F38")
def test_a_log_that_cannot_be_written_warns_once(tmp_path, caplog):
    folder = RunFolder(tmp_path)
    folder.lines_file.mkdir()
    with caplog.at_level(logging.WARNING, "vislora"):
        folder.log(1, {"loss": 1.0})
        folder.log(2, {"loss": 1.0})
    assert len(caplog.records) == 1 and "metrics.jsonl: cannot be written" in caplog.text


def test_metrics_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.write_metrics({"dino": 0.5})
    folder.write_metrics({"dino": 0.7, "p": float("inf")})
    assert json.loads(folder.metrics_file.read_text()) == {"dino": 0.7, "p": "inf"}

    def full(path, text):
        Path(path).write_text(text[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_module.checkpoint, "write_synced", full)
    with pytest.raises(EnvironmentFault, match="metrics.json: could not be written .No space left"):
        folder.write_metrics({"dino": 0.9})
    assert json.loads(folder.metrics_file.read_text())["dino"] == 0.7
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_sets_the_flag_and_handlers_come_back(number, status, capfd):
    before = signal.getsignal(number)
    with InterruptFlag() as stop:
        assert not stop and stop.status is None
        os.kill(os.getpid(), number)
        assert stop and stop.status == status
    assert signal.getsignal(number) is before
    assert "with a checkpoint" in capfd.readouterr().err
    assert not InterruptFlag()


@pytest.mark.case("F14")
@pytest.mark.parametrize("second, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_second_signal_ends_the_process_at_once(second, status):

    def loop(write):
        with InterruptFlag() as stop:
            write("ready")
            while not stop:
                time.sleep(0.01)
            write("flag")
            time.sleep(20)

    pid, lines = fork(loop)
    with lines:
        assert lines.readline() == "ready\n"
        os.kill(pid, signal.SIGTERM)
        assert lines.readline() == "flag\n"
    start = time.monotonic()
    os.kill(pid, second)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == status
    assert time.monotonic() - start < 5


def test_config_on_disk_is_plain_yaml(tmp_path):
    RunFolder(tmp_path).write_config({"seed": 3, "targets": ["to_q"]})
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"seed": 3, "targets": ["to_q"]}
