"""The evidence of an image with its pose integrated out by brute force: a fine grid of rotations and shifts about its
peaks, every cell of the same volume."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_cryo.data.batch import Batch
from pyro_cryo.guides.poses import PoseModes
from pyro_cryo.physics import rotation_grid
from pyro_cryo.physics.fourier import shift_phase
from pyro_cryo.physics.rotations import angle_deg
from pyro_cryo.physics.slices import fourier_grid, read_grid, slice_coordinates


def evidence(
    batch: Batch, volume: Tensor, sigma: float, modes: PoseModes, shift_sd: float, level: int, reach_sd: float = 4.5
) -> tuple[Tensor, Tensor]:
    """log p(image) less that of an empty image under AnyPose(shift_sd): (B,); and each peak's share of it (B, K).

    Of the grids all within reach_sd of a mode's standard deviations is added up, 0.6 of one a step of shifts; a cell
    is the nearest mode's.
    """
    grid, results = fourier_grid(volume), []
    for image in range(len(batch)):
        there = modes.log_weight[image].isfinite()
        one = batch[torch.tensor([image])]
        peaks, sd = modes.rotation[image][there], _sd(modes.precision[image][there])
        reach = reach_sd * math.degrees(float(sd[:, :3].max()))
        rotation = rotation_grid.centres(_near(peaks, reach, level), level)
        shift = _shifts(modes.translation[image][there], float(sd[:, 3:].max()), reach_sd)
        log_joint = log_likelihood(one, grid, sigma, rotation, shift[0]) - 0.5 * (shift[0] / shift_sd).square().sum(1)
        cell = math.log(shift[1] ** 2 / (2 * math.pi * shift_sd**2)) - math.log(rotation_grid.count(level))
        mass = log_joint.double().logsumexp(1) + cell
        nearest = angle_deg(rotation[:, None], peaks).argmin(1)
        share = torch.full(there.shape, -torch.inf, dtype=mass.dtype)
        share[there] = torch.stack([mass[nearest == peak].logsumexp(0) for peak in range(len(peaks))])
        results.append((mass.logsumexp(0), share.softmax(0)))
    return torch.stack([log for log, _ in results]).float(), torch.stack([share for _, share in results]).float()


def _sd(precision: Tensor) -> Tensor:
    return torch.linalg.inv(precision).diagonal(dim1=-2, dim2=-1).sqrt()


def _near(peaks: Tensor, reach_deg: float, level: int) -> Tensor:
    """Cells within some degrees of a peak, by descent: a cell may hold one while its centre is a step away."""
    cell = rotation_grid.cells(0)
    for fineness in range(level + 1):
        slack = 1.3 * rotation_grid.step_deg(fineness) if fineness < level else 0.0
        centre = rotation_grid.centres(cell, fineness)
        cell = cell[angle_deg(centre[:, None], peaks).amin(1) < reach_deg + slack]
        if fineness < level:
            cell = rotation_grid.children(cell).flatten()
    return cell


def _shifts(peaks: Tensor, sd: float, reach_sd: float) -> tuple[Tensor, float]:
    """Shifts (T, 2) of a square grid that covers the peaks, and its step."""
    centre, step = peaks.mean(0), 0.6 * sd
    count = math.ceil((reach_sd * sd + float((peaks - centre).abs().max())) / step)
    axis = step * torch.arange(-count, count + 1)
    return centre + torch.cartesian_prod(axis, axis), step


def log_likelihood(one: Batch, grid: Tensor, sigma: float, rotation: Tensor, shift: Tensor) -> Tensor:
    """log p(image | pose) less that of an empty image: (C, T)."""
    half, factor = one.half, one.ctf[0] / sigma
    slices = read_grid(grid, slice_coordinates(rotation, half.k) * one.freq_scale) * factor
    image = torch.view_as_complex(one.image)[0] / sigma
    shifted = image * shift_phase(half.k, shift * one.freq_scale, half.box).conj()
    cross = torch.view_as_real(slices).flatten(1) @ torch.view_as_real(shifted).flatten(1).T
    return cross - 0.5 * slices.abs().square().sum(1)[:, None]
