"""A molecule that bends: Gaussian points of fixed mass, displaced by a smooth function of where they are and of z."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyro_cryo.physics.fourier import fourier_to_volume, half_radius, resize, volume_to_fourier
from pyro_cryo.physics.splat import project_points, transform_points

WIDTH = 0.5  # sd of a point over the points' spacing: the least at which evenly spread points show no lattice
SOLVER_STEPS = 30


class SmoothModes(nn.Module):
    """The leading functions of a smooth random field over a set of points: the field's bandwidth is the prior.

    A Gaussian process with the kernel exp(-d^2 / 2 length^2) is a sum of random cosines (Rahimi and Recht, NIPS 2007);
    its principal components over the points (Karhunen-Loeve), each as large as the process makes it, are `values`
    (N, M). So unit coefficients give fields of about unit size, whose neighbours within `length` move alike.
    """

    values: Tensor

    def __init__(self, points: int, count: int) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(points, count))

    def set(self, position: Tensor, length: float, features: int = 1024, seed: int = 0) -> None:
        """Those over points (N, 3); length in the unit of the points."""
        generator, features = torch.Generator().manual_seed(seed), max(features, 2 * self.values.shape[1])
        frequency = (torch.randn(3, features, generator=generator) / length).to(position)
        phase = (2 * math.pi * torch.rand(features, generator=generator)).to(position)
        waves = torch.cos(position @ frequency + phase) * math.sqrt(2 / features)
        _, axes = torch.linalg.eigh(waves.mT @ waves)
        self.values.copy_(waves @ axes[:, -self.values.shape[1] :].flip(-1))

    def forward(self, coefficient: Tensor) -> Tensor:
        """The field of coefficients (*batch, M, 3) at the points: (*batch, N, 3)."""
        return self.values @ coefficient


class MovingPoints(nn.Module):
    """V(k | z) = 1 / D sum_j w_j exp(-2 pi i k.(x_j + u(x_j, z)) / D) exp(-2 pi^2 s^2 |k|^2 / D^2) up to |k| = kmax.

    Points of mass w_j, a parameter, stand at x_j (N, 3), on a lattice inside the molecule; s is the width of each, in
    pixels. u(x, z) = unit_px sum_m modes_m(x) net(z)_m is a displacement in pixels, under one at first but not nothing:
    from rest z finds no hold. A motion conserves mass, and what one conformation shows of the molecule serves all
    others: 3DFlex (Punjani and Fleet, Nature Methods 2023) with points for a mesh and voxels.

    box: D; count: N; modes: M; width, layers: of the network; length: over which neighbours move alike, in boxes
    amplitude: (D / 2 + 1,) how large a slice's coefficients are by shell, for whoever weighs them
    """

    rest: Tensor
    sigma_px: Tensor
    mass: Tensor
    amplitude: Tensor

    def __init__(
        self,
        box: int,
        zdim: int,
        count: int,
        *,
        modes: int = 64,
        width: int = 64,
        layers: int = 2,
        length: float = 0.15,
        kmax: float | None = None,
    ) -> None:
        super().__init__()
        self.box, self.length = box, length
        self.unit_px = box / 8
        self.kmax = box / 2 if kmax is None else kmax
        self.register_buffer("rest", torch.zeros(count, 3))
        self.register_buffer("sigma_px", torch.ones(()))
        self.register_buffer("mass", torch.ones(()))
        self.register_buffer("amplitude", torch.ones(box // 2 + 1))
        self.weight = nn.Parameter(torch.zeros(count))
        self.modes = SmoothModes(count, modes)
        hidden: list[nn.Module] = []
        for inputs in [zdim, *[width] * layers]:
            hidden += [nn.Linear(inputs, width), nn.SiLU()]
        self.net = nn.Sequential(*hidden, nn.Linear(width, 3 * modes))

    def get_extra_state(self) -> dict[str, float]:
        """The band limit, kept with the parameters since the data may have set it."""
        return {"kmax": self.kmax}

    def set_extra_state(self, state: dict[str, float]) -> None:
        self.kmax = state["kmax"]

    def set(self, volume: Tensor, region: Tensor) -> None:
        """Stand for a map (D, D, D) inside a region (D, D, D) of values in 0 to 1, as well as the points can.

        The points fill the region evenly, which fixes their spacing d. They carry no more than D / 2 d cycles a box:
        kmax is lowered to that. Their masses are a least-squares fit up to kmax. Raises ValueError where the region is
        empty.
        """
        points, spacing = lattice_in(region, len(self.rest))
        self.kmax = min(self.kmax, self.box / (2 * spacing))
        self.rest.copy_(points)
        self.sigma_px.fill_(WIDTH * spacing)
        self.modes.set(self.rest, self.length * self.box)
        weight = self._masses_of(volume * region)
        self.mass.copy_(weight.square().mean().sqrt().clamp_min(1e-12))
        self.weight.data.copy_(weight / self.mass)

    def _masses_of(self, volume: Tensor) -> Tensor:
        """The masses (N,) whose map is nearest to a map up to kmax, solved for on a box no larger than that needs."""
        box = min(self.box, 2 * math.ceil(self.kmax + 1))
        shrunk = box / self.box
        kept = self._gaussian(lattice_radius(box, volume.device))
        target = fourier_to_volume(volume_to_fourier(resize(volume, box)) * (kept > 0))

        def map_of(masses: Tensor) -> Tensor:
            # Finer than elsewhere, for kmax is the edge of this box, where splats err most.
            return fourier_to_volume(transform_points(self.rest * shrunk, masses, box, oversample=4) * kept)

        # A coefficient of unit mass is 1 / D, and a map on fewer voxels keeps the projections of the whole.
        return least_squares(map_of, target, len(self.rest), SOLVER_STEPS) / shrunk**2

    def displacement(self, z: Tensor) -> Tensor:
        """u at the points, in pixels, for z (*batch, zdim): (*batch, N, 3)."""
        return self.unit_px * self.modes(self.net(z).unflatten(-1, (-1, 3)))

    def images(self, z: Tensor, rotation: Tensor, k: Tensor, scale: Tensor) -> Tensor:
        """Central slices for z (*batch, zdim) seen at rotation (*batch, 3, 3), at integer k (P, 2): (*batch, P, 2).

        scale (*batch,) multiplies k: (D apix) of the volume over (D apix) of the image. The same as the transform at
        `slice_coordinates(rotation, k, scale)`, at the cost of a small fast Fourier transform an image.
        """
        seen = (self.rest + self.displacement(z)) @ rotation[..., :2, :].mT
        value = project_points(seen * scale[..., None, None], self.mass * self.weight, k, self.box)
        return torch.view_as_real(value * self._gaussian(k.norm(dim=-1) * scale[..., None]))

    def forward(self, k: Tensor, z: Tensor) -> Tensor:
        """The transform at any points (*batch, P, 3) in cycles a box for z (*batch, zdim): (*batch, P, 2), summed."""
        phase = (-2 * math.pi / self.box) * (k @ (self.rest + self.displacement(z)).mT)
        value = torch.polar(self.mass / self.box * self.weight.expand_as(phase), phase).sum(-1)
        return torch.view_as_real(value * self._gaussian(k.norm(dim=-1)))

    def spectrum(self, z: Tensor) -> Tensor:
        """The maps at z (*batch, zdim) as `volume_to_fourier` has them: (*batch, D, D, D // 2 + 1)."""
        made = transform_points(self.rest + self.displacement(z), self.mass * self.weight, self.box)
        return made * self._gaussian(lattice_radius(self.box, z.device))

    def map(self, z: Tensor) -> Tensor:
        """The maps in real space at z (*batch, zdim): (*batch, D, D, D)."""
        return fourier_to_volume(self.spectrum(z))

    def _gaussian(self, radius: Tensor) -> Tensor:
        """What the width of a point leaves of its transform at |k|, nothing beyond kmax."""
        limit = min(self.kmax, self.box / 2 - 1e-3) + 1e-3
        return torch.exp(-2 * (math.pi / self.box * self.sigma_px * radius).square()) * (radius <= limit)


def lattice_radius(box: int, device: torch.device) -> Tensor:
    """|k| in cycles a box where `volume_to_fourier` has it: (D, D, D // 2 + 1)."""
    return torch.fft.fftshift(half_radius(box, device), dim=(0, 1))


def lattice_in(region: Tensor, count: int) -> tuple[Tensor, float]:
    """The `count` points (count, 3), in pixels, of a cubic lattice that fill a region (D, D, D), and their spacing.

    Raises ValueError where the region is empty.
    """
    box = len(region)
    inside = (region > 0.5 * region.max()).nonzero()
    if not len(inside):
        raise ValueError("the mask leaves nothing of the consensus to put points in; give a mask about the molecule")
    spacing = (len(inside) / count) ** (1 / 3)
    low, high = inside.amin(0) - box // 2 - 1, inside.amax(0) - box // 2 + 1
    ends = zip((low / spacing).ceil().tolist(), (high / spacing).floor().tolist(), strict=True)
    axes = [spacing * torch.arange(int(a), int(b) + 1, device=region.device) for a, b in ends]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    points = torch.stack([x, y, z], -1).reshape(-1, 3)
    seat = (2 * (points + box // 2) / (box - 1) - 1)[None, None, None]
    value = torch.nn.functional.grid_sample(region[None, None], seat, align_corners=True).flatten()
    return points[value.topk(count).indices], spacing


def least_squares(of: Callable[[Tensor], Tensor], target: Tensor, count: int, steps: int) -> Tensor:
    """The x (count,) for which a linear function of(x) is nearest to a target, by `steps` conjugate gradients from 0.

    The adjoint is the function's own derivative. Source: CGLS, Hestenes and Stiefel 1952.
    """
    x = target.new_zeros(count)
    with torch.enable_grad():
        variable = torch.zeros_like(x).requires_grad_()
        made = of(variable)

    def adjoint(value: Tensor) -> Tensor:
        return torch.autograd.grad(made, variable, value, retain_graph=True)[0]

    residual = target
    slope = direction = adjoint(residual)
    size = slope.square().sum()
    with torch.no_grad():
        for _ in range(steps):
            image = of(direction)
            length = size / image.square().sum().clamp_min(1e-30)
            x, residual = x + length * direction, residual - length * image
            slope, before = adjoint(residual), size
            size = slope.square().sum()
            direction = slope + size / before.clamp_min(1e-30) * direction
    return x
