"""cryoDRGN: a continuous family of maps, decoded from z by a coordinate network. Poses are known."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_cryo.data.batch import Batch
from pyro_cryo.data.particles import Particles
from pyro_cryo.guides.encoder import FrameEncoder
from pyro_cryo.inference.reconstruct import Reconstruction, band_limit, reconstruct
from pyro_cryo.model import CryoModel, Density, form_image
from pyro_cryo.physics.fourier import HalfPlane
from pyro_cryo.physics.rotations import point_group
from pyro_cryo.physics.slices import slice_coordinates
from pyro_cryo.progress import Progress, quiet
from pyro_cryo.volumes.conjugate import shell_power
from pyro_cryo.volumes.grid import VoxelGrid
from pyro_cryo.volumes.mask import chosen_mask
from pyro_cryo.volumes.mlp import CoordinateMLP

MOTION_SNR = 2.0  # states share the images: a motion is seen less far than the consensus, whose limit is about 0.3


class CryoDRGN(CryoModel):
    """V(k | z) = V0(k) + net(k, z), z ~ Normal(0, I): a consensus map, solved for, and a network for what moves.

    box: D, pixels; zdim: dimension of z; width, layers: of the network and the encoder; kmax: band limit of what
    moves, cycles a box (default: as far as the consensus has a signal-to-noise ratio above MOTION_SNR); symmetry: point
    group of every map of the family; mask: "auto", "none" or the path of a map in 0 to 1, outside which nothing is.
    """

    volume: CoordinateMLP
    consensus: VoxelGrid
    mask: Tensor
    symmetry: Tensor

    def __init__(
        self,
        box: int,
        zdim: int = 8,
        width: int = 256,
        layers: int = 3,
        kmax: float | None = None,
        symmetry: str = "C1",
        mask: str = "auto",
        noise_groups: int = 1,
    ) -> None:
        super().__init__(box, noise_groups)
        if zdim < 1 or width < 1 or layers < 0:
            raise ValueError(f"zdim {zdim}, width {width}, layers {layers}; expected at least 1, 1 and 0")
        self.zdim, self.width, self.layers = zdim, width, layers
        self.consensus = VoxelGrid(box)
        self.volume = CoordinateMLP(box, zdim, width, layers, kmax=kmax)
        self.kmax, self.mask_choice = kmax, mask
        self.least_scale = (
            1.0  # of the images' coordinates: kmax is the model's, and a wider field of view has more below it
        )
        self.register_buffer("symmetry", point_group(symmetry), persistent=False)
        self.register_buffer("mask", torch.ones(box, box, box))

    def get_extra_state(self) -> dict[str, float]:
        """What the data set beside the buffers."""
        return {"least_scale": self.least_scale}

    def set_extra_state(self, state: dict[str, float]) -> None:
        self.least_scale = state["least_scale"]

    def latent(self) -> Tensor:
        return pyro.sample("z", dist.Normal(self.log_sigma.new_zeros(self.zdim), 1.0).to_event(1))

    def pose(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The pose, seen as often from each of its symmetric equivalents."""
        rotation, translation = super().pose(batch)
        element = torch.randint(len(self.symmetry), (len(batch),), device=self.symmetry.device)
        return rotation @ self.symmetry[element], translation

    def signal(self, density: Density, z: Tensor | None, rotation: Tensor, translation: Tensor, batch: Batch) -> Tensor:
        points = slice_coordinates(rotation, batch.half.k, batch.freq_scale)
        count = self.reached(self.reach)
        moving = density(points[..., :count, :], z)
        still = self.consensus(points)
        slices = torch.cat([still[..., :count, :] + moving, still[..., count:, :]], -2)
        return form_image(slices, translation, batch)

    @property
    def reach(self) -> float:
        """Cycles a box up to which anything moves."""
        return self.volume.kmax

    def reached(self, kmax: float) -> int:
        """How many coefficients of an image can lie within kmax cycles of the model's box."""
        return HalfPlane.of(self.box).count(kmax / self.least_scale)

    def expected(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images of V0 alone (B, P, 2) and the size of a slice's coefficients (P,): what the encoder compares with."""
        points = slice_coordinates(batch.rotation, batch.half.k, batch.freq_scale)
        image = form_image(self.consensus(points), batch.translation, batch)
        return image, self.volume.amplitude[batch.half.shell]

    def make_guide(self) -> nn.Module:
        return FrameEncoder(self, self.expected, width=self.width, layers=self.layers)

    def prepare(self, particles: Particles, seed: int = 0, progress: Progress = quiet) -> None:
        generator = torch.Generator().manual_seed(seed)
        start = reconstruct(
            particles,
            symmetry=self.symmetry,
            mask=chosen_mask(self.mask_choice, self.box),
            device=self.mask.device,
            generator=generator,
            progress=progress,
        )
        self.least_scale = float(particles.freq_scale.min())
        self.begin(start, particles, seed, progress)

    def begin(self, start: Reconstruction, particles: Particles, seed: int, progress: Progress) -> None:
        """Take a consensus, solved for, as where the descent begins."""
        if self.kmax is None:
            self.volume.kmax = band_limit(start.signal_to_noise, MOTION_SNR)
        self.consensus.set(start.volume)
        self.volume.amplitude.copy_((self.box * shell_power(start.volume, self.box // 2 + 1)).sqrt())
        self.log_sigma.data.copy_(start.sigma.log())
        # An arm that moves is faint in the consensus: only where next to nothing is expected is nothing shown.
        self.mask.copy_((50 * start.scale).clamp_max(1.0))

    def map(self, z: Tensor | None = None) -> Tensor:
        assert z is not None
        return self.mask * (self.consensus.map(z) + self.volume.map(z))
