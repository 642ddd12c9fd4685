"""The solvent mask finds the molecule, and the envelope expects density where there is some."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pyro_cryo.data.mrc_map import write_map
from pyro_cryo.data.simulate import hinge
from pyro_cryo.distributions.volume import filter_shells
from pyro_cryo.physics.fourier import radius, soft_disc
from pyro_cryo.volumes.mask import density_envelope, find_mask, read_mask

BOX = 40


@pytest.fixture
def molecule() -> Tensor:
    source = hinge(1)
    return source.volume(0, BOX, source.apix_for(BOX, None))


def noisy(volume: Tensor, sd: float) -> Tensor:
    return volume + sd * float(volume.max()) * torch.randn(volume.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sd", [0.0, 0.05, 0.2])
def test_the_mask_holds_the_density_and_little_else(molecule: Tensor, sd: float) -> None:
    mask = find_mask(noisy(molecule, sd))
    assert float(mask.min()) >= 0
    assert float(mask.max()) == 1
    assert float((molecule * mask).sum() / molecule.sum()) > 0.98
    assert float(mask.mean()) < 0.35  # the molecule itself is 10% of the box, the inscribed sphere 44%
    assert float((mask > 0.5).float().mean()) > float((molecule > 0.1 * molecule.max()).float().mean())


def test_the_mask_has_no_holes_and_a_soft_edge(molecule: Tensor) -> None:
    r = radius(BOX, 3)
    shell = ((r > 7) & (r < 11)).float()
    mask = find_mask(shell)
    assert bool((mask[r < 7] == 1).all())
    assert float((mask[1:] - mask[:-1]).abs().max()) < 0.8
    assert int(((mask > 0.05) & (mask < 0.95)).sum()) > 500


def test_specks_are_dropped(molecule: Tensor) -> None:
    volume = molecule.clone()
    volume[6:9, 6:9, 20:23] = float(molecule.max())
    assert float(find_mask(volume)[7, 7, 21]) == 0


def test_without_density_the_mask_is_the_inscribed_sphere() -> None:
    mask, r = find_mask(torch.zeros(BOX, BOX, BOX)), radius(BOX, 3)
    assert bool((mask[r < 0.44 * BOX] == 1).all())
    assert bool((mask[r > 0.51 * BOX] == 0).all())


def test_the_envelope_follows_the_density(molecule: Tensor) -> None:
    mask, r = find_mask(molecule), radius(BOX, 3)
    scale = density_envelope(molecule)
    inner = r < 0.44 * BOX
    assert float(scale.max()) == pytest.approx(1.0, abs=1e-5)
    assert float(scale[inner].min()) >= 0.02 - 1e-6
    assert float(scale[r > 0.51 * BOX].max()) == 0
    dense = molecule > 0.3 * molecule.max()
    assert float(scale[dense].mean()) > 5 * float(scale[(mask == 0) & inner].mean())
    assert float(density_envelope(molecule, mask)[(mask == 1) & inner].min()) >= 0.1 - 1e-6


def test_shells_of_equal_strength_tell_best_where_density_is() -> None:
    """What of the prior's variance an envelope has elsewhere than the maps, which are drawn within a support."""
    where = soft_disc(BOX, 0.25 * BOX, 0.1 * BOX, dims=3)
    tau = 1 / (1 + (3 * torch.linspace(0, 1, BOX // 2 + 1)) ** 2)
    drawn = where * filter_shells(torch.randn(BOX, BOX, BOX, generator=torch.Generator().manual_seed(0)), tau)

    def misplaced(envelope: Tensor) -> float:
        found, true = (v.square() / v.square().sum() for v in (envelope, where))
        return 0.5 * float((found - true).abs().sum())

    plain, even = (misplaced(density_envelope(v)) for v in (drawn, filter_shells(drawn, 1 / tau)))
    print(f"{even:.2f} of the variance is elsewhere, {plain:.2f} of a map as it is")
    assert even < 0.8 * plain


def test_masks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write_map(tmp_path / "small.mrc", torch.ones(16, 16, 16), 2.0)
    write_map(tmp_path / "density.mrc", 5 * torch.ones(BOX, BOX, BOX), 2.0)
    write_map(tmp_path / "empty.mrc", torch.zeros(BOX, BOX, BOX), 2.0)
    with pytest.raises(ValueError, match=r"small\.mrc: mask of 16 voxels, the images are 40 pixels"):
        read_mask(str(tmp_path / "small.mrc"), BOX)
    for name in ("density", "empty"):
        with pytest.raises(ValueError, match=rf"{name}\.mrc: mask values .* expected 0 \(solvent\) to 1"):
            read_mask(str(tmp_path / f"{name}.mrc"), BOX)


def test_noise_of_its_own_in_each_half_adds_nothing_to_the_envelope(molecule: Tensor) -> None:
    """Far from density the floor is left; squared, noise would be taken for density."""
    mask, r = find_mask(molecule), radius(BOX, 3)
    noise = 0.1 * molecule.max() * torch.randn(2, *molecule.shape, generator=torch.Generator().manual_seed(0))
    solvent = (mask == 0) & (r < 0.44 * BOX)
    clean = density_envelope(molecule)[solvent].mean()
    both = density_envelope(molecule + noise[0], other=molecule + noise[1])[solvent].mean()
    single = density_envelope(molecule + noise[0])[solvent].mean()
    assert both < 1.5 * clean < single
