"""What a run shows of itself: maps with their FSC, latent plots, learning curves."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_cryo.analysis import check_plots, plots
from pyro_cryo.analysis.free_energy import of_run
from pyro_cryo.analysis.fsc import masked_fsc
from pyro_cryo.analysis.latent import kmeans, pca
from pyro_cryo.analysis.series import VOLUMES, along_component, finishing, write_series
from pyro_cryo.data.mrc_map import read_map, write_map
from pyro_cryo.inference.reconstruct import Reconstruction
from pyro_cryo.inference.run import Run
from pyro_cryo.inference.state import write_atomically
from pyro_cryo.progress import Progress, quiet

CLUSTERS = "clusters.txt"  # a row a particle: its number and its cluster
MAPS = ("map", "sd", "half1", "half2", "mask")
MOST = 100  # maps in one picture


def write_reconstruction(folder: Path, found: Reconstruction, apix: float) -> None:
    """map, sd, half1, half2 and mask as .mrc, and the half-maps' FSC as fsc.tsv."""
    maps = (found.volume, found.sd, *found.halves, found.mask)
    for name, volume in zip(MAPS, maps, strict=True):
        write_map(folder / f"{name}.mrc", volume.cpu(), apix)
    curves = half_map_curves(found.halves[0].cpu(), found.halves[1].cpu(), found.mask.cpu())
    box = len(found.volume)
    lines = ["shell\tresolution_angstrom\t" + "\t".join(curves)]
    for shell in range(1, box // 2 + 1):
        values = "\t".join(f"{float(curve[shell]):.5f}" for curve in curves.values())
        lines.append(f"{shell}\t{box * apix / shell:.3f}\t{values}")
    write_atomically(folder / "fsc.tsv", lambda path: path.write_text("\n".join(lines) + "\n"))


def half_map_curves(half1: Tensor, half2: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """FSC of two half-maps: unmasked, masked, phase-randomised beyond where they agree, corrected for the mask."""
    curves = masked_fsc(half1, half2, mask)
    return {
        "unmasked": curves.unmasked,
        "masked": curves.masked,
        "phase-randomised": curves.randomised,
        "corrected": curves.corrected,
    }


def analyze(
    run: Run,
    out: Path,
    clusters: int = 10,
    steps: int = 10,
    components: int = 2,
    free_energy: bool = False,
    progress: Progress = quiet,
) -> list[Path]:
    """The pictures of a run, and maps at clusters and along components where it has z; the pictures' paths.

    free_energy: also that, along the longest way through the particles, which takes a pass over the images
    """
    for name, value, least in (("clusters", clusters, 1), ("steps", steps, 1), ("components", components, 0)):
        if not least <= value <= MOST:
            raise ValueError(f"{value} {name}; give {least} to {MOST}, each is a map and a picture")
    if free_energy:
        run.refuse_without_z()
    still = run.model.zdim == 0 or _still(run)
    if free_energy and still:
        warnings.warn("all particles have one z, and no free energy is drawn along it", UserWarning, stacklevel=2)
    profile = _free_energy(run, out, progress) if free_energy and not still else None
    pictures = _analyze_map(run, out) if still else _analyze_latent(run, out, clusters, steps, components, progress)
    if profile is not None:
        pictures.append(profile)
    if run.poses is not None:
        poses = plots.pose_distribution(run.poses.best[0], run.poses.spread)
        pictures.append(_save(poses, out / "poses.png"))
    return pictures


def _still(run: Run) -> bool:
    """Whether z is the same for all images, and the run has the one map that they then show."""
    return not np.ptp(run.latent.z, axis=0).any() and run.folder is not None and (run.folder / "map.mrc").exists()


def _analyze_map(run: Run, out: Path) -> list[Path]:
    """Sections of the map and its sd, and the FSC of the half-maps."""
    if run.folder is None or not (run.folder / "map.mrc").exists():
        raise ValueError(f"{run.folder} has no map.mrc yet; let the fit finish first (--resume)")
    out.mkdir(parents=True, exist_ok=True)
    apix = run.apix
    volume, sd, half1, half2, mask = (read_map(run.folder / f"{name}.mrc")[0] for name in MAPS)
    sections = plots.central_sections(volume, apix, sd, "posterior mean and standard deviation")
    curves = plots.fsc_curves(half_map_curves(half1, half2, mask), apix)
    return [_save(sections, out / "map.png"), _save(curves, out / "fsc.png")]


def _analyze_latent(run: Run, out: Path, clusters: int, steps: int, components: int, progress: Progress) -> list[Path]:
    apix, z = run.apix, run.latent.z
    plain = finishing(apix, None, None, False)
    out.mkdir(parents=True, exist_ok=True)
    pictures = []
    passes = [record for record in run.records if "loss" in record]
    if passes:
        pictures.append(_save(plots.learning_curve(passes), out / "learning_curve.png"))
    k = min(clusters, len(z))
    found = kmeans(z, k)
    pictures.append(_save(plots.latent_density(z, found), out / "latent.png"))
    write_series(run, out / f"kmeans{k}", found.nearest, z[found.nearest], plain, progress)
    labels = [f"cluster {i}" for i in range(k)]
    pictures.append(_picture(out / f"kmeans{k}", apix, labels, out / "kmeans.png", "maps at clusters"))
    parts = pca(z)
    for component in range(1, min(components, run.model.zdim) + 1):
        index, points = along_component(run, component, steps)
        write_series(run, out / f"pc{component}", index, points, plain, progress)
        title = f"along component {component}, {100 * parts.explained[component - 1]:.0f}% of the variance of z"
        labels = [f"{i + 1}" for i in range(steps)]
        pictures.append(_picture(out / f"pc{component}", apix, labels, out / f"pc{component}.png", title))
    np.savetxt(out / CLUSTERS, np.column_stack([run.latent.index, found.label]), fmt="%d", header="particle cluster")
    return pictures


def _free_energy(run: Run, out: Path, progress: Progress) -> Path:
    """A picture and a table of the profile along the longest way through the particles."""
    found = of_run(run, progress=progress)
    out.mkdir(parents=True, exist_ok=True)
    profile = found.free_energy
    columns = np.column_stack([profile.s, profile.median_kt, profile.low_kt, profile.high_kt])
    header = f"distance along z\tmedian_kt\tlow_kt\thigh_kt ({100 * profile.level:.0f}%)"
    header = f"{check_plots.barrier_told(profile)}\n{header}"
    np.savetxt(out / "free_energy.tsv", columns, "%.5g", "\t", header=header)
    figure = check_plots.free_energy_profile(profile, found.means, "distance in z along the longest way")
    return _save(figure, out / "free_energy.png")


def _picture(series: Path, apix: float, labels: list[str], path: Path, title: str) -> Path:
    """A picture of the maps that `write_series` wrote."""
    with np.load(series / VOLUMES) as file:
        maps = torch.from_numpy(file["volumes"])
    return _save(plots.map_series(maps, apix, labels, title), path)


def _save(figure: plots.Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path
