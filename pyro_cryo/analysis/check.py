"""Is this posterior to be trusted? Every question that a run can answer of itself, with a verdict and a picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from pyro_cryo.analysis import check_plots, plots
from pyro_cryo.analysis.amortisation import amortisation
from pyro_cryo.analysis.association import FEWEST as FEWEST_POSES
from pyro_cryo.analysis.association import pose_association
from pyro_cryo.analysis.calibration import Calibration, sbc
from pyro_cryo.analysis.half_sets import half_sets
from pyro_cryo.analysis.predictive import ImageFit, ResidualPower, residuals
from pyro_cryo.analysis.voxels import half_map_scatter
from pyro_cryo.data.particles import Particles
from pyro_cryo.guides.exact import ExactGuide
from pyro_cryo.guides.pose_mixture import PosedGuide
from pyro_cryo.guides.semi_amortised import anywhere
from pyro_cryo.inference.draws import drawn
from pyro_cryo.inference.importance import GOOD
from pyro_cryo.inference.pose_climb import about_its_poses, climbing, pose_likelihood
from pyro_cryo.inference.run import Run
from pyro_cryo.inference.state import read_record
from pyro_cryo.progress import Progress, quiet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SOUND, LOOK, BAD, UNASKED = "sound", "look at it", "not to be trusted", "not asked"
FEWEST = 25  # particles of which anything can be said
WEIGHED = 100  # draws of a particle that tell k
RANKED = 39  # draws of a simulated particle among which its truth is ranked
STILL_FALLS = 0.02  # of a loss's fall over the second half of its passes, in the last: the fit is not done
TOLERATED = 0.05  # of the noise's power, that a residual may be off whatever the count of images
COLLAPSED = 0.05  # share of the variance of z between particles, below which z tells next to nothing
JUNK = 0.01  # share of images that may fit badly
SURE = 1e-3  # p at which what is seen is not put down to chance, as it is of 1 in 20 sound runs at 0.05
SCATTERED = 0.15  # of the power by which half-maps differ, that it may be off
PAIRS = 15  # of half-maps of other noise
LOST = 0.5  # nats a particle that an encoder may lose of the evidence
OWN = 50  # particles that are given Gaussians of their own


@dataclass(frozen=True)
class Answer:
    """One question, answered.

    question: as a user would ask it
    verdict:  sound, look at it or not to be trusted
    said:     what was found, in numbers
    reading:  how to read the picture, and what to do where the verdict is not sound
    figure:   the picture, where there is one
    """

    question: str
    verdict: str
    said: str
    reading: str
    figure: Figure | None = None


def check(
    run: Run, particles: int = 300, seed: int = 0, halves: bool = False, progress: Progress = quiet
) -> list[Answer]:
    """What can be asked of a run, answered from its own particles.

    particles: at most so many are weighed, and as many simulated; images and poses are looked at ten times as many
    halves:    also fit two halves of the particles anew, and see whether the motion comes back: as long as the fit
    """
    some, many = (spread(run.particles, count) for count in (particles, 10 * particles))
    has_z = run.model.zdim > 0
    questions = [lambda: _converged(run), lambda: _left(run, many, seed)]
    if has_z or run.poses is not None:
        questions.append(lambda: _weights(run, some, seed))
    if has_z:
        questions += [lambda: _known(run), lambda: _amortised(run, seed)]
    if has_z or run.poses is not None:
        questions.append(lambda: _calibrated(run, some, seed))
    if has_z:
        questions.append(lambda: _associated(run, many, seed))
        questions.append(lambda: _reproduced(run, seed, halves))
    elif hasattr(run.model, "consensus_prior"):
        questions.append(lambda: _scattered(run, seed))
    answers = [answer for ask in progress(iter(questions), len(questions), "check") for answer in ask()]
    if not has_z:
        answers.append(_unasked("Does anything move?", "The fit is of one map: fit manifold, and hold both (compare)."))
    return answers


def _unasked(question: str, why: str) -> Answer:
    return Answer(question, UNASKED, why, "This says nothing for or against the fit.")


def overall(answers: list[Answer]) -> str:
    """The worst of the verdicts, of what was asked."""
    return max((answer.verdict for answer in answers), key=(UNASKED, SOUND, LOOK, BAD).index)


def spread(particles: Particles, count: int) -> Particles:
    """At most so many particles, evenly from all of them, each with all its images."""
    total = particles.n_particles
    return particles[particles.images_of(torch.linspace(0, total - 1, min(count, total)).round().long())]


def _converged(run: Run) -> Iterator[Answer]:
    loss = [float(record["loss"]) for record in run.records if record.get("loss") is not None]
    if not loss:  # solved for
        return
    question = "Has the fit converged?"
    if len(loss) < 4:
        yield Answer(question, LOOK, f"{len(loss)} passes are too few to tell.", "Give more epochs.")
        return
    last, before = loss[-2] - loss[-1], loss[len(loss) // 2] - loss[-1]
    falls = last > 0.01 and last > max(STILL_FALLS, 2 / len(loss)) * before
    did = f"lowered the loss by {last:.3f}" if last >= 0 else f"raised the loss by {-last:.3f}"
    yield Answer(
        question,
        LOOK if falls or last < -0.01 * abs(before) - 0.1 else SOUND,
        f"The last pass {did} nats an image; since half of the passes it fell by {before:.3f}.",
        "The loss should be level at its end. Where it still falls, give more epochs; where it rises, a smaller rate.",
        plots.learning_curve(run.records),
    )


def _left(run: Run, particles: Particles, seed: int) -> Iterator[Answer]:
    """What the model leaves of the images: the noise, and images that it does not explain."""
    power, fit = residuals(run, particles, seed)
    yield _noise(run, power, len(particles))
    junk = fit.junk()
    if run.poses is None:  # numbers among those that were looked at, as yet
        junk = particles.rows_in(run.particles).numpy()[junk]
    yield _images(fit, junk)


def _noise(run: Run, found: ResidualPower, count: int) -> Answer:
    low, high = found.band()
    off = (found.power - 1).abs()
    beyond = (found.power < low) | (found.power > high)
    worst = float(off.nan_to_num(0).max())
    bad = bool((beyond & (off > TOLERATED)).any())
    return Answer(
        "Is what the model leaves of the images noise, as strong as it says?",
        LOOK if bad else SOUND,
        f"Of {count:,} images the residual's power is at most {100 * worst:.1f}% off the noise's in a shell.",
        "The power of the residual over that of the noise is 1 where the model is right. Above 1 in some shells, maps "
        "or poses lack something there; below, the noise is taken for too strong, and posteriors are too wide.",
        check_plots.residual_spectrum(found, run.apix),
    )


def _images(found: ImageFit, junk: np.ndarray) -> Answer:
    share = len(junk) / len(found.index)
    named = f", the first of them {', '.join(map(str, junk[:10]))}" if len(junk) else ""
    return Answer(
        "Are there images that the model cannot explain?",
        LOOK if share > JUNK else SOUND,
        f"{len(junk):,} of {len(found.index):,} images fit worse than the model's own would{named}.",
        "Both histograms should follow the curve. Images far to the right of the first have more noise than others; "
        "those far to the left of the second show no particle, or another. Leave them out (--subset), or fit "
        "robust_noise.",
        check_plots.image_misfit(found),
    )


def _weights(run: Run, particles: Particles, seed: int) -> Iterator[Answer]:
    parts = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for batch in run.batches(particles, 64):
            parts.append(drawn(run, batch, WEIGHED, WEIGHED).smoothed[1])
    k = torch.cat(parts).numpy()
    exact, bad = float(np.isneginf(k).mean()), float((k >= GOOD).mean())
    said = f"k is {GOOD} or more for {100 * bad:.0f}% of {len(k)} particles."
    if exact == 1:
        said = f"Draws of all of {len(k)} particles weigh the same: the guide is the posterior."
    yield Answer(
        "Are the draws of z and pose from the posterior?",
        SOUND if bad < 0.05 else LOOK if bad < 0.5 else BAD,
        said,
        "k is the tail of the weights p / q. Below 0.5 draws can be taken as they are, below 0.7 with their weights "
        "(posterior --corrected); above, the guide misses a part of that particle's posterior, and its uncertainty is "
        "not to be trusted: of a network try --semi-amortised.",
        None if exact == 1 else check_plots.pareto_k(k),
    )


def _known(run: Run) -> Iterator[Answer]:
    latent = run.latent
    within = float(np.trace(latent.z_cov, axis1=1, axis2=2).mean())
    between = float(latent.z.var(0).sum())
    share = between / (between + within)
    yield Answer(
        "How much do the images tell of z?",
        SOUND if share > 0.5 else LOOK if share > COLLAPSED else BAD,
        f"Between particles lie {100 * share:.0f}% of the variance of z; the rest is what one does not know of each.",
        "A dot is a particle's posterior mean, an ellipse holds 90% of its posterior. Where ellipses are as large as "
        "the cloud, single particles say little, and clusters of means are no states.",
        check_plots.latent_uncertainty(latent.z, latent.z_cov) if latent.z.shape[1] > 1 else None,
    )


def _amortised(run: Run, seed: int) -> Iterator[Answer]:
    """What an encoder loses; of guides that solve, and of z whose posterior is no Gaussian of its own, nothing."""
    if isinstance(run.guide, ExactGuide | PosedGuide) or not anywhere(run.model):
        return
    found = amortisation(run, spread(run.particles, OWN), seed=seed)
    gap = float(found.gap.mean())
    yield Answer(
        "What does the encoder lose by being one function for all images?",
        SOUND if gap < LOST else LOOK,
        f"{gap:.2f} nats a particle of {len(found.gap)} to a Gaussian of each particle's own, whose bound is "
        f"{float(found.left.mean()):.2f} below the evidence.",
        "The network saw what the encoder says of z, and posteriors are its: where it loses much, they are too narrow "
        "or beside the truth. Draws of --semi-amortised have the particles' own; more epochs or a wider encoder close "
        "the gap.",
    )


def _calibrated(run: Run, particles: Particles, seed: int) -> Iterator[Answer]:
    """Of z, and where poses were found of these: simulated about the best, and climbed to."""
    if run.poses is None:
        found = sbc(run, particles, RANKED, seed)
    else:
        with about_its_poses(run) as near:
            guide = partial(climbing, near, pose_likelihood(run))
            found = sbc(near, particles, RANKED, seed, guide=guide)
    poses = ("rotation", "translation")
    pose: dict[str, Calibration] = {name: found.pop(name) for name in poses if name in found}
    if "z" in found:
        z = found["z"]
        yield _width(
            "Are posteriors of z as wide as they should be?",
            z,
            found,
            f"posteriors are {float(z.sharpness.mean()):.2f} as wide as the population.",
            "what looks like two states may be one. A posterior as wide as the population knows nothing.",
        )
    if pose:
        turn = pose["rotation"]
        shift = pose["translation"].coverage(0.9)
        yield _width(
            "Are posteriors of poses as wide as they should be?",
            turn,
            pose,
            f"of shifts {100 * float(shift.interval.mean()):.0f}%, in the peaks in which they were found.",
            "draws of --corrected have the posterior's own width.",
        )


def _scattered(run: Run, seed: int) -> Iterator[Answer]:
    """Of the one map of a model that is solved for."""
    question = "Do half-maps differ as noise of the images says?"
    found = half_map_scatter(run, PAIRS, seed)
    ratio, chance = found.ratio[1:-1], (3 * found.sd[1:-1]).clamp_min(SCATTERED)
    if not bool(ratio.isfinite().all()):
        yield _unasked(question, "There are too few particles for two halves.")
        return
    off = (ratio - 1).abs() / chance
    worst = int(off.argmax())
    yield Answer(
        question,
        LOOK if float(off[worst]) > 1 else SOUND,
        f"The power of their difference is {100 * float(ratio.mean()):.0f}% of what noise makes of it, "
        f"{100 * float(ratio[worst]):.0f}% in the shell that is farthest off, where chance is "
        f"{100 * float(chance[worst]):.0f}%.",
        "The sd of a voxel is right where this is 1. Above, noise is not as the model has it, independent and as "
        "strong in all images of an optics group; below, the halves share something: images that are there twice, say.",
        check_plots.half_map_scatter(found, run.apix),
    )


def _width(question: str, asked: Calibration, shown: dict[str, Calibration], more: str, narrow: str) -> Answer:
    """What the ranks of simulated truths say; `more` and what it means where posteriors are too narrow."""
    coverage = asked.coverage(0.9)
    interval, region, error = float(coverage.interval.mean()), float(coverage.region), coverage.error
    off = max(interval - 0.9, region - 0.9, key=abs)
    return Answer(
        question,
        SOUND if abs(off) < max(0.05, 2 * error) else LOOK if off > -max(0.1, 3 * error) else BAD,
        f"Of {len(asked.ranks)} particles that the fitted model made itself {100 * interval:.0f}% of coordinates lie "
        f"in their 90% intervals and {100 * region:.0f}% (+- {100 * error:.0f}) in their 90% regions; {more}",
        f"Lines should stay in the band. Above it at the left and below it at the right, posteriors are too narrow: "
        f"{narrow}",
        check_plots.rank_deviation(shown),
    )


def _associated(run: Run, particles: Particles, seed: int) -> Iterator[Answer]:
    if particles.n_particles < FEWEST_POSES:
        return
    z = run.latent.z
    if not np.ptp(z, axis=0).any():
        return
    found = pose_association(run, particles, seed)
    small = found.share < 0.02 and found.largest < 0.05
    yield Answer(
        "Does z know the pose? It should not.",
        SOUND if found.p_value > 0.05 else BAD if found.p_value <= SURE and not small else LOOK,
        f"p = {found.p_value:.3f} for {found.particles:,} particles; the pose explains {100 * found.share:.1f}% of the "
        "variance of z" + ("." if found.p_value > 0.05 else f", most by the {found.part}."),
        "A draw of z from each particle's posterior is independent of its pose where the motion is real. Where it is "
        "not, z explains errors of the poses or of the mask: refine the poses, widen the mask, and see whether the "
        "motion stays.",
    )


def _reproduced(run: Run, seed: int, halves: bool) -> Iterator[Answer]:
    question = "Does the motion come back in the other half of the particles?"
    if not halves or run.poses is not None:
        why = "Ask for it with --halves." if run.poses is None else "Poses were found with all particles together."
        yield _unasked(question, why)
        return
    settings = {} if run.folder is None else read_record(run.folder)["settings"]
    how = {name: settings[name] for name in ("epochs", "batch_size", "learning_rate", "precision") if name in settings}
    build = partial(type(run.model), **run.model.arguments)
    found = half_sets(build, run.particles, seed, device=str(run.device), **how)
    r2, finest = min(found.r2), found.resolution_angstrom
    yield Answer(
        question,
        SOUND if r2 > 0.5 and np.isfinite(finest) else BAD,
        f"z of one half tells {100 * r2:.0f}% of the other's; "
        + (
            f"both show the same motion to {finest:.1f} A." if np.isfinite(finest) else "no motion is the same in both."
        ),
        "The FSC of the motion alone, between maps of both halves at the same shapes, less each half's mean. The "
        "dotted line is what shapes matched at random would give.",
        check_plots.motion_fsc(found),
    )
