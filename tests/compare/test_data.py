import io
import json
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from headplug.compare.data import images as images_module
from headplug.compare.data import load_data
from headplug.compare.data.images import LazyImages, ResidentImages, to_pixels
from headplug.compare.data.sources import FolderSource
from headplug.compare.data.torchvision_data import TorchvisionSource
from headplug.errors import DataError, OptionError, UnknownNameError

CLASSES = ["ant", "bee", "cow"]


def load(spec, **options):
    return load_data(str(spec), show_progress=False, **options)


def noise(count, size=(8, 8), channels=3, seed=0):
    """Random images (N, H, W, C), or (N, H, W) for one channel."""
    shape = (count, *size, 3) if channels == 3 else (count, *size)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


def write_parquet(path, encoded, labels, *, flat=False, label="label", names=None, **options):
    encoded = pa.array(encoded, pa.binary())
    if flat:
        columns = {"image.bytes": encoded}
    else:
        paths = pa.nulls(len(encoded), pa.string())
        columns = {"image": pa.StructArray.from_arrays([encoded, paths], ["bytes", "path"])}
    table = pa.table({**columns, label: pa.array(labels)})
    if names:
        about = {"info": {"features": {label: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    pq.write_table(table, path, **options)


@pytest.fixture
def parquet(tmp_path):
    """A parquet folder of 30 + 12 images in three classes; gives the folder and train's pixels."""
    folder = tmp_path / "bugs"
    folder.mkdir()
    pixels = noise(30)
    for name, array in {"train": pixels, "test": noise(12, seed=1)}.items():
        labels = [i % 3 for i in range(len(array))]
        write_parquet(folder / f"{name}.parquet", map(png, array), labels, row_group_size=7)
    return folder, pixels


@pytest.fixture
def folder(tmp_path):
    """An image folder of 3 x 10 + 3 x 4 images; gives the folder and its pixels by class."""
    root = tmp_path / "zoo"
    pixels = {}
    for seed, (split, count) in enumerate({"train": 10, "test": 4}.items()):
        for c, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            pixels[split, name] = noise(count, seed=10 * seed + c)
            for i, array in enumerate(pixels[split, name]):
                Image.fromarray(array).save(root / split / name / f"{i}.png")
    return root, pixels


@pytest.fixture
def tiny_memory(monkeypatch):
    monkeypatch.setattr(images_module, "RESIDENT_LIMIT", 1000)


# what comes out


def test_digits_are_scikit_learns_scaled_to_a_byte_and_split_by_class():
    from sklearn.datasets import load_digits

    data = load("digits")
    assert data.train.shape == (1, 8, 8)
    assert (len(data.train), len(data.test)) == (1437, 360)
    both = torch.cat([data.train.tensor(), data.test.tensor()]).flatten(1)
    expected = torch.from_numpy(np.round(load_digits().data * 255 / 16)).byte()
    assert sorted(both.tolist()) == sorted(expected.tolist())
    train, test = (torch.bincount(s.labels) for s in (data.train, data.test))
    assert (test / (train + test) - 0.2).abs().max() < 0.01


def test_digits_split_does_not_follow_the_seed():
    assert torch.equal(load("digits", seed=0).train.tensor(), load("digits", seed=7).train.tensor())


@pytest.mark.parametrize("flat", [False, True], ids=["struct", "flat"])
def test_parquet_images_are_what_was_encoded_in_order(tmp_path, flat):
    pixels, labels = noise(700, (6, 9)), np.arange(700) % 4
    for name in ("train", "test"):
        file = tmp_path / f"{name}.parquet"
        write_parquet(file, map(png, pixels), labels, flat=flat, row_group_size=600)
    data = load(tmp_path)
    assert data.train.shape == (3, 6, 9)
    np.testing.assert_array_equal(data.train.tensor().permute(0, 2, 3, 1), pixels)
    assert data.test.labels.tolist() == labels.tolist()
    assert data.train.labels.dtype == torch.int64


def test_parquet_shards_are_joined_and_named_by_metadata(tmp_path):
    pixels = noise(20, channels=1)
    for i in range(2):
        part = slice(10 * i, 10 * i + 10)
        file = tmp_path / f"train-0000{i}-of-00002.parquet"
        options = {"label": "fine_label", "names": ["no", "odd", "even"]}
        write_parquet(file, map(png, pixels[part]), [1, 2] * 5, **options)
    write_parquet(tmp_path / "validation-0.parquet", map(png, pixels), [2, 1] * 10, **options)
    data = load(tmp_path)
    np.testing.assert_array_equal(data.train.tensor()[:, 0], pixels)
    assert data.classes == ["odd", "even"]  # nothing is labelled 0
    assert data.train.labels.tolist() == [0, 1] * 10
    assert data.test.labels.tolist() == [1, 0] * 10


def test_parquet_with_a_missing_shard_is_refused(tmp_path):
    write_parquet(tmp_path / "train-00000-of-00002.parquet", map(png, noise(4)), [0, 1] * 2)
    with pytest.raises(DataError, match="1 of 2 train files"):
        load(tmp_path)


def test_image_folder_is_read_in_the_order_of_its_names(folder):
    root, pixels = folder
    (root / "train" / ".cache").mkdir()
    (root / "train" / "ant" / "notes.txt").write_text("not an image")
    data = load(root)
    assert data.classes == CLASSES
    assert data.name == "zoo"
    expected = np.concatenate([pixels["train", name] for name in CLASSES])
    np.testing.assert_array_equal(data.train.tensor().permute(0, 2, 3, 1), expected)
    assert data.train.labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10


def test_image_folder_takes_val_for_a_test_split_and_deeper_folders(folder):
    root, _ = folder
    (root / "test").rename(root / "val")
    (root / "val" / "ant" / "images").mkdir()
    (root / "val" / "ant" / "0.png").rename(root / "val" / "ant" / "images" / "0.PNG")
    assert torch.bincount(load(root).test.labels).tolist() == [4, 4, 4]


def test_torchvision_data_are_read_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    raw = tmp_path / ".cache/headplug/torchvision/MNIST/raw"
    raw.mkdir(parents=True)
    pixels, labels = noise(20, (28, 28), channels=1), np.arange(20, dtype=np.uint8) % 10
    for part in ("train", "t10k"):
        image_file = struct.pack(">IIII", 0x803, 20, 28, 28) + pixels.tobytes()
        label_file = struct.pack(">II", 0x801, 20) + labels.tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(image_file)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(label_file)
    data = load("torchvision:MNIST")
    np.testing.assert_array_equal(data.train.tensor()[:, 0], pixels)
    assert data.test.labels.tolist() == labels.tolist()
    assert data.classes[3] == "3 - three"


def test_torchvision_data_without_a_list_of_labels_are_asked_for_each():
    from torchvision.datasets import FakeData
    from torchvision.transforms.functional import pil_to_tensor

    dataset = FakeData(12, (3, 8, 8), num_classes=3)
    source = TorchvisionSource("fake", dataset)
    assert source.labels.tolist() == [label for _, label in dataset]
    assert np.array_equal(source.open(5), dataset[5][0])
    with pytest.raises(DataError, match="pairs of Tensor and int"):
        TorchvisionSource("fake", FakeData(12, (3, 8, 8), 3, pil_to_tensor))


# one shape for all


def test_image_size_agrees_with_torchvision(parquet, tmp_path):
    from torchvision.transforms import v2
    from torchvision.transforms.functional import InterpolationMode, pil_to_tensor

    y, x = np.mgrid[0:40, 0:60]
    image = Image.fromarray(np.stack([4 * x, 6 * y, 2 * (x + y)], -1).astype(np.uint8))
    resize = v2.Resize(20, InterpolationMode.BICUBIC)
    expected = pil_to_tensor(v2.CenterCrop(20)(resize(image))).int()
    found = torch.from_numpy(to_pixels(image, (3, 20, 20)).copy()).int()
    assert (found - expected).abs().max() <= 1
    assert load(parquet[0], image_size=5).train.shape == (3, 5, 5)


def test_large_jpegs_are_read_almost_as_if_decoded_in_full(tmp_path):
    y, x = np.mgrid[0:256, 0:320]
    Image.fromarray((127 + 120 * np.sin(x / 40) * np.cos(y / 50)).astype(np.uint8)).save(
        tmp_path / "wave.jpg", quality=95
    )
    with Image.open(tmp_path / "wave.jpg") as lazy, Image.open(tmp_path / "wave.jpg") as full:
        full.load()
        found, expected = (to_pixels(i, (1, 64, 64)).astype(int) for i in (lazy, full))
        assert (lazy.size, full.size) == ((160, 128), (320, 256))
    assert np.abs(found - expected).max() <= 6


@pytest.mark.parametrize(("sides", "expected"), [((10, 20, 30), 20), ((300, 400, 500), 224)])
def test_without_image_size_mixed_sizes_become_the_median_shorter_side_up_to_224(
    tmp_path, sides, expected
):
    encoded = [png(noise(1, (side, side + 3))[0]) for side in sides for _ in range(2)]
    for name in ("train", "test"):
        write_parquet(tmp_path / f"{name}.parquet", encoded, [0, 1] * 3)
    assert load(tmp_path).train.shape == (3, expected, expected)


def test_one_colour_image_makes_all_of_them_rgb(tmp_path):
    grey, colour = noise(10, channels=1), noise(1)
    encoded = [*map(png, grey), *map(png, colour)]
    write_parquet(tmp_path / "train.parquet", encoded, [0, 1] * 5 + [0])
    write_parquet(tmp_path / "test.parquet", encoded[:4], [0, 1] * 2)
    pixels = load(tmp_path).train.tensor()
    assert pixels.shape == (11, 3, 8, 8)
    np.testing.assert_array_equal(pixels[:10], np.repeat(grey[:, None], 3, axis=1))


def test_16_bit_greyscale_is_scaled_not_clipped():
    values = np.array([[0, 255, 256], [32768, 65280, 65535]], dtype=np.uint16)
    pixels = to_pixels(Image.open(io.BytesIO(png(values))), (1, 2, 3))
    assert pixels.tolist() == [[[0, 0, 1], [128, 255, 255]]]


@pytest.mark.parametrize("mode", ["1", "P", "RGBA", "LA", "CMYK"])
def test_every_usual_mode_becomes_rgb(mode):
    red = Image.new("RGB", (4, 4), (255, 0, 0)) if mode in ("P", "RGBA", "CMYK") else None
    image = red.convert(mode) if red else Image.new("L", (4, 4), 255).convert(mode)
    expected = [255, 0, 0] if red else [255] * 3
    assert to_pixels(image, (3, 4, 4))[:, 2, 2].tolist() == expected


# limit


def test_limit_takes_as_many_of_each_class_and_follows_the_seed(parquet):
    folder, pixels = parquet
    a, b, c = (load(folder, limit=9, seed=seed) for seed in (0, 0, 1))
    assert torch.bincount(a.train.labels).tolist() == [3, 3, 3]
    assert torch.bincount(a.test.labels).tolist() == [3, 3, 3]
    assert torch.equal(a.train.tensor(), b.train.tensor())
    assert not torch.equal(a.train.tensor(), c.train.tensor())
    whole = [(p.tobytes(), i % 3) for i, p in enumerate(pixels)]
    taken = a.train.tensor().permute(0, 2, 3, 1).contiguous().numpy()
    assert all(
        (p.tobytes(), y) in whole for p, y in zip(taken, a.train.labels.tolist(), strict=True)
    )


def test_limit_keeps_images_and_labels_together_across_batches_and_row_groups(tmp_path):
    rows = np.arange(1000)
    pixels = np.zeros((1000, 4, 4, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = (part[:, None, None] for part in np.divmod(rows, 256))
    for name in ("train", "test"):
        file = tmp_path / f"{name}.parquet"
        write_parquet(file, map(png, pixels), rows % 7, row_group_size=600)
    images = load(tmp_path, limit=100).train
    high, low, _ = images.tensor()[..., 0, 0].long().T
    taken = 256 * high + low
    assert torch.equal(images.labels, taken % 7)
    assert (taken.diff() > 0).all()
    assert taken.max() > 600


def test_limit_is_exact_when_a_class_is_short(tmp_path):
    labels = [0] * 3 + [1] * 40 + [2] * 40
    for name in ("train", "test"):
        write_parquet(tmp_path / f"{name}.parquet", map(png, noise(83)), labels)
    counts = torch.bincount(load(tmp_path, limit=30).train.labels).tolist()
    assert counts[0] == 3
    assert sorted(counts[1:]) == [13, 14]


def test_images_know_their_rows_in_the_data(folder, parquet, monkeypatch):
    for place in (folder[0], parquet[0]):
        whole = load(place).train
        assert whole.rows.tolist() == list(range(len(whole)))
        some = load(place, limit=6).train
        assert len(some) == 6
        assert torch.equal(some.tensor(), whole.tensor()[some.rows])
        assert torch.equal(some.labels, whole.labels[some.rows])
    Path(sorted(folder[0].glob("train/*/*.png"))[2]).write_text("damaged")
    for limit in (images_module.RESIDENT_LIMIT, 0):
        monkeypatch.setattr(images_module, "RESIDENT_LIMIT", limit)
        with pytest.warns(UserWarning, match="left out"):
            rows = load(folder[0]).train.rows.tolist()
        assert rows == [row for row in range(len(rows) + 1) if row != 2]


def test_a_split_that_is_not_asked_for_is_not_read_and_changes_nothing(folder, monkeypatch):
    both = load(folder[0])
    opened = []
    look = FolderSource.open
    monkeypatch.setattr(FolderSource, "open", lambda self, i: opened.append(i) or look(self, i))
    load(folder[0])
    whole = len(opened)
    one = load(folder[0], splits=["test"])
    assert len(opened) - whole == whole - len(both.train)  # the sample of it is looked at
    assert (len(one.train), one.train.shape) == (0, both.train.shape)
    assert all(torch.equal(one.test[i][0], both.test[i][0]) for i in range(len(both.test)))
    assert (one.fingerprint, one.classes) == (both.fingerprint, both.classes)


def test_where_nothing_is_trained_classes_may_have_one_image(folder):
    assert len(load(folder[0], limit=2, to_train=False).train) == 2
    for name in ("ant", "bee"):
        shutil.rmtree(folder[0] / "train" / name)
        shutil.rmtree(folder[0] / "test" / name)
    assert load(folder[0], to_train=False).classes == ["cow"]


def test_limit_above_the_size_changes_nothing(parquet):
    whole, limited = load(parquet[0]), load(parquet[0], limit=1000, seed=3)
    assert torch.equal(whole.train.tensor(), limited.train.tensor())
    assert whole.fingerprint == limited.fingerprint


# indexing


def in_memory_and_lazy(root, monkeypatch):
    resident = load(root).train
    monkeypatch.setattr(images_module, "RESIDENT_LIMIT", 1000)
    lazy = load(root).train
    assert isinstance(resident, ResidentImages)
    assert isinstance(lazy, LazyImages)
    return resident, lazy


def test_lazy_and_resident_images_are_the_same(folder, monkeypatch):
    resident, lazy = in_memory_and_lazy(folder[0], monkeypatch)
    whole = resident.tensor()
    for images in (resident, lazy):
        assert len(images) == 30
        for index in ([3, 29, 3], torch.tensor([7]), [], [-1, 0]):
            pixels, labels, rows = images[index]
            expected = torch.as_tensor(index, dtype=torch.int64) % 30
            assert torch.equal(pixels, whole[expected])
            assert torch.equal(labels, resident.labels[expected])
            assert torch.equal(rows, expected)
        pixels, label, row = images[12]
        assert torch.equal(pixels, whole[12])
        assert (label, row) == (1, 12)


@pytest.mark.parametrize("index", [30, -31, [0, 30], torch.tensor([True] * 30), 0.5])
def test_a_wrong_index_is_an_index_error(folder, monkeypatch, index):
    for images in in_memory_and_lazy(folder[0], monkeypatch):
        with pytest.raises(IndexError):
            images[index]


def test_images_can_be_iterated(folder):
    assert [row for _, _, row in load(folder[0]).test] == list(range(12))


def test_lazy_images_work_in_loader_workers_and_pickled(folder, monkeypatch):
    resident, lazy = in_memory_and_lazy(folder[0], monkeypatch)
    assert torch.equal(pickle.loads(pickle.dumps(lazy))[[5, 6]][0], resident.tensor()[5:7])
    batches = [[0, 9, 18], [29], list(range(20, 30))]
    loader = torch.utils.data.DataLoader(lazy, batch_size=None, sampler=batches, num_workers=1)
    for batch, (pixels, labels, rows) in zip(batches, loader, strict=True):
        assert torch.equal(pixels, resident.tensor()[batch])
        assert torch.equal(labels, resident.labels[batch])
        assert rows.tolist() == batch


def test_lazy_tensor_is_refused_above_the_limit_and_works_below(folder, monkeypatch):
    resident, lazy = in_memory_and_lazy(folder[0], monkeypatch)
    with pytest.raises(DataError, match=r"30 images .* GiB decoded.*image_size"):
        lazy.tensor()
    monkeypatch.setattr(images_module, "RESIDENT_LIMIT", 2**30)
    assert torch.equal(lazy.tensor(), resident.tensor())


def test_a_file_damaged_after_loading_is_named(folder, monkeypatch):
    _, lazy = in_memory_and_lazy(folder[0], monkeypatch)
    (folder[0] / "train/ant/3.png").write_bytes(b"overwritten")
    with pytest.raises(DataError, match=r"train/ant/3\.png cannot be decoded \(not an image"):
        lazy[[2, 3]]


@pytest.mark.usefixtures("tiny_memory")
def test_parquet_above_the_limit_is_refused_with_what_to_do(parquet):
    with pytest.raises(DataError, match="image folder"):
        load(parquet[0])
    assert len(load(parquet[0], image_size=2).train) == 30


# damage


@pytest.mark.parametrize("lazily", [False, True])
def test_one_unreadable_file_is_left_out_with_a_warning(folder, monkeypatch, lazily):
    root, _ = folder
    whole = load(root)
    (root / "train/bee/4.png").write_bytes(b"")
    if lazily:
        monkeypatch.setattr(images_module, "RESIDENT_LIMIT", 1000)
    with pytest.warns(UserWarning, match=r"1 of 30 images cannot be read: .*bee/4\.png") as caught:
        data = load(root)
    assert len(caught) == 1
    kept = [i for i in range(30) if i != 14]
    assert torch.equal(data.train[list(range(29))][0], whole.train.tensor()[kept])
    assert torch.equal(data.train.labels, whole.train.labels[kept])


def test_more_unreadable_files_are_refused_and_the_first_three_named(folder):
    root, _ = folder
    for i in (1, 2, 3, 4):
        file = root / f"train/cow/{i}.png"
        file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(
        DataError, match=r"4 of 30 .*cow/1\.png.*cow/2\.png.*cow/3\.png .*; \.\.\."
    ) as e:
        load(root)
    assert "cow/4.png" not in str(e.value)
    assert "At most 1 may be left out" in str(e.value)


@pytest.mark.parametrize("content", [b"no image", None], ids=["garbage", "null"])
def test_an_unreadable_parquet_row_is_named_by_file_and_row(parquet, content):
    folder, _ = parquet
    pixels, encoded = noise(300), list(map(png, noise(300)))
    encoded[170] = content
    write_parquet(folder / "train.parquet", encoded, [0, 1, 2] * 100, row_group_size=64)
    with pytest.warns(UserWarning, match=r"1 of 300 .*train\.parquet row 170 "):
        data = load(folder)
    np.testing.assert_array_equal(
        data.train.tensor().permute(0, 2, 3, 1), np.delete(pixels, 170, axis=0)
    )
    for row in (0, 1, 2):  # four are more than 1 % of 300
        encoded[row] = content
    write_parquet(folder / "train.parquet", encoded, [0, 1, 2] * 100)
    with pytest.raises(DataError, match=r"4 of 300 .*row 0 .*row 1 .*row 2 .*At most 3"):
        load(folder)


def test_images_of_unknown_range_are_refused(parquet):
    buffer = io.BytesIO()
    Image.fromarray(np.ones((8, 8), np.float32)).save(buffer, "tiff")
    write_parquet(parquet[0] / "train.parquet", [buffer.getvalue()] * 6, [0, 1, 2] * 2)
    with pytest.raises(DataError, match="mode F, whose range of values is unknown"):
        load(parquet[0])


@pytest.mark.parametrize("cut", [0, 100, -100], ids=["empty", "start", "no_footer"])
def test_a_truncated_parquet_file_is_named(parquet, cut):
    file = parquet[0] / "test.parquet"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"test\.parquet is not a readable parquet file"):
        load(parquet[0])


def test_a_parquet_file_damaged_in_the_middle_is_named(parquet):
    file = parquet[0] / "train.parquet"
    content = bytearray(file.read_bytes())
    content[4:3000] = bytes(2996)
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"train\.parquet is not a readable parquet file"):
        load(parquet[0])


# refusals


def test_an_unknown_spec_shows_what_is_there_and_the_forms(folder):
    with pytest.raises(UnknownNameError) as error:
        load(folder[0].parent / "zooo")
    for part in ("zooo", "holds zoo", "digits", "torchvision:NAME", "<class>", "train.parquet"):
        assert part in str(error.value)


def test_an_unknown_torchvision_name_suggests_the_nearest():
    with pytest.raises(UnknownNameError, match="Closest: CIFAR10"):
        load("torchvision:CIFAR11")


def test_a_failed_download_names_the_data_set_and_a_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"cannot provide CIFAR10 .*network.*headplug/torchvision"):
        load("torchvision:CIFAR10")


def remove(*names):
    return lambda root: [shutil.rmtree(root / name) for name in names]


def stranger(root):
    shutil.copytree(root / "test/ant", root / "test/yak")


def single_image(root):
    for i in range(1, 10):
        (root / f"train/bee/{i}.png").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("train"), "has no train split: add .* It holds test"),
        (remove("test"), "has no test split: add test.parquet, or test/<class>.* It holds train"),
        (remove("test/ant", "test/bee", "test/cow"), "test holds no labelled images"),
        (remove("train/ant", "train/bee"), r"single class \(cow\)"),
        (remove("train/bee"), r"test has classes that .*train has not: bee\. Train has: ant, cow"),
        (stranger, "has not: yak"),
        (single_image, r"fewer than 2 images in 1 of 3 classes: bee \(1\)"),
        (lambda root: (root / "train/dog").mkdir(), r"dog \(0\)"),
    ],
)
def test_an_unusable_image_folder_is_refused(folder, change, message):
    change(folder[0])
    with pytest.raises(DataError, match=message):
        load(folder[0])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", "b"] * 3, "not integers but object.*'a'"),
        ([0.0, 1.0] * 3, "not integers but float64"),
        ([0, 1, None] * 2, "2 rows have no label"),
        ([0, 1, -1] * 2, "2 labels .* negative, the first at row 2"),
        ([4] * 6, r"single class \(4\)"),
        ([0, 1, 5] * 2, "has not: 2. Train has: 0, 1, 5"),
        (pa.array([], pa.int64()), "holds no labelled images"),
    ],
)
def test_unusable_parquet_labels_are_refused(parquet, labels, message):
    write_parquet(parquet[0] / "train.parquet", map(png, noise(len(labels))), labels)
    with pytest.raises(DataError, match=message):
        load(parquet[0])


def test_missing_parquet_columns_are_listed(parquet):
    file = parquet[0] / "train.parquet"
    write_parquet(file, map(png, noise(6)), [0, 1, 2] * 2, label="target")
    with pytest.raises(DataError, match=r"no column label or fine_label; .*target \(int64\)"):
        load(parquet[0])
    pq.write_table(pa.table({"image": ["a.png"], "label": [0]}), file)
    with pytest.raises(DataError, match=r"no column image\.bytes .*it has image \(string\), label"):
        load(parquet[0])


def test_a_limit_below_two_a_class_is_refused(folder):
    with pytest.raises(DataError, match=r"limit=5 .* take at least 6"):
        load(folder[0], limit=5)
    assert len(load(folder[0], limit=6).train) == 6


@pytest.mark.parametrize("options", [{"limit": 0}, {"limit": -5}, {"image_size": 0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(OptionError, match="positive integer"):
        load("digits", **options)


def test_a_file_in_place_of_a_folder_is_refused(parquet):
    with pytest.raises(DataError, match="is a file; give the folder"):
        load(parquet[0] / "train.parquet")


# fingerprint


def test_fingerprint_follows_the_data_and_not_their_place(folder):
    root, _ = folder
    first = load(root).fingerprint
    moved = root.rename(root.with_name("elsewhere"))
    assert load(moved).fingerprint == first
    others = {load(moved, image_size=4).fingerprint, load(moved, limit=9).fingerprint}
    others.add(load(moved, limit=9, seed=1).fingerprint)
    Image.fromarray(noise(1, (8, 7))[0]).save(moved / "test/ant/0.png")
    others.add(load(moved, image_size=8).fingerprint)
    assert len(others - {first}) == 4
