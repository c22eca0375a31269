"""The autoencoder and its head against the paper (arXiv 2408.14514), written again from its text.

The reference below knows nothing of headplug: torch for the layers, NumPy in float64 for the
gradients and for Adam. The order of images is not known to it either, so the tests either use data
in which the order cannot matter, or find the one order that explains the result.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headplug.autoencoder import Autoencoder, pretrain_autoencoder
from headplug.heads.ae_embedding import AEEmbeddingHead

PARAMETERS = [  # pythae's names, in the order of its forward pass
    "encoder.layers.0.0.weight",
    "encoder.layers.0.0.bias",
    "encoder.embedding.weight",
    "encoder.embedding.bias",
    "decoder.layers.0.0.weight",
    "decoder.layers.0.0.bias",
    "decoder.layers.1.0.weight",
    "decoder.layers.1.0.bias",
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Layers this small are only slowed down by threads that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def reference_ae(pixels: int, latent: int, hidden: int) -> Any:
    """The paper's autoencoder on flat images, with default initialisation, in forward order."""

    def block(fan_in: int, fan_out: int, act: nn.Module) -> nn.Sequential:
        return nn.Sequential(nn.Linear(fan_in, fan_out), act)

    encoder = nn.Module()
    encoder.layers = nn.ModuleList([block(pixels, hidden, nn.ReLU())])
    encoder.embedding = nn.Linear(hidden, latent)
    decoder = nn.Module()
    decoder.layers = nn.ModuleList(
        [block(latent, hidden, nn.ReLU()), block(hidden, pixels, nn.Sigmoid())]
    )
    return nn.ModuleDict({"encoder": encoder, "decoder": decoder})


def reference_forward(ae: Any, x: Tensor) -> Any:
    latent = ae["encoder"].embedding(ae["encoder"].layers[0](x.flatten(1)))
    return ae["decoder"].layers[1](ae["decoder"].layers[0](latent)).reshape(x.shape)


def loaded(state: dict[str, Tensor], pixels: int, latent: int, hidden: int) -> Any:
    ae = reference_ae(pixels, latent, hidden)
    ae.load_state_dict(state)
    return ae


def numpy_gradients(params: dict[str, np.ndarray], x: np.ndarray) -> dict[str, np.ndarray]:
    """Backpropagation of the mean squared error over all elements, by hand, in float64."""
    w1, b1, we, be, w2, b2, w3, b3 = (params[name] for name in PARAMETERS)
    a1 = x @ w1.T + b1
    h1 = np.maximum(a1, 0)
    z = h1 @ we.T + be
    a2 = z @ w2.T + b2
    h2 = np.maximum(a2, 0)
    y = 1 / (1 + np.exp(-(h2 @ w3.T + b3)))
    d3 = 2 * (y - x) / x.size * y * (1 - y)
    d2 = d3 @ w3 * (a2 > 0)
    dz = d2 @ w2
    d1 = dz @ we * (a1 > 0)
    pairs = ((d1, x), (dz, h1), (d2, z), (d3, h2))
    return dict(zip(PARAMETERS, (g for d, a in pairs for g in (d.T @ a, d.sum(0))), strict=True))


def numpy_adam(
    params: dict[str, np.ndarray], x: np.ndarray, steps: int, lr: float
) -> dict[str, np.ndarray]:
    """Kingma and Ba's algorithm with their defaults, in float64."""
    params = {name: value.copy() for name, value in params.items()}
    m = {name: np.zeros_like(value) for name, value in params.items()}
    v = {name: np.zeros_like(value) for name, value in params.items()}
    for t in range(1, steps + 1):
        gradients = numpy_gradients(params, x)
        for name, g in gradients.items():
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g**2
            m_hat, v_hat = m[name] / (1 - 0.9**t), v[name] / (1 - 0.999**t)
            params[name] -= lr * m_hat / (np.sqrt(v_hat) + 1e-8)
    return params


def numpy_state(state: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: value.double().numpy() for name, value in state.items()}


def fit(images: Tensor, latent: int, hidden: int, **options: Any) -> Autoencoder:
    return pretrain_autoencoder(
        images, latent, hidden, device="cpu", show_progress=False, **options
    )


def start(images: Tensor, latent: int, hidden: int, seed: int = 42) -> dict[str, Tensor]:
    """The initial weights of a run: what it returns when its learning rate moves nothing."""
    return fit(images, latent, hidden, epochs=1, lr=1e-30, seed=seed).state_dict()


def same_images(pixels: int = 12, count: int = 20) -> Tensor:
    """One image many times: neither the split nor the order can matter."""
    return torch.rand(1, pixels, generator=torch.Generator().manual_seed(5)).repeat(count, 1)


# --- layers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("latent", [128, 256, 512])
def test_names_shapes_and_counts_are_the_papers(latent: int) -> None:
    ours = Autoencoder((3, 32, 32), latent_dim=latent).state_dict()
    assert {name: tuple(value.shape) for name, value in ours.items()} == {
        "encoder.layers.0.0.weight": (512, 3072),
        "encoder.layers.0.0.bias": (512,),
        "encoder.embedding.weight": (latent, 512),
        "encoder.embedding.bias": (latent,),
        "decoder.layers.0.0.weight": (512, latent),
        "decoder.layers.0.0.bias": (512,),
        "decoder.layers.1.0.weight": (3072, 512),
        "decoder.layers.1.0.bias": (3072,),
    }
    # 3072*512 + 512 + 512*d + d + d*512 + 512 + 512*3072 + 3072
    expected = {128: 3_281_024, 256: 3_412_224, 512: 3_674_624}[latent]
    assert sum(value.numel() for value in ours.values()) == expected


def test_the_same_seed_gives_the_reference_initialisation() -> None:
    torch.manual_seed(3)
    reference = reference_ae(48, 5, 7).state_dict()
    torch.manual_seed(3)
    ours = Autoencoder((3, 4, 4), 5, 7).state_dict()
    assert set(ours) == set(reference)
    assert all(torch.equal(ours[name], reference[name]) for name in reference)


def test_forward_and_encode_equal_the_reference() -> None:
    torch.manual_seed(0)
    ae = Autoencoder((3, 8, 8), 16, 64)
    x = torch.rand(9, 3, 8, 8)
    reference = loaded(ae.state_dict(), 192, 16, 64)
    torch.testing.assert_close(ae(x), reference_forward(reference, x))
    hidden = torch.relu(
        x.flatten(1) @ ae.state_dict()["encoder.layers.0.0.weight"].T
        + ae.state_dict()["encoder.layers.0.0.bias"]
    )
    torch.testing.assert_close(ae.encode(x), reference["encoder"].embedding(hidden))
    assert bool((ae.encode(x) < 0).any())  # no activation behind the embedding


# --- training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 42])
def test_pretraining_starts_from_the_default_initialisation_of_its_seed(seed: int) -> None:
    torch.manual_seed(seed)
    reference = reference_ae(12, 3, 8).state_dict()
    ours = start(same_images(), 3, 8, seed=seed)
    assert all(torch.equal(ours[name], reference[name]) for name in reference)


@pytest.mark.parametrize("steps", [1, 3])
def test_adam_steps_equal_hand_computed_ones_in_float64(steps: int) -> None:
    images = same_images()
    initial = start(images, 3, 8)
    after = fit(images, 3, 8, epochs=steps).state_dict()  # 18 images: one step an epoch
    x = images[:18].double().numpy()
    expected = numpy_adam(numpy_state(initial), x, steps, lr=1e-4)
    for name in PARAMETERS:
        moved = after[name].double().numpy() - initial[name].double().numpy()
        by_hand = expected[name] - initial[name].double().numpy()
        # a step is about 1e-4, float32 near 1 resolves 6e-8
        np.testing.assert_allclose(moved, by_hand, rtol=2e-3, atol=1.2e-7 * steps, err_msg=name)
    name = "encoder.embedding.weight"
    assert np.abs(expected[name] - initial[name].numpy()).max() > 0.9e-4 * steps


def test_losses_in_the_history_are_means_over_all_elements() -> None:
    images = same_images()
    initial = loaded(start(images, 3, 8), 12, 3, 8)
    ae = fit(images, 3, 8, epochs=1)
    y = reference_forward(initial, images).detach().double().numpy()
    before = float(((y - images.double().numpy()) ** 2).mean())
    y = reference_forward(loaded(ae.state_dict(), 12, 3, 8), images).detach().double().numpy()
    after = float(((y - images.double().numpy()) ** 2).mean())
    assert ae.history[0]["train_loss"] == pytest.approx(before, rel=1e-5)  # before its only step
    assert ae.history[0]["val_loss"] == pytest.approx(after, rel=1e-5)


def test_one_split_and_one_order_an_epoch_explain_two_epochs_on_different_images() -> None:
    images = torch.rand(4, 6, generator=torch.Generator().manual_seed(1))
    initial = start(images, 2, 3)
    options = {"batch_size": 1, "lr": 0.01, "validation": 0.25, "seed": 42}
    first = fit(images, 2, 3, epochs=1, **options).state_dict()
    second = fit(images, 2, 3, epochs=2, **options)
    assert second.history[1]["val_loss"] < second.history[0]["val_loss"]  # so epoch 2 was kept

    def walked(orders: list[tuple[int, ...]]) -> Any:
        ae = loaded(initial, 6, 2, 3)
        adam = torch.optim.Adam(ae.parameters(), lr=0.01)
        for i in itertools.chain(*orders):
            adam.zero_grad()
            F.mse_loss(reference_forward(ae, images[i : i + 1]), images[i : i + 1]).backward()
            adam.step()
        return ae.state_dict()

    def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
        return all(torch.allclose(a[k], b[k], rtol=0, atol=2e-6) for k in a)

    orders = list(itertools.permutations(range(4), 3))
    epoch_1 = [o for o in orders if equal(walked([o]), first)]
    assert len(epoch_1) == 1  # every training image once, and one is left out
    epoch_2 = [o for o in orders if equal(walked([epoch_1[0], o]), second.state_dict())]
    assert len(epoch_2) == 1
    assert set(epoch_2[0]) == set(epoch_1[0])  # the split stays


def test_the_learning_rate_halves_after_ten_epochs_without_progress() -> None:
    images = same_images()
    initial = start(images, 3, 8)

    def reference(patience: int) -> Any:
        ae = loaded(initial, 12, 3, 8)
        adam = torch.optim.Adam(ae.parameters(), lr=1e-6)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(adam, factor=0.5, patience=patience)
        for _ in range(40):
            adam.zero_grad()
            F.mse_loss(reference_forward(ae, images[:18]), images[:18]).backward()
            adam.step()
            with torch.no_grad():
                plateau.step(F.mse_loss(reference_forward(ae, images[18:]), images[18:]))
        return ae.state_dict()

    ours = fit(images, 3, 8, epochs=40, lr=1e-6).state_dict()
    right, never, early = reference(10), reference(1000), reference(9)
    name = "decoder.layers.1.0.bias"
    torch.testing.assert_close(ours[name], right[name], rtol=0, atol=5e-7)
    assert float((never[name] - right[name]).abs().max()) > 5e-6  # what the test can tell apart
    assert float((early[name] - right[name]).abs().max()) > 8e-7


def test_the_epoch_of_the_least_validation_loss_is_returned() -> None:
    images = same_images()
    ae = fit(images, 3, 8, epochs=3, lr=0.3)  # a rate at which Adam overshoots
    losses = [epoch["val_loss"] for epoch in ae.history]
    assert len(losses) == 3
    assert losses[-1] > 1.1 * min(losses)
    returned = F.mse_loss(ae(images), images).item()
    assert returned == pytest.approx(min(losses), rel=1e-4)


def test_digits_train_as_in_a_plain_loop_with_the_same_order() -> None:
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.tensor(digits.images[:333] / 16, dtype=torch.float32)
    ours = fit(images, 16, 64, epochs=6, lr=1e-3, seed=7, batch_size=70)

    # one generator draws the split, then an order for each epoch: a seed means this for good
    generator = torch.Generator().manual_seed(7)
    order = torch.randperm(333, generator=generator)
    val, train = images[order[:33]], images[order[33:]]
    torch.manual_seed(7)
    ae = reference_ae(64, 16, 64)
    adam = torch.optim.Adam(ae.parameters(), lr=1e-3)
    history = []
    for _ in range(6):
        squares = 0.0
        for batch in train[torch.randperm(300, generator=generator)].split(70):
            adam.zero_grad()
            loss = F.mse_loss(reference_forward(ae, batch), batch)
            loss.backward()
            adam.step()
            squares += loss.item() * batch.numel()
        held_out = F.mse_loss(reference_forward(ae, val), val).item()
        history.append((squares / train.numel(), held_out))
    assert history[-1][1] == min(loss for _, loss in history)  # so the last epoch is the best
    ours_history = [(epoch["train_loss"], epoch["val_loss"]) for epoch in ours.history]
    np.testing.assert_allclose(ours_history, history, rtol=1e-4)
    for name, value in ae.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=2e-5)


# --- the head ---------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
}


def head_and_embedding(freeze: bool, activation: str = "tanh") -> tuple[Any, Any]:
    torch.manual_seed(0)
    ae = Autoencoder((3, 4, 4), latent_dim=6, hidden_dim=10)
    head = AEEmbeddingHead.from_autoencoder(ae, output_dim=4, activation=activation, freeze=freeze)
    return head, ae.encoder.embedding


def embedding_of(head: AEEmbeddingHead) -> dict[str, Tensor]:
    state = head.state_dict()
    return {k: state[f"layers.embedding.{k}"].clone() for k in ("weight", "bias")}


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_head_is_embedding_activation_linear(activation: str, freeze: bool) -> None:
    head, embedding = head_and_embedding(freeze, activation)
    x = 3 * torch.randn(7, 10)
    first = numpy_state(embedding.state_dict())
    last = numpy_state(head.layers.output.state_dict())
    hidden = ACTIVATIONS[activation](x.double().numpy() @ first["weight"].T + first["bias"])
    expected = hidden @ last["weight"].T + last["bias"]
    np.testing.assert_allclose(head(x).detach().numpy(), expected, rtol=1e-5, atol=1e-5)
    assert last["weight"].shape == (4, 6)


@pytest.mark.parametrize("thawed", [False, True])
def test_frozen_embedding_stays_bit_identical_through_sgd_with_weight_decay(thawed: bool) -> None:
    head, embedding = head_and_embedding(freeze=True)
    if thawed:  # what lightly's activate_requires_grad does
        for parameter in head.parameters():
            parameter.requires_grad_(True)
        head.requires_grad_(True)
    output = head.layers.output.weight.detach().clone()
    sgd = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(20):
        sgd.zero_grad()
        head(torch.randn(8, 10)).square().mean().backward()
        sgd.step()
    assert torch.equal(embedding_of(head)["weight"], embedding.weight)
    assert torch.equal(embedding_of(head)["bias"], embedding.bias)
    assert not torch.equal(head.layers.output.weight, output)


def test_unfrozen_embedding_moves_and_the_autoencoder_does_not() -> None:
    head, embedding = head_and_embedding(freeze=False)
    before = embedding.weight.detach().clone()
    sgd = torch.optim.SGD(head.parameters(), lr=0.1)
    head(torch.randn(8, 10)).square().mean().backward()
    sgd.step()
    assert not torch.equal(embedding_of(head)["weight"], before)
    assert not torch.equal(embedding_of(head)["bias"], embedding.bias)
    assert torch.equal(embedding.weight, before)  # no storage shared


def test_gradient_reaches_the_input_through_a_frozen_embedding() -> None:
    head, embedding = head_and_embedding(freeze=True)
    x = torch.randn(8, 10, requires_grad=True)
    head(x).square().sum().backward()
    assert x.grad is not None
    first, last = numpy_state(embedding.state_dict()), numpy_state(head.layers.output.state_dict())
    hidden = np.tanh(x.detach().double().numpy() @ first["weight"].T + first["bias"])
    z = hidden @ last["weight"].T + last["bias"]
    expected = (2 * z @ last["weight"] * (1 - hidden**2)) @ first["weight"]
    np.testing.assert_allclose(x.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("width", "count"), [(512, 262_656), (128, 65_664)])
def test_frozen_count_is_the_one_the_authors_recorded(width: int, count: int) -> None:
    ae = Autoencoder((1, 4, 4), latent_dim=width)
    frozen = AEEmbeddingHead.from_autoencoder(ae, output_dim=64)
    trained = AEEmbeddingHead.from_autoencoder(ae, output_dim=64, freeze=False)
    output = 64 * width + 64
    assert sum(value.numel() for value in embedding_of(frozen).values()) == count
    assert sum(p.numel() for p in frozen.parameters()) == output
    assert sum(p.numel() for p in trained.parameters()) == output + count
