from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from headplug import ReweightingHead, create_head
from headplug.errors import DimensionError, OptionError

WIDTH = 2048
KAPPAS = [1.0, 1.01, 1.05, 1.5, 2.0]
TINY = np.finfo(np.float32).tiny


def exact(kappa: float, width: int = WIDTH) -> np.ndarray:
    with np.errstate(under="ignore"):
        return np.float64(kappa) ** -np.arange(width, dtype=np.float64)


@pytest.mark.filterwarnings("ignore:kappa=")
@pytest.mark.parametrize("kappa", KAPPAS)
def test_weights_are_numpys_powers_rounded_once(kappa: float) -> None:
    ours = ReweightingHead(WIDTH, kappa=kappa).reweights.numpy()
    assert ours.dtype == np.float32
    expected = exact(kappa)
    normal = expected >= TINY
    error = np.abs(ours[normal] / expected[normal] - 1).max()
    assert error <= np.finfo(np.float32).eps
    assert (ours[~normal] < TINY).all()
    assert (np.diff(ours) <= 0).all()
    assert ours[0] == 1


@pytest.mark.parametrize("kappa", KAPPAS)
def test_vanishing_weights_are_counted_in_a_warning(kappa: float) -> None:
    lost = int((exact(kappa) < TINY).sum())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ReweightingHead(WIDTH, kappa=kappa)
    messages = [str(w.message) for w in caught]
    if lost:
        assert len(messages) == 1
        assert f"kappa={kappa} makes the last {lost} of {WIDTH} weights vanish" in messages[0]
    else:
        assert messages == []


def test_cases_with_and_without_a_warning_are_both_checked() -> None:
    assert {bool((exact(k) < TINY).any()) for k in KAPPAS} == {True, False}


@pytest.mark.filterwarnings("ignore:kappa=")
@pytest.mark.parametrize("kappa", [1e6, 1e308, 10**300])
def test_steep_weights_vanish_without_an_overflow(kappa: float) -> None:
    head = ReweightingHead(WIDTH, kappa=kappa)
    assert head.reweights[0] == 1
    assert (head.reweights[100:] == 0).all()
    assert head(torch.full((2, WIDTH), 3.0)).isfinite().all()


@pytest.mark.parametrize("kappa", [0.999, 0.0, -2.0, float("nan"), float("inf"), 10**400])
def test_kappa_below_one_or_not_finite_is_refused(kappa: float) -> None:
    with pytest.raises(OptionError, match="kappa must be a finite number of at least 1"):
        create_head("reweighting", input_dim=8, kappa=kappa)


def test_kappa_one_is_the_identity() -> None:
    x = torch.randn(5, WIDTH)
    assert torch.equal(ReweightingHead(WIDTH, kappa=1)(x), x)


def test_output_is_the_input_times_the_weights() -> None:
    x = torch.randn(5, 512)
    z = ReweightingHead(512, kappa=1.05)(x)
    expected = x.double().numpy() * exact(1.05, 512)
    np.testing.assert_allclose(z.numpy(), expected, rtol=3e-7)


def test_nothing_is_trained() -> None:
    assert list(ReweightingHead(8).parameters()) == []


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "to(dtype)": lambda m: m.to(torch.float16),
    "to(device, dtype)": lambda m: m.to("cpu", torch.bfloat16),
    "there and back": lambda m: m.half().float(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_weights_stay_exact_when_the_model_is_cast(cast: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(4, 1500), ReweightingHead(1500))
    before = model[1].reweights.clone()
    cast(model)
    assert model[1].reweights.dtype == torch.float32
    assert torch.equal(model[1].reweights, before)
    assert list(model[1].state_dict()) == ["reweights"]
    x = torch.randn(3, 4, dtype=model[0].weight.dtype)
    assert model(x).dtype == model[0].weight.dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_keeps_the_product_in_float32(dtype: torch.dtype) -> None:
    head = ReweightingHead(1500)
    h = torch.ones(2, 1500, dtype=dtype)  # what a backbone gives under autocast
    with torch.autocast("cpu", dtype):
        z = head(h)
    assert z.dtype == torch.float32
    assert torch.equal(z[0], head.reweights)


def test_weights_move_with_the_device() -> None:
    head = ReweightingHead(8)
    assert head.to("meta").reweights.device.type == "meta"
    assert ReweightingHead(8).to("meta", torch.float16).reweights.dtype == torch.float32


def test_authors_checkpoint_loads_into_a_model(tmp_path: Path) -> None:
    class Authors(nn.Module):  # a parameter without gradient, as in the authors' code
        def __init__(self) -> None:
            super().__init__()
            weights = torch.tensor([1 / 1.02**i for i in range(64)])
            self.reweights = nn.Parameter(weights, requires_grad=False)

    theirs = nn.ModuleDict({"backbone": nn.Linear(3, 64), "projection_head": Authors()})
    torch.save(theirs.state_dict(), tmp_path / "model.pt")
    ours = nn.ModuleDict({"backbone": nn.Linear(3, 64), "projection_head": ReweightingHead(64)})
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert "projection_head.reweights" in state
    ours.load_state_dict(state, strict=True)
    loaded = ours["projection_head"]
    assert torch.equal(loaded.reweights, theirs["projection_head"].reweights)
    assert not loaded.reweights.requires_grad
    assert list(loaded.parameters()) == []


@pytest.mark.parametrize("name", ["reweighting", "identity"])
@pytest.mark.parametrize("output_dim", [7, 9])
def test_heads_that_keep_the_width_refuse_another_one(name: str, output_dim: int) -> None:
    with pytest.raises(DimensionError, match=f"{name!r}.*output_dim={output_dim}.*input_dim=8"):
        create_head(name, input_dim=8, output_dim=output_dim)
    assert create_head(name, input_dim=8, output_dim=8).output_dim == 8


def test_identity_passes_its_input_on_and_has_no_weights() -> None:
    head = create_head("identity", input_dim=8)
    x = torch.randn(2, 3, 8)
    assert torch.equal(head(x), x)
    assert head.state_dict() == {}
