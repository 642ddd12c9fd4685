"""What a run shows of itself: maps with their FSC, latent plots, learning curves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pyro_cryo.analysis import plots
from pyro_cryo.analysis.fsc import masked_fsc, resolution_angstrom
from pyro_cryo.analysis.latent import kmeans, pca
from pyro_cryo.analysis.series import along_component, at_clusters, finishing, write_series
from pyro_cryo.data.mrc_map import write_map
from pyro_cryo.inference.reconstruct import Reconstruction
from pyro_cryo.inference.run import Run
from pyro_cryo.inference.state import write_atomically


def write_reconstruction(folder: Path, found: Reconstruction, apix: float) -> None:
    """map, sd, half1, half2 and mask as .mrc; the half-maps' FSC as fsc.tsv, its picture and the map's."""
    maps = {"map": found.volume, "sd": found.sd, "half1": found.halves[0], "half2": found.halves[1], "mask": found.mask}
    for name, volume in maps.items():
        write_map(folder / f"{name}.mrc", volume.cpu(), apix)
    curves = masked_fsc(found.halves[0].cpu(), found.halves[1].cpu(), found.mask.cpu())
    named = {
        "unmasked": curves.unmasked,
        "masked": curves.masked,
        "phase-randomised": curves.randomised,
        "corrected": curves.corrected,
    }
    box = len(found.volume)
    lines = ["shell\tresolution_angstrom\t" + "\t".join(named)]
    for shell in range(1, box // 2 + 1):
        values = "\t".join(f"{float(curve[shell]):.5f}" for curve in named.values())
        lines.append(f"{shell}\t{box * apix / shell:.3f}\t{values}")
    write_atomically(folder / "fsc.tsv", lambda path: path.write_text("\n".join(lines) + "\n"))
    plots.fsc_curves(named, apix).savefig(folder / "fsc.png", dpi=150)
    figure = plots.central_sections(found.volume.cpu(), apix, found.sd.cpu(), "posterior mean and standard deviation")
    figure.savefig(folder / "map.png", dpi=150)


def half_map_resolution(found: Reconstruction, apix: float) -> float:
    """Resolution in angstrom where the corrected FSC of the half-maps falls below 0.143."""
    curves = masked_fsc(found.halves[0].cpu(), found.halves[1].cpu(), found.mask.cpu())
    return resolution_angstrom(curves.corrected, apix)


def analyze(run: Run, out: Path, clusters: int = 10, steps: int = 10, components: int = 2) -> list[Path]:
    """Latent plots, maps at cluster centres and along principal components, learning curve; the pictures written."""
    if run.model.zdim == 0:
        raise ValueError(
            f"{type(run.model).__name__} has no latent coordinate to analyse; its map, sd and FSC are in the run"
        )
    out.mkdir(parents=True, exist_ok=True)
    apix, z = run.particles.apix, run.latent.z
    plain = finishing(apix, None, None, False)
    pictures = []
    if run.records:
        pictures.append(_save(plots.learning_curve(run.records), out / "learning_curve.png"))
    k = min(clusters, len(z))
    found = kmeans(z, k)
    pictures.append(_save(plots.latent_density(z, found), out / "latent.png"))
    index, points = at_clusters(run, k)
    write_series(run, out / f"kmeans{k}", index, points, plain)
    pictures.append(_picture(run, points, [f"cluster {i}" for i in range(k)], out / "kmeans.png", "maps at clusters"))
    parts = pca(z)
    for component in range(1, min(components, run.model.zdim) + 1):
        index, points = along_component(run, component, steps)
        write_series(run, out / f"pc{component}", index, points, plain)
        title = f"along component {component}, {100 * parts.explained[component - 1]:.0f}% of the variance of z"
        pictures.append(_picture(run, points, [f"{i + 1}" for i in range(steps)], out / f"pc{component}.png", title))
    np.savetxt(out / "clusters.txt", np.column_stack([run.latent.index, found.label]), fmt="%d", header="image cluster")
    return pictures


def _picture(run: Run, z: np.ndarray, labels: list[str], path: Path, title: str) -> Path:
    maps = torch.stack([run.volume(point) for point in z])
    return _save(plots.map_series(maps, run.particles.apix, labels, title), path)


def _save(figure: plots.Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path
