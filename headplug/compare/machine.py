"""What a result depends on beside its settings: versions, the machine; the time of a head."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from headplug.device import pick_device

PACKAGES = (
    "torch",
    "torchvision",
    "lightly",
    "lightning",
    "timm",
    "kornia",
    "numpy",
    "scikit-learn",
)


def versions() -> dict[str, str]:
    """Versions of headplug, Python and the packages that results depend on."""
    found = {"headplug": metadata.version("headplug"), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """The processor, its cores as far as this process may use them, and the GPU."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": _cpu(), "cores": cores, "threads": torch.get_num_threads(), "gpu": gpu}


def head_step_ms(heads: Mapping[str, nn.Module], batch: int, repeats: int = 15) -> dict[str, float]:
    """Median time of forward, backward and an SGD step of each head on random features.

    The heads take turns, so that whatever else the machine does meets them all; the input needs a
    gradient, as it does behind a backbone.

    Args:
        heads: In training mode, with `input_dim`.
        batch: Rows of the features.
        repeats: Timed rounds, after three that are not.

    Returns:
        Milliseconds by name.
    """
    device = pick_device()
    steps = {}
    for name, head in heads.items():
        head.to(device).train()
        trained = [p for p in head.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.01, momentum=0.9) if trained else None
        x = torch.randn(batch, int(head.input_dim), device=device, requires_grad=True)  # type: ignore[arg-type]
        steps[name] = (head, x, optimizer)
    times: dict[str, list[float]] = {name: [] for name in heads}
    for _ in range(repeats + 3):
        for name, (head, x, optimizer) in steps.items():
            started = _now(device)
            head(x).square().mean().backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            x.grad = None
            times[name].append(1000 * (_now(device) - started))
    return {name: statistics.median(values[3:]) for name, values in times.items()}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
