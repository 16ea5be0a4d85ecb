"""What the DreamBooth script's options do, each seen in what a run leaves or in what it computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalTokenNotFoundError
from PIL import Image
from script_runs import lines, photograph, refused, state

from vislora.diffusion import publish
from vislora.diffusion.noise import DDPM
from vislora.io import KOHYA_FILE, LORA_FILE, read
from vislora.training import telemetry

QUICK = ("--adapter", "lora", "--learning_rate", "0.01", "--max_train_steps", "2", "--output_dir", "out")


@pytest.fixture
def seen(script, monkeypatch):
    """The run's Denoising, and every batch that its denoiser saw: (latents' shape, prompts)."""
    kept = SimpleNamespace(denoising=None, shapes=[], prompts=[])
    own = script.Denoising

    class Kept(own):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            kept.denoising = self

        def embed(self, prompts):
            kept.prompts.append(list(prompts))
            return super().embed(prompts)

        def predict(self, noisy, timesteps, condition):
            kept.shapes.append(tuple(noisy.shape))
            return super().predict(noisy, timesteps, condition)

    monkeypatch.setattr(script, "Denoising", Kept)
    return kept


def resumed_alike(run, flags, last: int) -> None:
    """The run of `flags` into "out" is left; going on from the step before its last gives it again, bit for bit."""
    whole = state("out", last)
    shutil.rmtree(f"out/checkpoints/checkpoint-{last}")
    run(*flags, "--resume_from_checkpoint", "latest")
    again = state("out", last)
    assert whole.keys() == again.keys() and all(torch.equal(t, again[name]) for name, t in whole.items())


def test_the_average_is_what_is_kept(run):
    flags = (*QUICK, "--use_ema", "--ema_decay", "0.3", "--checkpointing_steps", "1", "--max_train_steps", "3")
    run(*flags)
    averages = {s: read(Path(f"out/checkpoints/checkpoint-{s}/ema.safetensors"))[0] for s in (1, 2, 3)}
    live = {name.removeprefix("adapter."): t for name, t in state("out", 3).items() if name.startswith("adapter.")}
    final = read(Path("out/adapter/adapter.safetensors"))[0]
    share = min(0.3, 3 / (3 + 9))
    for name, tensor in live.items():
        expected = share * averages[2][f"average|{name}"] + (1 - share) * tensor
        torch.testing.assert_close(averages[3][f"average|{name}"], expected)
        assert torch.equal(final[name], averages[3][f"average|{name}"])
    assert any(not torch.equal(final[name], t) for name, t in live.items())
    resumed_alike(run, flags, 3)
    assert all(torch.equal(t, final[name]) for name, t in read(Path("out/adapter/adapter.safetensors"))[0].items())


def test_captions_are_dropped_by_chance(run, seen):
    run(*QUICK, "--caption_dropout", "0.5", "--max_train_steps", "6")
    flat = [prompt for batch in seen.prompts for prompt in batch]
    assert set(flat) == {"", "a b"} and 2 <= flat.count("") <= 10
    run(*QUICK[:-2], "--caption_dropout", "1.0", "--output_dir", "all")
    assert {prompt for batch in seen.prompts[-2:] for prompt in batch} == {""}


@pytest.mark.parametrize("prior", ["images", "base_output"])
def test_concepts_keep_their_prompts_and_classes(run, place, seen, prior):
    photograph(place / "cats", 2, seed=1)
    concepts = [{"instance_data_dir": "photos", "instance_prompt": "a x dog", "class_prompt": "a dog"},
                {"instance_data_dir": "cats", "instance_prompt": "a y cat", "class_prompt": "a cat"}]  # fmt: skip
    Path("concepts.json").write_text(json.dumps(concepts))
    run(*QUICK, "--concepts_list", "concepts.json", "--with_prior_preservation", "--prior_source", prior,
        "--num_class_images", "2", "--validation_inference_steps", "1", "--train_batch_size", "5")  # fmt: skip
    photos = [p for batch in seen.prompts for p in batch if " x " in p or " y " in p]
    assert photos.count("a x dog") == 6 and photos.count("a y cat") == 4  # two epochs of five photos
    if prior == "images":
        assert {p.name for p in Path("out").iterdir() if p.is_dir()} >= {"class_images", "class_images_2"}
        assert len(list(Path("out/class_images_2").iterdir())) == 2
        assert {"a dog", "a cat"} <= {p for batch in seen.prompts for p in batch}
    else:
        for classes, own in zip(seen.prompts[::2], seen.prompts[1::2], strict=True):
            assert [p.split()[-1] for p in classes] == [p.split()[-1] for p in own]


def test_buckets_train_on_shapes_and_resume_exactly(run, place, seen):
    noise = np.random.default_rng(0)
    for name, (height, width) in {"wide": (40, 90), "tall": (80, 40), "taller": (82, 40)}.items():
        Image.fromarray(noise.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(place / f"photos/{name}.png")
    flags = (*QUICK, "--use_aspect_ratio_buckets", "--bucket_reso_steps", "4", "--train_batch_size", "2",
             "--max_train_steps", "5", "--checkpointing_steps", "1", "--with_prior_preservation", "--class_prompt", "b",
             "--num_class_images", "2", "--validation_inference_steps", "1")  # fmt: skip
    run(*flags)
    shapes = {shape[2:] for shape in seen.shapes}
    assert {shape[0] for shape in seen.shapes} == {4} and len(shapes) == 3  # two photos, two class images
    assert all(h * w <= 16 * 16 and h % 2 == 0 == w % 2 for h, w in shapes)
    assert any(h < w for h, w in shapes) and any(h > w for h, w in shapes)
    resumed_alike(run, flags, 5)


def test_an_epoch_of_buckets_has_its_own_length(run, place):
    Image.fromarray(np.zeros((90, 40, 3), np.uint8)).save(place / "photos/tall.png")
    run("--use_aspect_ratio_buckets", "--bucket_reso_steps", "8", "--num_train_epochs", "2", "--max_train_steps",
        "none", "--train_batch_size", "2", "--output_dir", "out")  # fmt: skip
    assert len(lines("out")) == 2 * (2 + 1)  # three photos make two batches, the tall one makes one


def test_masks_take_their_part_of_the_loss(run, place):
    losses = {}
    for name, width in {"none": 0, "left": 24, "all": 48}.items():
        for i in range(3):
            mask = Image.new("L", (48, 40), 0)
            mask.paste(255, (0, 0, width, 40))
            mask.save(place / f"photos/{i}-masklabel.png")
        run(*QUICK[:-2], "--masked_loss", "--center_crop", "--no_cache_latents", "--output_dir", name)
        losses[name] = lines(name)[0]["loss"]
    assert losses["none"] == 0 < losses["left"] < losses["all"]
    for i in range(3):
        (place / f"photos/{i}-masklabel.png").unlink()
    run(*QUICK[:-2], "--center_crop", "--output_dir", "plain")
    assert lines("plain")[0]["loss"] == pytest.approx(losses["all"], rel=1e-6)


def test_loss_options_reach_the_objective(run, seen):
    run(*QUICK, "--prediction_type", "v_prediction", "--rescale_betas_zero_snr", "--min_snr_gamma", "4",
        "--debiased_estimation_loss", "--noise_offset", "0.1", "--loss_type", "huber", "--huber_schedule", "constant",
        "--huber_c", "0.2", "--validation_prompt", "a", "--num_validation_images", "1",
        "--validation_inference_steps", "1")  # fmt: skip
    process, error = seen.denoising.process, seen.denoising.error
    assert isinstance(process, DDPM) and (process.snr_gamma, process.debiased, process.noise_offset) == (4, True, 0.1)
    assert process.scheduler.config.prediction_type == "v_prediction" and process.scheduler.alphas_cumprod[-1] < 1e-6
    assert (error.kind, error.huber_schedule, error.huber_c) == ("huber", "constant", 0.2)
    sampler = seen.denoising.models.pipeline().scheduler
    assert sampler.config.timestep_spacing == "trailing" and sampler.config.prediction_type == "v_prediction"
    assert all(np.isfinite(entry["loss"]) for entry in lines("out"))


@pytest.mark.parametrize("flags, kind", [
    (("--use_8bit_adam",), "AdamW8bit"),
    (("--optimizer", "prodigy", "--learning_rate", "1", "--prodigy_safeguard_warmup", "--train_text_encoder"),
     "Prodigy"),
])  # fmt: skip
def test_other_peoples_optimizers_train_and_resume_exactly(run, flags, kind):
    if kind == "Prodigy":
        pytest.importorskip("prodigyopt")
    flags = (*QUICK, "--rank", "16", "--adam_epsilon", "1e-8", *flags, "--checkpointing_steps", "1",
             "--max_train_steps", "4")  # fmt: skip
    run(*flags)
    saved = json.loads(Path("out/checkpoints/checkpoint-4/state.json").read_text())
    assert saved["optimizer"]["class"] == kind
    group = saved["optimizer"]["groups"][0]["settings"]
    assert group.get("safeguard_warmup", True) is True and group["weight_decay"] == 0.01
    factors = [name for name in state("out", 4) if name.startswith("adapter.")]
    first, last = state("out", 1), state("out", 4)
    assert all(last[n].isfinite().all() for n in factors) and any(not torch.equal(last[n], first[n]) for n in factors)
    resumed_alike(run, flags, 4)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind, layer", [("nf4", bnb.nn.Linear4bit), ("int8", bnb.nn.Linear8bitLt)])
def test_a_quantized_base_trains_and_exports(run, seen, kind, layer):
    run(*QUICK, "--base_quantization", kind, "--mixed_precision", "bf16")
    unet = seen.denoising.models.unet
    linears = [m for m in unet.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) > 30 and all(isinstance(m, layer) for m in linears)
    assert type(seen.denoising.models.text_encoder.encoder.layers[0].mlp.fc1) is torch.nn.Linear
    assert all(np.isfinite(entry["loss"]) for entry in lines("out"))
    assert json.loads(Path("out/metrics.json").read_text())["diffusers_export_error"] < 1e-3
    assert Path("out", LORA_FILE).is_file() and Path("out", KOHYA_FILE).is_file()


class Hub:
    """The hub's client, remembering what it was asked."""

    calls: list = []

    def whoami(self):
        self.calls.append("whoami")

    def create_repo(self, name, exist_ok):
        self.calls.append(name)
        return SimpleNamespace(repo_id=f"me/{name}" if "/" not in name else name)

    def upload_folder(self, repo_id, folder_path, ignore_patterns, commit_message):
        self.calls.append((repo_id, Path(folder_path).name, tuple(ignore_patterns)))
        return f"at {repo_id}"


def test_a_finished_run_goes_to_the_hub(run, capsys, monkeypatch):
    monkeypatch.setattr(publish, "HfApi", Hub)
    Hub.calls.clear()
    run(*QUICK, "--push_to_hub")
    assert Hub.calls == ["whoami", "out", ("me/out", "out", ("checkpoints/*", "class_images*/*", "logs/*", ".*"))]
    assert "hub        at me/out" in capsys.readouterr().out
    run(*QUICK[:-2], "--push_to_hub", "--hub_model_id", "us/owl", "--output_dir", "two")
    assert Hub.calls[4] == "us/owl"

    def full(*_, **__):
        raise OSError("no space")

    monkeypatch.setattr(Hub, "upload_folder", full)
    with pytest.raises(SystemExit) as stop:
        run(*QUICK[:-2], "--push_to_hub", "--output_dir", "three")
    said = capsys.readouterr().err
    assert stop.value.code == 3 and "hf upload three three" in said and Path("three/README.md").is_file()

    def locked_out(*_):
        raise LocalTokenNotFoundError("none")

    monkeypatch.setattr(Hub, "whoami", locked_out)
    line = refused(run, capsys, *QUICK[:-2], "--push_to_hub")
    assert "hf auth login" in line


class Tracker(telemetry.GeneralTracker):
    name, requires_logging_directory, kept = "wandb", False, []

    def __init__(self, project):
        super().__init__()
        self.kept.append(project)

    @property
    def tracker(self):
        return self

    def start(self):
        self.kept.append("start")

    def store_init_configuration(self, values):
        self.kept.append(values["learning_rate"])

    def log(self, values, step):
        self.kept.append((step, values["loss"]))

    def log_images(self, values, step):
        self.kept.append((step, sorted(values)))

    def finish(self):
        self.kept.append("finish")


def test_metrics_go_to_accelerates_trackers(run, monkeypatch, capsys):
    assert "wandb is not installed" in refused(run, capsys, "--report_to", "wandb")
    import accelerate.tracking

    for module in (telemetry, accelerate.tracking):
        monkeypatch.setattr(module, "get_available_trackers", lambda: ["wandb", "tensorboard"])
    monkeypatch.setitem(telemetry.LOGGER_TYPE_TO_CLASS, "wandb", Tracker)
    Tracker.kept.clear()
    run(*QUICK, "--report_to", "all", "--validation_prompt", "a", "--num_validation_images", "1",
        "--validation_inference_steps", "1")  # fmt: skip
    losses = [(entry["step"], entry["loss"]) for entry in lines("out")]
    assert Tracker.kept == ["vislora", "start", "0.01", *losses, (2, ["samples"]), "finish"]
    assert any("tfevents" in file.name for file in Path("out/logs").iterdir())


@pytest.mark.case("C06")
def test_bad_values_get_one_line(run, capsys, place, monkeypatch):
    nowhere = ("--pretrained_model_name_or_path", "nowhere/at/all")
    for flags, words in (
        (("--caption_dropout", "1.5"), ("--caption_dropout", "1.5")),
        (("--ema_decay", "1"), ("--ema_decay", "1.0")),
        (("--huber_c", "0"), ("--huber_c", "0.0")),
        (("--loss_type", "huber", "--huber_c", "2"), ("--huber_c", "2.0", "snr")),
        (("--loss_type", "l3"), ("--loss_type", "l3", "l1")),
        (("--noise_offset", "-1"), ("--noise_offset", "-1")),
        (("--logit_std", "0"), ("--logit_std",)),
        (("--logit_mean", "nan"), ("--logit_mean",)),
        (("--mode_scale", "-2"), ("--mode_scale",)),
        (("--weighting_scheme", "moed"), ("moed", "mode")),
        (("--bucket_reso_steps", "0"), ("--bucket_reso_steps", "0")),
        (("--concepts_list", "gone.json"), ("gone.json", "cannot be read")),
        (("--use_8bit_adam", "--optimizer", "prodigy"), ("--use_8bit_adam", "prodigy")),
        (("--prodigy_beta3", "0.9"), ("--prodigy_beta3", "adamw", "prodigy")),
        (("--optimizer", "prodigy", "--prodigy_beta3", "2"), ("--prodigy_beta3", "2.0")),
        (("--conditioning_data_dir", "masks"), ("--conditioning_data_dir", "--masked_loss")),
        (("--hub_model_id", "a/b"), ("--hub_model_id", "--push_to_hub")),
        (("--push_to_hub", "--hub_model_id", "a b"), ("--hub_model_id", "a b")),
        (("--masked_loss",), ("--masked_loss", "3 of 3 photos", "0.png")),
        (("--report_to", "wandbb", *nowhere), ("wandbb", "wandb")),
        (("--base_quantization", "nf5"), ("nf5", "nf4")),
        (("--base_quantization", "nf4", "--adapter", "full", *nowhere), ("--base_quantization", "full")),
        (("--rescale_betas_zero_snr",), ("--rescale_betas_zero_snr", "--prediction_type v_prediction")),
        (("--resolution", "31"), ("--resolution", "31", "multiple of 2")),
    ):
        line = refused(run, capsys, *(("--rank", "2") if "full" not in flags else ()), *flags)
        assert all(word in line for word in words), line
    Path("one.json").write_text('[{"instance_data_dir": "photos"}]')
    for flags, words in (
        (("--class_prompt", "b"), ("--class_prompt", "beside --concepts_list")),
        (("--instance_prompt", "b"), ("--instance_prompt", "beside --concepts_list")),
        (("--with_prior_preservation",), ("photos has no class_prompt",)),
        ((), ("photos holds no captions",)),
    ):
        line = refused(run, capsys, "--concepts_list", "one.json", *flags)
        assert all(word in line for word in words), line
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install prodigyopt" in refused(run, capsys, "--optimizer", "prodigy")
    assert "pip install bitsandbytes" in refused(run, capsys, "--optimizer", "adamw8bit")
    assert "pip install bitsandbytes" in refused(run, capsys, "--base_quantization", "int8")


def test_the_gradient_probe_is_logged_and_changes_nothing(run):
    for more in (("--output_dir", "plain"), ("--output_dir", "probed", "--probe_steps", "1")):
        run(*QUICK, "--gradient_accumulation_steps", "2", "--train_text_encoder", *more)
    plain, probed = (read(Path(folder) / "adapter" / "adapter.safetensors")[0] for folder in ("plain", "probed"))
    assert all(torch.equal(t, probed[k]) for k, t in plain.items())
    (line,) = (line for line in lines("probed") if "cosine" in line)
    assert line["step"] == 1 and 0 < line["cosine"] <= 1 and not any("cosine" in line for line in lines("plain"))
