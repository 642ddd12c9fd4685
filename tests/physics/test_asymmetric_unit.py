"""One of the equivalent views of a symmetric volume."""

import pytest
import torch

from pyro_cryo.physics.asymmetric_unit import in_unit, to_unit
from pyro_cryo.physics.rotations import point_group, random_rotations

GROUPS = ["C1", "C2", "C3", "C7", "D2", "D5", "T", "O", "I"]


@pytest.mark.parametrize("name", GROUPS)
def test_one_of_each_orbit_is_in_the_unit(name: str) -> None:
    group = point_group(name)
    rotation = random_rotations(2000, torch.Generator().manual_seed(0))
    orbit = rotation[:, None] @ group
    assert (in_unit(orbit[..., 2, :], group).sum(-1) == 1).all()
    chosen = to_unit(orbit, group)  # from wherever in the orbit one begins
    torch.testing.assert_close(chosen, chosen[:, :1].expand_as(chosen), rtol=0, atol=1e-5)
    assert in_unit(chosen[:, 0, 2], group).all()
    assert float((orbit - chosen[:, :1]).abs().amax((-2, -1)).amin(-1).max()) < 1e-5  # and it is one of them


def test_the_unit_of_a_cyclic_group_is_a_wedge() -> None:
    direction = random_rotations(5000, torch.Generator().manual_seed(1))[:, 2]
    azimuth = torch.rad2deg(torch.atan2(direction[:, 1], direction[:, 0]))
    middle = 24.545  # azimuth of the reference
    expected = ((azimuth - middle + 180) % 360 - 180).abs() < 180 / 5
    assert torch.equal(in_unit(direction, point_group("C5")), expected)
