"""What is extracted, from which loaders, in which order, and what it leaves alone."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from headplug import FeatureStore, extract_features, features
from headplug.errors import (
    CheckpointError,
    DataError,
    OptionError,
    RunError,
    SlotError,
    TapError,
    UnknownNameError,
)


@pytest.mark.parametrize("on_disk", [False, True])
def test_extraction_equals_one_pass_by_hand(model, loader, data, at, by_hand, tmp_path, on_disk):
    out = tmp_path / "a" / "store" if on_disk else None
    store = extract_features(model, loader, at, out, shard_size=8)
    x, y = data.tensors
    assert store.points == at
    assert len(store) == 23
    assert store.ids.tolist() == list(range(23))
    assert torch.equal(store.labels, y)
    assert store.labels.dtype == torch.int64
    for point, expected in by_hand(model, x).items():
        torch.testing.assert_close(store[point], expected)
        assert store[point].dtype == torch.float32
        assert not store[point].requires_grad


@pytest.mark.parametrize("out", [None, "store"])
def test_order_is_by_index_whatever_the_loader_shuffles_drops_or_repeats(
    model, data, tmp_path, assert_equal, out
):
    expected = extract_features(model, DataLoader(data, batch_size=4), "projection")
    shuffled = DataLoader(data, batch_size=4, shuffle=True)
    for number, loader in enumerate(
        [
            shuffled,
            DataLoader(data, batch_size=4, shuffle=True, drop_last=True),
            DataLoader(data, batch_size=4, shuffle=True, num_workers=2, prefetch_factor=3),
            DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 4, drop_last=False)),
            DataLoader(data, batch_size=4, sampler=[*range(22, -1, -1), 3, 3]),
        ]
    ):
        folder = out and tmp_path / str(number)
        store = extract_features(model, loader, "projection", folder, shard_size=8)
        assert_equal(store, expected)


def test_a_part_of_the_data_keeps_its_indices(model, data):
    some = DataLoader(data, batch_size=2, sampler=[20, 3, 11])
    store = extract_features(model, some, "projection")
    assert store.ids.tolist() == [3, 11, 20]
    assert torch.equal(store.labels, data.tensors[1][[3, 11, 20]])
    store = extract_features(model, DataLoader(Subset(data, [20, 3]), batch_size=2), "projection")
    assert torch.equal(store.labels, data.tensors[1][[20, 3]])  # a Subset has indices of its own


def test_a_sampler_for_two_processes_gives_its_part_alone(model, data):
    sampler = DistributedSampler(data, num_replicas=2, rank=1, shuffle=False)
    store = extract_features(model, DataLoader(data, batch_size=4, sampler=sampler), "projection")
    assert store.ids.tolist() == [0, *range(1, 23, 2)]  # 0 is its padding


def test_batches_made_by_the_data_set_itself_work(model, data, assert_equal):
    class Batches(Dataset):
        def __getitem__(self, rows):
            return data.tensors[0][rows], data.tensors[1][rows], "more"

    sampler = BatchSampler(range(23), 4, drop_last=False)
    loader = DataLoader(Batches(), batch_size=None, sampler=sampler)
    expected = extract_features(model, DataLoader(data, batch_size=4), "projection")
    assert_equal(extract_features(model, loader, "projection"), expected)


def test_loaders_that_name_no_samples_are_read_in_their_order(model, data):
    class Keys(Dataset):  # its keys are no integers
        def __getitem__(self, key):
            return torch.full((1, 8, 8), float(ord(key))), ord(key)

    class Ready(Dataset):  # an item is a batch
        def __len__(self):
            return 2

        def __getitem__(self, i):
            return torch.ones(3, 1, 8, 8), torch.full((3,), i)

    class Wrapper(DataLoader):
        def __iter__(self):
            return ((x, y + 100) for x, y in super().__iter__())

    keys = DataLoader(Keys(), batch_sampler=[["b", "a"], ["c"]])
    assert extract_features(model, keys, "projection").labels.tolist() == [98, 97, 99]
    ready = DataLoader(Ready(), batch_size=None)
    assert extract_features(model, ready, "projection").labels.tolist() == [0] * 3 + [1] * 3
    wrapped = Wrapper(data, batch_size=4)
    labels = extract_features(model, wrapped, "projection").labels
    assert torch.equal(labels, data.tensors[1] + 100)


def test_streams_and_lists_of_batches_work(model):
    class Stream(IterableDataset):
        def __iter__(self):
            for i in range(7):
                yield torch.full((1, 8, 8), float(i)), i

    store = extract_features(model, DataLoader(Stream(), batch_size=3), ["projection"])
    assert store.labels.tolist() == store.ids.tolist() == list(range(7))
    pairs = ((torch.rand(2, 1, 8, 8), [0, 1]) for _ in range(2))
    assert extract_features(model, pairs, ["projection"]).labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("out", [None, "store"])
def test_batches_may_bring_ids_which_set_the_order(model, tmp_path, out):
    def batch(*ids):
        x = torch.tensor(ids).float().view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
        return x, torch.tensor(ids) * 10, torch.tensor(ids)

    folder = out and tmp_path / out
    batches = [batch(5, 3), batch(9), batch(1)]
    store = extract_features(model, batches, ["projection"], folder, shard_size=2)
    assert store.ids.tolist() == [1, 3, 5, 9]
    assert store.labels.tolist() == [10, 30, 50, 90]
    expected = features(model.eval(), batch(1, 3, 5, 9)[0], at="projection")
    torch.testing.assert_close(store["projection"], expected)
    torch.testing.assert_close(torch.cat(list(store.parts("projection"))), expected)
    x, y = store.dataset()[[3, 0]]
    torch.testing.assert_close(x, expected[[3, 0]])
    assert y.tolist() == [90, 10]


@pytest.mark.parametrize("out", [None, "store"])
def test_ids_may_be_strings_such_as_lightlys_file_names(model, tmp_path, out):
    names = ["b/ü.png", "a/2.png", "a/1.png", ""]
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    batches = [(x[:3], y[:3], names[:3]), (x[3:], y[3:], tuple(names[3:]))]
    folder = out and tmp_path / out
    store = extract_features(model, batches, ["projection"], folder, shard_size=3)
    assert store.ids == ["", "a/1.png", "a/2.png", "b/ü.png"]
    assert store.labels.tolist() == [3, 2, 1, 0]


def test_ids_may_be_paths_and_arrays_of_strings(model):
    x, names = torch.rand(2, 1, 8, 8), ["b.png", "a.png"]
    for ids in (np.array(names), np.array(names, object), tuple(map(Path, names))):
        assert extract_features(model, [(x, None, ids)], "projection").ids == ["a.png", "b.png"]
    store = FeatureStore.from_tensors({"h": torch.eye(2)}, ids=np.array(names))
    assert store.ids == ["a.png", "b.png"]
    assert store["h"].tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("out", [None, "store"])
@pytest.mark.parametrize(
    ("thirds", "message"),
    [
        ([[0, 1, 2, 0], [1, 2, 0, 1]], "ids must differ: 4 samples have 3. .*leave it out"),
        ([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 0]], "ids must differ: 12 samples have 11"),
        ([list("abcd"), list("efga")], "ids must differ: 8 samples have 7"),
        ([[0, 1, 2, 3], list("0123")], "all integers or all strings"),
        ([[0, 1, 2, 3], None], "ids are missing in some batches"),
        ([None, [8, 9, 10, 11]], "ids are missing in some batches"),
    ],
)
def test_ids_that_name_no_sample_are_refused(model, tmp_path, out, thirds, message):
    batches = [(torch.rand(4, 1, 8, 8), [0, 1, 2, 3], third) for third in thirds]
    with pytest.raises(DataError, match=message):
        extract_features(model, batches, "projection", out and tmp_path / out, shard_size=4)


def test_third_entries_that_are_no_ids_are_left_aside(model):
    for third in (torch.rand(2), [None, None], {"a": 1}, torch.ones(2, 2).long(), ["x"]):
        store = extract_features(model, [(torch.rand(2, 1, 8, 8), [4, 5], third)], ["projection"])
        assert store.ids.tolist() == [0, 1]


def test_taps_come_in_depth_order_each_once(model, loader):
    at = ["projection", "backbone.*", "pre_projection", "backbone.3"]
    store = extract_features(model, loader, at)
    assert store.points == [*(f"backbone.{i}" for i in range(5)), "pre_projection", "projection"]
    assert extract_features(model, loader, "projection").points == ["projection"]
    named = extract_features(model, loader, {"z": "projection", "h": "pre_projection"})
    assert named.points == ["h", "z"]


def test_in_place_modules_do_not_spoil_what_is_kept(model, loader, data):
    store = extract_features(model, loader, ["backbone.1", "projection"])
    with torch.no_grad():
        expected = model.eval().backbone[:2](data.tensors[0]).mean((2, 3))
    torch.testing.assert_close(store["backbone.1"], expected)


def test_transform_is_applied_to_the_batch(model, loader, data, by_hand):
    store = extract_features(model, loader, ["projection"], transform=lambda x: 2 * x + 1)
    expected = by_hand(model, 2 * data.tensors[0] + 1)["projection"]
    torch.testing.assert_close(store["projection"], expected)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(model, loader, at, fails):
    model.train()
    model.backbone[1].eval()
    modes = [m.training for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def pool(x):
        assert not any(m.training for m in model.modules())
        if fails:
            raise KeyError
        return x.flatten(1)

    if fails:
        with pytest.raises(KeyError):
            extract_features(model, loader, at, pool=pool)
    else:
        extract_features(model, loader, at, pool=pool)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


class Noisy(Dataset):
    """Draws from every generator there is."""

    def __len__(self):
        return 9

    def __getitem__(self, i):
        return torch.randn(1, 8, 8) + random.random() + np.random.rand(), i


@pytest.mark.parametrize("out", [None, "store"])
@pytest.mark.parametrize("workers", [0, 1])
def test_random_states_stay_as_they_were(model, tmp_path, out, workers):
    own = torch.Generator().manual_seed(5)
    for options in (
        {"shuffle": True, "generator": own},
        {"shuffle": True},
        {"sampler": WeightedRandomSampler([1.0] * 9, 9, generator=own)},
    ):
        loader = DataLoader(Noisy(), batch_size=4, num_workers=workers, **options)
        before = random.getstate(), np.random.get_state()[1].copy()
        states = torch.get_rng_state(), own.get_state()
        extract_features(model, loader, "projection", out and tmp_path / str(len(options)))
        assert random.getstate() == before[0]
        assert np.array_equal(np.random.get_state()[1], before[1])
        assert torch.equal(torch.get_rng_state(), states[0])
        assert torch.equal(own.get_state(), states[1])
        if out:
            break  # one is enough: the others would be another extraction


@pytest.mark.parametrize("out", [None, "store"])
def test_it_works_inside_inference_mode_as_lightnings_callbacks_run(
    model, loader, at, tmp_path, assert_equal, out
):
    with torch.inference_mode():
        store = extract_features(model, loader, at, out and tmp_path / out)
    assert_equal(store, extract_features(model, loader, at))
    assert not store["projection"].is_inference()


def test_no_more_of_the_model_runs_than_needed(model, loader):
    calls = []
    model.projection_head.register_forward_pre_hook(lambda *_: calls.append(1))
    extract_features(model, loader, ["backbone.3"])
    assert calls == []


# ---- types ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", [None, "store"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_may_be_kept_in_another_type(model, loader, tmp_path, out, dtype):
    folder = out and tmp_path / out
    store = extract_features(model, loader, ["projection"], folder, dtype=dtype)
    full = extract_features(model, loader, ["projection"])
    assert store["projection"].dtype == dtype
    assert torch.equal(store["projection"], full["projection"].to(dtype))
    if dtype == torch.bfloat16:
        assert store.numpy("projection").dtype == np.float32


def test_half_precision_is_kept_as_float32(model, loader):
    model = model.to(torch.bfloat16)
    store = extract_features(model, loader, ["projection"], transform=lambda x: x.bfloat16())
    assert store["projection"].dtype == torch.float32


def test_values_beyond_float16_are_refused(model, loader, tmp_path):
    for out in (None, tmp_path):
        with pytest.raises(DataError, match=r"'projection' has values beyond float16"):
            extract_features(
                model, loader, "projection", out, dtype=torch.float16, pool=lambda z: z * 1e9
            )
    with pytest.raises(OptionError, match="dtype is one of torch's floats"):
        extract_features(model, loader, "projection", dtype=torch.int64)
    with pytest.raises(OptionError, match="shard_size must be a positive integer"):
        extract_features(model, loader, "projection", shard_size=0)


@pytest.mark.parametrize("out", [None, "store"])
@pytest.mark.parametrize(
    ("labels", "dtype"),
    [
        (torch.randperm(6), torch.int64),
        (torch.randperm(6).to(torch.uint8), torch.int64),
        (torch.rand(6) > 0.5, torch.int64),
        (torch.eye(6)[:, :4].long(), torch.int64),
        (torch.rand(6), torch.float32),
        (torch.rand(6, 3, dtype=torch.float64), torch.float64),
        (None, None),
    ],
)
def test_labels_of_all_kinds(model, tmp_path, labels, dtype, out):
    x = torch.rand(6, 1, 8, 8)
    parts = [(x[i : i + 2], *(() if labels is None else (labels[i : i + 2],))) for i in (0, 2, 4)]
    store = extract_features(model, parts, ["projection"], out and tmp_path / out, shard_size=2)
    if labels is None:
        assert store.labels is None
    else:
        assert store.labels.dtype == dtype
        assert torch.equal(store.labels, labels.to(dtype))


def test_batches_may_be_images_alone(model):
    x = torch.rand(4, 1, 8, 8)
    expected = extract_features(model, [(x, None)], "projection")["projection"]
    for batches in ([x[:2], x[2:]], [(x,)], [[x]], DataLoader(x, batch_size=4)):
        store = extract_features(model, batches, "projection")
        assert store.labels is None
        assert torch.allclose(store["projection"], expected)


# ---- pooling -------------------------------------------------------------------------------------


def test_the_mean_over_positions_of_every_stage_of_cnn_vit_and_swin():
    x = torch.randn(2, 3, 64, 64)
    for name, at, widths in (
        ("resnet18", "layer*", [64, 128, 256, 512]),
        ("swin_tiny_patch4_window7_224", "layers.*", [96, 192, 384, 768]),
        ("vit_tiny_patch16_224", "blocks.1[01]", [192, 192]),
    ):
        options = {} if name == "resnet18" else {"img_size": 64}
        model = timm.create_model(name, **options).eval()
        store = extract_features(model, [(x, [0, 1])], at)
        assert [store[p].shape[1] for p in store.points] == widths
        if "vit" in name:
            expected = [value[:, 1:].mean(1) for value in features(model, x, store.points)]
        else:
            maps = model.forward_intermediates(x, intermediates_only=True)
            expected = [m.mean((2, 3)).detach() for m in maps[-4:]]
        for point, value in zip(store.points, expected, strict=True):
            torch.testing.assert_close(store[point], value)


@pytest.mark.parametrize("out", [None, "store"])
def test_tokens_are_kept_in_their_own_shape(tmp_path, out):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
    x = torch.randn(5, 3, 32, 32)
    batches = [(x[:3], [0, 1, 2]), (x[3:], [3, 4])]
    store = extract_features(
        model, batches, "blocks.1", out and tmp_path / out, pool="tokens", shard_size=3
    )
    assert store["blocks.1"].shape == (5, 4, 192)
    assert repr(store) == "FeatureStore(5 samples; blocks.1: 4 x 192)"
    expected = features(model, x, "blocks.1", pool="tokens")
    torch.testing.assert_close(store["blocks.1"], expected)


def test_pool_can_be_any_function_of_a_tap(model, loader, data, at):
    store = extract_features(model, loader, at, pool=lambda x: x.flatten(1)[:, :3])
    first = model.eval().backbone[0](data.tensors[0]).flatten(1)[:, :3]
    torch.testing.assert_close(store["backbone.0"], first.detach())
    for wrong in (lambda x: x.mean(), lambda x: x[None], lambda x: x[:1]):
        with pytest.raises(DataError, match=r"it must give \(5, D\)"):
            extract_features(model, loader, at, pool=wrong)
    with pytest.raises(TapError, match=r"pool must make a tensor of \(5, 4, 6, 6\), not None"):
        extract_features(model, loader, at, pool=lambda x: None)
    with pytest.raises(OptionError, match="pool is one of"):
        extract_features(model, loader, at, pool="max")


def test_types_that_numpy_has_not_are_refused(model, loader):
    for dtype in (torch.float8_e4m3fn, torch.complex64, "float32"):
        with pytest.raises(OptionError, match="floats float32, float16, bfloat16, float64, not"):
            extract_features(model, loader, "projection", dtype=dtype)


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "the loader is empty"),
        (DataLoader(TensorDataset(torch.rand(0, 1, 8, 8))), "the loader is empty"),
        (3, "a int cannot be iterated"),
        ([{"image": torch.rand(2, 1, 8, 8)}], r"must yield \(images, labels\), not a dict"),
        ([([torch.rand(2, 1, 8, 8)] * 2, [0, 1])], "one view"),
        ([()], "tensor of images first"),
        ([torch.tensor(1.0)], "one image without a batch"),
        ([(torch.rand(2, 1, 8, 8), [0, 1, 2])], "2 images with 3 labels"),
        ([(torch.rand(2, 1, 8, 8), ["cat", "dog"])], "such as 'cat': map each to an integer, or"),
        ([(torch.rand(2, 1, 8, 8), [None, None])], "the labels cannot be made a tensor"),
        ([(torch.rand(0, 1, 8, 8), [])] * 2, "the loader is empty"),
        ([(torch.rand(2, 1, 8, 8), torch.tensor(1))], "labels must be"),
        ([(torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8))], "labels must be"),
        ([(torch.rand(2, 1, 8, 8), torch.rand(2).to(torch.complex64))], "labels must be"),
        (
            [(torch.rand(2, 1, 8, 8), [0, 1]), (torch.rand(2, 1, 8, 8),)],
            "the labels are missing in some batches",
        ),
    ],
)
def test_a_loader_that_cannot_be_used_is_refused(model, tmp_path, batches, message, on_disk):
    out = tmp_path / "store" if on_disk else None
    with pytest.raises(DataError, match=message):
        extract_features(model, batches, ["projection"], out)
    with pytest.raises(CheckpointError, match="no finished feature store"):
        FeatureStore.open(tmp_path / "store")


def test_samples_that_a_collate_function_drops_are_noticed(model, data):
    def collate(samples):
        return torch.stack([x for x, y in samples if y != 7])

    loader = DataLoader(data, batch_size=5, collate_fn=collate)
    with pytest.raises(DataError, match=r"a batch of 4 of 5 samples.*Subset"):
        extract_features(model, loader, "projection")


def test_features_of_several_shapes_are_refused(model, tmp_path):
    batches = [(torch.rand(2, 1, n, n), [0, 1]) for n in (8, 10)]
    for size in (4, 2):
        with pytest.raises(DataError, match=r"'backbone.0'.* only one shape can be kept"):
            extract_features(model, batches, "backbone.0", pool="flat", shard_size=size)


def test_taps_without_a_row_per_image_are_refused(loader):
    lstm = nn.Sequential(nn.Flatten(2), nn.LSTM(64, 3))
    with pytest.raises(DataError, match=r"'1' gives a tuple, not a tensor.*1:output\[0\]"):
        extract_features(lstm, loader, ["1"])
    assert extract_features(lstm, loader, ["1:output[0]"])["1:output[0]"].shape == (23, 3)

    class Windows(nn.Module):
        def forward(self, x):
            return x.repeat(4, 1, 1, 1)

    windows = nn.Sequential(Windows(), nn.Conv2d(1, 2, 1))
    with pytest.raises(DataError, match=r"'0' gives shape \(20, 1\) for 5 images"):
        extract_features(windows, loader, ["0", "1"])


@pytest.mark.parametrize("name", [":labels", ":ids", ":names", "__metadata__", 3])
@pytest.mark.parametrize("out", [None, "store"])
def test_names_that_a_store_needs_are_no_taps(model, loader, tmp_path, name, out):
    with pytest.raises(DataError, match=f"a tap is called {name!r}, which .* another name"):
        extract_features(model, loader, {"z": "projection", name: "backbone"}, out and tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: nn.Linear(64, 3, device="meta"), r"1.weight .* meta device.*load_state_dict"),
        (lambda: nn.LazyLinear(3), r"1.weight .* no shape before the first batch.*model\(images\)"),
    ],
)
def test_models_without_values_are_refused_before_the_work(tmp_path, layer, message):
    model = nn.Sequential(nn.Flatten(), layer())
    for out in (None, tmp_path / "s"):
        with pytest.raises(RunError, match=message):
            extract_features(model, [(torch.rand(2, 1, 8, 8), [0, 1])], "1", out)
    assert not list(tmp_path.iterdir())


def test_empty_batches_are_passed_over(model, tmp_path):
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    batches = [(x[:0], y[:0]), (x[:3], y[:3]), (x[:0], y[:0]), (x[3:], y[3:])]
    for out in (None, tmp_path / "s"):
        store = extract_features(model, batches, "projection", out, shard_size=3)
        assert store.labels.tolist() == [0, 1, 2, 3]


def test_points_are_checked_before_the_work(model, at, tmp_path):
    def never():
        raise AssertionError("the loader was read")
        yield

    with pytest.raises(UnknownNameError, match="Closest"):
        extract_features(model, never(), ["projektion"])
    with pytest.raises(TapError, match="at least one point"):
        extract_features(model, never(), [])
    with pytest.raises(SlotError):
        extract_features(nn.Sequential(nn.ReLU()), never(), ["projection"])
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write to"):
        extract_features(model, never(), at, tmp_path / "file" / "store")
    model.unused = nn.ReLU()
    with pytest.raises(TapError, match="'unused' was never reached"):
        extract_features(model, [(torch.rand(2, 1, 8, 8), [0, 1])], ["unused", "projection"])
