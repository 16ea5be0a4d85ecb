"""A complete checkpoint is never lost, a damaged one never read, and what comes back is what was saved."""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vislora.errors import EnvironmentFault, InputError
from vislora.training import checkpoint
from vislora.training.checkpoint import load, locate, require_space, resolve, save


def weights(value):
    return {"adapter": {"a": torch.full((3, 2), float(value))}, "optimizer": {"a|step": torch.tensor(float(value))}}


def steps(root):
    return sorted(p.name for p in root.iterdir())


def test_round_trip_keeps_bits_dtypes_shared_storage_and_state(tmp_path):
    base = torch.randn(4, 6)
    named = {
        "half": base.half(),
        "bf16": base.bfloat16(),
        "double": base.double(),
        "int": torch.arange(3),
        "view": base.t(),
        "row": base[1],
        "same": base,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "nan": torch.tensor([float("nan"), float("inf")]),
        "mask": torch.tensor([True, False]),
    }
    state = {"step": 7, "p": float("inf"), "note": "é\n", "rate": 0.1 + 0.2}
    path = save(tmp_path / "new" / "root", 7, {"adapter": named, "nothing": {}}, state, None)
    read = load(path)
    assert (read.step, read.path, read.state) == (7, tmp_path / "new" / "root" / "checkpoint-7", state)
    assert read.tensors["nothing"] == {}
    assert read.tensors["adapter"].keys() == named.keys()
    for name, tensor in named.items():
        got = read.tensors["adapter"][name]
        assert got.dtype == tensor.dtype and got.shape == tensor.shape
        assert torch.equal(got.nan_to_num(9.0), tensor.nan_to_num(9.0)) if name != "mask" else torch.equal(got, tensor)
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}


def test_limit_prunes_the_oldest_after_the_new_one_stands(tmp_path):
    for step in (2, 4, 10, 6):
        save(tmp_path, step, weights(step), {}, None)
    save(tmp_path, 12, weights(12), {}, 3)
    assert steps(tmp_path) == ["checkpoint-10", "checkpoint-12", "checkpoint-6"]
    save(tmp_path, 3, weights(3), {}, 1)  # an older step than those that stand: the new one is kept all the same
    assert steps(tmp_path) == ["checkpoint-12", "checkpoint-3"]
    with pytest.raises(InputError, match="0 keeps no checkpoint"):
        save(tmp_path, 5, weights(5), {}, 0)


def test_state_that_json_cannot_hold_fails_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError):
        save(tmp_path / "root", 1, weights(1), {"x": object()}, None)
    assert not (tmp_path / "root").exists()


def between(boundary, real):
    def call(*args, **kw):
        boundary()
        result = real(*args, **kw)
        boundary()
        return result

    return call


def forked_kill(root, stop, value, step):
    """Run a save in a forked child that is killed at its `stop`-th file operation; True when it was killed."""
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -9)
        return status == -9
    count = 0

    def boundary():
        nonlocal count
        if count == stop:
            os.kill(os.getpid(), 9)
        count += 1

    for module, names in ((os, ("rename", "fsync", "mkdir", "unlink", "rmdir", "open")), (checkpoint, ("save_file",))):
        for name in names:
            setattr(module, name, between(boundary, getattr(module, name)))
    try:
        save(root, step, {"adapter": {"a": torch.full((3, 2), float(value))}}, {"value": value}, 1)
    except BaseException:
        os._exit(1)  # the child must not go on with the tests
    os._exit(0)


@pytest.mark.case("F01", "F02", "F03", "F04", "F05", "F06", "F07", "F08")
@pytest.mark.parametrize("again", [5, 6], ids=["same step", "next step"])
def test_a_kill_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path, again):
    kills = 0
    for stop in range(200):
        root = tmp_path / str(stop)
        save(root, 5, {"adapter": {"a": torch.full((3, 2), 1.0)}}, {"value": 1}, None)
        killed = forked_kill(root, stop, 2, again)
        read = load(resolve(root, "latest"))
        assert torch.equal(read.tensors["adapter"]["a"], torch.full((3, 2), float(read.state["value"])))
        if not killed:
            assert read.state["value"] == 2
            break
        kills += 1
        save(root, 9, {"adapter": {"a": torch.zeros(1)}}, {}, None)  # the next save clears what the dead one left
        assert all(name.startswith("checkpoint-") for name in steps(root))
        shutil.rmtree(root)
    assert kills >= 20 and not killed


def test_temporary_folders_of_living_processes_stay_and_of_dead_ones_go(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = {
        kind: tmp_path / f".checkpoint-3.tmp-{pid}"
        for kind, pid in (("dead", dead.pid), ("alive", os.getppid()), ("own", os.getpid()))
    }
    for path in names.values():
        path.mkdir()
    (tmp_path / ".checkpoint-notes").mkdir()
    save(tmp_path, 4, weights(4), {}, None)
    assert {kind for kind, path in names.items() if path.exists()} == {"alive"}
    assert (tmp_path / ".checkpoint-notes").exists()


@pytest.mark.case("F18")
def test_a_full_disk_keeps_the_older_one_and_says_so(tmp_path, monkeypatch):
    save(tmp_path, 5, weights(1), {}, None)
    for place in ("fsync", "rename"):

        def full(*args, **kw):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, place, full)
            with pytest.raises(EnvironmentFault, match="checkpoint-5: could not be written .No space left on device"):
                save(tmp_path, 5, weights(2), {}, 1)
        assert steps(tmp_path) == ["checkpoint-5"]
        assert load(tmp_path / "checkpoint-5").tensors["adapter"]["a"][0, 0] == 1
    real, calls = os.rename, []

    def second_fails(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(*args)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(EnvironmentFault):
        save(tmp_path, 5, weights(2), {}, 1)
    assert steps(tmp_path) == ["checkpoint-5"] and len(calls) == 3


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
DAMAGE = [
    (name, action)
    for name in FILES
    for action in (flip, Path.unlink, lambda p: os.truncate(p, 0))
    if (name, action) != ("manifest.json", flip)
]  # its middle may be white space


@pytest.mark.case("F22", "F23", "F24")
@pytest.mark.parametrize("name, damage", DAMAGE, ids=[f"{n}-{i}" for i, (n, _) in enumerate(DAMAGE)])
def test_a_damaged_newest_gives_way_to_the_next_older_with_one_warning(tmp_path, caplog, name, damage):
    for step in (1, 2, 3):
        save(tmp_path, step, weights(step), {"step": step}, None)
    damage(tmp_path / "checkpoint-3" / name)
    with caplog.at_level(logging.WARNING, "vislora"):
        assert resolve(tmp_path, "latest") == tmp_path / "checkpoint-2"
    assert len(caplog.records) == 1 and "checkpoint-3: " in caplog.text and "from checkpoint-2" in caplog.text
    with pytest.raises(InputError, match="no whole checkpoint"):
        resolve(tmp_path, "checkpoint-3")
    with pytest.raises(InputError, match=r"checkpoint-3: .*manifest|sha256|cannot be read"):
        load(tmp_path / "checkpoint-3")


def test_none_whole_and_none_at_all_are_errors(tmp_path):
    with pytest.raises(InputError, match="latest: .* holds no checkpoint"):
        resolve(tmp_path / "absent", "latest")
    save(tmp_path, 1, weights(1), {}, None)
    (tmp_path / "checkpoint-1" / "state.json").unlink()
    with pytest.raises(InputError, match="no whole checkpoint: .*state.json cannot be read"):
        resolve(tmp_path, "latest")


def test_a_path_is_taken_as_given_or_under_the_root_and_a_missing_one_names_those_that_exist(tmp_path):
    for step in (10, 20):
        save(tmp_path, step, weights(step), {}, None)
    assert resolve(tmp_path, str(tmp_path / "checkpoint-10")) == tmp_path / "checkpoint-10"
    assert resolve(tmp_path, "checkpoint-20") == tmp_path / "checkpoint-20" == locate(tmp_path, "latest")
    with pytest.raises(
        InputError, match=r"no such folder \(did you mean checkpoint-20.* holds checkpoint-20, checkpoint-10"
    ):
        resolve(tmp_path, "checkpoint-2")
    with pytest.raises(InputError, match="is a folder of checkpoints.*name one of checkpoint-20"):
        resolve(tmp_path, str(tmp_path))


@pytest.mark.case("F40")
def test_a_hostile_manifest_reaches_no_file_outside_and_strangers_are_never_opened(tmp_path):
    path = save(tmp_path, 1, weights(1), {}, None)
    (path / "evil.pkl").write_bytes(b"\x80\x04cos\nsystem\n")
    opened = []
    sys.addaudithook(
        lambda event, args: opened.append(str(args[0])) if event in ("open", "pickle.find_class") else None
    )
    load(resolve(tmp_path, "latest"))
    assert any("adapter.safetensors" in name for name in opened) and not any("evil" in name for name in opened)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../outside.safetensors"] = manifest["files"]["adapter.safetensors"]
    shutil.copy(path / "adapter.safetensors", tmp_path / "outside.safetensors")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="outside.safetensors, which is not a file of the folder"):
        load(path)


@pytest.mark.parametrize("name, content, words", [
    ("state.json", b"[" * 100_000, "cannot be read"), ("state.json", b"{", "cannot be read"),
    ("state.json", b"[]", "state.json holds no object"), ("adapter.safetensors", b"x" * 40, "cannot be read"),
    ("manifest.json", b"[" * 100_000, "manifest.json cannot be read"),
])  # fmt: skip
def test_files_that_agree_with_their_hashes_and_hold_something_else_are_refused(tmp_path, name, content, words):
    path = save(tmp_path, 1, weights(1), {}, None)
    (path / name).write_bytes(content)
    if name != "manifest.json":
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=f"checkpoint-1: .*{words}") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_require_space_names_what_is_free(tmp_path):
    require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(EnvironmentFault, match="MiB are free, .* are needed"):
        require_space(tmp_path / "not" / "yet", 2**60)
