"""The few things that several processes of one comparison must agree on."""

from __future__ import annotations

import os

import torch


def is_first() -> bool:
    """Whether this is the process that writes and talks (torchrun's and Slurm's rank 0)."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0


def launched() -> bool:
    """Whether torchrun or Slurm started this process."""
    return "RANK" in os.environ or "SLURM_PROCID" in os.environ


def wait() -> None:
    """Until the other processes are here, if there are any."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
