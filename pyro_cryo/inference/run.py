"""A fit and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from pyro_cryo.data.batch import Batch
from pyro_cryo.data.particles import Particles
from pyro_cryo.guides.defocus import Defocus
from pyro_cryo.guides.exact import ExactGuide
from pyro_cryo.guides.pose_mixture import PosedGuide, PoseMixture
from pyro_cryo.guides.pose_table import open_table, write_table
from pyro_cryo.guides.poses import PoseModes
from pyro_cryo.guides.semi_amortised import SemiAmortised
from pyro_cryo.inference.posterior import posterior
from pyro_cryo.inference.state import (
    build_model,
    load_checkpoint,
    read_log,
    read_record,
    write_arrays,
    write_atomically,
)
from pyro_cryo.model import CryoModel
from pyro_cryo.progress import Progress, quiet

LATENT, PARTICLES, POSES, DEFOCUS = "latent.npz", "particles.star", "poses.npy", "defocus.npz"


@dataclass(frozen=True)
class Latent:
    """Posterior moments of z: index (n,) number of the particle, z (n, zdim) means, z_cov (n, zdim, zdim).

    A row a particle, however many images it has: neighbours, clusters and densities count it once. Where each has one
    image its number is the row of that image; else `Particles.images_of` gives the rows.
    """

    index: np.ndarray
    z: np.ndarray
    z_cov: np.ndarray

    def write(self, path: Path) -> None:
        """An .npz of the three arrays."""
        write_arrays(path, index=self.index, z=self.z, z_cov=self.z_cov)


@dataclass
class Run:
    """A model fitted to particles.

    model, guide: the modules, on the device of the fit
    source:       the particles, or what opens them when they are first asked for
    folder:       where it is kept; None for a fit in memory
    poses:        posteriors of the poses, translations in pixels of the model's box; None where they are known. Those
                  of a run in a folder are mapped to its file
    defocus:      posteriors of what images' defocus differs by from the table's; None where it was not refined
    records:      one a pass: epoch, step, loss (minus the ELBO, nats an image), images_per_second, seconds
    """

    model: CryoModel
    source: Particles | Callable[[], Particles]
    folder: Path | None = None
    guide: nn.Module | None = None
    poses: PoseModes | None = None
    defocus: Defocus | None = None
    records: list[dict[str, Any]] = field(default_factory=list)

    @staticmethod
    def load(
        folder: str | Path,
        *,
        model: CryoModel | None = None,
        particles: Particles | None = None,
        device: torch.device | str = "cpu",
    ) -> Run:
        """The run in a folder, also while it is going on or after it was stopped.

        Its particles are opened when they are needed: maps at given z do without.

        model:     one built as the run's, for a class that run.json cannot find (one typed in a session, say)
        particles: the run's own, in place of opening them again
        """
        folder = Path(folder)
        record = read_record(folder)
        state = load_checkpoint(folder, device)
        if particles is not None and particles.fingerprint() != record["particles"]["fingerprint"]:
            raise ValueError(f"{folder} is a fit of other particles; give the ones it was fitted to")
        model = (build_model(record) if model is None else model).to(device)
        poses = read_poses(folder)
        try:
            model.load_state_dict(state["model"])
            guide = guide_of(model, poses).to(device)
            guide.load_state_dict(state["guide"])
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"the checkpoint of {folder} does not fit {type(model).__name__} as it is now ({reason}); "
                "build the model as it was fitted"
            ) from error
        source = particles if particles is not None else partial(open_again, record, folder)
        return Run(model, source, folder, guide, poses, read_defocus(folder), read_log(folder))

    @cached_property
    def _opened(self) -> Particles:
        """The particles as they came."""
        return self.source if isinstance(self.source, Particles) else self.source()

    @property
    def _focused(self) -> Particles:
        """As they came, but for a defocus that was refined."""
        return self._opened if self.defocus is None else self._opened.with_defocus(self.defocus.mean)

    @cached_property
    def particles(self) -> Particles:
        """What the model was fitted to; where poses were found, at the best of each image, its defocus at the mean."""
        return self._focused if self.poses is None else self._focused.with_poses(*self.poses.best)

    @cached_property
    def apix(self) -> float:
        """Angstrom a voxel of the maps."""
        if isinstance(self.source, Particles) or self.folder is None:
            return self.particles.apix
        return float(read_record(self.folder)["apix"])

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.log_sigma.device

    @cached_property
    def latent(self) -> Latent:
        """Posterior moments of z for every particle, from latent.npz or from the guide."""
        path = None if self.folder is None else self.folder / LATENT
        if path is not None and path.exists():
            with np.load(path) as file:
                return Latent(file["index"], file["z"], file["z_cov"])
        return self.encode(self.particles)

    def batches(self, particles: Particles, batch_size: int) -> Iterator[Batch]:
        """Batches of particles, on the run's device, as the model and its guide take them.

        Where poses were found the particles are some of the run's own, `index` is each image's row among all of these,
        and poses are those about which the prior is.

        Raises ValueError where box, pixel size or optics groups are not the run's, or poses of particles are not known.
        """
        self._check(particles)
        if self.poses is None:
            return particles.batches(batch_size, device=self.device)
        rows = particles.rows_in(self.particles)
        about = self._focused if self._opened.has_poses else self.particles
        row = rows.to(self.device)
        batches = about[rows].batches(batch_size, device=self.device)
        return (replace(batch, index=row[batch.index]) for batch in batches)

    def _check(self, particles: Particles) -> None:
        """Raise ValueError unless they are seen as the run's own are."""
        if particles.box != self.model.box:
            raise ValueError(f"particles of {particles.box} px, the run has {self.model.box}; open with that box")
        if abs(particles.apix - self.apix) > 1e-3 * self.apix:
            raise ValueError(
                f"particles of {particles.apix:.4g} A a pixel, the run has {self.apix:.4g}; crop them so "
                "that their field of view is the same"
            )
        if particles.n_noise_groups > len(self.model.log_sigma):
            raise ValueError(
                f"particles of {particles.n_noise_groups} optics groups, the run knows the noise of "
                f"{len(self.model.log_sigma)}; take them group by group"
            )

    def encode(self, particles: Particles, batch_size: int = 256, progress: Progress = quiet) -> Latent:
        """Posterior moments of z for any particles of the same box and pixel size."""
        self.refuse_without_z()
        means, covariances = [], []
        with torch.no_grad():
            batches = self.batches(particles, batch_size)
            for batch in progress(batches, particles.n_batches(batch_size), "encode"):
                mean, covariance = self.guide.posterior(batch)  # type: ignore[union-attr, operator]
                means.append(mean.cpu())
                covariances.append(covariance.cpu())
        z, z_cov = torch.cat(means).numpy(), torch.cat(covariances).numpy()
        return Latent(np.arange(particles.n_particles), z, z_cov)

    def refuse_without_z(self) -> None:
        """Raise ValueError where nothing but poses is latent."""
        if self.model.zdim == 0:
            raise ValueError(f"{type(self.model).__name__} has no latent coordinate z; fit a heterogeneous model")

    def semi_amortised(self) -> Run:
        """The same run with a Gaussian for each particle as q(z | images), which the encoder only begins.

        It has the mean and covariance of the posterior. Whatever asks its guide, `posterior`, `encode`, `log_evidence`
        or `sbc`, gets better answers, at some 130 + 10 zdim looks of the model at each image (26 zdim beyond
        8 dimensions). It is kept in memory: a folder has the latents of the run's own guide.

        Raises ValueError where there is no z, it cannot be anywhere, poses are not known or the guide is exact.
        """
        self.refuse_without_z()
        if isinstance(self.guide, ExactGuide):
            raise ValueError(
                f"q(z | images) of {type(self.model).__name__} is the exact posterior; nothing is better than this run"
            )
        assert self.guide is not None
        return replace(self, guide=SemiAmortised(self.model, self.guide), folder=None)

    def some(self, index: Sequence[int]) -> Particles:
        """The run's particles of these numbers, each with all its images. ValueError where one is not there."""
        numbers, count = torch.as_tensor(index, dtype=torch.long).flatten(), self.particles.n_particles
        outside = numbers[(numbers < 0) | (numbers >= count)]
        if len(outside) or not len(numbers):
            named = f"particle {int(outside[0])}" if len(outside) else "no particle"
            raise ValueError(f"{named} is asked for; the run has particles 0 to {count - 1}")
        if len(numbers.unique()) < len(numbers):
            raise ValueError(f"particle {int(numbers.mode().values)} is asked for more than once; name it once")
        return self.particles[self.particles.images_of(numbers)]

    def posterior(
        self,
        particles: Particles | None = None,
        draws: int = 500,
        *,
        index: Sequence[int] | None = None,
        **settings: Any,
    ) -> Any:
        """Draws of all that is latent about particles, as ArviZ takes them.

        `pyro_cryo.inference.posterior` says what is in it and what the settings are.

        particles: default: the run's own, or those with the numbers `index`, by which they are then named
        """
        if particles is not None and index is not None:
            raise ValueError("give particles or an index of the run's own, not both")
        if index is not None:
            index = torch.as_tensor(index).flatten().tolist()
            particles = self.some(index)
        return posterior(self, self.particles if particles is None else particles, draws, index=index, **settings)

    def volume(self, z: Tensor | ArrayLike | None = None) -> Tensor:
        """Maps at z (*batch, zdim): (*batch, D, D, D), z-y-x, on the scale of the images.

        Without z, the map of a homogeneous model. Draws of z in ArviZ's arrays are as good as tensors.
        """
        if (z is None) != (self.model.zdim == 0):
            has = "no z" if self.model.zdim == 0 else f"a z of dimension {self.model.zdim}"
            raise ValueError(f"{type(self.model).__name__} has {has}; call volume{'()' if z is not None else '(z)'}")
        with torch.no_grad():
            if z is None:
                return self.model.map().cpu()
            values = z if isinstance(z, Tensor) else torch.from_numpy(np.asarray(z))
            points = values.to(self.device, torch.float32)
            if points.ndim < 1 or points.shape[-1] != self.model.zdim:
                raise ValueError(f"z of shape {tuple(points.shape)}; expected (*batch, {self.model.zdim})")
            maps = [self.model.map(one).cpu() for one in points.reshape(-1, self.model.zdim)]
        return torch.stack(maps).view(*points.shape[:-1], *maps[0].shape)

    def finish(self, progress: Progress = quiet) -> None:
        """Write what a finished run leaves: latents, particles, the model's own results."""
        if self.folder is None:
            return
        if self.model.zdim:
            latent = self.encode(self.particles, progress=progress)
            self.__dict__["latent"] = latent
            latent.write(self.folder / LATENT)
        self.particles.write_star(self.folder / PARTICLES, extra=self._pose_columns())
        self.model.write_results(self.folder, self.particles)

    def _pose_columns(self) -> dict[str, np.ndarray]:
        """How unsure each image's pose and defocus are, in columns that RELION carries along."""
        if self.poses is None:
            return {}
        spread = self.poses.spread
        columns = {
            "pyroCryoAngleSdDeg": spread.angle_deg.numpy(),
            "pyroCryoShiftSdPx": spread.shift_px.numpy(),
            "pyroCryoPoseEntropy": spread.entropy.numpy(),
        }
        if self.defocus is not None:
            columns["pyroCryoDefocusSdAngst"] = self.defocus.sd.numpy()
        return columns


def guide_of(model: CryoModel, poses: PoseModes | None) -> nn.Module:
    """The guide of a model; where its poses have posteriors, one that draws them and then guesses the rest."""
    rest = model.make_guide()
    if model.zdim and not hasattr(rest, "posterior"):
        raise ValueError(
            f"the guide of {type(model).__name__} says nothing of z; let make_guide return one with "
            "posterior(batch), such as pyro_cryo.guides.encoder.ImageEncoder(self)"
        )
    if poses is None:
        return rest
    return PosedGuide(PoseMixture(poses.to(model.log_sigma.device), enumerated=False), rest)


def write_poses(folder: Path, poses: PoseModes) -> None:
    """poses.npy, a row an image: rotation (K, 3, 3), translation (K, 2), precision (K, 5, 5) and log_weight (K,)."""
    write_atomically(folder / POSES, lambda beside: write_table(beside, poses))


def read_poses(folder: Path) -> PoseModes | None:
    """What `write_poses` wrote, if it did: mapped, a row is read when it is asked for."""
    return open_table(folder / POSES) if (folder / POSES).exists() else None


def write_defocus(folder: Path, defocus: Defocus | None) -> None:
    """defocus.npz, where it was refined: mean (N,) and sd (N,) of what to add to the table's, angstrom."""
    if defocus is not None:
        write_arrays(folder / DEFOCUS, mean=defocus.mean.numpy(), sd=defocus.sd.numpy())


def read_defocus(folder: Path) -> Defocus | None:
    """What `write_defocus` wrote, if it did."""
    if not (folder / DEFOCUS).exists():
        return None
    with np.load(folder / DEFOCUS) as file:
        return Defocus(torch.from_numpy(file["mean"]), torch.from_numpy(file["sd"]))


def open_again(record: dict[str, Any], folder: Path) -> Particles:
    """The particles of a run's record, checked to be the same."""
    asked = dict(record["particles"])
    fingerprint = asked.pop("fingerprint")
    asked.pop("count")
    if "path" not in asked:
        raise ValueError(f"{folder}/run.json does not say where its particles are; give Run.load(..., particles=)")
    path = Path(asked.pop("path"))
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} is a fit of {path}, which is not there; put it back, or give Run.load(..., particles=)"
        )
    particles = Particles.open(path, **asked)
    if particles.fingerprint() != fingerprint:
        raise ValueError(f"{folder}: the particles have changed since the fit; give Run.load(..., particles=)")
    return particles
