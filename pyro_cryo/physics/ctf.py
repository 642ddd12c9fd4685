"""The contrast transfer function.

    gamma(s) = pi lambda (lambda^2 Cs |s|^4 / 2 - z(theta) |s|^2) - phase shift
    z(theta) = (U + V) / 2 + (U - V) / 2 cos 2 (theta - angle)
    ctf(s)   = -scale (sqrt(1 - A^2) sin gamma - A cos gamma) exp(-B |s|^2 / 4)

with s in cycles an angstrom and theta from the x axis (RELION's zero of the astigmatism angle). The sign is
the one of a bright particle on a dark ground: positive where an underfocused image has positive contrast, A at
s = 0. Rohou and Grigorieff, J. Struct. Biol. 192 (2015), equations 2 to 5.

d angstrom more of both U and V turn the function towards its quadrature, that of a phase shift larger by 90 degrees:

    ctf(s; d) = cos(phi) ctf(s) + sin(phi) quadrature(s),  phi = pi lambda |s|^2 d
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class CTF:
    """Optics of N images; every field is (N,).

    Units are in the names. bfactor_angstrom2 is B in exp(-B s^2 / 4); scale multiplies the whole function.
    """

    defocus_u_angstrom: Tensor
    defocus_v_angstrom: Tensor
    defocus_angle_deg: Tensor
    voltage_kv: Tensor
    cs_mm: Tensor
    amplitude_contrast: Tensor
    phase_shift_deg: Tensor
    bfactor_angstrom2: Tensor
    scale: Tensor

    def __len__(self) -> int:
        return len(self.scale)

    def __getitem__(self, rows: Tensor | slice) -> CTF:
        return replace(self, **{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def to(self, device: torch.device | str) -> CTF:
        """The same optics on another device."""
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def defocused(self, offset_angstrom: Tensor) -> CTF:
        """With (N,) more of both defocus values."""
        u, v = self.defocus_u_angstrom + offset_angstrom, self.defocus_v_angstrom + offset_angstrom
        return replace(self, defocus_u_angstrom=u, defocus_v_angstrom=v)

    @property
    def quadrature(self) -> CTF:
        """With 90 degrees more of phase shift."""
        return replace(self, phase_shift_deg=self.phase_shift_deg + 90)

    def __call__(self, frequency: Tensor) -> Tensor:
        """The function at frequencies (P, 2) or (N, P, 2), x-y, in cycles an angstrom: (N, P)."""
        u, v, angle, kv, cs, contrast, phase, b, scale = (getattr(self, f.name)[:, None] for f in fields(self))
        wavelength = electron_wavelength(kv)
        x, y = frequency.unbind(-1)
        square = x**2 + y**2
        # |s|^2 cos 2 (theta - a), without the angle theta itself
        cos2, sin2 = torch.cos(2 * torch.deg2rad(angle)), torch.sin(2 * torch.deg2rad(angle))
        astigmatic = (x**2 - y**2) * cos2 + 2 * x * y * sin2
        defocus = 0.5 * ((u + v) * square + (u - v) * astigmatic)
        gamma = math.pi * wavelength * (0.5e7 * cs * wavelength**2 * square**2 - defocus) - torch.deg2rad(phase)
        # sqrt(1 - A^2) sin g - A cos g = sin(g - asin A): one sine in place of a sine and a cosine
        return -scale * torch.sin(gamma - torch.asin(contrast)) * torch.exp(-0.25 * b * square)


def electron_wavelength(voltage_kv: Tensor) -> Tensor:
    """Relativistic wavelength of the electron in angstrom, h / sqrt(2 m e V (1 + e V / 2 m c^2)), CODATA 2018."""
    volts = voltage_kv * 1e3
    return 12.26425966 / torch.sqrt(volts * (1 + 0.97847559e-6 * volts))


def aliasing_angstrom(ctf: CTF, apix: float, box: int) -> float:
    """The coarsest resolution at which the CTF of any image oscillates faster than the box samples it, in angstrom.

    Neighbouring samples of a box are 1 / (D apix) apart. The CTF aliases where its phase gamma turns by more than pi
    between them: |d gamma / ds| > pi D apix. Returns 0 where that happens nowhere up to Nyquist.
    """
    wavelength = electron_wavelength(ctf.voltage_kv)
    defocus = torch.maximum(ctf.defocus_u_angstrom.abs(), ctf.defocus_v_angstrom.abs())
    s = torch.linspace(0, 0.5 / apix, 512, device=wavelength.device)[:, None]
    slope = 2 * math.pi * wavelength * (1e7 * ctf.cs_mm * wavelength**2 * s**3 - defocus * s)
    bad = (slope.abs() > math.pi * box * apix).any(1)
    return float(1 / s[bad].min()) if bool(bad.any()) else 0.0
