"""Where a map may live: the solvent mask, and the envelope that says how much density to expect where."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pyro_cryo.data.mrc_map import read_map
from pyro_cryo.physics.fourier import radius, soft_disc


def find_mask(volume: Tensor, *, threshold_sd: float = 4.0, grow: float = 0.04, edge: float = 0.05) -> Tensor:
    """A soft mask about the density of a map (D, D, D), values 0 to 1.

    The map is smoothed with a Gaussian of sd D / 40; what exceeds threshold_sd standard deviations of the solvent (the
    voxels outside the inscribed sphere) and 5% of the peak is density. Specks under a tenth of the largest piece are
    dropped, holes filled, the rest grown by `grow` D with a raised-cosine edge of `edge` D.
    Where no density stands out, the inscribed sphere is returned.
    """
    from scipy.ndimage import binary_fill_holes, distance_transform_edt, gaussian_filter, label

    box = len(volume)
    sphere = soft_disc(box, 0.5 * box * 0.9, 0.5 * box * 0.1, dims=3)
    smooth = gaussian_filter(volume.detach().cpu().numpy(), box / 40, mode="wrap")
    outside = smooth[(radius(box, 3) > 0.5 * box * 0.95).numpy()]
    level = max(threshold_sd * float(outside.std()) + float(outside.mean()), 0.05 * float(smooth.max()))
    core = (smooth > level) & (sphere.numpy() > 0)
    pieces, count = label(core)
    if count == 0:
        return sphere.to(volume.device)
    sizes = torch.bincount(torch.from_numpy(pieces).flatten().long())[1:]
    kept = binary_fill_holes(torch.isin(torch.from_numpy(pieces), 1 + (sizes >= 0.1 * sizes.max()).nonzero()).numpy())
    distance = torch.from_numpy(distance_transform_edt(~kept)).float() - grow * box
    ramp = (distance / (edge * box)).clamp(0, 1)
    mask = 0.5 * (1 + torch.cos(torch.pi * ramp)) * sphere
    return mask.to(volume.device)


def density_envelope(
    volume: Tensor,
    mask: Tensor | None = None,
    *,
    other: Tensor | None = None,
    width: float = 1 / 32,
    inside: float = 0.1,
    floor: float = 0.02,
) -> Tensor:
    """Prior sd of the density at each voxel, up to a factor: the local rms of a first map, (D, D, D), at most 1.

    The map is squared, smoothed with a Gaussian of sd `width` D and rooted; below `floor` it is not believed, and
    beyond the inscribed sphere it is zero. A prior that expects density where there is density is what non-uniform
    refinement (Punjani, Zhang and Fleet, Nature Methods 17, 2020) does by cross-validation.
    volume: best one whose shells are as strong as each other where they are seen, like the e of a posterior: in a map
            as it is the lowest shells tell, which are few coefficients, uneven by chance
    other:  the map of the other half of the images. Noise, which is not the same in both, then adds nothing: two maps
            are multiplied where one is squared
    mask:   where at least `inside` is expected, (D, D, D): of a map that no other one confirms
    """
    from scipy.ndimage import gaussian_filter

    box = len(volume)
    square = volume * (volume if other is None else other)
    power = gaussian_filter(square.detach().cpu().numpy(), width * box, mode="wrap")
    local = torch.from_numpy(power).clamp_min(0).sqrt().to(volume.device)
    envelope = (local / local.max().clamp_min(1e-30)).clamp_min(floor)
    if mask is not None:
        envelope = torch.maximum(envelope, inside * mask)
    return envelope * soft_disc(box, 0.5 * box * 0.9, 0.5 * box * 0.1, dims=3, device=volume.device)


def chosen_mask(choice: str, box: int) -> Tensor | str | None:
    """What a user's choice means to `reconstruct`: "auto" as it is, "none" None, else the map of that path."""
    if choice in ("auto", "none"):
        return None if choice == "none" else choice
    return read_mask(choice, box)


def read_mask(path: str, box: int) -> Tensor:
    """A mask from a map file, checked: the box of the model, values in 0 to 1."""
    mask, _ = read_map(Path(path))
    if len(mask) != box:
        raise ValueError(f"{path}: mask of {len(mask)} voxels, the images are {box} pixels; resample the mask")
    if float(mask.min()) < -1e-3 or float(mask.max()) > 1 + 1e-3 or float(mask.max()) <= 0:
        low, high = float(mask.min()), float(mask.max())
        raise ValueError(f"{path}: mask values {low:g} to {high:g}; expected 0 (solvent) to 1 (molecule)")
    return mask.clamp(0, 1)
