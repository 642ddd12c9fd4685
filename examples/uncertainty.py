"""How sure is a fit? Draws for ArviZ, a credible family of maps, where two states differ, and a page of checks.

python examples/uncertainty.py [particles.star] [--out uncertainty] [--images 2000] [--box 32] [--draws 20]

Without particles: a swinging arm, simulated. Leaves posterior.nc, check.html and maps in the folder `out`.
"""

import argparse
import warnings
from pathlib import Path

from pyro_cryo import Particles, fit
from pyro_cryo.analysis.check import check, overall
from pyro_cryo.analysis.page import write_page
from pyro_cryo.analysis.voxels import write_uncertainty
from pyro_cryo.data.simulate import hinge, simulate
from pyro_cryo.inference.run import Run
from pyro_cryo.models.linear_subspace import LinearSubspace


def tell(run: Run, out: Path, draws: int) -> None:
    """Everything that a run says of how sure it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz as az
    first = run.latent.z[:, 0].argsort()
    ends = [int(first[len(first) // 20]), int(first[-1 - len(first) // 20])]  # particles near both ends of the motion
    idata = run.posterior(index=ends, draws=500)
    print(az.summary(idata, var_names=["z"], kind="stats"))
    idata.to_netcdf(out / "posterior.nc")
    paths = write_uncertainty(run, out / "maps", ends[0], ends[1], draws)
    print(f"{', '.join(path.name for path in paths)} are in {out / 'maps'}")
    answers = check(run, particles=100)
    for answer in answers:
        print(f"{answer.question} {answer.said}")
    write_page(out / "check.html", "Is this fit to be trusted?", answers)
    print(f"all in all: {overall(answers)}; see {out / 'check.html'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("star", nargs="?", help="particles with poses; default: simulated ones")
    parser.add_argument("--out", type=Path, default=Path("uncertainty"))
    parser.add_argument("--images", type=int, default=2000, help="of the simulated set")
    parser.add_argument("--box", type=int, default=32)
    parser.add_argument("--draws", type=int, default=20, help="of maps")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    star = args.star or simulate(hinge(51), args.out / "case", n_images=args.images, box=args.box, snr=0.2, seed=0)
    particles = Particles.open(star)
    tell(
        fit(LinearSubspace(particles.box, zdim=4, noise_groups=particles.n_noise_groups), particles),
        args.out,
        args.draws,
    )
