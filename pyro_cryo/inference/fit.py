"""Fit a model to particles: solve for what is conjugate, descend the ELBO for the rest, leave a run behind."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_cryo.data.batch import Batch
from pyro_cryo.data.particles import Particles
from pyro_cryo.inference.elbo import ReparameterisedELBO
from pyro_cryo.inference.posing import find_poses, learn_spread
from pyro_cryo.inference.run import Run, guide_of, read_defocus, read_poses, write_defocus, write_poses
from pyro_cryo.inference.state import (
    CHECKPOINT,
    RECORD,
    append_log,
    json_arguments,
    load_checkpoint,
    model_reference,
    pose_reference,
    read_record,
    save_checkpoint,
    write_log,
    write_record,
)
from pyro_cryo.model import CryoModel
from pyro_cryo.pose import KnownPose
from pyro_cryo.progress import Progress, quiet

CHECK_EVERY = 25  # steps between looks at the loss: each look waits for the device


@dataclass(frozen=True)
class Settings:
    """How a fit goes about it.

    epochs:         passes over the data; default: the model's own (0 where everything is solved for)
    batch_size:     images a step
    learning_rate:  of Adam, falling to 0 along a cosine
    noise_rate:     learning rate of the noise's log standard deviations
    warmup:         passes in which the weight of the prior of z rises from 0 to beta
    beta:           weight of the prior of z: 1 is the ELBO, more is the VAE's trade-off
    clip:           largest norm of a gradient
    seed:           of the images' order, of draws and of the guide's starting values; a model's own starting values
                    are drawn when it is built, so seed PyTorch before that
    device:         "cpu", "cuda", "cuda:1" ...
    precision:      "float32", or "bf16" in the networks
    compile:        whether the networks are compiled
    save_every_s:   seconds between checkpoints within a pass; one is written after every pass anyway
    """

    epochs: int | None = None
    batch_size: int = 16
    learning_rate: float = 1e-3
    noise_rate: float = 3e-3
    warmup: float = 1.0
    beta: float = 1.0
    clip: float = 100.0
    seed: int = 0
    device: str = "cpu"
    precision: str = "float32"
    compile: bool = False
    save_every_s: float = 300.0

    def __post_init__(self) -> None:
        for name in ("batch_size", "learning_rate", "noise_rate", "beta", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a positive number")
        for name in ("epochs", "warmup", "save_every_s"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; expected 0 to 4294967295")
        if self.precision not in ("float32", "bf16"):
            raise ValueError(f"precision {self.precision!r} is not known; expected float32 or bf16")
        check_device(self.device)


def fit(
    model: CryoModel,
    particles: Particles,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    progress: Progress = quiet,
    **settings: Any,
) -> Run:
    """Fit `model` to `particles`; keyword arguments are those of `Settings`.

    out:    folder of the run, new or empty; None keeps everything in memory
    resume: go on where the run in `out` stopped; with nothing there, start

    Raises ValueError where the folder holds something else, the data or the model are not the run's own, or the loss is
    no longer finite (the last good checkpoint stays).
    """
    chosen = Settings(**settings)
    folder = None if out is None else Path(out)
    if model.epochs == 0 and chosen.epochs:
        raise ValueError(
            f"epochs is {chosen.epochs}, but {type(model).__name__} is solved, not descended; leave it out"
        )
    if resume and folder is not None and chosen.epochs is None and (folder / RECORD).exists():
        chosen = replace(chosen, epochs=read_record(folder)["settings"]["epochs"])
    if particles.box != model.box:
        raise ValueError(f"a model of box {model.box} for particles of {particles.box} px; build it with particles.box")
    if particles.n_noise_groups > len(model.log_sigma):
        raise ValueError(
            f"a model of {len(model.log_sigma)} noise groups for particles of {particles.n_noise_groups}; build it "
            "with noise_groups=particles.n_noise_groups"
        )
    run = Run(model.to(chosen.device), particles, folder)
    loop = _Loop(run, chosen, progress)
    with pyro.validation_enabled(False):  # it reads numbers back from the device at every step
        if folder is None:
            loop.start(None)
        elif resume and (folder / RECORD).exists():
            loop.start(_saved(folder, run, chosen))
        else:
            _start_in(folder, loop, chosen)
        loop.go()
    return run


def _start_in(folder: Path, loop: _Loop, settings: Settings) -> None:
    """Begin a run in a new folder; where that fails nothing is fitted yet, and nothing is left behind."""
    made = _make_folder(folder)
    try:
        write_record(folder, loop.model, loop.particles, asdict(settings))
        loop.start(None)
    except Exception:
        (folder / RECORD).unlink(missing_ok=True)
        with suppress(OSError):
            for path in made:
                path.rmdir()
        raise


def check_device(device: str) -> None:
    """Raise ValueError unless PyTorch has it."""
    try:
        asked = torch.device(device)
    except RuntimeError:
        asked = None
    if asked is None or asked.type not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r} is not known; expected cpu, cuda or cuda:1")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked.type == "cuda" and (asked.index or 0) >= count:
        seen = f"{count} GPUs" if count else "no GPU"
        raise ValueError(f"device {device} is not there, PyTorch sees {seen}; use device cpu")


def _make_folder(folder: Path) -> list[Path]:
    """Make the run's folder, or see that it is empty; the folders made, the innermost first."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; give another -o, or --resume to go on with a run")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return made


def _saved(folder: Path, run: Run, settings: Settings) -> dict[str, Any] | None:
    """The checkpoint of the run in a folder, if it has one; ValueError unless the run is of this model and data."""
    record = read_record(folder)
    if record["particles"]["fingerprint"] != run.particles.fingerprint():
        raise ValueError(f"{folder} is a fit of other particles; resume with the input of its run.json")
    reference, then_reference = model_reference(run.model), record["model"]
    poses = pose_reference(run.model)
    now = {"model": reference["class"], "poses": _said(poses), **json_arguments(run.model), **asdict(settings)}
    then_poses = _said(record.get("poses", poses))
    then = {"model": then_reference["class"], "poses": then_poses, **record["arguments"], **record["settings"]}
    for name in ("device", "compile", "save_every_s"):  # where and how, not what
        now.pop(name)
    changed = [name for name, value in now.items() if then.get(name) != value]
    if changed:
        name = changed[0]
        raise ValueError(f"{folder} was fitted with {name} {then.get(name)}, not {now[name]}; resume as it was")
    if reference.get("sha256") != then_reference.get("sha256"):
        raise ValueError(f"{reference.get('file')} has changed since the fit; resume with the model as it was")
    return load_checkpoint(folder, settings.device) if (folder / CHECKPOINT).exists() else None


def _said(poses: dict[str, Any]) -> str:
    """A prior of poses as it is typed."""
    return f"{poses['class']}({', '.join(f'{name}={value:g}' for name, value in poses['arguments'].items())})"


class _Loop:
    """The state of a descent: where it is, its optimiser, its log."""

    def __init__(self, run: Run, settings: Settings, progress: Progress) -> None:
        self.run, self.settings, self.progress = run, settings, progress
        self.model, self.particles = run.model, run.particles
        self.epochs = self.model.epochs if settings.epochs is None else settings.epochs
        self.batches = self.particles.n_batches(settings.batch_size)
        self.step = 0
        self.elapsed = 0.0
        self.losses: list[Tensor] = []  # of the present pass
        self.finished = False

    def start(self, saved: dict[str, Any] | None) -> None:
        """To where the descent begins, or to where a checkpoint was taken."""
        settings = self.settings
        torch.manual_seed(settings.seed)
        began = time.monotonic()
        if not isinstance(self.model.poses, KnownPose):
            self._find_poses()
            torch.manual_seed(settings.seed)  # as if the poses had been there
        if saved is None:
            self.model.prepare(self.particles, settings.seed, self.progress)
            self.elapsed = time.monotonic() - began if not self.epochs else 0.0
        self.run.guide = guide_of(self.model, self.run.poses).to(settings.device)
        self.elbo = ReparameterisedELBO()(self.model, self.run.guide)
        if self.epochs:
            self.optimiser, self.schedule = self._optimiser()
        if saved is not None:
            self._restore(saved)
        elif self.epochs:
            self._save()

    def _find_poses(self) -> None:
        """The posteriors of the poses, those of an earlier start where they were kept; at the best it is fitted."""
        run, folder = self.run, self.run.folder
        if folder is not None:
            run.poses, run.defocus = read_poses(folder), read_defocus(folder)
        if run.poses is None:
            kept = None if folder is None else folder / "poses.part.pt"
            settings = self.settings
            found = find_poses(self.model, self.particles, settings.seed, self.progress, kept, self._descended)
            run.poses, run.defocus = found.modes, found.defocus
            if folder is not None:
                write_defocus(folder, found.defocus)
                write_poses(folder, found.modes)  # the last: where they stand, all was found
                run.poses = read_poses(folder)
                for path in folder.glob("*poses.part.pt"):
                    path.unlink()
        assert run.poses is not None
        learn_spread(self.model, self.particles, run.poses, run.defocus)
        vars(run).pop("particles", None)
        self.particles = run.particles

    def _descended(self, posed: Particles) -> Run:
        """A model like this one, fitted for a while to particles whose poses are taken as known."""
        torch.manual_seed(self.settings.seed)
        model = type(self.model)(**self.model.arguments)
        model.poses = KnownPose()
        settings = replace(self.settings, epochs=math.ceil(self.model.pose_steps / self.batches))
        return fit(model, posed, progress=self.progress, **asdict(settings))

    def go(self) -> None:
        """To the end."""
        if self.finished:
            return
        self._speed_up()
        if self.epochs:
            self._descend()
        else:
            self._record({"epoch": 0, "step": 0, "seconds": round(self.elapsed, 2)})
        self.model.beta = 1.0
        self.run.finish(self.progress)
        self.finished = True
        self._save()

    def _optimiser(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        noise = [self.model.log_sigma]
        rest = [p for p in self.elbo.parameters() if p is not self.model.log_sigma]
        groups = [{"params": noise, "lr": self.settings.noise_rate}]
        if rest:
            groups.append({"params": rest, "lr": self.settings.learning_rate})
        optimiser = torch.optim.Adam(groups, fused=True)
        total = max(1, self.epochs * self.batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda s: min(1.0, (s + 1) / 100) * 0.5 * (1 + math.cos(math.pi * min(1.0, s / total)))
        )
        return optimiser, schedule

    def _speed_up(self) -> None:
        assert self.run.guide is not None
        for module in (*self.model.modules(), *self.run.guide.modules()):
            if hasattr(module, "half_precision"):
                module.half_precision = self.settings.precision == "bf16"  # type: ignore[assignment]
                if self.settings.compile:
                    module.compile()

    def _images(self) -> Iterator[tuple[int, Batch]]:
        """Every batch from the present step to the end of the last pass, with its number within its pass."""
        for epoch in range(self.step // self.batches, self.epochs):
            generator = torch.Generator().manual_seed(self.settings.seed * 100_003 + epoch)
            start = self.step % self.batches
            batches = self.particles.batches(
                self.settings.batch_size, generator=generator, device=self.settings.device, start=start
            )
            yield from enumerate(batches, start)

    def _descend(self) -> None:
        clock = saved_at = pass_at = time.monotonic()
        before = len(self.losses)
        total = self.epochs * self.batches
        for number, batch in self.progress(self._images(), total, "fit", self.step):
            self.losses.append(self._step(batch))
            last = number + 1 == self.batches
            if last or len(self.losses) % CHECK_EVERY == 0:
                self.progress.note(f"loss {self._check():.4g}")
            now = time.monotonic()
            self.elapsed, clock = self.elapsed + now - clock, now
            if last:
                self._log(len(self.losses) - before, now - pass_at)
                self.losses, before, pass_at = [], 0, now
            if self.run.folder is not None and (last or now - saved_at > self.settings.save_every_s):
                self._check()
                self._save()
                saved_at = now

    def _step(self, batch: Batch) -> Tensor:
        """One step of the optimiser; the loss is minus the ELBO, nats an image."""
        settings = self.settings
        rise = (self.step + 1) / (settings.warmup * self.batches) if settings.warmup else 1.0
        self.model.beta = settings.beta * min(1.0, rise)
        loss = self.elbo(batch.standing_for(self.particles.n_particles)) / len(self.particles)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.elbo.parameters(), settings.clip, foreach=True)
        self.optimiser.step()
        self.schedule.step()
        self.step += 1
        return loss.detach()

    def _check(self) -> float:
        """Stop where a loss or a parameter is not finite; the mean of the latest losses otherwise."""
        recent = torch.stack(self.losses[-CHECK_EVERY:]).float().cpu() if self.losses else torch.zeros(0)
        good = torch.isfinite(recent)
        if not bool(good.all()):
            self._stop(len(recent) - int((~good).nonzero()[0]))
        if not bool(torch.stack([torch.isfinite(p).all() for p in self.elbo.parameters()]).all()):
            self._stop(1)
        return float(recent.mean())

    def _stop(self, steps_ago: int) -> None:
        epoch, number = divmod(self.step - steps_ago, self.batches)
        kept = "" if self.run.folder is None else f"; the last good checkpoint is kept in {self.run.folder}"
        raise ValueError(
            f"the loss is not finite at epoch {epoch + 1}, batch {number + 1} of {self.batches}{kept}; "
            "try a smaller learning_rate"
        )

    def _log(self, steps: int, seconds: float) -> None:
        record = {
            "epoch": self.step // self.batches,
            "step": self.step,
            "loss": float(torch.stack(self.losses).mean()),
            "images_per_second": round(min(steps / self.batches, 1.0) * len(self.particles) / seconds, 1),
            "learning_rate": self.schedule.get_last_lr()[-1],
            "seconds": round(self.elapsed, 2),
        }
        self._record(record)

    def _record(self, record: dict[str, Any]) -> None:
        self.run.records.append(record)
        if self.run.folder is not None:
            append_log(self.run.folder, record)

    def _save(self) -> None:
        if self.run.folder is None:
            return
        assert self.run.guide is not None
        state = {
            "finished": self.finished,
            "step": self.step,
            "losses": torch.stack(self.losses) if self.losses else torch.zeros(0),
            "elapsed": self.elapsed,
            "model": self.model.state_dict(),
            "guide": self.run.guide.state_dict(),
            "optimiser": self.optimiser.state_dict() if self.epochs else {},
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "records": self.run.records,
        }
        save_checkpoint(self.run.folder, state)

    def _restore(self, saved: dict[str, Any]) -> None:
        assert self.run.guide is not None
        self.model.load_state_dict(saved["model"])
        self.run.guide.load_state_dict(saved["guide"])
        if self.epochs:
            self.optimiser.load_state_dict(saved["optimiser"])
            self.schedule.last_epoch = saved["step"]
        self.finished, self.losses = saved["finished"], list(saved["losses"])
        self.step, self.elapsed, self.run.records = saved["step"], saved["elapsed"], saved["records"]
        if self.run.folder is not None and self.epochs:
            write_log(self.run.folder, self.run.records)
        torch.set_rng_state(saved["random"].cpu())
        if saved["random_cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all([state.cpu() for state in saved["random_cuda"]])
