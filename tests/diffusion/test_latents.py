"""Latents with and without the cache: the same draws, in any order."""

import pytest
import torch
from tiny_sd import tiny_sd

from vislora.diffusion.latents import LatentCache, decode, encode, normal
from vislora.diffusion.models import load
from vislora.errors import InputError

IMAGES, VARIANTS = 5, 2


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return load(tiny_sd(tmp_path_factory.mktemp("tiny-sd"))).vae


def pixels(index: int, variant: int) -> torch.Tensor:
    noise = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(index)) * 2 - 1
    return noise.flip(-1) if variant else noise


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(scope="module")
def cache(vae):
    return LatentCache(vae, pixels, IMAGES, VARIANTS, batch_size=3)


@pytest.mark.parametrize("order", [[(0, 0), (1, 0), (2, 1)], [(4, 1), (0, 0), (4, 0), (3, 1)], [(2, 0), (2, 0)]])
@pytest.mark.parametrize("single", [True, False])
def test_cached_latents_equal_uncached_ones_in_any_order(vae, cache, order, single):
    indices, variants = zip(*order, strict=True)

    def draws():
        return torch.Generator().manual_seed(7) if single else seeded(*range(len(order)))

    uncached = encode(vae, torch.stack([pixels(*key) for key in order]), draws())
    torch.testing.assert_close(cache.sample(indices, variants, draws()), uncached, rtol=1e-5, atol=1e-6)


def test_latents_are_equal_to_the_bit_when_batches_are(vae):
    cache = LatentCache(vae, pixels, IMAGES, batch_size=IMAGES)
    uncached = encode(vae, torch.stack([pixels(i, 0) for i in range(IMAGES)]), seeded(*range(IMAGES)))
    assert torch.equal(cache.sample(range(IMAGES), [0] * IMAGES, seeded(*range(IMAGES))), uncached)


def test_latents_are_the_scaled_draws_of_diffusers_own_posterior(vae, cache):
    with torch.no_grad():
        found = vae.encode(pixels(3, 0)[None]).latent_dist
    expected = found.sample(generator=torch.Generator().manual_seed(5)) * vae.config.scaling_factor
    torch.testing.assert_close(cache.sample([3], [0], torch.Generator().manual_seed(5)), expected, rtol=1e-5, atol=1e-6)


def test_a_sample_depends_on_its_own_key_and_generator_alone(cache):
    whole = cache.sample([0, 1, 2], [0, 1, 0], seeded(10, 11, 12))
    assert torch.equal(cache.sample([2, 1], [0, 1], seeded(12, 11)), whole[[2, 1]])
    assert not torch.equal(cache.sample([1], [1], seeded(99)), whole[1:2])
    assert not torch.allclose(cache.sample([1], [0], seeded(11)), whole[1:2])


def test_each_pair_is_read_once_and_sizes_may_differ(vae):
    calls = []

    def sized(index, variant):
        calls.append((index, variant))
        return pixels(index, variant)[:, : 32 if index else 16]

    cache = LatentCache(vae, sized, 3, 2, batch_size=4)
    assert sorted(calls) == [(i, v) for i in range(3) for v in range(2)]
    assert cache.sample([0], [1], seeded(0)).shape == (1, 4, 8, 16)
    assert cache.sample([1, 2], [0, 0], seeded(0, 1)).shape == (2, 4, 16, 16)
    with pytest.raises(InputError, match="batch equal sizes only"):
        cache.sample([0, 1], [0, 0], seeded(0, 1))


def test_errors_name_the_value(vae, cache):
    with pytest.raises(InputError, match="image 5, variant 0 is not in it -> it holds 10 pairs"):
        cache.sample([5], [0], seeded(0))
    with pytest.raises(InputError, match="1 for 2 samples"):
        cache.sample([0, 1], [0, 0], seeded(0))
    with pytest.raises(InputError, match="0 images"):
        LatentCache(vae, pixels, 0)


def test_the_global_generator_is_left_alone(vae, cache):
    before = torch.random.get_rng_state()
    cache.sample([0], [0], seeded(0))
    encode(vae, pixels(0, 0)[None], seeded(0))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_normal_draws_are_standard():
    draws = normal((4, 50, 50), seeded(1, 2, 3, 4))
    assert abs(draws.mean()) < 0.03 and abs(draws.std() - 1) < 0.03
    assert torch.equal(draws[1], torch.randn(50, 50, generator=torch.Generator().manual_seed(2)))


def test_decode_undoes_the_scaling(vae):
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = vae.decode(latents).sample
    torch.testing.assert_close(decode(vae, latents * vae.config.scaling_factor), expected)
