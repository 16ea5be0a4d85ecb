"""The command, whole: on a run of a random Stable Diffusion of 32 pixels, on adapters of other tools, on folders."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from diffusers import UNet2DConditionModel
from metric_world import tiny_dino
from PIL import Image
from tiny_sd import tiny_sd

import vislora
from vislora.errors import InputError
from vislora.training import checkpoint
from vislora.training.run import RunFolder

REPOSITORY = Path(__file__).resolve().parents[2]
PROMPTS = ["a {} in the snow", "a red {}"]
METRICS = {"dino", "clip_i", "clip_t", "lpips_real", "lpips_div", "pres", "drift_dino", "drift_clip", "drift_denoising"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    """{"ours", "diffusers", "kohya", "peft": an adapter of a rough weight, as each tool's file}."""
    place = tmp_path_factory.mktemp("adapters")
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    handle = vislora.attach({"unet": unet}, "lora", rank=2)
    with torch.no_grad():
        for name, tensor in handle.named_parameters():
            tensor.copy_(0.5 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))))
    handle.save(place / "ours")
    for form in ("diffusers", "kohya", "peft"):
        handle.export(place / form, format=form)
    return place


@pytest.fixture
def subject_driven(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "eval"))
    monkeypatch.delitem(sys.modules, "subject_driven", raising=False)
    import subject_driven

    return subject_driven


@pytest.fixture
def folder(tmp_path, model, adapters, noise, monkeypatch):
    """A run's folder, photos and prompts, in the working directory."""
    monkeypatch.chdir(tmp_path)
    noise("pet", [f"{i}.png" for i in range(3)])
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.write_config({
        "pretrained_model_name_or_path": str(model), "instance_data_dir": "pet", "adapter": "lora",
        "instance_prompt": "a photo of a sks dog", "class_prompt": "a photo of a dog", "guidance_scale": 2.0,
        "mixed_precision": None, "resolution": None, "concepts_list": None,
    })  # fmt: skip
    shutil.copytree(adapters / "ours", run.adapter)
    return run.path


@pytest.fixture
def score(subject_driven, small_world, tmp_path):
    """score(*flags): the result's JSON, of two images a prompt in two sampler steps."""

    def call(*flags: str) -> dict:
        AcceleratorState._reset_state()
        PartialState._reset_state()
        usual = {"--cache_dir": str(tmp_path / "cache"), "--resamples": "20"}
        if "--generated" not in flags:
            usual |= {"--steps": "2", "--images": "2", "--drift_images": "1"}
        usual |= {} if "--data" in flags else {"--prompts": "prompts.txt"}
        given = [word for flag, value in usual.items() if flag not in flags for word in (flag, value)]
        subject_driven.main([*given, *flags])
        named = flags[flags.index("--output_dir") + 1] if "--output_dir" in flags else flags[1]
        return json.loads((Path(named) / "eval" / "subject_driven.json").read_text())

    return call


def test_a_run_is_drawn_and_scored(score, folder, capsys):
    result = score("--run", str(folder))
    assert result["protocol"] == "oft" and set(result["protocols"]) == {"dreambooth"}
    metrics, intervals = result["metrics"], result["intervals"]
    assert set(metrics) >= METRICS and all(isinstance(metrics[name], float) for name in METRICS)
    assert all(low <= metrics[name] <= high for name, (low, high) in intervals.items() if name != "lpips_div")
    assert metrics["drift_denoising"] > 0 and metrics["drift_dino"] > 0
    assert set(result["per_subject"]) == {"pet"} and set(result["per_prompt"]) >= set(PROMPTS)
    counts = result["counts"]
    assert (counts["generated"], counts["pairs"], counts["real_pairs"], counts["real_pairs_with_self"]) == (4, 12, 6, 9)
    record = result["record"]
    assert record["texts"] == {"pet": {p: p.format("dog") for p in PROMPTS}} and record["tokens"] == {"pet": "sks"}
    assert record["steps"] == 2 and record["guidance"] == 2.0 and record["versions"]["torch"] == version("torch")
    assert record["lpips_column"] == "lpips_world" and "tiny-dino" in record["dino"]
    assert record["clip_activations"] == "GELU"  # tiny-clip's, which is none of OpenAI's
    manifest = json.loads((folder / "eval" / "images" / "manifest.json").read_text())
    assert {image["prompt"] for image in manifest["images"].values()} == {p.format("sks dog") for p in PROMPTS}
    shown = capsys.readouterr().out
    assert "lpips_world_real" in shown and "dreambooth" in shown and "4 images of 2 prompts, 1 subjects" in shown
    assert "ALL BLACK" not in shown and "with self-pairs" not in shown
    assert "[" not in next(line for line in shown.splitlines() if "real im" in line)

    # Images of the same run in folders give the same numbers.
    again = score("--generated", str(folder), "--real", "pet", "--output_dir", "again")
    for name in ("dino", "clip_i", "clip_t", "lpips_real", "lpips_div"):
        assert again["metrics"][name] == pytest.approx(metrics[name], abs=1e-12), name


def test_drawing_goes_on_where_it_was_cut_off(score, folder, subject_driven, monkeypatch):
    first = score("--run", str(folder), "--no_drift")
    images = folder / "eval" / "images"
    before = {file.name: file.read_bytes() for file in images.glob("*.png")}
    (images / "001_0.png").unlink()
    (images / "000_1.png").write_bytes(before["000_1.png"][:200])  # cut short
    kept = (images / "000_0.png").stat().st_mtime_ns
    assert score("--run", str(folder), "--no_drift")["metrics"] == first["metrics"]
    assert {file.name: file.read_bytes() for file in images.glob("*.png")} == before
    assert (images / "000_0.png").stat().st_mtime_ns == kept

    monkeypatch.setattr(subject_driven.draw, "render", None)  # would fail if anything were drawn
    assert score("--run", str(folder), "--no_drift")["metrics"] == first["metrics"]
    with pytest.raises(TypeError):
        score("--run", str(folder), "--no_drift", "--steps", "1")  # other images are asked for


def test_images_of_another_noise_schedule_are_others(score, folder, tmp_path):
    plain = score("--run", str(folder))
    images = folder / "eval" / "images"
    before = {file.name: file.read_bytes() for file in images.glob("*.png")}
    run = RunFolder(folder)
    run.write_config({**run.read_config(), "prediction_type": "v_prediction", "rescale_betas_zero_snr": True})
    other = score("--run", str(folder))
    assert all(file.read_bytes() != before[file.name] for file in images.glob("*.png"))
    assert len(list((tmp_path / "cache" / "base").iterdir())) == 2  # the base's images are not those of the plain run
    assert other["record"]["schedule"] != plain["record"]["schedule"]
    assert other["record"]["sequence"] is None


def test_every_tool_s_file_draws_the_same(score, folder, adapters, model):
    own = score("--run", str(folder), "--no_drift")["metrics"]
    for form in ("diffusers", "kohya", "peft"):
        found = score("--adapter", str(adapters / form), "--base", str(model), "--real", "pet", "--class_noun", "dog",
                      "--guidance_scale", "2", "--no_drift", "--output_dir", form)["metrics"]  # fmt: skip
        assert found.keys() == own.keys()
        for name, value in own.items():
            assert found[name] == (None if value is None else pytest.approx(value, abs=5e-3)), (form, name)


def test_a_checkpoint_takes_the_adapter_s_place(score, folder, model):
    handle = vislora.load({"unet": UNet2DConditionModel.from_pretrained(model / "unet")}, folder)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in handle.named_tensors()}
    checkpoint.save(folder / "checkpoints", 7, {"adapter": zeros}, {}, None)
    final = score("--run", str(folder), "--output_dir", "final")
    early = score("--run", str(folder), "--checkpoint", "latest", "--output_dir", "early")
    assert final["metrics"]["drift_denoising"] > early["metrics"]["drift_denoising"] == 0
    assert early["metrics"]["drift_dino"] == pytest.approx(0, abs=1e-9)
    assert "checkpoint-7" in early["record"]["adapter"]
    assert early["record"]["adapter_digest"] != final["record"]["adapter_digest"]
    with pytest.raises(InputError, match=r"--checkpoint checkpoint-8: no such folder.*or latest"):
        score("--run", str(folder), "--checkpoint", "checkpoint-8")
    with pytest.raises(InputError, match="--checkpoint: is one of a run"):
        score("--adapter", "none", "--checkpoint", "latest", "--output_dir", "x")


@pytest.mark.parametrize("kept", [9, 6])  # the run's own step, or --keep best's
@pytest.mark.parametrize("place", [None, "elsewhere"])
def test_all_checkpoints_make_a_curve_and_the_best_step_is_told_as_biased(score, folder, model, capsys, place, kept):
    handle = vislora.load({"unet": UNet2DConditionModel.from_pretrained(model / "unet")}, folder)
    for step, strength in ((3, 0.0), (15 - kept, 0.5)):
        tensors = {name: strength * tensor for name, tensor in handle.named_tensors()}
        checkpoint.save(folder / "checkpoints", step, {"adapter": tensors}, {}, None)
    RunFolder(folder).write_metrics({"steps": 9, **({"kept_step": kept} if kept < 9 else {})})
    checkpoint.save(folder / "checkpoints", kept, {"adapter": dict(handle.named_tensors())}, {}, None)  # the final one
    out = [] if place is None else ["--output_dir", place]
    final = score("--run", str(folder), *out, "--checkpoint", "all")
    root = Path(place or folder) / "eval"
    curve = json.loads((root / "over_steps.json").read_text())
    assert [point["step"] for point in curve] == [3, 6, 9] and curve[0]["metrics"]["drift_denoising"] == 0
    at = {point["step"]: point["metrics"] for point in curve}
    assert at[kept] == final["metrics"] != at[15 - kept] != at[3]
    best = max(curve, key=lambda point: point["metrics"]["dino"])
    assert final["biased_best"]["step"] == best["step"] and final["biased_best"]["metrics"] == best["metrics"]
    assert f"is step {best['step']}'s" in capsys.readouterr().out
    name = f"checkpoint-{15 - kept}"
    one = Path(place, name, "eval") if place else root / name
    assert json.loads((one / "subject_driven.json").read_text())["metrics"] == at[15 - kept]
    with Image.open(root / "over_steps.png") as picture:
        assert picture.width > 500
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(InputError, match="--checkpoint all: .*none beside the final adapter's.*--checkpointing_steps"):
        score("--run", str(folder), "--checkpoint", "all")


def test_the_base_has_not_drifted(score, folder):
    result = score("--run", str(folder), "--adapter", "none", "--output_dir", "base")
    assert result["metrics"]["drift_dino"] == pytest.approx(0, abs=1e-9)
    assert result["metrics"]["drift_denoising"] == 0
    assert not (Path("base") / "eval" / "drift").exists()


def test_bad_input_is_told_in_one_line(score, folder, noise, model):
    with pytest.raises(InputError, match="none of --run, --adapter and --generated"):
        score("--seed", "1")
    with pytest.raises(InputError, match="ofc.*unknown.*one of oft"):
        score("--run", str(folder), "--protocol", "ofc")
    for flag, name in (("--dino", "b16"), ("--dino", "dinov2_s"), ("--clip", "L14")):
        with pytest.raises(InputError, match=f"{flag}: {name} is a network of the papers'.*--backbones papers"):
            score("--run", str(folder), flag, name)
    place = noise("made", [f"00{i}_{k}.png" for i in range(2) for k in range(2)])
    (place / "001_1.png").unlink()
    with pytest.raises(InputError, match=r"made: 0 of 2 prompts have no image, 1 have fewer.*number 1"):
        score("--generated", "made", "--real", "pet")
    noise("made", ["001_1.png", "002_0.png"])
    with pytest.raises(InputError, match="up to number 2, and there are 2"):
        score("--generated", "made", "--real", "pet")
    (place / "002_0.png").unlink()
    (place / "000_0.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"1 cannot be read: made/000_0.png"):
        score("--generated", "made", "--real", "pet")
    with pytest.raises(InputError, match="no such folder"):
        score("--generated", "made", "--real", "nowhere")



def test_real_is_a_folder_of_subjects_folders_with_a_run_too(score, folder, noise, capsys):
    for seed, name in enumerate(("rex", "bello", "empty")):
        noise(f"pets/{name}", [f"{i}.png" for i in range(3)] if name != "empty" else [], seed)
    flags = ["--run", str(folder), "--real", "pets", "--no_drift", "--images", "1"]
    result = score(*flags, "--subjects", "rex", "bello", "--include_self", "--output_dir", "both")
    assert set(result["per_subject"]) == {"rex", "bello"} and result["counts"]["real"] == 6
    assert result["record"]["texts"]["rex"] == {p: p.format("dog") for p in PROMPTS}
    lines = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    for label, how in (("real images, dino", "exclude_self"), ("real images, dino with self-pairs", "include_self")):
        value, (low, high) = result["real"][how]["dino"], result["real_intervals"][how]["dino"]
        assert low <= value <= high and f"{value:.4f} [{low:.4f}, {high:.4f}]" in lines[label]
    alone = score(*flags, "--subjects", "bello", "--output_dir", "alone")
    assert alone["counts"]["subjects"] == 1 and alone["real_intervals"]["exclude_self"]["dino"] is None
    with pytest.raises(InputError, match=r"'bela' is no subject here.*did you mean bello"):
        score(*flags, "--subjects", "bela")
    with pytest.raises(InputError, match=r"empty: holds no image"):
        score(*flags)


def test_images_that_the_manifest_does_not_name_are_passed_over(score, folder, noise, caplog):
    """Of four images a prompt of one adapter, the first two drawn again by another, which wrote the manifest."""
    own = score("--run", str(folder), "--no_drift")
    noise("run/eval/images", [f"00{i}_{k}.png" for i in range(2) for k in (2, 3)])
    flags = ["--generated", str(folder), "--real", "pet", "--output_dir", "again"]
    again = score(*flags)
    assert again["counts"]["generated"] == 4
    assert again["metrics"]["dino"] == pytest.approx(own["metrics"]["dino"], abs=1e-12)
    assert "4 images that manifest.json does not name passed over: 000_2.png, 000_3.png" in caplog.text
    (folder / "eval" / "images" / "001_0.png").unlink()
    with pytest.raises(InputError, match=r"manifest.json: names 1 images that are not there: 001_0.png"):
        score(*flags)


def test_all_black_images_are_counted_and_named(score, folder, noise, capsys):
    made = noise("made", [f"00{i}_{k}.png" for i in range(2) for k in range(4)])
    for file in ("made/000_1.png", "made/001_2.png", "pet/2.png"):
        Image.new("RGB", (64, 64)).save(file)
    flags = ["--generated", str(made), "--real", "pet", "--class_noun", "dog"]
    result = score(*flags)
    assert (result["counts"]["black"], result["counts"]["black_real"], result["counts"]["pairs"]) == (2, 1, 24)
    files = [str(made / "000_1.png"), str(made / "001_2.png"), "pet/2.png"]
    assert result["black_files"] == files
    line = f"ALL BLACK: 2 images, 1 photos, 0 images for drift: {', '.join(files)}"
    assert line in capsys.readouterr().out.splitlines()


def test_compat_and_texts_through_the_command(score, folder, noise, capsys):
    """OFT's defects, on names that end alike, five images a prompt and a black one; and what CLIP-T is told."""
    for seed, name in enumerate(("dog", "backpack_dog")):
        noise(f"pets/{name}", ["0.png", "1.png"], seed)
        noise(f"made/{name}", [f"00{i}_{k}.png" for i in range(2) for k in range(5)], 7 + seed)
    Image.new("RGB", (64, 64)).save("made/dog/000_1.png")
    flags = ["--generated", "made", "--real", "pets", "--class_noun", "dog"]
    plain = score(*flags)
    assert plain["compat"] is False and plain["counts"]["pairs"] == 2 * 10 * 2
    assert plain["record"]["texts"]["dog"] == {p: p.format("dog") for p in PROMPTS}
    assert "with self-pairs" not in capsys.readouterr().out
    compat = score(*flags, "--compat", "--include_self", "--clip_t_text", "class")
    shown = capsys.readouterr().out
    assert "oft compat" in shown and shown.count("with self-pairs") == 3
    dog, backpack = 2 * (7 + 8), 2 * 8  # photos times images: of both folders; four a prompt, less the black one
    assert compat["compat"] is True and compat["counts"]["pairs"] == dog + backpack
    assert compat["record"]["texts"]["dog"] == dict.fromkeys(PROMPTS, "a photo of a dog")
    told = score(*flags, "--clip_t_text", "with_token")
    assert told["record"]["texts"]["backpack_dog"] == {p: p.format("sks dog") for p in PROMPTS}
    assert len({r["metrics"]["clip_t"] for r in (plain, compat, told)}) == 3
    assert {r["record"]["clip_t_text"] for r in (plain, compat, told)} == {"without_token", "class", "with_token"}


def test_prompts_without_a_class_noun_are_told(score, folder, noise, caplog):
    noise("made", [f"00{i}_{k}.png" for i in range(2) for k in range(2)])
    flags = ["--generated", "made", "--real", "pet"]
    assert score(*flags)["metrics"]["clip_t"] is None
    assert "CLIP-T is left out -> give --class_noun" in caplog.text
    caplog.clear()
    result = score(*flags, "--class_noun", "dog")
    assert result["metrics"]["clip_t"] is not None and "CLIP-T" not in caplog.text
    assert result["record"]["texts"] == {"pet": {p: p.format("dog") for p in PROMPTS}}


@pytest.mark.slow
def test_two_processes_give_one_s_result(score, folder, tmp_path):
    dino = tiny_dino(tmp_path / "dino")
    flags = ["--run", str(folder), "--dino", str(dino)]
    alone = score(*flags, "--output_dir", "alone")
    loopback = next((name for name in os.listdir("/sys/class/net") if name.startswith("lo")), None)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    environment |= {"GLOO_SOCKET_IFNAME": loopback} if loopback else {}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2",
              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
              "--main_process_port", str(port)]  # fmt: skip
    usual = ["--prompts", "prompts.txt", "--steps", "2", "--images", "2", "--drift_images", "1", "--batch_size", "2",
             "--resamples", "20", "--cache_dir", "cache of two"]  # fmt: skip
    command = [*launch, str(REPOSITORY / "eval" / "subject_driven.py"), *flags, *usual, "--output_dir", "two"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "two" / "eval" / "subject_driven.json").read_text())
    for name, value in alone["metrics"].items():
        assert two["metrics"][name] == pytest.approx(value, abs=2e-3), name  # batches differ, and with them rounding
