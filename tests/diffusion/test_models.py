"""Loading a base model: what comes back, and what is refused before anything is loaded."""

import json
import shutil

import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline
from huggingface_hub.errors import LocalEntryNotFoundError
from tiny_sd import tiny_sd

from vislora.diffusion import base as module
from vislora.diffusion.base import check_folder
from vislora.diffusion.conditioning import EmbeddingCache, encode, tokenize
from vislora.diffusion.models import load
from vislora.errors import EnvironmentFault, InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_sd(tmp_path_factory.mktemp("tiny-sd"))


@pytest.fixture(scope="module")
def models(folder):
    return load(folder)


@pytest.fixture
def copy(folder, tmp_path):
    """A folder to damage."""
    return shutil.copytree(folder, tmp_path / "base")


def test_everything_is_frozen_and_in_eval_mode_and_convolutions_in_channels_last(models):
    for part in (models.unet, models.vae, models.text_encoder):
        assert not any(weight.requires_grad for weight in part.parameters())
        assert not any(child.training for child in part.modules())
    kernels = [w for part in (models.unet, models.vae) for w in part.parameters() if w.dim() == 4 and w.shape[-1] == 3]
    assert len(kernels) > 10
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in kernels)


def test_weights_are_those_of_the_file(models, folder):
    stock = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    for name in ("unet", "vae", "text_encoder"):
        theirs = getattr(stock, name).state_dict()
        ours = getattr(models, name).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_facts_about_the_model(models):
    assert (models.resolution, models.vae_factor, models.pipeline_class) == (32, 2, "StableDiffusionPipeline")
    assert models.device == torch.device("cpu")


def test_no_schedule_clips_latents(copy):
    # Stable Diffusion 1.5's own scheduler: it has no such option, and those made from it clip by default.
    PNDMScheduler(skip_prk_steps=True, steps_offset=1).save_pretrained(copy / "scheduler")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "PNDMScheduler"]}))
    models = load(copy)
    assert models.scheduler.config.clip_sample is False
    assert models.pipeline("ddim").scheduler.config.clip_sample is False


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_pipeline_shares_the_modules_and_the_noise_schedule(models, sampler):
    pipe = models.pipeline(sampler)
    assert pipe.unet is models.unet and pipe.vae is models.vae and pipe.text_encoder is models.text_encoder
    assert pipe.scheduler is not models.scheduler
    assert torch.equal(pipe.scheduler.alphas_cumprod, models.scheduler.alphas_cumprod)
    assert pipe.safety_checker is None
    with pytest.raises(InputError, match="did you mean ddim"):
        models.pipeline("ddimm")


def test_prediction_type_reaches_every_scheduler(tmp_path):
    models = load(tiny_sd(tmp_path, prediction_type="v_prediction"))
    assert models.scheduler.config.prediction_type == "v_prediction"
    assert models.pipeline("ddim").scheduler.config.prediction_type == "v_prediction"
    assert models.pipeline("dpm").scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize(("dtype", "vae"), [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_half_precision_spares_the_vae_where_it_would_overflow(folder, dtype, vae):
    models = load(folder, dtype=dtype)
    assert {weight.dtype for weight in models.unet.parameters()} == {dtype}
    assert {weight.dtype for weight in models.text_encoder.parameters()} == {dtype}
    assert {weight.dtype for weight in models.vae.parameters()} == {vae}


@pytest.mark.case("A19")
@pytest.mark.parametrize(
    "missing",
    [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae",
        "text_encoder/model.safetensors",
        "tokenizer",
        "scheduler/scheduler_config.json",
    ],
)
def test_a_missing_part_is_named_before_anything_is_loaded(copy, missing, monkeypatch):
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("loaded too soon"))
    path = copy / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InputError, match="no such file") as caught:
        load(copy)
    assert missing in str(caught.value)


def test_a_truncated_weight_file_is_named(copy):
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(InputError, match="unet/diffusion_pytorch_model.safetensors: is broken"):
        check_folder(copy)


@pytest.mark.case("A19")
def test_a_missing_shard_is_named(copy):
    part = copy / "unet"
    (part / "diffusion_pytorch_model.safetensors").rename(part / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (part / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="unet/two.safetensors: no such file, though its index lists it"):
        check_folder(copy)


def test_a_broken_json_file_is_named(copy):
    (copy / "vae" / "config.json").write_text('{"cut": ')
    with pytest.raises(InputError, match="vae/config.json: cannot be read"):
        check_folder(copy)


def test_weights_of_another_shape_are_one_line(copy):
    file = copy / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"cross_attention_dim": 48}))
    with pytest.raises(InputError, match="cannot be loaded"):
        load(copy)


def test_an_unknown_family_lists_the_known(copy):
    (copy / "model_index.json").write_text('{"_class_name": "StableDiffusionPipelin"}')
    with pytest.raises(InputError, match="did you mean StableDiffusionPipeline.*known: StableDiffusionPipeline"):
        load(copy)


def test_variants(copy):
    with pytest.raises(InputError, match="no part has files of variant 'fp16'"):
        check_folder(copy, "fp16")
    part = copy / "unet"
    (part / "diffusion_pytorch_model.safetensors").rename(part / "diffusion_pytorch_model.fp16.safetensors")
    check_folder(copy, "fp16")
    with pytest.raises(InputError, match="there is diffusion_pytorch_model.fp16.safetensors: check --variant"):
        check_folder(copy)
    assert load(copy, variant="fp16").resolution == 32


@pytest.mark.parametrize("path", ["/no/such/folder", "./nowhere", "a/b/c", "nothing"])
def test_a_mistyped_path_is_not_looked_up_on_the_hub(path, monkeypatch):
    monkeypatch.setattr(module, "hf_hub_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match="no such folder"):
        load(path)


def test_an_unreachable_hub_is_the_environments_fault(monkeypatch):
    def offline(*_, **__):
        raise LocalEntryNotFoundError("no traffic")

    monkeypatch.setattr(module, "hf_hub_download", offline)
    with pytest.raises(EnvironmentFault, match="owner/name: no such folder, and the hub cannot be reached"):
        load("owner/name")


def test_the_family_of_a_hub_model_is_checked_before_it_is_fetched(copy, monkeypatch):
    (copy / "model_index.json").write_text('{"_class_name": "AudioPipeline"}')
    monkeypatch.setattr(module, "hf_hub_download", lambda *_, **__: str(copy / "model_index.json"))
    monkeypatch.setattr(StableDiffusionPipeline, "download", lambda *_, **__: pytest.fail("fetched too soon"))
    with pytest.raises(InputError, match="owner/name/model_index.json.*AudioPipeline"):
        load("owner/name")


def test_a_hub_model_comes_from_the_cached_folder(folder, monkeypatch):
    monkeypatch.setattr(module, "hf_hub_download", lambda *_, **__: str(folder / "model_index.json"))
    monkeypatch.setattr(StableDiffusionPipeline, "download", lambda *_, **__: str(folder))
    assert load("owner/name").path == "owner/name"


def test_embeddings_are_those_of_the_pipeline(models):
    expected, _ = models.pipeline().encode_prompt("a dog", "cpu", 1, False)
    assert torch.equal(encode(models, tokenize(models, ["a dog"]))["text"], expected)


def test_cached_embeddings_follow_their_prompts(models):
    prompts = ["a dog", "a cat", "a dog", "a bus"]
    cache = EmbeddingCache(models, prompts, batch_size=2)
    assert len(cache) == 3
    for order in ([0, 1, 3], [3, 0, 1], [1, 1, 2]):
        chosen = [prompts[i] for i in order]
        torch.testing.assert_close(cache.lookup(chosen), encode(models, tokenize(models, chosen)))
    assert not torch.equal(cache.lookup(["a dog"])["text"], cache.lookup(["a cat"])["text"])
    with pytest.raises(InputError, match="did you mean a dog"):
        cache.lookup(["a dogg"])


def test_a_long_prompt_is_cut(models):
    ids = tokenize(models, ["a", "b" * 150])["text_encoder"]
    assert ids.shape == (2, 77) and len(set(ids[1, 1:76].tolist())) == 1
    assert ids[1, 76] == models.tokenizer.eos_token_id


def test_gradients_pass_the_text_encoder_only_when_asked(models):
    weight = models.text_encoder.get_input_embeddings().weight
    ids = tokenize(models, ["a dog"])
    weight.requires_grad_(True)
    try:
        assert not encode(models, ids)["text"].requires_grad
        encode(models, ids, grad=True)["text"].square().sum().backward()
        assert weight.grad.abs().sum() > 0
    finally:
        weight.requires_grad_(False)
        weight.grad = None
