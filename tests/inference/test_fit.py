"""The descent: reproducible, stopped where it breaks, and z keeps its meaning."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_cryo.analysis.latent import neighbour_r2
from pyro_cryo.data.particles import Particles
from pyro_cryo.inference import fit as fit_module
from pyro_cryo.inference.fit import Settings, fit
from pyro_cryo.inference.run import Run
from pyro_cryo.models.cryodrgn import CryoDRGN
from pyro_cryo.models.homogeneous import Homogeneous
from pyro_cryo.progress import Progress


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(value, second[name]) for name, value in first.items())


def test_the_same_seed_gives_the_same_tensors(particles, small_model, tensors) -> None:
    found = []
    for seed in (0, 0, 1):
        run = fit(small_model(), particles, epochs=2, seed=seed)
        found.append(tensors(run.model, run.guide))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])  # the same starting values, another order and other draws


def test_the_same_seed_gives_the_same_map(particles) -> None:
    maps = [fit(Homogeneous(16), particles, seed=seed).volume() for seed in (0, 0)]
    assert torch.equal(*maps)


def test_a_fit_in_memory_equals_one_in_a_folder(particles, small_model, tensors, tmp_path: Path) -> None:
    kept = fit(small_model(), particles, tmp_path / "run", epochs=2)
    memory = fit(small_model(), particles, epochs=2)
    assert same(tensors(kept.model, kept.guide), tensors(memory.model, memory.guide))
    assert [r["loss"] for r in kept.records] == [r["loss"] for r in memory.records]


def test_the_loss_falls_and_is_minus_the_evidence_an_image(toy: Path, cryodrgn_run: Path) -> None:
    run = Run.load(cryodrgn_run)
    losses = [record["loss"] for record in run.records]
    assert losses[-1] < losses[0]
    batch = Particles.open(toy).batch(slice(0, 200))
    with torch.no_grad():
        sigma = run.model.sigma[0][batch.half.shell][:, None]
        noise_alone = -torch.distributions.Normal(0.0, sigma).log_prob(batch.image).sum() / 200
    assert losses[-1] < float(noise_alone)  # the images are better explained than by no molecule
    assert losses[-1] > 0.5 * float(noise_alone)


def test_z_follows_the_motion_and_does_not_collapse(toy: Path, cryodrgn_run: Path) -> None:
    with np.load(toy.parent / "truth.npz") as truth:
        coordinate = truth["coordinate"]
    latent = Run.load(cryodrgn_run).latent
    assert float(neighbour_r2(latent.z, coordinate)[0]) > 0.5
    sd = np.sqrt(np.diagonal(latent.z_cov, axis1=1, axis2=2)).mean(0)
    assert sd.min() < 0.8  # the images tell more than the prior, whose sd is 1
    assert sd.max() < 1.2


def test_beta_draws_z_to_its_prior(toy: Path) -> None:
    particles, spread = Particles.open(toy), []
    for beta in (1.0, 30.0):
        torch.manual_seed(0)
        run = fit(CryoDRGN(32, zdim=2, width=32), particles, epochs=3, beta=beta, learning_rate=2e-3)
        spread.append(run.latent.z.std())
    assert spread[1] < 0.5 * spread[0]


def test_a_loss_that_is_not_finite_stops_the_fit(particles, small_model, tensors, tmp_path: Path, monkeypatch) -> None:
    step = fit_module._Loop._step

    def breaks(self, batch):
        loss = step(self, batch)
        return loss if self.step != 8 else torch.full_like(loss, torch.nan)

    monkeypatch.setattr(fit_module._Loop, "_step", breaks)
    with pytest.raises(
        ValueError, match=r"not finite at epoch 2, batch 3 of 5; .*checkpoint is kept in .*smaller lear"
    ):
        fit(small_model(), particles, tmp_path / "run", epochs=3)
    monkeypatch.undo()
    kept = Run.load(tmp_path / "run")
    one = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert (one["step"], one["finished"]) == (5, False)
    assert all(bool(torch.isfinite(value).all()) for value in tensors(kept.model, kept.guide).values())
    assert [record["epoch"] for record in kept.records] == [1]


def test_parameters_that_break_are_not_saved(particles, small_model, tmp_path: Path, monkeypatch) -> None:
    step = fit_module._Loop._step

    def breaks(self, batch):
        loss = step(self, batch)
        if self.step == 10:  # the last step of the second pass: its own loss is still good
            with torch.no_grad():
                self.model.log_sigma[0, 3] = torch.nan
        return loss

    monkeypatch.setattr(fit_module._Loop, "_step", breaks)
    with pytest.raises(ValueError, match="not finite at epoch 2, batch 5 of 5"):
        fit(small_model(), particles, tmp_path / "run", epochs=3)
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 5


def test_a_fit_that_cannot_begin_leaves_nothing(particles, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.mrc"):
        fit(Homogeneous(16, mask="gone.mrc"), particles, tmp_path / "a" / "b" / "run")
    assert not (tmp_path / "a").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"gone\.mrc"):
        fit(Homogeneous(16, mask="gone.mrc"), particles, tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_model_of_other_data_is_refused(particles, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a model of box 32 for particles of 16 px; build it with particles\.box"):
        fit(Homogeneous(32), particles, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_settings_are_checked() -> None:
    wrong = {"noise_rate": 0.0, "clip": float("nan"), "warmup": -1.0, "save_every_s": -1.0, "precision": "float16"}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            Settings(**{name: value})
    for device in ("mps", "nonsense", "cuda:99"):
        with pytest.raises(ValueError, match=f"device .*{device}"):
            Settings(device=device)


def test_progress_sees_every_batch_and_the_loss(particles, small_model) -> None:
    class Seen(Progress):
        def __init__(self) -> None:
            self.counts: dict[str, list[int]] = {}
            self.notes: list[str] = []

        def __call__(self, items, total, title, done=0):
            self.counts[title] = [total, 0]
            for item in items:
                self.counts[title][1] += 1
                yield item

        def note(self, text: str) -> None:
            self.notes.append(text)

    seen = Seen()
    run = fit(small_model(), particles, epochs=2, progress=seen)
    assert seen.counts["fit"] == [10, 10]
    assert all(total == done for total, done in seen.counts.values())
    assert seen.notes[-1].startswith("loss ")
    assert len(run.records) == 2


def test_no_descent_where_no_epochs_are_asked_for(particles, small_model, tmp_path: Path) -> None:
    run = fit(small_model(), particles, tmp_path / "run", epochs=0)
    assert [record["epoch"] for record in run.records] == [0]  # the solution's time, no loss
    assert "loss" not in run.records[0]
    assert float(run.volume(torch.zeros(2)).abs().max()) > 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["epochs"] == 0


def test_half_precision_stays_close(particles, small_model) -> None:
    full, half = (fit(small_model(), particles, epochs=2, precision=p) for p in ("float32", "bf16"))
    losses = [run.records[-1]["loss"] for run in (full, half)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_on_each_device(device: str, particles, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CryoDRGN(16, zdim=1, width=16, layers=1)
    run = fit(model, particles, tmp_path / "run", epochs=1, device=device)
    assert run.device.type == device
    assert run.volume(torch.zeros(1)).device.type == "cpu"
    moved = Run.load(tmp_path / "run")
    assert torch.allclose(moved.volume(torch.zeros(1)), run.volume(torch.zeros(1)), atol=1e-4)
