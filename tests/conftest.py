"""Fixtures that all tests share."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from desk import BOX, COUNT, Desk


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the repository; tests that need it skip where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("reference data are not beside this checkout")
    return folder


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def device(request: pytest.FixtureRequest) -> str:
    """Each device that this machine has."""
    return request.param


Command = Callable[..., int]


@pytest.fixture(scope="session")
def command() -> Command:
    """pyro-cryo in this process: the exit status of a command line. Leaves threads and warnings as they were."""
    from pyro_cryo.cli import main

    def run(*arguments: object) -> int:
        threads, shown = torch.get_num_threads(), warnings.showwarning
        try:
            return main([str(argument) for argument in arguments])
        finally:
            torch.set_num_threads(threads)
            warnings.showwarning = shown

    return run


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A moving complex: the STAR file of 600 images of 32 px at SNR 1, truth.npz beside it."""
    from pyro_cryo.data.simulate import hinge, simulate

    return simulate(hinge(), tmp_path_factory.mktemp("toy"), n_images=600, box=32, snr=1.0, seed=0)


FIT_CRYODRGN = (
    "--model", "cryodrgn", "--zdim", 2, "--set", "width=32", "--epochs", 4, "--lr", 2e-3, "--threads", 1,
    "--device", "cpu", "--quiet",
)  # fmt: skip


@pytest.fixture(scope="session")
def cryodrgn_options() -> tuple[object, ...]:
    """What the run of `cryodrgn_run` was asked for."""
    return FIT_CRYODRGN


@pytest.fixture(scope="session")
def cryodrgn_run(toy: Path, command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of cryodrgn on the toy; to be read only."""
    out = tmp_path_factory.mktemp("runs") / "cryodrgn"
    assert command("fit", toy, "-o", out, *FIT_CRYODRGN) == 0
    return out


@pytest.fixture(scope="session")
def homogeneous_run(toy: Path, command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of homogeneous on the toy; to be read only."""
    out = tmp_path_factory.mktemp("runs") / "homogeneous"
    assert command("fit", toy, "-o", out, "--model", "homogeneous", "--threads", 1, "--device", "cpu", "--quiet") == 0
    return out


@pytest.fixture(scope="session")
def small_case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a case of 12 images of 16 px."""
    from pyro_cryo.data.simulate import hinge, simulate

    folder = tmp_path_factory.mktemp("small")
    simulate(hinge(), folder, n_images=COUNT, box=BOX, snr=1.0, seed=0, defocus_angstrom=(2000.0, 3000.0))
    return folder


@pytest.fixture
def desk(small_case: Path, toy: Path, cryodrgn_run: Path, homogeneous_run: Path, tmp_path: Path) -> Desk:
    """Copies of the small case and of finished runs, to be spoilt."""
    for source, name in ((small_case, "case"), (cryodrgn_run, "cryodrgn"), (homogeneous_run, "homogeneous")):
        shutil.copytree(source, tmp_path / name)
    return Desk(tmp_path, toy)
