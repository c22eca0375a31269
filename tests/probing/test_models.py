"""What holds for every probe that fits weights."""

from __future__ import annotations

import pytest
import torch

from headplug.errors import DataError, DimensionError
from headplug.probing.data import check_features
from headplug.probing.linear import LinearSetting, LinearTraining, fit_linear
from headplug.probing.logistic import LogisticSetting, fit_logistic
from headplug.probing.mlp import MLPSetting, fit_mlp
from headplug.probing.ridge import RidgeSetting, fit_ridge

QUICK = LinearTraining(max_steps=40, init="normal")
FITS = {
    "linear": lambda x, y, **options: fit_linear(
        x, y, [LinearSetting(0.1), LinearSetting(0.01)], training=QUICK, **options
    ),
    "ridge": lambda x, y, **options: fit_ridge(
        x, y, [RidgeSetting(0.01), RidgeSetting(1.0)], **options
    ),
    "logistic": lambda x, y, **options: fit_logistic(
        x, y, [LogisticSetting(0.01), LogisticSetting(1.0)], **options
    ),
    "mlp": lambda x, y, **options: fit_mlp(
        x, y, [MLPSetting(0.01), MLPSetting(0.001, 0.1, 32)], max_steps=40, **options
    ),
}
fits = pytest.mark.parametrize("fit", FITS.values(), ids=FITS)


@fits
def test_nothing_of_the_callers_is_changed_and_nothing_of_it_changes_the_result(blobs, fit):
    x, y = blobs(200)
    given = x.clone(), y.clone()
    expected = fit(x, y).predict(x)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
            models = fit(x.requires_grad_(), y)
            got = models.predict(x)
            assert torch.is_grad_enabled()
            assert torch.is_autocast_enabled("cpu")
        with torch.inference_mode():
            assert torch.equal(fit(x.detach(), y).predict(x.detach()), expected)
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert float(torch.tensor(1e-40) * 1) > 0  # denormal numbers are not flushed
    assert torch.equal(got, expected)
    assert not got.requires_grad
    assert torch.equal(x.detach(), given[0])
    assert torch.equal(y, given[1])


@fits
def test_half_precision_and_memory_mapped_features_give_the_same(blobs, fit, tmp_path):
    x, y = blobs(300)
    half = x.half()
    expected = fit(half.float(), y).predict(half.float())
    assert (fit(half, y).predict(half) == expected).float().mean() > 0.995
    file = tmp_path / "x.bin"
    file.write_bytes(half.numpy().tobytes())
    mapped = torch.from_file(str(file), shared=False, size=x.numel(), dtype=torch.half).view(
        300, -1
    )
    assert torch.equal(fit(mapped, y).predict(mapped), fit(half, y).predict(half))
    whole = (4 * x).round().to(torch.int32)
    assert torch.equal(fit(whole, y).predict(whole), fit(whole.float(), y).predict(whole.float()))


@fits
def test_constant_and_repeated_features_give_no_nan_and_change_little(blobs, fit):
    x, y = blobs(300)
    odd = torch.cat([x, x, torch.full((300, 1), 0.1), torch.zeros(300, 1)], 1)
    predicted = fit(odd, y).predict(odd)
    assert (predicted >= 0).all()
    assert (predicted == y).float().mean() > (fit(x, y).predict(x) == y).float().mean() - 0.1
    nothing = fit(torch.ones(300, 3), y).predict(torch.ones(300, 3))
    assert (nothing == nothing[:, :1]).all()


@fits
@pytest.mark.parametrize(("count", "dim", "classes"), [(2, 3, 2), (30, 700, 3), (1500, 6, 1000)])
def test_few_samples_many_features_and_many_classes(fit, count, dim, classes):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, dim, generator=generator)
    y = torch.arange(count) % classes
    predicted = fit(x, y).predict(x)
    assert predicted.shape == (2, count)
    assert predicted.dtype is torch.int64
    assert (predicted >= 0).all()
    assert (predicted < classes).all()
    if count <= dim:
        assert (predicted == y).all()
    else:
        assert (predicted == y).float().mean() > 2 / classes


@fits
def test_predictions_have_the_form_of_the_targets(blobs, fit):
    x, y = blobs(100)
    for labels in (torch.stack([y == 1, y > 1, y == 0], 1), None):
        if labels is None and fit is FITS["logistic"]:
            continue
        given = torch.stack([x[:, 0], x[:, 1], y.float()], 1) if labels is None else labels
        predicted = fit(x, given).predict(x[:7])
        assert predicted.shape == (2, 7, 3)
        assert predicted.dtype is torch.float32
    assert int(fit(x, y, num_classes=9).predict(x)[0].max()) < 4


@fits
def test_unusable_features_are_refused(blobs, fit):
    x, y = blobs(50)
    models = fit(x, y)
    with pytest.raises(DimensionError, match="fitted on 16 features a sample and is given 3"):
        models.predict(x[:, :3])
    bad = x.clone()
    bad[3, 2] = torch.nan
    for call in (lambda: fit(bad, y), lambda: models.predict(bad)):
        with pytest.raises(DataError, match="first at row 3"):
            call()
    with pytest.raises(DataError, match="shape"):
        fit(x[None], y)
    with pytest.raises(DataError, match="50 samples and labels of shape"):
        fit(x, y[:7])


def test_large_finite_values_are_no_infinity():
    """The quick check adds all values up, and their sum may overflow."""
    x = torch.full((4, 3), 3e38)
    assert torch.isinf(x.sum())
    assert check_features(x) is not None


def test_arrays_lists_and_complex_numbers_are_refused_in_a_sentence(blobs):
    x, y = blobs(40)
    for features, labels in ((x.numpy(), y), (x, y.tolist()), (x + 1j * x, y)):
        with pytest.raises(DataError, match=r"torch\.as_tensor"):
            fit_ridge(features, labels, [RidgeSetting(0.1)])
