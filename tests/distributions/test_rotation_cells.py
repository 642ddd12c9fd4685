"""A histogram on SO(3): its density, its draws, its batches."""

import pyro
import pytest
import torch
from pyro.poutine import trace
from scipy import stats

from pyro_cryo.distributions import RotationCells
from pyro_cryo.physics import rotation_grid as grid
from pyro_cryo.physics.rotations import random_rotations

CELL = torch.tensor([500, 3, 77, 78])
PROBABILITY = torch.tensor([0.4, 0.3, 0.2, 0.1])
LOG_WEIGHT = PROBABILITY.log() + 2.0  # any constant


def test_all_cells_alike_are_the_uniform_measure() -> None:
    everywhere = RotationCells(grid.cells(1), torch.zeros(grid.count(1)), 1)
    rotation = random_rotations(500, torch.Generator().manual_seed(0))
    torch.testing.assert_close(everywhere.log_prob(rotation), torch.zeros(500), rtol=0, atol=1e-5)


def test_the_density_is_that_of_the_cell_and_integrates_to_one() -> None:
    cells = RotationCells(CELL, LOG_WEIGHT, 1)
    density = cells.log_prob(grid.centres(CELL, 1)).exp()
    torch.testing.assert_close(density, PROBABILITY * grid.count(1))
    fine = grid.uniform_in(grid.cells(3), 3, torch.Generator().manual_seed(1))  # one draw in each of equal volumes
    assert float(cells.log_prob(fine).exp().mean()) == pytest.approx(1, abs=1e-5)
    beside = cells.log_prob(grid.centres(torch.tensor([0, 4, 501, 575]), 1))
    assert beside.tolist() == [-torch.inf] * 4


def test_draws_are_in_the_cells_by_their_weights_and_uniform_within() -> None:
    pyro.set_rng_seed(0)
    cells = RotationCells(CELL, LOG_WEIGHT, 1)
    drawn = cells.sample((20_000,))
    assert cells.log_prob(drawn).isfinite().all()
    found = grid.cell_of(drawn, 2)
    expected = PROBABILITY.repeat_interleave(8) / 8
    counts = (found[:, None] == grid.children(CELL).flatten()).sum(0)
    assert stats.chisquare(counts.numpy(), (20_000 * expected / expected.sum()).numpy(), sum_check=False).pvalue > 1e-3
    assert float(cells.log_prob(drawn).mean()) == pytest.approx(
        float((PROBABILITY * (PROBABILITY * grid.count(1)).log()).sum()), abs=0.03
    )


def test_a_batch_has_weights_of_its_own() -> None:
    pyro.set_rng_seed(1)
    rows = torch.stack([LOG_WEIGHT, torch.tensor([0.0, -torch.inf, -torch.inf, -torch.inf])])
    cells = RotationCells(CELL, rows, 1)
    drawn = cells.sample((300,))
    assert drawn.shape == (300, 2, 3, 3)
    assert (grid.cell_of(drawn[:, 1], 1) == 500).all()
    expected = torch.stack([RotationCells(CELL, row, 1).log_prob(drawn) for row in rows], -1)
    torch.testing.assert_close(cells.log_prob(drawn), expected.diagonal(dim1=-2, dim2=-1))
    torch.testing.assert_close(cells.log_prob(drawn[:, :1]), expected[:, 0])


@pytest.mark.parametrize(
    ("rows", "batch"), [((), (2,)), ((), (3, 2)), ((2,), (3, 2)), ((1,), (2,)), ((2, 1), (4, 2, 3)), ((2,), (2,))]
)
def test_expanding_repeats_the_weights(rows: tuple[int, ...], batch: tuple[int, ...]) -> None:
    pyro.set_rng_seed(2)
    log_weight = torch.randn(*rows, 4)
    small = RotationCells(CELL, log_weight, 1)
    large = small.expand(batch)
    written_out = RotationCells(CELL, log_weight.expand(*batch, 4), 1)
    drawn = large.sample((2000,))
    assert large.batch_shape == batch
    assert drawn.shape == (2000, *batch, 3, 3)
    torch.testing.assert_close(large.log_prob(drawn), written_out.log_prob(drawn))
    assert large.log_prob(drawn[0, ..., :1, :, :] if batch[-1] == 1 else drawn[0]).shape == batch
    assert large.log_prob(grid.centres(CELL[0], 1)).shape == batch
    frequency = (grid.cell_of(drawn, 1)[..., None] == CELL).double().mean(0)
    expected = log_weight.softmax(-1).expand(*batch, 4).double()
    torch.testing.assert_close(frequency, expected, rtol=0, atol=0.045)


def test_weights_are_learned_as_frequencies() -> None:
    """The gradient of the log likelihood in the weights vanishes where they are what was seen, and only there."""
    pyro.set_rng_seed(3)
    seen = RotationCells(CELL, LOG_WEIGHT, 1).sample((5000,))
    frequency = (grid.cell_of(seen, 1)[:, None] == CELL).float().mean(0)
    for weight, at_rest in ((frequency, True), (torch.ones(4), False)):
        log_weight = weight.log().requires_grad_()
        RotationCells(CELL, log_weight, 1).expand([5000]).log_prob(seen).mean().backward()
        assert (float(log_weight.grad.abs().max()) < 1e-4) == at_rest


def test_it_is_a_site_of_a_plate() -> None:
    def model() -> None:
        with pyro.plate("particles", 5, dim=-1):
            pyro.sample("rotation", RotationCells(CELL, LOG_WEIGHT, 1))

    with pyro.validation_enabled(True):
        site = trace(model).get_trace()
        site.compute_log_prob()
    assert site.nodes["rotation"]["value"].shape == (5, 3, 3)
    assert site.nodes["rotation"]["log_prob"].shape == (5,)


def test_what_is_no_set_of_cells_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weights \(3,\) for cells \(4,\)"):
        RotationCells(CELL, torch.zeros(3), 1)
    for wrong in (torch.tensor([5, 7, 5]), torch.tensor([5, 7, 576])):
        with pytest.raises(ValueError, match="repeat or are beyond the 576 of level 1"):
            RotationCells(wrong, torch.zeros(3), 1, validate_args=True)
