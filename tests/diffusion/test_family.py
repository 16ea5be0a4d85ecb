"""Every family against its own diffusers pipeline: what a prompt becomes, and how the denoiser is called."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_families import FAMILIES, build

from vislora.diffusion.base import check_folder, facts_of
from vislora.diffusion.conditioning import EmbeddingCache, encode, tokenize, warn_of_cuts
from vislora.diffusion.models import load
from vislora.errors import InputError

PROMPTS = ["a dog", "a red bus"]


@pytest.fixture(scope="module", params=["sd", *FAMILIES])
def models(request, tmp_path_factory):
    return load(build(request.param, tmp_path_factory.mktemp(request.param)))


def told(models, prompts, height, width):
    """The condition that the pipeline makes of prompts for an image of this size."""
    condition = encode(models, tokenize(models, prompts))
    if models.family.has_time_ids:
        condition["time_ids"] = torch.tensor([[height, width, 0, 0, height, width]]).repeat(len(prompts), 1).float()
    return condition


def test_prompts_become_what_the_pipeline_makes_of_them(models):
    pipe = models.pipeline()
    more = {"do_classifier_free_guidance": False, "num_images_per_prompt": 1}
    if models.pipeline_class.startswith("StableDiffusion3"):
        theirs = pipe.encode_prompt(PROMPTS, None, None, max_sequence_length=models.sequence, **more)
    elif models.pipeline_class.startswith("Flux"):
        theirs = pipe.encode_prompt(PROMPTS, None, max_sequence_length=models.sequence)
    elif models.pipeline_class.endswith("XLPipeline"):
        theirs = pipe.encode_prompt(PROMPTS, **more)
    else:
        theirs = pipe.encode_prompt(PROMPTS, "cpu", 1, False)
    ours = encode(models, tokenize(models, PROMPTS))
    assert torch.equal(ours["text"], theirs[0])
    if "pooled" in ours:
        assert any(torch.equal(ours["pooled"], t) for t in theirs[1:] if t is not None)
    cache = EmbeddingCache(models, PROMPTS)
    row = cache.lookup(PROMPTS[1:])
    assert row.keys() == ours.keys()
    for name, tensor in row.items():
        torch.testing.assert_close(tensor, ours[name][1:])


def test_the_denoiser_is_called_as_the_pipeline_calls_it(models):
    height, width = 32, 16
    seen = {}

    def look(module, args, kwargs, output):
        seen.setdefault("latents", args[0] if args else kwargs["hidden_states"])
        time = args[1] if len(args) > 1 else kwargs["timestep"]
        seen.setdefault("time", time)
        seen.setdefault("output", output[0])

    hook = models.denoiser.register_forward_hook(look, with_kwargs=True)
    try:
        guidance = 3.5 if models.pipeline_class.startswith("Flux") else 1.0  # no second pass without a prompt
        pipe = models.pipeline()
        pipe(PROMPTS, height=height, width=width, num_inference_steps=2, guidance_scale=guidance, output_type="latent",
             generator=torch.Generator().manual_seed(0), **models.drawing)  # fmt: skip
    finally:
        hook.remove()
    latents, output, time = seen["latents"], seen["output"], seen["time"].expand(len(PROMPTS))
    if latents.ndim == 3:
        latents, output = (pipe._unpack_latents(t, height, width, models.vae_factor) for t in (latents, output))
        time = time * 1000
    with torch.no_grad():
        ours = models.predict(models.denoiser, latents, time, told(models, PROMPTS, height, width))
    torch.testing.assert_close(ours, output, rtol=1e-5, atol=1e-6)
    assert ours.shape == latents.shape


def test_facts_are_known_before_loading(models):
    facts = facts_of(models.path)
    assert (facts.family, facts.resolution, facts.grain) == (models.family, models.resolution, models.grain)
    assert models.resolution == 32 and check_folder(models.path) is models.family
    with pytest.raises(InputError, match="'heun' is unknown"):
        models.pipeline("heun")


def test_sd3_without_t5_attends_to_zeros_in_its_place(tmp_path):
    folder = build("sd3", tmp_path, with_t5=False)
    models = load(folder, sequence=40)
    found = encode(models, tokenize(models, PROMPTS))
    theirs = models.pipeline().encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False,
                                             max_sequence_length=40)  # fmt: skip
    assert torch.equal(found["text"], theirs[0]) and not found["text"][:, 77:].any()
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder_2": [None, None]}))
    with pytest.raises(InputError, match="text_encoder_2"):
        check_folder(folder)


def test_a_cut_is_told_of_the_encoder_that_reads_furthest(tmp_path, caplog):
    models = load(build("flux", tmp_path), sequence=100)
    warn_of_cuts(models, ["a" * 90, "b" * 120])
    assert len(caplog.records) == 1 and "the model reads 100" in caplog.records[0].message


def test_flux_is_told_its_guidance_where_it_is_distilled(tmp_path):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for guidance, differs in ((True, True), (False, False)):
        folder = build("flux", tmp_path / str(guidance), guidance=guidance)
        outputs = []
        for scale in (1.0, 7.0):
            models = load(folder, guidance=scale)
            with torch.no_grad():
                outputs.append(models.predict(models.denoiser, latents, torch.tensor([500.0, 100.0]),
                                              encode(models, tokenize(models, PROMPTS))))  # fmt: skip
        assert torch.equal(*outputs) != differs
