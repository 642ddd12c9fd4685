"""What the consensus says of an image's contrast is its posterior, where nothing moves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pyro import poutine

from pyro_cryo.models.contrast import Contrast
from tests.images import blobs, observed

BOX, SIGMA = 24, 0.8


@pytest.mark.parametrize("window_power", [1.0, 0.45])
def test_the_contrast_is_what_quadrature_finds(window_power: float) -> None:
    model = Contrast(BOX, zdim=1, width=8, layers=0)
    model.consensus.set(blobs(BOX, 9))
    model.log_sigma.data.fill_(torch.tensor(SIGMA).log())
    batch = replace(observed(blobs(BOX, 9), 12, SIGMA, torch.ones(12)), window_power=window_power)
    grid = torch.linspace(0.6, 1.6, 400)
    with torch.no_grad():
        for parameter in model.volume.parameters():
            parameter.zero_()
        told = torch.stack([_joint(model, batch, contrast) for contrast in grid])
        q: Any = model.make_guide().contrast(batch)  # type: ignore[operator]
    weight = told.softmax(0)
    mean = (weight * grid[:, None]).sum(0)
    sd = (weight * (grid[:, None] - mean).square()).sum(0).sqrt()
    assert 0.02 < float(sd.mean()) < 0.12
    assert float(((q.mean - mean) / sd).abs().max()) < 0.25
    torch.testing.assert_close(q.variance.sqrt(), sd, rtol=0.1, atol=0)


def _joint(model: Contrast, batch: Any, contrast: torch.Tensor) -> torch.Tensor:
    """log p(images, contrast), (B,), at z = 0."""
    given = {"z": torch.zeros(len(batch), 1), "contrast": contrast.expand(len(batch))}
    trace: Any = poutine.trace(poutine.condition(model, given)).get_trace(batch)  # type: ignore[arg-type, call-arg]
    trace.compute_log_prob()
    return trace.nodes["image"]["log_prob"] + trace.nodes["contrast"]["log_prob"]
