"""Randomness is a function of its counters alone."""

import random as python_random

import numpy
import pytest
import torch

from vislora.training.random import batch_indices, epoch_order, first_position, generator


def draw(*key):
    return torch.randn(64, generator=generator(*key))


def test_equal_counters_equal_draws_and_any_other_counter_another():
    assert torch.equal(draw(0, "noise", 3, 1), draw(0, "noise", 3, 1))
    keys = [
        (0, "noise", 3, 1),
        (1, "noise", 3, 1),
        (0, "crop", 3, 1),
        (0, "noise", 1, 3),
        (0, "noise", 31),
        (0, "noise", 3, 1, 0),
        (0, "noise3", 1),
        (-1, "noise", 3, 1),
    ]
    draws = [draw(*key) for key in keys]
    for i, a in enumerate(draws):
        for b in draws[i + 1 :]:
            assert (a != b).float().mean() > 0.9


def test_known_values_so_that_old_runs_resume_on_a_new_version():
    assert generator(0, "noise", 5).initial_seed() == 18416203886704460589
    assert epoch_order(0, 0, 6) == [2, 4, 3, 0, 1, 5]


def test_streams_are_uncorrelated():
    steps = torch.stack([torch.randn(4096, generator=generator(0, "noise", s)) for s in range(8)])
    correlation = torch.corrcoef(steps) - torch.eye(8)
    assert correlation.abs().max() < 0.08  # 4096 samples: one standard deviation is 0.016


def test_global_generators_do_not_move():
    torch.manual_seed(1)
    before = torch.get_rng_state(), numpy.random.get_state()[1].copy(), python_random.getstate()
    draw(0, "noise", 9)
    batch_indices(123, 0, 20, 7)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == numpy.random.get_state()[1]).all()
    assert before[2] == python_random.getstate()


def test_each_epoch_visits_each_sample_once_in_its_own_order():
    n = 11
    orders = [epoch_order(7, e, n) for e in range(5)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert len({tuple(order) for order in orders}) == 5
    assert batch_indices(7, 0, 5 * n, n) == sum(orders, [])


@pytest.mark.parametrize("batch", [1, 3, 4, 25])
def test_batches_of_any_size_from_any_position_read_the_same_sequence(batch):
    whole = batch_indices(3, 0, 60, 7)
    for position in range(0, 30):
        assert batch_indices(3, position, batch, 7) == whole[position : position + batch]


@pytest.mark.parametrize("batch, accumulation, world", [(12, 1, 1), (3, 4, 1), (3, 2, 2), (1, 1, 12), (2, 3, 2)])
def test_every_split_of_a_step_reads_the_same_samples(batch, accumulation, world):
    for step in (0, 1, 5):
        seen = [
            i
            for micro in range(accumulation)
            for rank in range(world)
            for i in batch_indices(
                0, first_position(step, micro, rank, batch=batch, accumulation=accumulation, world=world), batch, 10
            )
        ]
        assert seen == batch_indices(0, step * 12, 12, 10)


def test_changing_a_returned_order_does_not_change_the_next():
    epoch_order(5, 0, 4).clear()
    assert sorted(epoch_order(5, 0, 4)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "call",
    [
        lambda: batch_indices(0, 0, 1, 0),
        lambda: batch_indices(0, -1, 1, 4),
        lambda: epoch_order(0, 0, 0),
        lambda: epoch_order(0, -1, 3),
    ],
)
def test_an_empty_set_or_a_negative_position_is_refused(call):
    with pytest.raises(ValueError, match="needs n >= 1"):
        call()
