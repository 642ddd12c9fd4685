"""Five seeds of every recipe on data of its own story: what the benchmark prints, held to what the project claims."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "benchmarks"))
import zoo

WITHIN = {
    "weight": 0.05,
    "turns": 0.01,
    "near their state": 0.15,
    "accuracy": 0.02,
    "share of junk": 0.02,
    "of the junk found": 0.05,
    "sd": 0.03,
    "correlation": 0.06,
    "rank correlation": 0.05,
    "rms between micrographs": 0.02,
}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", list(zoo.TRIALS))
def test_a_recipe_finds_what_it_assumes_and_explains_more(name: str, seed: int) -> None:
    found, gain = zoo.one_trial(zoo.TRIALS[name], seed)
    for what, value, truth in found:
        assert value == pytest.approx(truth, abs=WITHIN[what]), what
    assert float(gain.mean()) > 0
