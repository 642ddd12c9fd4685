"""Fourier shell correlation: how far two maps agree, and what a mask adds to that agreement."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_cryo.physics.fourier import half_radius

RANDOMISE_BELOW = 0.8
"""Phases are randomised beyond the shell where the unmasked FSC first falls below this."""


@dataclass(frozen=True)
class MaskedFSC:
    """Four curves (D / 2 + 1,) of two half-maps, by shell.

    unmasked:        of the half-maps as they are
    masked:          of the half-maps times the mask, which correlate by the mask alone too
    randomised:      of the masked half-maps after their phases beyond `randomised_from` were made random: what the
                     mask adds
    corrected:       (masked - randomised) / (1 - randomised) two shells beyond `randomised_from` and on, the masked
                     curve before; never above the masked curve
    randomised_from: first shell with random phases; D / 2 + 1 where the maps agree so well that none was randomised
    """

    unmasked: Tensor
    masked: Tensor
    randomised: Tensor
    corrected: Tensor
    randomised_from: int


def fsc(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of two real maps (D, D, D) in the shells round(|k|) = 0 .. D / 2: (D / 2 + 1,), float64.

        FSC(s) = sum Re A conj B / sqrt(sum |A|^2 sum |B|^2) over the shell s

    Shell 0 is the maps' mean and is set to 1; a shell without power in either map gives 0. Harauz and van Heel, Optik
    73 (1986).
    """
    if a.shape != b.shape or a.dim() != 3 or len(set(a.shape)) != 1 or a.shape[0] % 2:
        raise ValueError(f"maps of {tuple(a.shape)} and {tuple(b.shape)} voxels; give two cubes of the same even box")
    return _correlation(torch.fft.rfftn(a.double()), torch.fft.rfftn(b.double()))


def resolution_angstrom(curve: Tensor, apix: float, threshold: float = 0.143) -> float:
    """Where a curve (D / 2 + 1,) first falls below the threshold, interpolated between shells, in angstrom.

    A curve that never falls below it is good to Nyquist, 2 apix: the box allows no better claim. One that is below it
    from the first shell on resolves nothing, and gives infinity.
    """
    values = curve.double().cpu()
    if not bool(torch.isfinite(values).all()):
        raise ValueError("the FSC curve holds values that are not finite; check the maps for NaN")
    box = 2 * (len(values) - 1)
    below = torch.nonzero(values[1:] < threshold).flatten()
    if not len(below):
        return 2 * apix
    shell = int(below[0]) + 1
    if shell == 1:
        return math.inf
    last, first = float(values[shell - 1]), float(values[shell])
    return box * apix / (shell - 1 + (last - threshold) / (last - first))


def masked_fsc(half1: Tensor, half2: Tensor, mask: Tensor, seed: int = 0) -> MaskedFSC:
    """FSC of two half-maps under a mask, corrected for the correlation that the mask itself brings.

    Noise substitution: the phases of both maps are randomised beyond the shell where the unmasked FSC first falls
    below 0.8; what correlates there under the mask afterwards is the mask's doing. Chen et al., Ultramicroscopy 135
    (2013), equation 4. Half-maps and mask are (D, D, D), the mask from 0 to 1.

    As in common practice the correction starts two shells later than the random phases do: a mask smears the
    boundary between true and random over about that much.
    """
    if mask.shape != half1.shape:
        raise ValueError(f"a mask of {tuple(mask.shape)} voxels for maps of {tuple(half1.shape)}; give the same box")
    unmasked = fsc(half1, half2)
    masked = fsc(half1 * mask, half2 * mask)
    below = torch.nonzero(unmasked[1:] < RANDOMISE_BELOW).flatten()
    start = int(below[0]) + 1 if len(below) else len(unmasked)
    generator = torch.Generator().manual_seed(seed)
    random1, random2 = (randomise_phases(half, start, generator) for half in (half1, half2))
    randomised = fsc(random1 * mask, random2 * mask)
    corrected = masked.clone()
    tail = slice(start + 2, None)
    brought = randomised[tail].clamp(0, 1 - 1e-6)  # chance correlations below 0 must not raise the curve
    corrected[tail] = (masked[tail] - brought) / (1 - brought)
    return MaskedFSC(unmasked, masked, randomised, corrected, start)


def randomise_phases(volume: Tensor, start: int, generator: torch.Generator) -> Tensor:
    """The map (D, D, D) with the phases of the shells from `start` on replaced by random ones, amplitudes kept."""
    box = volume.shape[-1]
    spectrum = torch.fft.rfftn(volume.double())
    # the transform of white noise has uniform phases and the Hermitian symmetry of a real map
    noise = torch.fft.rfftn(torch.randn(volume.shape, generator=generator, dtype=torch.float64)).to(volume.device)
    random = spectrum.abs() * noise / noise.abs().clamp_min(1e-30)
    beyond = half_radius(box, volume.device).round() >= start
    return torch.fft.irfftn(torch.where(beyond, random, spectrum), s=volume.shape).to(volume.dtype)


def shell_sum(values: Tensor) -> Tensor:
    """Sum real values on the rfftn layout (D, D, D / 2 + 1) over both halves of each shell: (D / 2 + 1,)."""
    box = values.shape[0]
    shell = half_radius(box, values.device).round().long().clamp_max(box // 2 + 1)
    twice = torch.full((box // 2 + 1,), 2.0, dtype=values.dtype, device=values.device)
    twice[0] = twice[-1] = 1.0  # these columns of the layout hold both halves themselves
    total = values.new_zeros(box // 2 + 2)
    return total.index_add_(0, shell.flatten(), (values * twice).flatten())[:-1]


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    cross = shell_sum((a * b.conj()).real)
    power = (shell_sum(a.abs().square()) * shell_sum(b.abs().square())).sqrt()
    curve = torch.where(power > 0, cross / power.clamp_min(1e-300), torch.zeros_like(cross)).clamp(-1, 1)
    curve[0] = 1.0
    return curve
