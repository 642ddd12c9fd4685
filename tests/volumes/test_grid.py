"""The voxel map reads what it holds now, on whichever device, for every z."""

import torch

from pyro_cryo.physics.fourier import HalfPlane
from pyro_cryo.physics.rotations import random_rotations
from pyro_cryo.physics.slices import fourier_grid, read_grid, slice_coordinates
from pyro_cryo.volumes.grid import VoxelGrid


def points(box: int) -> torch.Tensor:
    rotation = random_rotations(3, torch.Generator().manual_seed(0))
    return slice_coordinates(rotation, HalfPlane.of(box).k)


def test_it_reads_central_slices_of_its_voxels(device: str) -> None:
    volume = VoxelGrid(12).to(device)
    k = points(12).to(device)
    assert volume(k).abs().max() == 0
    voxels = torch.randn(12, 12, 12)
    volume.set(voxels)
    expected = torch.view_as_real(read_grid(fourier_grid(voxels), k.cpu()))
    torch.testing.assert_close(volume(k).cpu(), expected, atol=1e-5, rtol=1e-5)


def test_changed_voxels_are_read_anew() -> None:
    volume, k = VoxelGrid(8), points(8)
    voxels = torch.randn(8, 8, 8)
    volume.set(voxels)
    first = volume(k).clone()
    volume.voxels.mul_(2)
    torch.testing.assert_close(volume(k), 2 * first)
    volume.load_state_dict({"voxels": 3 * voxels})
    torch.testing.assert_close(volume(k), 3 * first)
    for factor in range(4, 20):  # new tensors in the place of freed ones
        volume.set(0 * voxels)
        volume.set(factor * voxels)
        torch.testing.assert_close(volume(k), factor * first)


def test_it_keeps_a_copy_of_the_map() -> None:
    volume, voxels = VoxelGrid(8), torch.ones(8, 8, 8)
    volume.set(voxels)
    volume.voxels.zero_()
    assert float(voxels.min()) == 1


def test_the_map_is_the_same_for_every_z() -> None:
    volume = VoxelGrid(8)
    volume.set(torch.randn(8, 8, 8))
    assert volume.map().shape == (8, 8, 8)
    assert volume.map(torch.zeros(5, 2, 3)).shape == (5, 2, 8, 8, 8)
    torch.testing.assert_close(volume.map(torch.randn(4, 1))[2], volume.map())
