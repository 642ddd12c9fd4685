"""Particles with known truth: a RELION 3.1 stack made from a toy complex, atoms or maps.

    simulate(hinge(), "case", n_images=5000, box=64, snr=0.1)

writes the folder

    particles.mrcs, particles.star   the images, with their poses, origins and defocus
    truth.npz                        what is true of them, for scoring only:
        rotation   (N, 3, 3)     R with projection(x, y) = integral over z of V(R^T (x, y, z)), uniform over SO(3)
        shift_px   (N, 2)        displacement (x, y) of the particle from the box centre, pixels
        state      (N,)          index into `volumes`
        coordinate (N, q)        the state's continuous coordinate; discrete states repeat `state`
        volumes    (S, D, D, D)  z-y-x, on the scale of the images: image = ctf * projection(volume) + noise
        ctf        (N, 9)        box, apix, defocus U and V (angstrom), angle (degrees), voltage (kV), Cs (mm),
                                 amplitude contrast, phase shift (degrees)
        apix, snr, noise_sd      angstrom a pixel; var(images before noise) / noise_sd^2; noise sd of a pixel

Images are projected in real space (blobs) or through accurately interpolated slices (maps), multiplied by the CTF in
Fourier space, and scaled to variance 1 once Gaussian noise is on. Protein is bright on a dark ground.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pyro_cryo.data.blobs import Complex, classes, from_pdb, hinge, rotor, ten_classes, two_arms
from pyro_cryo.data.density_maps import DensityMaps, from_maps
from pyro_cryo.data.star import write_star
from pyro_cryo.physics.ctf import CTF
from pyro_cryo.physics.rotations import random_rotations, tilt, to_euler_deg
from pyro_cryo.progress import Progress, quiet

__all__ = [
    "TOYS", "Complex", "DensityMaps", "Source", "classes", "from_maps", "from_pdb", "hinge", "rotor", "simulate",
    "ten_classes", "two_arms",
]  # fmt: skip

TOYS: Mapping[str, Callable[[], Complex]] = {
    "hinge": hinge,
    "rotor": rotor,
    "two_arms": two_arms,
    "classes": classes,
    "ten_classes": ten_classes,
}
"""The built-in complexes by name."""

NOISE_ROWS_PX = 2**22
"""Noise is added to about so many pixels at once."""


class Source(Protocol):
    """What can be simulated: S states, each with a true volume and exact projections on its scale."""

    def __len__(self) -> int: ...

    @property
    def coordinate(self) -> Tensor:
        """(S, q) where each state lies."""

    def apix_for(self, box: int, apix: float | None) -> float:
        """The pixel size to use, or ValueError where the one asked for does not do."""

    def volume(self, state: int, box: int, apix: float) -> Tensor:
        """(D, D, D), z-y-x."""

    def projector(self, state: int, box: int, apix: float) -> Callable[[Tensor, Tensor], Tensor]:
        """A function of rotations (n, 3, 3) and shifts (n, 2) in pixels that gives projections (n, D, D)."""

    def images_at_once(self, box: int) -> int:
        """How many images to project together within bounded memory."""


@dataclass(frozen=True)
class Truth:
    """What is drawn for each of N images; shapes and meanings as in the module's docstring."""

    rotation: Tensor
    shift_px: Tensor
    state: Tensor
    ctf: CTF


def simulate(
    source: Source,
    out: str | Path,
    *,
    n_images: int,
    box: int,
    apix: float | None = None,
    snr: float = 0.1,
    shift_sd_px: float | None = None,
    defocus_angstrom: tuple[float, float] = (10_000.0, 25_000.0),
    voltage_kv: float = 300.0,
    cs_mm: float = 2.7,
    amplitude_contrast: float = 0.1,
    noise_power: Sequence[float] | None = None,
    tilt_deg: float | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress = quiet,
) -> Path:
    """Write `n_images` particles of `box` pixels and their truth into the folder `out`; returns the STAR file.

    apix:             angstrom a pixel; by default a complex fills 70% of the box, and maps keep their field of view
    snr:              variance of the images before noise, over the whole box, over the variance of the noise
    shift_sd_px:      standard deviation of the displacement along x and y; by default 3% of the box
    defocus_angstrom: range of the mean defocus, uniform; astigmatism has a standard deviation of 200 angstrom
    noise_power:      relative power of the noise in the shells round(|k|) = 0, 1, ... D / 2; by default it is white.
                      Whatever its scale, the noise has the variance that `snr` asks for
    tilt_deg:         tilt pairs: rows 2i and 2i + 1 show one particle, the second turned by so many degrees
                      about its x axis, and with a shift and a defocus of its own. `n_images` counts both
    overwrite:        replace a case that stands in `out`
    progress:         wraps the chunks of images, as they are projected and as they get their noise

    The same arguments and seed give the same bytes. Memory stays bounded by the states' volumes and one chunk of
    images. Raises ValueError where a value makes no sense or `out` already holds a case.
    """
    shift_sd_px = 0.03 * box if shift_sd_px is None else shift_sd_px
    optics = (voltage_kv, cs_mm, amplitude_contrast)
    _check(n_images, box, snr, shift_sd_px, defocus_angstrom, optics, noise_power, tilt_deg)
    apix = source.apix_for(box, apix)
    out = Path(out)
    if not overwrite and any((out / name).exists() for name in ("particles.mrcs", "particles.star", "truth.npz")):
        raise ValueError(f"{out} already holds particles; choose another folder or give overwrite=True")
    generator = torch.Generator().manual_seed(seed)
    truth = _draw(n_images, len(source), shift_sd_px, defocus_angstrom, optics, tilt_deg, generator)
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    stack = out / f".particles.{os.getpid()}.tmp"
    try:
        variance = _write_clean(stack, source, truth, box, apix, progress)
        if not variance > 0:
            raise ValueError(f"the images have no contrast (variance {variance:g}); give a source that is not empty")
        noise_sd, scale = (variance / snr) ** 0.5, (variance + variance / snr) ** -0.5
        _add_noise(stack, apix, noise_sd, scale, noise_power, generator, progress)
        os.replace(stack, out / "particles.mrcs")
    finally:
        stack.unlink(missing_ok=True)
        if new and not any(out.iterdir()):
            out.rmdir()
    _write_truth(out / "truth.npz", source, truth, box, apix, snr, scale, noise_sd)
    _write_star(out / "particles.star", truth, box, apix, pairs=tilt_deg is not None)
    return out / "particles.star"


def _check(
    n_images: int,
    box: int,
    snr: float,
    shift_sd_px: float,
    defocus_angstrom: tuple[float, float],
    optics: tuple[float, float, float],
    noise_power: Sequence[float] | None,
    tilt_deg: float | None,
) -> None:
    """One ValueError for the first argument that makes no sense."""
    low, high = defocus_angstrom
    voltage_kv, cs_mm, amplitude_contrast = optics
    power = np.ones(box // 2 + 1) if noise_power is None else np.asarray(noise_power, float)
    complaints = [
        (n_images < 1, f"{n_images} images; give at least 1"),
        (tilt_deg is not None and n_images % 2 == 1, f"{n_images} images of tilt pairs; give {n_images + 1}"),
        (tilt_deg is not None and not np.isfinite(tilt_deg), f"tilt_deg {tilt_deg}; give degrees, for example 45"),
        (box % 2 or box < 8, f"box {box} is not an even number of at least 8; give box={max(8, box + box % 2)}"),
        (not 0 < snr < float("inf"), f"snr {snr} is not positive; give for example snr=0.1"),
        (not shift_sd_px >= 0, f"shift_sd_px {shift_sd_px} is negative; give 0 or more pixels"),
        (not 0 < low <= high, f"defocus range {low:g} to {high:g} angstrom; give two positive values, lower first"),
        (not 0 < voltage_kv < float("inf"), f"a voltage of {voltage_kv:g} kV; give for example 300"),
        (not 0 <= cs_mm < float("inf"), f"a spherical aberration of {cs_mm:g} mm; give for example 2.7"),
        (not 0 <= amplitude_contrast < 1, f"amplitude contrast {amplitude_contrast} lies outside 0 to 1; give 0.1"),
        (
            power.shape != (box // 2 + 1,) or not np.isfinite(power).all() or power.min() < 0 or power.max() <= 0,
            f"noise_power holds {power.size} values; give {box // 2 + 1}, one a shell, none negative and not all zero",
        ),
    ]
    for wrong, message in complaints:
        if wrong:
            raise ValueError(message)


def _draw(
    n: int,
    n_states: int,
    shift_sd_px: float,
    defocus_angstrom: tuple[float, float],
    optics: tuple[float, float, float],
    tilt_deg: float | None,
    generator: torch.Generator,
) -> Truth:
    low, high = defocus_angstrom
    mean = low + (high - low) * torch.rand(n, generator=generator)
    astigmatism = torch.randn(n, generator=generator).abs() * 200.0
    angle = 180 * torch.rand(n, generator=generator)
    voltage, cs, contrast = (torch.full((n,), float(v)) for v in optics)
    zero, one = torch.zeros(n), torch.ones(n)
    views = torch.eye(3)[None] if tilt_deg is None else torch.stack([torch.eye(3), tilt(tilt_deg)])
    particles = n // len(views)
    rotation = random_rotations(particles, generator)
    shift = torch.randn(n, 2, generator=generator)
    state = torch.randint(n_states, (particles,), generator=generator)
    return Truth(
        rotation=(views @ rotation[:, None]).flatten(0, 1),
        shift_px=shift_sd_px * shift,
        state=state.repeat_interleave(len(views)),
        ctf=CTF(mean + astigmatism / 2, mean - astigmatism / 2, angle, voltage, cs, contrast, zero, zero, one),
    )


def _write_clean(path: Path, source: Source, truth: Truth, box: int, apix: float, progress: Progress) -> float:
    """Write the images before noise, state by state, into a new stack; returns the variance of their pixels."""
    import mrcfile

    frequency = torch.stack(
        torch.meshgrid(torch.fft.fftfreq(box, apix), torch.fft.rfftfreq(box, apix), indexing="ij")[::-1], -1
    ).flatten(0, 1)
    total = square = 0.0
    with mrcfile.new_mmap(path, (len(truth.state), box, box), mrc_mode=2, overwrite=True) as file:
        chunks = sum(-(-count // source.images_at_once(box)) for count in truth.state.bincount().tolist())
        for project, part in progress(_chunks(source, truth, box, apix), chunks, "project"):
            clean = project(truth.rotation[part], truth.shift_px[part])
            ctf = truth.ctf[part](frequency).view(-1, box, box // 2 + 1)
            image = torch.fft.irfft2(torch.fft.rfft2(clean) * ctf, s=(box, box))
            file.data[part.numpy()] = image.numpy()
            total += float(image.sum(dtype=torch.float64))
            square += float(image.double().square().sum())
    pixels = len(truth.state) * box**2
    return square / pixels - (total / pixels) ** 2


def _chunks(
    source: Source, truth: Truth, box: int, apix: float
) -> Iterator[tuple[Callable[[Tensor, Tensor], Tensor], Tensor]]:
    """What projects a state, with as many of its rows as fit into memory, until all are done."""
    for state in range(len(source)):
        rows = torch.nonzero(truth.state == state).flatten()
        if not len(rows):
            continue
        project = source.projector(state, box, apix)
        for part in rows.split(source.images_at_once(box)):
            yield project, part


def _add_noise(
    path: Path,
    apix: float,
    noise_sd: float,
    scale: float,
    noise_power: Sequence[float] | None,
    generator: torch.Generator,
    progress: Progress,
) -> None:
    """Add noise to the stack in place, scale it, and complete its header."""
    import mrcfile

    with mrcfile.mmap(path, mode="r+") as file:
        n, box, _ = file.data.shape
        colour = None if noise_power is None else _colour(noise_power, box)
        low, high, total, square = np.inf, -np.inf, 0.0, 0.0
        chunks = torch.arange(n).split(max(1, NOISE_ROWS_PX // box**2))
        for rows in progress(chunks, len(chunks), "add noise"):
            noise = torch.randn(len(rows), box, box, generator=generator)
            if colour is not None:
                noise = torch.fft.irfft2(torch.fft.rfft2(noise) * colour, s=(box, box))
            at = slice(int(rows[0]), int(rows[-1]) + 1)
            image = (torch.from_numpy(np.array(file.data[at])) + noise_sd * noise) * scale
            file.data[at] = image.numpy()
            low, high = min(low, float(image.min())), max(high, float(image.max()))
            total += float(image.sum(dtype=torch.float64))
            square += float(image.double().square().sum())
        mean = total / (n * box**2)
        header = file.header
        header.dmin, header.dmax, header.dmean = low, high, mean
        header.rms = (square / (n * box**2) - mean**2) ** 0.5
        header.label[0] = b"pyro_cryo"  # in place of the time of writing: the same seed gives the same bytes
        file.set_image_stack()
        file.voxel_size = apix


def _colour(noise_power: Sequence[float], box: int) -> Tensor:
    """Factor of the transform of white noise (D, D / 2 + 1) that colours it and keeps the variance of a pixel."""
    power = torch.tensor(list(noise_power), dtype=torch.float32)
    shell = (torch.fft.fftfreq(box, 1 / box)[:, None] ** 2 + torch.fft.rfftfreq(box, 1 / box) ** 2).sqrt().round()
    density = power[shell.long().clamp_max(box // 2)]
    weight = torch.full((box // 2 + 1,), 2.0)  # coefficients with kx > 0 stand for two
    weight[0] = weight[-1] = 1.0
    return (density * (box**2 / (density * weight).sum())).sqrt()


def _write_truth(
    path: Path, source: Source, truth: Truth, box: int, apix: float, snr: float, scale: float, noise_sd: float
) -> None:
    volumes = np.empty((len(source), box, box, box), np.float32)
    for state in range(len(source)):
        volumes[state] = (source.volume(state, box, apix) * scale).numpy()
    ctf, one = truth.ctf, torch.ones(len(truth.state))
    columns = [
        one * box, one * apix, ctf.defocus_u_angstrom, ctf.defocus_v_angstrom, ctf.defocus_angle_deg,
        ctf.voltage_kv, ctf.cs_mm, ctf.amplitude_contrast, ctf.phase_shift_deg,
    ]  # fmt: skip
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp.npz")
    try:
        np.savez(
            temporary,
            rotation=truth.rotation.numpy(),
            shift_px=truth.shift_px.numpy(),
            state=truth.state.numpy(),
            coordinate=source.coordinate[truth.state].numpy(),
            volumes=volumes,
            ctf=torch.stack(columns, 1).numpy(),
            apix=apix,
            snr=snr,
            noise_sd=noise_sd * scale,
        )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_star(path: Path, truth: Truth, box: int, apix: float, pairs: bool) -> None:
    """RELION 3.1: an optics table and a particle table. RELION's origin is the displacement's negative, in angstrom."""
    import pandas as pd

    ctf, n = truth.ctf, len(truth.state)
    euler = to_euler_deg(truth.rotation.double().numpy())
    origin = -apix * truth.shift_px.double().numpy()
    optics = {
        "rlnOpticsGroupName": ["opticsGroup1"], "rlnOpticsGroup": [1], "rlnVoltage": [float(ctf.voltage_kv[0])],
        "rlnSphericalAberration": [float(ctf.cs_mm[0])], "rlnAmplitudeContrast": [float(ctf.amplitude_contrast[0])],
        "rlnImagePixelSize": [apix], "rlnImageSize": [box], "rlnImageDimensionality": [2],
    }  # fmt: skip
    particles = {
        "rlnImageName": [f"{i + 1:06d}@particles.mrcs" for i in range(n)],
        "rlnAngleRot": euler[:, 0], "rlnAngleTilt": euler[:, 1], "rlnAnglePsi": euler[:, 2],
        "rlnOriginXAngst": origin[:, 0], "rlnOriginYAngst": origin[:, 1],
        "rlnDefocusU": ctf.defocus_u_angstrom.numpy(), "rlnDefocusV": ctf.defocus_v_angstrom.numpy(),
        "rlnDefocusAngle": ctf.defocus_angle_deg.numpy(), "rlnOpticsGroup": [1] * n,
    }  # fmt: skip
    if pairs:
        particles["rlnTomoParticleName"] = [f"pair/{i // 2 + 1}" for i in range(n)]
    write_star(path, {"optics": pd.DataFrame(optics), "particles": pd.DataFrame(particles)})
