"""Batches of particles with one image or several: who shows whom, and sums over a particle's images."""

from __future__ import annotations

import pytest
import torch
from images import blobs, observed, seen_together

from pyro_cryo.data.batch import Batch, numbered


@pytest.fixture(scope="module")
def images() -> Batch:
    return observed(blobs(12, 5), 6, 0.1, torch.ones(6))


def test_numbers_count_in_the_order_of_appearance() -> None:
    number, first = numbered(torch.tensor([7, 7, 2, 9, 2, 7]))
    assert number.tolist() == [0, 0, 1, 2, 1, 0]
    assert first.tolist() == [0, 2, 3]


def test_what_particles_have_and_what_images_have_are_adjoint(images: Batch) -> None:
    batch = seen_together(images, [0, 0, 1, 2, 2, 2])
    assert (batch.particles, batch.size, batch.several) == (3, 3, True)
    assert batch.views.tolist() == [2, 1, 3]
    own, theirs = torch.randn(4, 3, 2), torch.randn(4, 6, 2)
    torch.testing.assert_close((batch.of_images(own, 1) * theirs).sum(), (own * batch.by_particle(theirs, -2)).sum())
    assert torch.equal(batch.of_images(own, -2)[:, 4], own[:, 2])
    assert batch.of_images(own[:, :1], 1).shape == theirs.shape  # one for all, as under enumeration


def test_with_one_image_each_nothing_is_copied(images: Batch) -> None:
    values = torch.randn(6, 2)
    assert images.of_images(values) is values
    assert images.by_particle(values) is values


def test_some_images_show_some_of_the_particles(images: Batch) -> None:
    batch = seen_together(images, [0, 0, 1, 2, 2, 2])
    some = batch[torch.tensor([5, 4, 1])]
    assert some.particle.tolist() == [0, 0, 1]
    assert some.shown.tolist() == [2, 0]
    assert some.size == some.particles == 2
    masked = batch[batch.particle == 1]
    assert (masked.particle.tolist(), masked.shown.tolist(), masked.several) == ([0], [1], False)
    alone = images[torch.tensor([5, 4])]
    assert (alone.particle.tolist(), alone.shown.tolist(), alone.size) == ([0, 1], [5, 4], 2)
