"""Every registered head in parallel training: DDP, FSDP2, SyncBatchNorm, inductor, EMA twins.

Two processes are started once and go over all heads; the tests read, head by head, what they
brought back. This file is also the script that these processes run.
"""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import shutil
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightly.models.utils import update_momentum
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from headplug import create_head, list_heads
from headplug.heads.parameters import param_groups

Build = Callable[..., nn.Module]
State = dict[str, Tensor]
Batches = list[tuple[Tensor, Tensor]]
Outcome = dict[str, Any]  # what one process says of one head

WIDTH, STEPS, RANKS, BATCH = 20, 2, 2, 8
FULL = StateDictOptions(full_state_dict=True)


def variants(name: str, build: Build) -> list[nn.Module]:
    """A head as it is and, where it has weights, with its first layer frozen."""
    torch.manual_seed(0)
    head = build(name, input_dim=WIDTH)
    first = next((n for n, _ in head.named_parameters()), None)
    if first is None:
        return [head]
    return [head, build(name, input_dim=WIDTH, freeze=first.rpartition(".")[0] or first)]


def fixed_keys(head: nn.Module) -> list[str]:
    """What must not move: frozen layers and parameters that need no gradient."""
    patterns = [p for path in getattr(head, "frozen", ()) for p in (path, f"{path}.*")]
    patterns += [n for n, p in head.named_parameters() if not p.requires_grad]
    return [k for k in head.state_dict() if any(fnmatchcase(k, p) for p in patterns)]


def wrap(head: nn.Module) -> nn.Sequential:
    """A backbone, the same in every process, and the head."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), head)


def batches(head: nn.Module) -> tuple[Tensor, Tensor]:
    """Inputs and targets of shape `(steps, ranks, batch, width)`."""
    generator = torch.Generator().manual_seed(2)
    sizes = head.output_dim if isinstance(head.output_dim, list) else [head.output_dim]
    widths = (head.input_dim, sum(sizes))
    x, y = (torch.randn(STEPS, RANKS, BATCH, w, generator=generator) for w in widths)
    return x, y


def whole(z: Tensor | list[Tensor]) -> Tensor:
    """The output of a head that gives one tensor, or one per set of prototypes."""
    return torch.cat(z, dim=-1) if isinstance(z, list) else z


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(
    model: nn.Module, steps: Sequence[Batches], after_step: Callable[[], None] = lambda: None
) -> State:
    """Steps on losses averaged over each step's batches; returns the last gradients."""
    optimiser = torch.optim.SGD(param_groups(model, 0.1), lr=0.1)
    for parts in steps:
        optimiser.zero_grad()
        for x, y in parts:
            ((whole(model.train()(x)) - y).square().mean() / len(parts)).backward()
        optimiser.step()
        after_step()
    return {n: full(p.grad.clone()) for n, p in model.named_parameters() if p.grad is not None}


# what each of the two processes does with a head


def ddp(head: nn.Module, rank: int, device: str = "cpu") -> Outcome:
    """DDP with an EMA twin, as in BYOL, MoCo and DINO."""
    x, y = (t[:, rank].to(device) for t in batches(head))
    model = DistributedDataParallel(wrap(head).to(device), find_unused_parameters=False)
    twin = copy.deepcopy(head).requires_grad_(False)

    def follow() -> None:
        if list(head.parameters()):  # lightly's function takes no empty list
            update_momentum(head, twin, m=0.9)

    gradients = train(model, [[part] for part in zip(x, y, strict=True)], follow)
    model.eval()(x[0])  # brings the buffers of rank 0 to all
    return {
        "gradients": {n.removeprefix("module."): g.cpu() for n, g in gradients.items()},
        "state": {k: v.cpu() for k, v in model.module.state_dict().items()},
        "twin": {k: v.cpu() for k, v in twin.state_dict().items()},
    }


def sync(head: nn.Module, rank: int) -> Outcome:
    """DDP on one GPU, batch norm taking its statistics over both processes."""
    return ddp(nn.SyncBatchNorm.convert_sync_batchnorm(head), rank, "cuda")


def described(head: nn.Module) -> tuple[Any, str]:
    try:
        return head.config, str(head).replace("FSDP", "")
    except Exception as error:
        return None, repr(error)


def fsdp(head: nn.Module, rank: int) -> Outcome:
    """FSDP2; then a second model, built without memory, takes over the first one's weights."""
    config = head.config
    mesh = init_device_mesh("cpu", (RANKS,))

    def shard(model: nn.Sequential) -> nn.Sequential:
        fully_shard(model[1], mesh=mesh)
        return fully_shard(model, mesh=mesh)

    x, y = (t[:, rank] for t in batches(head))
    model = shard(wrap(head))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gradients = train(model, [[part] for part in zip(x, y, strict=True)])
    state = get_model_state_dict(model, options=FULL)
    with torch.device("meta"):
        empty = shard(wrap(create_head(config)))
    empty.to_empty(device="cpu")
    set_model_state_dict(empty, dict(state), options=FULL)  # it writes into what it gets
    moved = get_model_state_dict(empty, options=FULL)
    outputs = [
        [whole(m.train(mode)(x[0])).detach() for m in (model, empty)] for mode in (False, True)
    ]
    return {
        "gradients": gradients,
        "state": state,
        "moved": moved,
        "outputs": outputs,
        "sharded": [n for n, p in head.named_parameters() if isinstance(p, DTensor)],
        "warnings": [str(w.message) for w in caught],
        "described": described(head),
    }


JOBS: dict[str, Callable[[nn.Module, int], Outcome]] = {"ddp": ddp, "fsdp": fsdp}
if torch.cuda.is_available():
    JOBS["sync"] = sync


def attempt(job: str, pickled: bytes, rank: int) -> list[Outcome]:
    try:
        return [JOBS[job](head, rank) for head in pickle.loads(pickled)]
    except Exception:
        return [{"error": traceback.format_exc()}]


def main(rank: int, folder: Path) -> None:
    """One of two processes: does all jobs on all heads, and writes the outcomes to a file.

    Each has a process group of its own, so that a head that fails does not stop the others.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # those of training are collected
    store = dist.FileStore(str(folder / "store"), RANKS)
    outcomes: dict[tuple[str, str], list[Outcome]] = {}
    for name, pickled in torch.load(folder / "heads.pt", weights_only=False).items():
        for job in JOBS:
            own = dist.PrefixStore(f"{job} {name}", store)
            patience = timedelta(seconds=60)
            dist.init_process_group("gloo", None, patience, RANKS, rank, own)
            outcomes[job, name] = attempt(job, pickled, rank)
            dist.destroy_process_group()
    torch.save(outcomes, folder / f"{rank}.pt")


# reading what they brought back


@pytest.fixture(scope="module")
def finished() -> dict[str, Any]:
    return {}


@pytest.fixture
def pair(
    finished: dict[str, Any], build: Build, tmp_path: Path
) -> Callable[[str, str], Iterator[tuple[nn.Module, Outcome, Outcome]]]:
    """Gives each variant of a head with what both processes say of it; the first call runs them."""

    def run() -> None:
        heads: dict[str, bytes] = {}
        for name in list_heads():
            with contextlib.suppress(Exception):  # that head's own tests fail
                heads[name] = pickle.dumps(variants(name, build))
        torch.save(heads, tmp_path / "heads.pt")
        processes = []
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        for rank in range(RANKS):
            with (tmp_path / f"{rank}.txt").open("w") as words:  # a pipe that nobody reads blocks
                command = [sys.executable, __file__, str(rank), str(tmp_path)]
                processes.append(subprocess.Popen(command, stdout=words, stderr=words, env=env))
        finished.update(heads=heads, error="", results=[])
        try:
            codes = [process.wait(timeout=300) for process in processes]
            if any(codes):
                both = (tmp_path / f"{rank}.txt" for rank in range(RANKS))
                finished["error"] = "\n".join(file.read_text() for file in both)
                return
        except subprocess.TimeoutExpired as error:
            finished["error"] = str(error)
            return
        finally:
            for process in processes:
                process.kill()
        both = (tmp_path / f"{rank}.pt" for rank in range(RANKS))
        finished["results"] = [torch.load(file, weights_only=False) for file in both]

    def outcomes(job: str, name: str) -> Iterator[tuple[nn.Module, Outcome, Outcome]]:
        if not finished:
            run()
        if name not in finished["heads"]:
            variants(name, build)  # raises again what it raised before
        if finished["error"]:
            pytest.fail(finished["error"])
        results = [result[job, name] for result in finished["results"]]
        errors = [o["error"] for outcome in results for o in outcome if "error" in o]
        if errors:
            pytest.fail("\n".join(errors))
        yield from zip(pickle.loads(finished["heads"][name]), *results, strict=True)

    return outcomes


def sees_rows_alone(head: nn.Module) -> bool:
    """Whether a row's output in training is the same whatever the rest of the batch is."""
    x = torch.randn(BATCH, WIDTH)
    z, half = (whole(copy.deepcopy(head).train()(part)) for part in (x, x[: BATCH // 2]))
    return torch.allclose(z[: BATCH // 2], half, atol=1e-5)


def reference(head: nn.Module, joint: bool) -> tuple[nn.Module, State]:
    """The same training in one process.

    Over the joint batch; or, where a row's output depends on the others, over the mean of both
    processes' losses.
    """
    model = wrap(head)
    x, y = batches(head)
    parts: list[Batches] = [
        [(a.flatten(0, 1), b.flatten(0, 1))] if joint else list(zip(a, b, strict=True))
        for a, b in zip(x, y, strict=True)
    ]
    return model, train(model, parts)


def assert_all_equal(a: State, b: State) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def check_training(head: nn.Module, outcome: Outcome, joint: bool) -> None:
    """Gradients and weights are those of one process; what is frozen has not moved a bit."""
    before = {f"1.{k}": v.clone() for k, v in head.state_dict().items()}
    fixed = [f"1.{k}" for k in fixed_keys(head)]
    model, gradients = reference(head, joint)
    assert gradients.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    torch.testing.assert_close(outcome["gradients"], gradients, rtol=1e-3, atol=1e-5)
    weights = {n: p.detach() for n, p in model.named_parameters()}
    found = {n: outcome["state"][n] for n in weights}
    torch.testing.assert_close(found, weights, rtol=1e-3, atol=1e-5)
    assert outcome["state"].keys() == model.state_dict().keys()
    assert_all_equal({k: outcome["state"][k] for k in fixed}, {k: before[k] for k in fixed})


@pytest.mark.slow
@pytest.mark.parametrize("name", list_heads())
def test_ddp_trains_as_one_process_and_keeps_frozen_layers(name: str, pair: Any) -> None:
    for head, first, second in pair("ddp", name):
        for part in ("gradients", "state", "twin"):
            assert_all_equal(first[part], second[part])
        check_training(head, first, joint=sees_rows_alone(head))


@pytest.mark.parametrize("name", list_heads())
def test_first_layer_is_frozen_in_the_second_variant(name: str, build: Build) -> None:
    for head in variants(name, build)[1:]:
        assert fixed_keys(head)


@pytest.mark.slow
@pytest.mark.parametrize("name", list_heads())
def test_fsdp_trains_as_one_process_and_keeps_frozen_layers(name: str, pair: Any) -> None:
    for head, *both in pair("fsdp", name):
        for outcome in both:
            assert outcome["sharded"] == [n for n, _ in head.named_parameters()]
            check_training(copy.deepcopy(head), outcome, joint=sees_rows_alone(head))


@pytest.mark.slow
@pytest.mark.parametrize("name", list_heads())
def test_fsdp_state_dict_fits_a_plain_head_and_one_built_on_the_meta_device(
    name: str, pair: Any
) -> None:
    for head, *both in pair("fsdp", name):
        for outcome in both:
            state = outcome["state"]
            own = {k.removeprefix("1."): v for k, v in state.items() if k.startswith("1.")}
            assert own.keys() == head.state_dict().keys()
            head.load_state_dict(own, strict=True)
            assert_all_equal(dict(head.state_dict()), own)
            assert_all_equal(outcome["moved"], state)
            for sharded, moved in outcome["outputs"]:
                assert torch.equal(sharded, moved)


@pytest.mark.slow
@pytest.mark.parametrize("name", list_heads())
def test_fsdp_leaves_config_and_print_as_they_were(name: str, pair: Any) -> None:
    for head, *both in pair("fsdp", name):
        for outcome in both:
            assert outcome["described"] == (head.config, str(head))


def passes_on(head: nn.Module) -> bool:
    """Whether the output is the input, or a part of it."""
    x = torch.randn(BATCH, WIDTH)
    return whole(head(x)).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@pytest.mark.slow
@pytest.mark.parametrize("name", list_heads())
def test_fsdp_finds_nothing_to_warn_of(name: str, pair: Any) -> None:
    """What a head computes is no view: FSDP2 would lose its hook to the first in-place change."""
    for head, *both in pair("fsdp", name):
        for outcome in both:
            assert outcome["warnings"] == [] or passes_on(head)


# in one process


@pytest.mark.parametrize("name", list_heads())
def test_sync_batch_norm_conversion_keeps_keys_values_and_outputs(name: str, build: Build) -> None:
    for head in variants(name, build):
        before = copy.deepcopy(head)
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(head)
        assert_all_equal(dict(converted.state_dict()), dict(before.state_dict()))
        assert [n for n, _ in converted.named_modules()] == [n for n, _ in before.named_modules()]
        for path, module in before.named_modules():
            sync_too = isinstance(converted.get_submodule(path), nn.SyncBatchNorm)
            assert sync_too == isinstance(module, _BatchNorm), path
        assert converted.config == before.config
        x = torch.randn(BATCH, WIDTH)
        torch.testing.assert_close(converted.eval()(x), before.eval()(x))


@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="SyncBatchNorm trains on a GPU only: its kernels for a CPU do not exist",
)
@pytest.mark.slow
@pytest.mark.parametrize("name", list_heads())
def test_sync_batch_norm_makes_ddp_train_as_on_the_joint_batch(name: str, pair: Any) -> None:
    for head, first, second in pair("sync", name):
        assert_all_equal(first["gradients"], second["gradients"])
        plain = copy.deepcopy(head)
        norms = [path for path, m in head.named_modules() if isinstance(m, _BatchNorm)]
        for path in norms:
            plain.set_submodule(path, nn.Identity())
        alone = sees_rows_alone(plain)
        if alone or not norms:  # else whitening, which stays per process
            check_training(head, first, joint=alone)


@pytest.mark.parametrize("name", list_heads())
def test_ema_twin_follows_every_parameter_and_no_frozen_layer(name: str, build: Build) -> None:
    for head in variants(name, build):
        if not list(head.parameters()):
            continue  # a host gives the twin one: see headplug/hosts/twins.py
        twin, before = copy.deepcopy(head), copy.deepcopy(head).state_dict()
        train(wrap(head), [list(zip(*(t[0] for t in batches(head)), strict=True))])
        update_momentum(head, twin, m=0.9)
        moving = dict(head.named_parameters())
        for key, value in twin.state_dict().items():
            if key in moving:
                expected = 0.9 * before[key] + 0.1 * moving[key].detach()
                torch.testing.assert_close(value, expected)
            else:
                assert torch.equal(value, before[key]), key


def score(z: Tensor | list[Tensor]) -> Tensor:
    flat = whole(z).flatten()
    return flat @ torch.linspace(-1, 1, len(flat)) / len(flat) ** 0.5


def trained(head: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in head.named_parameters() if p.requires_grad}


def backward(forward: Callable[[Tensor], Tensor], x: Tensor, head: nn.Module) -> State:
    """Output, and gradients of the input and of all parameters."""
    x = x.clone().requires_grad_()
    z = forward(x)
    gradients = torch.autograd.grad(score(z), [x, *trained(head).values()])
    return {
        "output": whole(z).detach(),
        **dict(zip(["input", *trained(head)], gradients, strict=True)),
    }


@pytest.mark.parametrize("name", list_heads())
def test_activation_checkpointing_gives_the_same_gradients(name: str, build: Build) -> None:
    for head in variants(name, build):
        x = torch.randn(BATCH, WIDTH)
        plain = copy.deepcopy(head)
        found = backward(partial(checkpoint, head, use_reentrant=False), x, head)
        assert_all_equal(found, backward(plain, x, plain))


def functional_score(weights: State, rest: State, head: nn.Module, x: Tensor) -> Tensor:
    return score(functional_call(head, (weights, rest), x))


@pytest.mark.parametrize("name", list_heads())
def test_functional_call_takes_other_weights_and_differentiates(name: str, build: Build) -> None:
    for head in variants(name, build):
        x = torch.randn(BATCH, WIDTH)
        before, other = (copy.deepcopy(head) for _ in range(2))
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(0.1 * torch.rand_like(parameter))
        weights = {n: p.detach().clone() for n, p in trained(other).items()}
        rest = {k: v.clone() for k, v in other.state_dict().items() if k not in weights}
        found = torch.func.grad(functional_score, argnums=(0, 3))(weights, rest, head, x)
        expected = backward(other, x, other)
        del expected["output"]
        torch.testing.assert_close({"input": found[1], **found[0]}, expected)
        assert_all_equal(dict(head.state_dict()), dict(before.state_dict()))


def one_of_each_class() -> list[str]:
    """The smallest heads that train something and together have every class not PyTorch's own."""
    classes: dict[str, list[type]] = {}
    for name in list_heads():
        with contextlib.suppress(Exception), torch.device("meta"):  # its own tests fail
            head = create_head(name, input_dim=512)
            if trained(head):
                classes[name] = [type(m) for m in head.modules()]
    chosen, seen = [], set[type]()
    for name in sorted(classes, key=lambda name: len(classes[name])):
        new = {c for c in classes[name] if not c.__module__.startswith("torch.")} - seen
        chosen += [name] if new else []
        seen |= new
    return chosen


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler"
)
@pytest.mark.parametrize("name", one_of_each_class())
def test_inductor_equals_eager(name: str, build: Build) -> None:
    head = build(name, input_dim=WIDTH)
    plain = copy.deepcopy(head)
    x = torch.randn(8 * BATCH, WIDTH)  # more rows than features, for whitening
    torch._dynamo.reset()
    found = backward(torch.compile(head, fullgraph=True), x, head)
    torch.testing.assert_close(found, backward(plain, x, plain), rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
