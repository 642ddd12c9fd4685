"""One map from particles with known poses: noise, prior, mask and map, all by solving linear systems.

1. one pass over all images accumulates the normal equations of two half sets
2. the noise of every noise group and shell: what a first map leaves of a sample of images
3. the prior's variance of every shell by empirical Bayes (MacKay's fixed point) and the solvent mask
4. conjugate gradients for the posterior mean of the map and of both half-maps, perturb-and-solve for its sd
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_cryo.data.batch import Batch
from pyro_cryo.data.particles import Particles
from pyro_cryo.model import form_image
from pyro_cryo.physics.slices import fourier_grid, read_grid, slice_coordinates
from pyro_cryo.progress import Progress, quiet
from pyro_cryo.volumes.conjugate import NormalEquations, settled
from pyro_cryo.volumes.mask import density_envelope, find_mask

SAMPLE = 500  # images a noise group from which the noise spectrum is learned
SETTLING = 3  # steps of MacKay's fixed point


@dataclass(frozen=True)
class Reconstruction:
    """A map and what is known about it.

    volume, sd:   (D, D, D) posterior mean and standard deviation a voxel
    u:            (D, D, D) posterior mean of u, V = scale * u
    halves:       two (D, D, D) maps from independent half sets
    mask:         (D, D, D) solvent mask, 0 to 1
    scale:        (D, D, D) prior sd of each voxel, up to the factor tau
    tau:          (D / 2 + 1,) prior standard deviation a shell of u, V = scale * u
    coefficient_sd: (D / 2 + 1,) posterior standard deviation a shell of u, each coefficient on its own
    signal_to_noise: (D / 2 + 1,) power of the map over the variance of its estimate, a shell, over the whole box
    sigma:        (noise groups, D / 2 + 1) noise standard deviation of each real Fourier component
    """

    volume: Tensor
    u: Tensor
    sd: Tensor
    halves: tuple[Tensor, Tensor]
    mask: Tensor
    scale: Tensor
    tau: Tensor
    coefficient_sd: Tensor
    signal_to_noise: Tensor
    sigma: Tensor


def reconstruct(
    particles: Particles,
    *,
    symmetry: Tensor | None = None,
    mask: Tensor | str | None = "auto",
    draws: int = 1,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    progress: Progress = quiet,
) -> Reconstruction:
    """Reconstruct one map.

    symmetry:  (G, 3, 3) rotations of the point group (`rotations.point_group`); default none
    mask:      (D, D, D) in 0 to 1, "auto" to find it, None for none (then the prior is the same everywhere)
    draws:     posterior draws behind the voxels' standard deviation; one, averaged over neighbours, gives it to 7%
    generator: seeds the half sets where the particles bring none, and the draws
    progress:  wraps the batches of the pass over all images
    """
    generator = generator or torch.Generator().manual_seed(0)
    symmetry = torch.eye(3)[None] if symmetry is None else symmetry
    symmetry = symmetry.to(device)
    halves, sigma = weighed(particles, symmetry, generator, batch_size, device, progress)
    return _solve(halves, sigma, len(symmetry), mask, draws, generator)


Halves = tuple[NormalEquations, NormalEquations]


def weighed(
    particles: Particles,
    symmetry: Tensor,
    generator: torch.Generator,
    batch_size: int,
    device: torch.device | str,
    progress: Progress = quiet,
) -> tuple[Halves, Tensor]:
    """The normal equations of two half sets, and the noise sd (G, L) that weighs their images.

    With one noise group a pass can be weighed afterwards, so the noise is learned from the pass's own map; with several
    it is learned first, from a map of a sample.
    """
    half_set = half_sets(particles, generator)
    sample = particles[sample_rows(particles, generator)]
    power = image_power(sample, batch_size, device)
    if particles.n_noise_groups == 1:
        first, second = add_up(particles, half_set, power, symmetry, batch_size, device, progress)
        sigma = residual_noise(sample, first + second, len(symmetry), batch_size, device)
        factor = (power / sigma)[0].square()
        return (first.reweighted(factor), second.reweighted(factor)), sigma
    drawn = add_up(sample, half_sets(sample, generator), power, symmetry, batch_size, device)
    sigma = residual_noise(sample, drawn[0] + drawn[1], len(symmetry), batch_size, device)
    return add_up(particles, half_set, sigma, symmetry, batch_size, device, progress), sigma


def add_up(
    particles: Particles,
    half_set: Tensor,
    sigma: Tensor,
    symmetry: Tensor,
    batch_size: int,
    device: torch.device | str,
    progress: Progress = quiet,
) -> Halves:
    """One pass: the normal equations of each half set (N,), 1 or 2."""
    halves = (NormalEquations.empty(particles.box, device), NormalEquations.empty(particles.box, device))
    batches = particles.batches(batch_size, device=device)
    threads = torch.get_num_threads()
    # Scattering is serial: a half set goes to each of two threads, which then need no threads of their own. Meanwhile
    # the next batch is made.
    try:
        with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            adding: list[Future[None]] = []
            for batch in progress(batches, particles.n_batches(batch_size), "reconstruct"):
                first = half_set[batch.index.cpu()].to(device) == 1
                parts = (batch[first], batch[~first])
                for added in adding:
                    added.result()
                pairs = zip(halves, parts, strict=True)
                adding = [pool.submit(half.add, part, sigma, symmetry) for half, part in pairs]
            for added in adding:
                added.result()
    finally:
        torch.set_num_threads(threads)
    return halves


def _solve(
    halves: Halves,
    sigma: Tensor,
    order: int,
    mask: Tensor | str | None,
    draws: int,
    generator: torch.Generator,
) -> Reconstruction:
    whole = halves[0] + halves[1]
    everywhere = torch.ones((whole.box,) * 3, device=whole.value.device)
    plain = whole.posterior(everywhere, order=order)
    alone = [half.posterior(everywhere, order=order) for half in halves]
    if not all(bool(half.weight.any()) for half in halves):  # a single particle
        alone = [plain, plain]
    first, second = [half.mean(1e-2) for half in alone]
    half_maps = alone[0].to_map(first), alone[1].to_map(second)
    if mask is None:
        mask, scale = everywhere, everywhere
    elif isinstance(mask, str):
        mask = find_mask(0.5 * (half_maps[0] + half_maps[1]))
        scale = density_envelope(first, other=second)
    else:
        mask = mask.to(everywhere)
        envelope = density_envelope(mask * first, other=mask * second)
        scale = torch.minimum(mask, envelope)  # their product would narrow a tight mask
    posterior, rough = settled(whole.posterior(scale, order=order, like=plain), SETTLING, 1e-2)
    mean = posterior.mean(3e-3, start=rough)
    # R and R S count as one image: the draws of a symmetric map are narrower by the order of the group
    square = posterior.to_map(posterior.deviations(draws, generator, 2e-2)).square().mean(0) / order
    return Reconstruction(
        volume=posterior.to_map(mean),
        u=posterior.in_box(posterior.colour(mean)),
        sd=_smooth(square).sqrt(),
        halves=half_maps,
        mask=mask,
        scale=scale,
        tau=posterior.tau,
        coefficient_sd=(1 / (posterior.information() + posterior.tau.square().reciprocal())).sqrt(),
        signal_to_noise=plain.information() * plain.tau.square(),
        sigma=sigma,
    )


def _smooth(square: Tensor) -> Tensor:
    """A posterior variance from few draws, averaged over neighbouring voxels, between which it varies little."""
    return torch.nn.functional.avg_pool3d(square[None, None], 5, stride=1, padding=2, count_include_pad=False)[0, 0]


def band_limit(signal_to_noise: Tensor, least: float) -> float:
    """The last shell before the signal-to-noise ratio (D / 2 + 1,) falls below `least`, at least D / 8."""
    weak = (signal_to_noise[1:] < least).nonzero().flatten()
    last = int(weak[0]) if len(weak) else len(signal_to_noise) - 1
    return float(max(last, len(signal_to_noise) // 4))


def half_sets(particles: Particles, generator: torch.Generator) -> Tensor:
    """1 or 2 for every image: as the table has it, else drawn at random, a particle's images together: (N,).

    Where the table has them all in one set, one half of a larger set that is, they are drawn too.
    """
    given = particles.half_set
    drawn = torch.randint(1, 3, (particles.n_particles,), generator=generator, dtype=given.dtype)[particles.particle]
    sets = torch.where(given > 0, given, drawn)
    return drawn if bool((sets == sets[:1]).all()) else sets


def residual_noise(
    sample: Particles, equations: NormalEquations, order: int, batch_size: int, device: torch.device | str
) -> Tensor:
    """Noise sd by noise group and shell, (G, L), from what the map of `equations` leaves of a sample of images.

    The posterior variance of the map is added to the squared residuals, without which they would be too small by
    what the map fitted of the noise. order is that of the point group.
    """
    everywhere = torch.ones((sample.box,) * 3, device=device)
    posterior = equations.posterior(everywhere, order=order)
    grid = fourier_grid(posterior.to_map(posterior.mean(1e-2)))
    # variance of a slice's coefficient: D times the posterior variance of a voxel's worth of that shell
    variance = sample.box / (posterior.information() + posterior.tau.square().reciprocal()) / order
    total = torch.zeros(sample.n_noise_groups, sample.half.shells, device=device)
    count = torch.zeros_like(total)
    for batch in sample.batches(batch_size, device=device):
        square = left_of(batch, grid).square().sum(-1) + batch.ctf.square() * variance[batch.half.shell]
        add_shells(total, count, square, batch)
    return noise_floor((0.5 * total / count.clamp_min(1)).sqrt())


def left_of(batch: Batch, grid: Tensor) -> Tensor:
    """What a map, given as its Fourier grid, leaves of images at the poses of their batch: (B, P, 2)."""
    points = slice_coordinates(batch.rotation, batch.half.k, batch.freq_scale)
    return batch.image - form_image(torch.view_as_real(read_grid(grid, points)), batch.translation, batch)


def sample_rows(particles: Particles, generator: torch.Generator) -> Tensor:
    """Up to SAMPLE rows of every noise group, at random, in order."""
    rows = []
    for group in range(particles.n_noise_groups):
        mine = (particles.noise_group == group).nonzero().flatten()
        rows.append(mine[torch.randperm(len(mine), generator=generator)[:SAMPLE]])
    return torch.cat(rows).sort().values


def image_power(particles: Particles, batch_size: int, device: torch.device | str) -> Tensor:
    """sd of each real component of the images themselves by noise group and shell: (G, L)."""
    total = torch.zeros(particles.n_noise_groups, particles.half.shells, device=device)
    count = torch.zeros_like(total)
    for batch in particles.batches(batch_size, device=device):
        add_shells(total, count, batch.image.square().sum(-1), batch)
    return noise_floor((0.5 * total / count.clamp_min(1)).sqrt())


def add_shells(total: Tensor, count: Tensor, square: Tensor, batch: Batch, weight: Tensor | None = None) -> None:
    """Sum squared coefficients (B, P) by noise group and shell into total and count (G, L), images by weight (B,)."""
    each = torch.ones_like(square)
    if weight is not None:
        each = each * weight[:, None]
        square = square * weight[:, None]
    if batch.noise_scale is not None:
        square = square / batch.noise_scale.square()
    shells = total.shape[1]
    index = (batch.noise_group[:, None] * shells + batch.half.shell).flatten()
    total.view(-1).index_add_(0, index, square.flatten())
    count.view(-1).index_add_(0, index, each.flatten())


def noise_floor(sigma: Tensor) -> Tensor:
    """sigma with empty shells filled and a floor, a tenth of its largest value beyond the first shells.

    Noise is never that uneven, but without noise what is left of the signal is: and where one shell outweighs another
    ten thousandfold, no solver sees the other.
    """
    typical = sigma[:, 1:].median(1).values.clamp_min(1e-12)[:, None]
    largest = sigma[:, 1 + sigma.shape[1] // 8 :].amax(1, keepdim=True)
    return torch.maximum(torch.where(sigma > 0, sigma, typical), 0.1 * largest)
