"""Real images: open every set of a folder, reconstruct the two that have poses enough, compare and draw.

    python examples/benchmarks/real_data.py DATA OUT

DATA holds aspire_17, empiar_10076_7, relion31_5, ribosome_subtomogram and tilt_series_10499. Prints what opens, the
half-maps' resolution and the correlation with the map that came with the tilt series (mirrored: its poses define
the other hand).
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch

from pyro_cryo.analysis.fsc import fsc, masked_fsc, resolution_angstrom
from pyro_cryo.analysis.report import analyze
from pyro_cryo.data.mrc_map import read_map
from pyro_cryo.data.particles import Particles
from pyro_cryo.inference.fit import fit
from pyro_cryo.models.homogeneous import Homogeneous
from pyro_cryo.physics.fourier import flip_hand


def main() -> None:
    """Open, reconstruct, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    data = asked.data
    tilts = next((data / "tilt_series_10499").glob("*optimisation_set.star"))
    subtomograms = data / "ribosome_subtomogram"
    sets = {
        "aspire_17": Particles.open(
            data / "aspire_17/sample_relion_data.star", datadir=data / "aspire_17/sample_17x200.mrcs"
        ),
        "empiar_10076_7": Particles.open(data / "empiar_10076_7/empiar_10076_7.star"),
        "relion31_5": Particles.open(data / "relion31_5/relion31.star"),
        "ribosome_subtomogram": Particles.open(
            subtomograms / "sta_testing_bin8.star", ctf=subtomograms / "sta_ctf.pkl"
        ),
        "tilt_series_10499": Particles.open(tilts),
    }
    for name, particles in sets.items():
        print(f"{name}: {len(particles)} images of {particles.box} px at {particles.apix:.2f} A")
    for name in ("ribosome_subtomogram", "tilt_series_10499"):
        particles = sets[name]
        run = fit(Homogeneous(particles.box, noise_groups=particles.n_noise_groups), particles, asked.out / name)
        analyze(run, asked.out / name / "analysis")
        half1, half2, mask = (read_map(asked.out / name / f"{part}.mrc")[0] for part in ("half1", "half2", "mask"))
        curve = masked_fsc(half1, half2, mask).corrected
        for level in (0.5, 0.143):
            print(f"{name}: {resolution_angstrom(curve, particles.apix, level):.1f} A at a corrected FSC of {level}")
    supplied, _ = read_map(next((data / "tilt_series_10499").glob("*reconstruct.mrc")))
    mine = read_map(asked.out / "tilt_series_10499" / "map.mrc")[0]
    for name, volume in (("as it is", mine), ("mirrored", flip_hand(mine))):
        inside = mask if name == "as it is" else flip_hand(mask)
        pair = torch.stack([(volume * inside).flatten(), (supplied * inside).flatten()])
        agree = fsc(volume * inside, supplied * inside)[1 : particles.box // 2]
        print(f"supplied map, {name}: correlation {torch.corrcoef(pair)[0, 1]:.3f}, mean FSC {agree.mean():.3f}")


if __name__ == "__main__":
    main()
