"""What extraction to disk costs beyond the bare forward loop, and how fast a store is read."""

import shutil
import statistics

import measure
import pytest
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

from headplug import FeatureStore, extract_features

STAGES = ["layer1", "layer2", "layer3", "layer4", "global_pool"]


@pytest.fixture(scope="module")
def model(full, device):
    name = "resnet50" if full else "resnet18"
    return timm.create_model(name, num_classes=0).eval().to(device)


@pytest.fixture(scope="module")
def loader(full):
    size, batch = ((4096, 3, 224, 224), 256) if full else ((512, 3, 64, 64), 32)
    data = TensorDataset(torch.randn(size), torch.arange(size[0]))
    return DataLoader(data, batch_size=batch)


def test_extraction_to_disk_against_the_bare_forward_loop(model, loader, tmp_path, against, device):
    """Writes, checksums and the fingerprint of the weights included."""

    def bare():
        with torch.no_grad():
            for x, _ in loader:
                model(x.to(device))

    def extraction():
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        extract_features(model, loader, STAGES, tmp_path / "store", shard_size=128)

    against(extraction, bare, rounds=5, samples=len(loader.dataset))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A quarter of a gigabyte of features in 16 shards."""
    path = tmp_path_factory.mktemp("features") / "store"
    data = DataLoader(TensorDataset(torch.randn(16 * 1024, 4096)), batch_size=1024)
    extract_features(torch.nn.Sequential(torch.nn.Identity()), data, "0", path, shard_size=1024)
    return path


@pytest.mark.parametrize("how", ["whole", "parts"])
def test_reading_a_store_from_page_cache(how, folder, ceilings, benchmark, cpu):
    """With every checksum compared; in parts nothing is copied."""

    def read():
        store = FeatureStore.open(folder)
        if how == "whole":
            return store["0"].nbytes
        return sum(part.nbytes for part in store.parts("0"))

    if not benchmark.enabled:
        pytest.skip("nothing is timed with --benchmark-disable")
    size = benchmark.pedantic(read, rounds=5, warmup_rounds=1)
    seconds = statistics.median(measure.seconds(read, torch.device("cpu")) for _ in range(5))
    moved = size * (2 if how == "whole" else 1)  # read, and written
    benchmark.extra_info.update(
        gb_per_s=size / seconds / 1e9, of_copy_ceiling=moved / seconds / ceilings["copy"]
    )
