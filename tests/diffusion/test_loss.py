"""The denoising loss against values worked out in float64, and both kinds of prior preservation."""

from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from diffusers import DDPMScheduler
from tiny_sd import tiny_sd

from vislora.diffusion.conditioning import encode, tokenize
from vislora.diffusion.loss import BaseOutput, ClassImages, denoising_loss, prior_loss
from vislora.diffusion.models import load
from vislora.diffusion.noise import DDPM, min_snr_weight, snr
from vislora.errors import InputError

SHAPE = (4, 4, 8, 8)
LATENTS = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
EMBEDDINGS = {"text": torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(1))}


def schedule(kind: str) -> DDPMScheduler:
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=kind)


def draws(n: int = 4) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + i) for i in range(n)]


def predict(noisy, timesteps, condition):
    """A network simple enough to work out by hand."""
    return 0.3 * noisy + condition["text"].mean((1, 2))[:, None, None, None] + 1e-3 * timesteps[:, None, None, None]


def by_hand(kind: str):
    """Squared error (4,), SNR (4,), output and target of the four samples, from the definitions, in float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    signal = (1 - betas).cumprod(0)
    times, noise = [], []
    for g in draws():
        times.append(torch.randint(1000, (), generator=g))
        noise.append(torch.randn(SHAPE[1:], generator=g))
    times, noise, clean = torch.stack(times), torch.stack(noise).double(), LATENTS.double()
    alpha, sigma = signal[times].sqrt()[:, None, None, None], (1 - signal[times]).sqrt()[:, None, None, None]
    target = noise if kind == "epsilon" else alpha * noise - sigma * clean
    output = predict(alpha * clean + sigma * noise, times, {"text": EMBEDDINGS["text"].double()})
    return (output - target).square().flatten(1).mean(1), signal[times] / (1 - signal[times]), output, target


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_loss_is_the_mean_squared_error_of_the_definition(kind):
    errors, *_ = by_hand(kind)
    loss = denoising_loss(predict, DDPM(schedule(kind)), LATENTS, EMBEDDINGS, draws())
    assert loss.keys() == {"total", "instance"}
    torch.testing.assert_close(loss["total"].double(), errors.mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("gamma", [0.05, 1.0, 5.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weighs_each_sample(kind, gamma):
    errors, ratio, *_ = by_hand(kind)
    clipped = ratio.clamp(max=gamma)
    weights = clipped / ratio if kind == "epsilon" else clipped / (ratio + 1)
    loss = denoising_loss(predict, DDPM(schedule(kind), gamma), LATENTS, EMBEDDINGS, draws())
    torch.testing.assert_close(loss["total"].double(), (weights * errors).mean(), rtol=2e-5, atol=0)
    assert loss["total"].dtype == torch.float32


def test_min_snr_weights_by_hand():
    ratio = torch.tensor([0.0, 0.5, 5.0, 20.0])
    torch.testing.assert_close(min_snr_weight(ratio, 5.0, "epsilon"), torch.tensor([1, 1, 1, 0.25]))
    expected = torch.tensor([0, 0.5 / 1.5, 5 / 6, 5 / 21])
    torch.testing.assert_close(min_snr_weight(ratio, 5.0, "v_prediction"), expected)


def test_snr_is_alpha_squared_over_sigma_squared():
    scheduler, times = schedule("epsilon"), torch.tensor([0, 10, 500, 999])
    signal = scheduler.alphas_cumprod.double()[times]
    torch.testing.assert_close(snr(scheduler, times).double(), signal / (1 - signal), rtol=1e-4, atol=0)
    assert (snr(scheduler, times).diff() < 0).all()


def test_a_schedule_of_zero_terminal_snr_gives_finite_weights():
    scheduler = DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    ratio = snr(scheduler, torch.tensor([999, 500]))
    assert min_snr_weight(ratio, 5.0, "v_prediction").isfinite().all()


def test_half_precision_predictions_are_scored_in_float32():
    def half(*inputs):
        return (predict(*inputs) * 300).half()  # squared: 9e4 and more, beyond float16

    loss = denoising_loss(half, DDPM(schedule("epsilon")), LATENTS, EMBEDDINGS, draws())
    assert loss["total"].dtype == torch.float32 and loss["total"].isfinite()


def test_a_sample_draws_the_same_in_any_batch():
    process = DDPM(schedule("epsilon"))
    whole, part = process.add_noise(LATENTS, draws()), process.add_noise(LATENTS[2:], draws()[2:])
    assert torch.equal(whole.noisy[2:], part.noisy) and torch.equal(whole.timesteps[2:], part.timesteps)
    assert len(set(whole.timesteps.tolist())) > 1


def test_timesteps_cover_the_whole_schedule():
    many = [torch.Generator().manual_seed(i) for i in range(2000)]
    times = DDPM(schedule("epsilon")).add_noise(torch.zeros(2000, 1, 1, 1), many).timesteps
    assert times.min() < 10 and times.max() > 989
    assert abs(times.float().mean() - 499.5) < 25


def test_class_images_are_the_last_of_the_batch():
    errors, ratio, output, target = by_hand("epsilon")
    prior = ClassImages(count=1, weight=0.5)
    loss = denoising_loss(predict, DDPM(schedule("epsilon"), 1.0), LATENTS, EMBEDDINGS, draws(), prior=prior)
    instance = (errors * ratio.clamp(max=1) / ratio)[:3].mean()
    torch.testing.assert_close(loss["instance"].double(), instance, rtol=2e-5, atol=0)
    torch.testing.assert_close(loss["prior"].double(), errors[3], rtol=2e-5, atol=0)  # unweighted by the SNR
    torch.testing.assert_close(loss["total"], loss["instance"] + 0.5 * loss["prior"])
    torch.testing.assert_close(prior_loss(output[3:], target[3:]).double(), errors[3])


class Shift:
    """The least adapter: it adds `delta` to the UNet's text projections, and can be switched off."""

    def __init__(self, unet, delta: float):
        self.delta, self.on, self.hooks = torch.tensor(delta, requires_grad=True), True, []
        for name, layer in unet.named_modules():
            if name.endswith("attn2.to_v"):
                self.hooks.append(layer.register_forward_hook(self.add))

    def add(self, layer, inputs, output):
        return output + self.delta * inputs[0][..., :1] if self.on else output

    @contextmanager
    def disabled(self):
        self.on = False
        try:
            yield
        finally:
            self.on = True


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return load(tiny_sd(tmp_path_factory.mktemp("tiny-sd")))


@pytest.fixture
def attach(models):
    """attach(delta): the adapter on the shared model, gone after the test."""
    adapters = []
    yield lambda delta: adapters.append(Shift(models.unet, delta)) or adapters[-1]
    for adapter in adapters:
        for hook in adapter.hooks:
            hook.remove()


def base_output_loss(models, adapter, **changes):
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    instance = encode(models, tokenize(models, ["a photo of sks dog"] * 2))
    klass = encode(models, tokenize(models, ["a photo of a dog"] * 2))
    prior = BaseOutput(klass, adapter.disabled, **changes)
    predict = partial(models.predict, models.unet)
    return denoising_loss(predict, DDPM(models.scheduler), latents, instance, draws(2), prior=prior), klass


def test_base_output_costs_nothing_while_the_adapter_does_nothing(models, attach):
    loss, _ = base_output_loss(models, attach(0.0))
    assert loss["prior"] < 1e-10
    torch.testing.assert_close(loss["total"], loss["instance"])


def test_base_output_pulls_the_adapter_back(models, attach):
    adapter = attach(0.5)
    loss, _ = base_output_loss(models, adapter, weight=3.0)
    assert loss["prior"] > 1e-8
    torch.testing.assert_close(loss["total"], loss["instance"] + 3 * loss["prior"])
    pulls = []
    for weight in (0.0, 1e6):
        adapter.delta.grad = None
        base_output_loss(models, adapter, weight=weight)[0]["total"].backward()
        pulls.append(adapter.delta.grad.item())
    assert pulls[1] > 0 and abs(pulls[1]) > 10 * abs(pulls[0])  # downhill, delta shrinks
    assert adapter.on and all(weight.grad is None for weight in models.unet.parameters())


def test_base_output_is_that_of_the_class_prompt_on_the_same_latents(models, attach):
    adapter = attach(0.5)
    loss, klass = base_output_loss(models, adapter)
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    batch = DDPM(models.scheduler).add_noise(latents, draws(2))
    unet = partial(models.predict, models.unet)
    with torch.no_grad():
        adapted = unet(batch.noisy, batch.timesteps, klass)
        with adapter.disabled():
            base = unet(batch.noisy, batch.timesteps, klass)
    torch.testing.assert_close(loss["prior"], (adapted - base).square().mean(), rtol=1e-3, atol=1e-12)


def test_base_output_sees_a_text_encoder_that_drifts(models, attach):
    adapter = attach(0.0)
    _, klass = base_output_loss(models, adapter)
    loss, _ = base_output_loss(models, adapter, base_condition={"text": klass["text"] + 1.0})
    assert loss["prior"] > 1e-8


def test_errors_name_the_value():
    process = DDPM(schedule("epsilon"))
    for count in (0, 4):
        with pytest.raises(InputError, match=f"{count} class images in a batch of 4"):
            denoising_loss(predict, process, LATENTS, EMBEDDINGS, draws(), prior=ClassImages(count))
    with pytest.raises(InputError, match="3 for 4 samples"):
        denoising_loss(predict, process, LATENTS, EMBEDDINGS, draws(3))
    with pytest.raises(InputError, match="--snr_gamma: 0.0 is not positive"):
        denoising_loss(predict, DDPM(schedule("epsilon"), 0.0), LATENTS, EMBEDDINGS, draws())
    with pytest.raises(InputError, match="'sample' is not supported"):
        DDPM(schedule("sample"))


def test_predictions_may_come_from_a_base_in_half_precision(tmp_path):
    models = load(tiny_sd(tmp_path), dtype=torch.bfloat16)
    prior = BaseOutput(encode(models, tokenize(models, ["a dog"])), nullcontext)
    loss = denoising_loss(
        partial(models.predict, models.unet),
        DDPM(models.scheduler),
        torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3)),
        encode(models, tokenize(models, ["sks dog"])),
        draws(1),
        prior=prior,
    )
    assert all(value.dtype == torch.float32 and value.isfinite() for value in loss.values())
