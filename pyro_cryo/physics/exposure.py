"""How electrons wear the specimen out."""

from __future__ import annotations

from torch import Tensor


def attenuation(frequency: Tensor, exposure: Tensor, voltage_kv: Tensor) -> Tensor:
    """Amplitude left after exposures (N,), electrons an A^2, at frequencies (P, 2) or (N, P, 2), cycles an A: (N, P).

        exp(-exposure / (2 Ne(s))),   Ne(s) = 0.245 s^-1.665 + 2.81 at 300 kV, four fifths of it at 200 kV and below

    Grant and Grigorieff, eLife 4 (2015) e06980, equations 3 and 8. Warp and RELION multiply the images of a
    tilt series by it.
    """
    critical = 0.245 * frequency.square().sum(-1).pow(-0.5 * 1.665) + 2.81
    per_volt = (1 - 0.2 * (voltage_kv < 250).float())[:, None]
    return (-0.5 * exposure[:, None] / (critical * per_volt)).exp()
