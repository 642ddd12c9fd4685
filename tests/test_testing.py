"""The contract is kept by every recipe, and what breaks it is told."""

from __future__ import annotations

import inspect
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_cryo.inference.state import load_class
from pyro_cryo.model import CryoModel
from pyro_cryo.models.cryodrgn import CryoDRGN
from pyro_cryo.recipes import recipes
from pyro_cryo.testing import check_model

SMALL: dict[str, Any] = {"zdim": 2, "width": 16, "layers": 1, "points": 30, "classes": 3}


def factory(kind: type[CryoModel]) -> Any:
    known = inspect.signature(kind.__init__).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    own = {k: v for k, v in SMALL.items() if k in known}
    if takes_any:
        own |= {"width": 16, "layers": 1}
    return lambda box: kind(box, **own)


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_keeps_the_contract(name: str, device: str) -> None:
    check_model(factory(load_class(name)), device)


@pytest.mark.slow
@pytest.mark.parametrize("name", recipes())
def test_every_recipe_keeps_it_with_two_images_a_particle(name: str, device: str) -> None:
    check_model(factory(load_class(name)), device, views=2)


class Idle(CryoDRGN):
    """Has a parameter that nothing uses."""

    def __init__(self, box: int) -> None:
        super().__init__(box, zdim=2, width=8, layers=1)
        self.idle = torch.nn.Parameter(torch.zeros(3))


class Entangled(CryoDRGN):
    """Lets an image depend on the others of its batch."""

    def __init__(self, box: int) -> None:
        super().__init__(box, zdim=2, width=8, layers=1)

    def noise(self, mean: Tensor, sigma: Tensor) -> dist.Normal:
        return dist.Normal(mean - 0.5 * mean.mean(0), sigma)


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Idle, "parameter idle is not reached"), (Entangled, "depends on the others of its batch")],
)
def test_what_breaks_the_contract_is_told(kind: type[CryoModel], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_model(kind)
