"""The contrast transfer function agrees with torch-ctf, with its own formula and with its stated limits."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pyro_cryo.physics.ctf import CTF, aliasing_angstrom, electron_wavelength


def optics(**given: float | list[float]) -> CTF:
    """Optics of one or more images in float64, of a usual microscope where nothing else is given."""
    usual: dict[str, float | list[float]] = {
        "defocus_u_angstrom": 15_000.0, "defocus_v_angstrom": 15_000.0, "defocus_angle_deg": 0.0, "voltage_kv": 300.0,
        "cs_mm": 2.7, "amplitude_contrast": 0.1, "phase_shift_deg": 0.0, "bfactor_angstrom2": 0.0, "scale": 1.0,
    }  # fmt: skip
    columns = [torch.as_tensor(v, dtype=torch.float64).reshape(-1) for v in (usual | given).values()]
    return CTF(*torch.broadcast_tensors(*columns))


def fft_frequencies(box: int, apix: float) -> Tensor:
    """(D, D / 2 + 1, 2) x-y in cycles an angstrom, the layout of rfft2."""
    y, x = torch.meshgrid(
        torch.fft.fftfreq(box, apix, dtype=torch.float64),
        torch.fft.rfftfreq(box, apix, dtype=torch.float64),
        indexing="ij",
    )
    return torch.stack([x, y], -1)


@pytest.fixture
def double_precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Has torch-ctf, which asks for torch.float, compute in float64: its float32 phases are good to 1e-5 only."""
    monkeypatch.setattr(torch, "float", torch.float64)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("double_precision")
def test_it_equals_torch_ctf() -> None:
    """In torch-ctf too the angle runs from x to y, the function is -sin of its phase, and defocus is in micrometres."""
    torch_ctf = pytest.importorskip("torch_ctf")
    generator = torch.Generator().manual_seed(0)
    n, box, apix = 12, 64, 1.7

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)

    mean, angle = uniform(4_000, 25_000), uniform(0, 180)
    # beyond some 300 angstrom torch-ctf's guard against 0 / 0 in its unit vectors costs it 1e-5
    astigmatism = uniform(20, 250)
    voltage = torch.tensor([100.0, 200.0, 300.0]).repeat(4)
    cs, contrast, phase = uniform(0.01, 2.7), uniform(0.05, 0.2), uniform(0, 120)
    ours = CTF(
        mean + astigmatism, mean - astigmatism, angle, voltage, cs, contrast, phase, torch.zeros(n), torch.ones(n)
    )(fft_frequencies(box, apix).reshape(-1, 2))
    theirs = torch_ctf.calculate_ctf_2d(
        defocus=mean / 1e4,
        astigmatism=astigmatism / 1e4,
        astigmatism_angle=angle,
        voltage=voltage,
        spherical_aberration=cs,
        amplitude_contrast=contrast,
        phase_shift=phase,
        pixel_size=apix,
        image_shape=(box, box),
        rfft=True,
        fftshift=False,
    )
    assert float((ours.reshape(theirs.shape) - theirs).abs().max()) < 1e-5


def test_the_electron_wavelength_is_relativistic() -> None:
    """lambda = h / sqrt(2 m e V (1 + e V / 2 m c^2)) with CODATA 2018."""
    h, m, e, c = 6.62607015e-34, 9.1093837015e-31, 1.602176634e-19, 299792458.0
    for kv in (80.0, 200.0, 300.0):
        volts = kv * 1e3
        expected = 1e10 * h / math.sqrt(2 * m * e * volts * (1 + e * volts / (2 * m * c**2)))
        assert float(electron_wavelength(torch.tensor(kv, dtype=torch.float64))) == pytest.approx(expected, rel=1e-8)


def test_at_zero_frequency_it_is_the_amplitude_contrast() -> None:
    zero = torch.zeros(1, 2, dtype=torch.float64)
    assert float(optics(amplitude_contrast=0.07)(zero)) == pytest.approx(0.07)
    # a phase plate of 90 degrees turns phase contrast into full contrast there
    assert float(optics(amplitude_contrast=0.0, phase_shift_deg=90.0)(zero)) == pytest.approx(1.0)


def test_a_weak_phase_object_in_underfocus_has_positive_contrast_at_low_frequency() -> None:
    s = torch.tensor([[0.01, 0.0]], dtype=torch.float64)
    assert float(optics(defocus_u_angstrom=1e4, defocus_v_angstrom=1e4)(s)) > 0.1
    assert float(optics(defocus_u_angstrom=-1e4, defocus_v_angstrom=-1e4)(s)) < 0.1


@pytest.mark.parametrize("angle", [0.0, 30.0, 90.0, 160.0])
def test_along_the_astigmatism_angle_the_defocus_is_u_and_across_it_v(angle: float) -> None:
    astigmatic = optics(defocus_u_angstrom=20_000.0, defocus_v_angstrom=10_000.0, defocus_angle_deg=angle)
    a = math.radians(angle)
    along = torch.linspace(0, 0.2, 50, dtype=torch.float64)[:, None] * torch.tensor([math.cos(a), math.sin(a)])
    across = along.flip(-1) * torch.tensor([-1.0, 1.0])
    for points, defocus in ((along, 20_000.0), (across, 10_000.0)):
        plain = optics(defocus_u_angstrom=defocus, defocus_v_angstrom=defocus)
        torch.testing.assert_close(astigmatic(points), plain(points), rtol=0, atol=1e-6)


def test_b_factor_and_scale_multiply() -> None:
    s = fft_frequencies(16, 2.0).reshape(-1, 2)
    plain, damped = optics()(s), optics(bfactor_angstrom2=80.0, scale=0.7)(s)
    torch.testing.assert_close(damped, 0.7 * plain * torch.exp(-80.0 * s.square().sum(-1) / 4))


def test_more_defocus_turns_it_towards_its_quadrature() -> None:
    images = optics(defocus_u_angstrom=[12_000.0, 21_000.0], defocus_angle_deg=40.0, bfactor_angstrom2=50.0)
    offset = torch.tensor([400.0, -900.0], dtype=torch.float64)
    s = fft_frequencies(24, 1.5).reshape(-1, 2)
    phi = math.pi * electron_wavelength(images.voltage_kv)[:, None] * s.square().sum(-1) * offset[:, None]
    turned = phi.cos() * images(s) + phi.sin() * images.quadrature(s)
    torch.testing.assert_close(images.defocused(offset)(s), turned)


def test_frequencies_of_each_image_and_rows() -> None:
    images = optics(defocus_u_angstrom=[10_000.0, 20_000.0, 30_000.0])
    assert len(images) == 3
    s = fft_frequencies(8, 2.0).reshape(-1, 2)
    own = torch.stack([s, 2 * s, 3 * s])
    for i in range(3):
        torch.testing.assert_close(images(own)[i], images[i : i + 1](own[i])[0])
    assert images[torch.tensor([False, True, False])].defocus_u_angstrom.tolist() == [20_000.0]


def test_it_aliases_where_the_phase_turns_by_pi_between_samples() -> None:
    """Without Cs the phase is pi lambda z s^2, so the box L = D apix samples it up to s = L / (2 lambda z)."""
    images = optics(defocus_u_angstrom=[20_000.0, 40_000.0], defocus_v_angstrom=[19_000.0, 41_000.0], cs_mm=0.0)
    box, apix = 128, 1.0
    wavelength = float(electron_wavelength(images.voltage_kv)[0])
    expected = 2 * wavelength * 41_000 / (box * apix)
    assert 0.98 * expected < aliasing_angstrom(images, apix, box) <= expected  # it looks at 512 frequencies
    assert aliasing_angstrom(images, 2 * apix, 4 * box) == 0.0  # a large box, and Nyquist before the limit
    assert aliasing_angstrom(images[:1], apix, box) == pytest.approx(expected * 20 / 41, rel=0.02)
