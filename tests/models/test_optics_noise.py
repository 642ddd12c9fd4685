"""The noise of optics groups: each group's spectrum is found, a small group's with the help of the others."""

from __future__ import annotations

import warnings
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_cryo.data.particles import Particles
from pyro_cryo.data.simulate import hinge, simulate
from pyro_cryo.data.star import read_star, write_star
from pyro_cryo.inference.fit import fit
from pyro_cryo.models.cryodrgn import CryoDRGN
from pyro_cryo.models.optics_noise import OpticsNoise
from pyro_cryo.physics.fourier import radius

BOX = 24
IMAGES = (200, 200, 6)
FACTOR = (1.0, 1.5, 2.2)  # of each group's noise


def optics_case(folder: Path, seed: int = 0) -> tuple[Particles, Tensor]:
    """Three optics groups of one static complex, and the true sigma (groups, shells)."""
    power = np.linspace(1.6, 0.7, BOX // 2 + 1)
    frames, optics, truth = [], [], []
    for group, (count, factor) in enumerate(zip(IMAGES, FACTOR, strict=True)):
        case = folder / f"group{group}"
        star = simulate(
            hinge(1), case, n_images=count, box=BOX, snr=0.3 / factor**2, noise_power=power, seed=10 * seed + group
        )
        with np.load(case / "truth.npz") as file:
            scale, noise_sd = float(file["volumes"].std()), float(file["noise_sd"])
        with mrcfile.open(case / "particles.mrcs", mode="r+") as stack:  # one complex: the signal is on one scale
            stack.data[:] /= scale
        blocks = read_star(star)
        rows = blocks["particles"].assign(rlnOpticsGroup=group + 1)
        rows["rlnImageName"] = rows["rlnImageName"].str.replace("@", f"@group{group}/")
        frames.append(rows)
        optics.append(blocks["optics"].assign(rlnOpticsGroup=group + 1, rlnOpticsGroupName=f"opticsGroup{group + 1}"))
        plane = power[radius(BOX, 2).round().long().clamp_max(BOX // 2).numpy()]
        truth.append(noise_sd / scale * np.sqrt(0.5 * power / plane.mean()))
    write_star(folder / "all.star", {"optics": pd.concat(optics), "particles": pd.concat(frames)})
    return Particles.open(folder / "all.star"), torch.tensor(np.array(truth)).float()


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Particles, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return optics_case(tmp_path_factory.mktemp("optics"))


def error(kind: type[CryoDRGN], particles: Particles, truth: Tensor) -> Tensor:
    """Root mean square error of log sigma over the shells, for each group, after a fit."""
    torch.manual_seed(0)
    model = kind(BOX, zdim=1, width=16, layers=1, noise_groups=particles.n_noise_groups)
    fit(model, particles, epochs=8, learning_rate=2e-3)
    return (model.sigma.detach() / truth)[:, 1:].log().square().mean(1).sqrt()


def test_a_small_group_borrows_from_the_others(case: tuple[Particles, Tensor]) -> None:
    particles, truth = case
    alone, borrowed = error(CryoDRGN, particles, truth), error(OpticsNoise, particles, truth)
    print(f"error of log sigma by group: each alone {alone.tolist()}, hierarchical {borrowed.tolist()}")
    assert float(borrowed[:2].max()) < 0.02
    assert float(borrowed[2]) < 0.03  # three standard errors of a level that six images tell
    assert float(borrowed[2]) < 0.6 * float(alone[2])


def test_the_spread_is_learned_with_log_sigma_integrated_out(case: tuple[Particles, Tensor]) -> None:
    """Where the images say y of log sigma, Gaussian, the sites add up to log Normal(y; expected, spread + error)."""
    model, batch = OpticsNoise(BOX, zdim=1, width=8, layers=1, noise_groups=3), case[0].batch(slice(0, 2))
    pyro.set_rng_seed(0)
    seen, told = 0.2 * torch.randn_like(model.log_sigma), 10 + 500 * torch.rand_like(model.log_sigma)
    model.information.copy_(told)
    with torch.no_grad():
        found, exact = [], []
        for spread in (0.01, 0.1, 1.0):
            model.log_spread.fill_(np.log(spread))
            model.log_sigma.copy_(told * seen / (told + spread**-2))
            trace = poutine.trace(model).get_trace(batch.standing_for(100))
            trace.compute_log_prob()
            likelihood = -0.5 * told * (model.log_sigma - seen).square()
            sites = [trace.nodes[name]["log_prob_sum"] for name in ("log_sigma", "width")]
            found.append(float(sum(sites) + likelihood.sum()))
            exact.append(float(torch.distributions.Normal(0, (spread**2 + 1 / told).sqrt()).log_prob(seen).sum()))
    np.testing.assert_allclose(np.diff(found), np.diff(exact), rtol=1e-3)


def test_a_group_without_images_is_what_the_others_say(case: tuple[Particles, Tensor]) -> None:
    model = OpticsNoise(BOX, zdim=1, width=8, layers=1, noise_groups=3)
    model.prepare(case[0][: sum(IMAGES[:2])])
    torch.testing.assert_close(model.log_sigma[2], model.mean)
    assert float(model.level[2].detach()) == 0
