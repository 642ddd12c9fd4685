"""Maps made ready to look at: filters, sharpening, hand, contour level, a ChimeraX script.

Filters act on real maps (D, D, D) and multiply their transform by a function of s, in cycles an angstrom.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pyro_cryo.analysis.fsc import shell_sum
from pyro_cryo.physics.fourier import half_radius


def low_pass(volume: Tensor, apix: float, resolution_angstrom: float, edge_shells: float = 4.0) -> Tensor:
    """Remove what is finer than a resolution, by a cosine edge `edge_shells` wide that is 1/2 at the resolution."""
    if not resolution_angstrom > 0:
        raise ValueError(f"resolution {resolution_angstrom} is not positive; give angstrom")
    box = volume.shape[-1]
    k = half_radius(box, volume.device)
    ramp = ((k - box * apix / resolution_angstrom) / edge_shells + 0.5).clamp(0, 1)
    return _filter(volume, 0.5 * (1 + torch.cos(math.pi * ramp)))


def sharpen(volume: Tensor, apix: float, bfactor_angstrom2: float) -> Tensor:
    """Multiply the transform by exp(-B s^2 / 4): a negative B sharpens, as in RELION's post-processing."""
    s = half_radius(volume.shape[-1], volume.device) / (volume.shape[-1] * apix)
    return _filter(volume, torch.exp(-0.25 * bfactor_angstrom2 * s.square()))


def guinier_bfactor(volume: Tensor, apix: float, resolution_angstrom: float, coarsest_angstrom: float = 10.0) -> float:
    """The B factor that undoes a map's decay, in angstrom^2: hand it to `sharpen`. Negative for a map that decays.

    The slope of ln(mean amplitude of a shell) against s^2, fitted from `coarsest_angstrom` to the resolution of the
    map, is B / 4 (Guinier plot; Rosenthal and Henderson, J. Mol. Biol. 333 (2003)). Coarser than about 10 angstrom
    the molecule's shape, not the decay, rules the amplitudes: ValueError where fewer than three shells lie between.
    """
    box = volume.shape[-1]
    amplitude = shell_sum(torch.fft.rfftn(volume.double()).abs())
    mean = amplitude / shell_sum(torch.ones(box, box, box // 2 + 1, dtype=torch.float64, device=volume.device))
    s = torch.arange(box // 2 + 1, dtype=torch.float64, device=volume.device) / (box * apix)
    fitted = (s >= 1 / coarsest_angstrom) & (s <= 1 / resolution_angstrom) & (mean > 0)
    if int(fitted.sum()) < 3:
        raise ValueError(
            f"no B factor can be fitted between {coarsest_angstrom:g} and {resolution_angstrom:g} angstrom "
            f"({int(fitted.sum())} shells of this box); give one, or a coarser start"
        )
    x, y = s[fitted].square(), mean[fitted].log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return 4 * float(slope)


def fsc_weight(volume: Tensor, curve: Tensor) -> Tensor:
    """Weight each shell by Cref = sqrt(2 FSC / (1 + FSC)), the expected correlation of the full map with the truth.

    curve (D / 2 + 1,) is the FSC of its half-maps; negative values count as 0, and so does all beyond D / 2.
    Rosenthal and Henderson (2003), equation 21.
    """
    box = volume.shape[-1]
    if len(curve) != box // 2 + 1:
        raise ValueError(f"an FSC curve of {len(curve)} shells for a box of {box}; give {box // 2 + 1}")
    positive = curve.to(volume.device, torch.float32).clamp(0, 1)
    cref = torch.cat([(2 * positive / (1 + positive)).sqrt(), positive.new_zeros(1)])
    shell = half_radius(box, volume.device).round().long().clamp_max(box // 2 + 1)
    return _filter(volume, cref[shell])


def contour_level(volumes: Tensor, volume_fraction: float = 0.03) -> float:
    """One contour level for a series of maps (*batch, D, D, D).

    The level that encloses `volume_fraction` of all voxels of all the maps. The default, 3% of the box, is about the
    volume of a globular complex that fills 70% of the box in its longest direction.
    """
    if not 0 < volume_fraction < 1:
        raise ValueError(f"volume fraction {volume_fraction} lies outside 0 to 1; give for example 0.03")
    values = volumes.flatten()
    rank = min(max(round((1 - volume_fraction) * len(values)), 1), len(values))
    return float(values.kthvalue(rank).values)


def write_chimerax(path: str | Path, map_paths: Sequence[str | Path], level: float) -> None:
    """Write a ChimeraX script (.cxc) that opens maps at one contour level: several as a series with a slider.

    Paths are written relative to the script's folder, from which ChimeraX reads them. The script changes nothing on
    disk.
    """
    if not map_paths:
        raise ValueError(f"{path}: no maps to show; give at least one")
    path = Path(path)
    names = [f'"{os.path.relpath(p, path.parent)}"' for p in map_paths]
    series = len(names) > 1
    lines = [
        f"open {' '.join(names)}{' vseries true' if series else ''}",
        f"volume #1 style surface step 1 level {level:.6g} color #7aa6c2",
        *(["vseries slider #1"] if series else []),
        "set bgColor white",
        "lighting soft",
        "graphics silhouettes true",
        "view",
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _filter(volume: Tensor, factor: Tensor) -> Tensor:
    return torch.fft.irfftn(torch.fft.rfftn(volume) * factor, s=volume.shape[-3:], dim=(-3, -2, -1))
