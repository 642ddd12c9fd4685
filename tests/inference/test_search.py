"""The search for poses on grids: its sums are likelihoods, its beam keeps what a whole grid finds."""

from __future__ import annotations

import pytest
import torch
from images import blobs, observed, seen_together
from torch import Tensor

from pyro_cryo.data.batch import Batch
from pyro_cryo.inference.search import Found, Level, Search
from pyro_cryo.model import form_image
from pyro_cryo.physics import rotation_grid, shift_grid
from pyro_cryo.physics.fourier import HalfPlane
from pyro_cryo.physics.rotations import angle_deg, point_group, random_rotations
from pyro_cryo.physics.slices import fourier_grid, read_grid

BOX, IMAGES, SIGMA, SHIFT_SD = 20, 60, 1.0, 1.0
EVERY = torch.eye(3)[None]


@pytest.fixture(scope="module")
def volume() -> Tensor:
    return blobs(BOX, 9)


@pytest.fixture(scope="module")
def batch(volume: Tensor) -> Batch:
    return observed(volume, IMAGES, SIGMA, torch.ones(IMAGES))


@pytest.fixture
def sigma() -> Tensor:
    return torch.full((1, BOX // 2 + 1), SIGMA)


def test_one_level_is_the_posterior_over_its_grid(volume: Tensor, batch: Batch, sigma: Tensor) -> None:
    level, few = Level(0, 2, 5.0), batch[torch.arange(3)]
    search = Search(volume, (level,), 3.0, SHIFT_SD, EVERY, peaks=72, apart=0.0)
    found = search(few, sigma)
    low = few.band(HalfPlane.of(BOX).count(level.kmax))
    shifts = shift_grid.centres(shift_grid.disc(2), 2, 3.0)
    log_joint = torch.empty(3, 72, len(shifts))
    for c, rotation in enumerate(rotation_grid.centres(rotation_grid.cells(0), 0)):
        slices = torch.view_as_real(read_grid(fourier_grid(volume), low.half.k @ rotation[:2])).expand(3, -1, -1)
        for t, shift in enumerate(shifts):
            image = form_image(slices, shift.expand(3, 2), low)
            gain = (low.image * image).sum((1, 2)) - 0.5 * image.square().sum((1, 2))
            log_joint[:, c, t] = gain / SIGMA**2 - 0.5 * shift.square().sum() / SHIFT_SD**2
    mass = log_joint.logsumexp(2).sort(1, descending=True).values
    kept = mass > mass[:, :1] - 20
    torch.testing.assert_close(found.log_mass[kept], mass[kept], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(found.evidence, mass.logsumexp(1) - torch.tensor(72.0).log(), atol=1e-3, rtol=1e-4)
    assert bool((found.left_out == 0).all())


def test_images_of_several_fields_of_view_are_found_as_each_alone(volume: Tensor, sigma: Tensor) -> None:
    scale = torch.where(torch.arange(IMAGES) % 3 == 0, 1.0, 0.85)
    mixed = observed(volume, IMAGES, 0.5, scale)
    search = Search(volume, (Level(1, 2, 4.5), Level(2, 3, 7.0)), 3.0, SHIFT_SD, EVERY, beam=24)
    found = search(mixed, 0.5 * sigma)
    assert float((angle_deg(found.rotation[:, 0], mixed.rotation) < 20).float().mean()) > 0.8
    for each in (1.0, 0.85):
        rows = (scale == each).nonzero()[:, 0]
        alone = search(mixed[rows], 0.5 * sigma)
        torch.testing.assert_close(found[rows].log_mass, alone.log_mass, atol=1e-2, rtol=1e-4)


def test_a_beam_finds_what_the_whole_grid_finds(volume: Tensor, batch: Batch, sigma: Tensor) -> None:
    whole = Search(volume, (Level(2, 3, 7.0),), 3.0, SHIFT_SD, EVERY)(batch, sigma)
    beam = Search(volume, (Level(1, 2, 4.5), Level(2, 3, 7.0)), 3.0, SHIFT_SD, EVERY, beam=24)(batch, sigma)
    same = angle_deg(whole.rotation[:, 0], beam.rotation[:, 0]) < 1
    assert float(same.float().mean()) > 0.9
    # what was left out is what the whole grid has more of, where the beam is as wide as its posterior
    assert float(beam.left_out.mean()) < 0.1
    assert bool((beam.log_mass[:, 0] <= whole.log_mass[:, 0] + 1e-2).all())


def test_what_a_beam_left_out_is_what_the_whole_finer_grid_has_more_of(volume: Tensor) -> None:
    """The level that is cut does not know: its cells of most mass are those whose centres lie well."""
    loud = 3.0
    noisy, sd = observed(volume, 200, loud, torch.ones(200)), torch.full((1, BOX // 2 + 1), loud)
    fine, everything = Level(2, 3, 7.0), {"peaks": 1, "apart": 100.0}  # one peak, which all cells are near
    levels = Level(1, 2, 4.5), fine
    whole = Search(volume, (fine,), 3.0, SHIFT_SD, EVERY, beam=2000, **everything)(noisy, sd)
    for beam in (8, 24):
        found = Search(volume, levels, 3.0, SHIFT_SD, EVERY, beam=beam, spared=1.0, **everything)(noisy, sd)
        left_out = 1 - (found.log_mass[:, 0] - whole.log_mass[:, 0]).exp()
        error = found.left_out - left_out
        assert float(left_out.mean()) > 0.05
        assert abs(float(error.mean())) < 0.03
        assert float(torch.stack([found.left_out, left_out]).corrcoef()[0, 1]) > 0.7


def test_particles_of_which_a_beam_leaves_out_much_are_searched_with_a_wider_one(
    volume: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are found as before; where a wider one does not fit in memory, so is every one."""
    loud = 2.0
    noisy, sd = observed(volume, 200, loud, torch.ones(200)), torch.full((1, BOX // 2 + 1), loud)
    levels, everything = (Level(1, 2, 4.5), Level(2, 3, 7.0)), {"peaks": 1, "apart": 100.0}
    whole = Search(volume, levels[1:], 3.0, SHIFT_SD, EVERY, beam=2000, **everything)(noisy, sd)

    def found(spared: float) -> Found:
        return Search(volume, levels, 3.0, SHIFT_SD, EVERY, beam=8, spared=spared, **everything)(noisy, sd)

    def missed(found: Found) -> float:
        return float(1 - (found.log_mass - whole.log_mass).exp().mean())

    narrow, wider = found(1.0), found(0.02)
    enough = narrow.left_out <= 0.02
    assert 0.02 < float(enough.float().mean()) < 0.98
    assert missed(narrow) > 0.05
    assert missed(wider) < 0.02
    assert float(wider.left_out.max()) <= 0.02
    torch.testing.assert_close(wider[enough].tensors, narrow[enough].tensors)
    monkeypatch.setattr("pyro_cryo.inference.search.NUMBERS", 1 << 14)
    torch.testing.assert_close(found(0.02).log_mass, narrow.log_mass, atol=1e-3, rtol=1e-4)


def test_beams_are_widened_in_many_maps_too(volume: Tensor) -> None:
    """Though the first level, which compares all of them, has more cells than a beam that is wider."""
    loud, many = 2.0, torch.stack([volume.roll(shift, 0) for shift in range(-6, 6)])
    noisy, sd = observed(volume, 60, loud, torch.ones(60)), torch.full((1, BOX // 2 + 1), loud)
    levels = (Level(1, 2, 4.5), Level(2, 3, 7.0))
    narrow, wider = (Search(many, levels, 3.0, SHIFT_SD, EVERY, beam=8, spared=s)(noisy, sd) for s in (1.0, 0.02))
    assert float(narrow.left_out.mean()) > 0.1
    assert float(wider.left_out.max()) <= 0.02


def test_peaks_are_apart_and_near_the_truth(volume: Tensor, batch: Batch, sigma: Tensor) -> None:
    found = Search(volume, (Level(1, 2, 4.5), Level(2, 3, 7.0)), 3.0, SHIFT_SD, EVERY, peaks=3)(batch, sigma)
    assert float(angle_deg(found.rotation[:, 0], batch.rotation).median()) < rotation_grid.step_deg(2)
    assert float((found.translation[:, 0] - batch.translation).norm(dim=1).median()) < shift_grid.step_px(3, 3.0)
    apart = angle_deg(found.rotation[:, :1], found.rotation[:, 1:])[found.log_mass[:, 1:].isfinite()]
    assert float(apart.min()) > rotation_grid.step_deg(2)
    assert bool((found.log_mass.diff(dim=1) <= 0).float().mean() > 0.9)


def test_a_turned_grid_is_as_good(volume: Tensor, batch: Batch, sigma: Tensor) -> None:
    turn = random_rotations(1, torch.Generator().manual_seed(5))[0]
    levels = (Level(1, 2, 4.5), Level(2, 3, 7.0))
    found = Search(volume, levels, 3.0, SHIFT_SD, EVERY, turn=turn)(batch, sigma)
    assert float(angle_deg(found.rotation[:, 0], batch.rotation).median()) < rotation_grid.step_deg(2)


def test_a_symmetric_map_is_searched_in_its_asymmetric_unit(volume: Tensor, batch: Batch, sigma: Tensor) -> None:
    group = point_group("C4")
    cells = Search(volume, (Level(1, 2, 4.5),), 3.0, SHIFT_SD, group).cells
    assert len(cells) == rotation_grid.count(1) // 4


def test_several_maps_are_searched_at_once(
    volume: Tensor, batch: Batch, sigma: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each image is found in the map that it shows, with the mass that a search of this map alone finds."""
    levels, log_share = (Level(1, 2, 4.5), Level(2, 3, 7.0)), torch.tensor([0.2, 0.5, 0.3]).log()
    part = volume.clone()
    part[: BOX // 2] = 0
    maps = torch.stack([0.3 * volume.flip(0), volume, part])
    both = Search(maps, levels, 3.0, SHIFT_SD, EVERY, beam=24, log_share=log_share)
    found = both(batch, sigma)
    assert float((found.which[:, 0] == 1).float().mean()) > 0.9
    alone = Search(volume, levels, 3.0, SHIFT_SD, EVERY, beam=24)(batch, sigma)
    same = (found.which[:, 0] == 1) & (angle_deg(found.rotation[:, 0], alone.rotation[:, 0]) < 1)
    assert float(same.float().mean()) > 0.85
    gained = found.log_mass[same, 0] - alone.log_mass[same, 0]
    assert abs(float(gained.median()) - float(log_share[1])) < 1e-2
    each = [Search(one, levels, 3.0, SHIFT_SD, EVERY, beam=24)(batch, sigma).evidence for one in maps]
    torch.testing.assert_close(found.evidence, (torch.stack(each, 1) + log_share).logsumexp(1), atol=2e-2, rtol=1e-4)
    monkeypatch.setattr("pyro_cryo.inference.search.TABLE", 1)
    unkept = Search(maps, levels, 3.0, SHIFT_SD, EVERY, beam=24, log_share=log_share)(batch, sigma)
    torch.testing.assert_close(unkept.log_mass[:, 0], found.log_mass[:, 0], atol=1e-3, rtol=1e-4)
    assert bool((unkept.which == found.which).float().mean() > 0.99)


def test_slices_of_a_level_are_read_once(volume: Tensor, batch: Batch, sigma: Tensor) -> None:
    """Whatever the images' own poses are."""
    search = Search(volume, (Level(1, 2, 4.5),), 3.0, SHIFT_SD, EVERY)
    for rows in torch.arange(IMAGES).split(20):
        search(batch[rows], sigma)
        pairs = batch[rows]
        search(seen_together(pairs, [i // 2 for i in range(20)]), sigma)
    assert len(search._tables) == 1 + 3 * 10  # that of first views, and a second one of each pair
