"""What benchmarks count and time: work, memory, a device's seconds, and what the machine can do."""

import itertools
import time
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class Memory(TorchDispatchMode):
    """The largest number of bytes that tensors made inside have held at one time."""

    def __init__(self):
        super().__init__()
        self.held = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {id(t.untyped_storage()) for t in _tensors((args, kwargs))}
        made = func(*args, **(kwargs or {}))
        for tensor in _tensors(made):
            storage = tensor.untyped_storage()
            if id(storage) not in before | self.known:
                self.known.add(id(storage))
                self.held += storage.nbytes()
                weakref.finalize(storage, self._freed, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.held)
        return made

    def _freed(self, key, nbytes):
        self.known.discard(key)
        self.held -= nbytes


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def counted(call, device):
    """FLOPs of matrix products, convolutions and attention; bytes of tensors at the worst moment.

    Bytes are beyond those that were there before.
    """
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with Memory() as memory, FlopCounterMode(display=False) as counter:
        call()
    peak = torch.cuda.max_memory_allocated(device) - before if cuda else memory.peak
    return counter.get_total_flops(), peak


def seconds(call, device):
    """CUDA events around a call; on a CPU the time of all threads of the process."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    started = time.process_time()
    call()
    return time.process_time() - started


def waited(call, device):
    """The call, until the device has done it: for clocks on the wall."""
    if device.type != "cuda":
        return call

    def run():
        call()
        torch.cuda.synchronize(device)

    return run


def graphed(call):
    """The call as one CUDA graph: what it launches is recorded, after three calls to warm up."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def rotated(make, count=4):
    """Inputs in turn, so that none is found in a cache because it was the last one."""
    return itertools.cycle([make() for _ in range(count)])


def ceilings(device):
    """FLOP/s of a large matrix product by dtype, and bytes/s of a large copy, read and written."""
    cuda = device.type == "cuda"
    size, length = (8192, 2**30) if cuda else (1536, 2**27)

    def best(call):
        call()
        return min(seconds(call, device) for _ in range(5))

    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        found[str(dtype).removeprefix("torch.")] = 2 * size**3 / best(lambda a=a, b=b: a @ b)
    source = torch.ones(length, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found["copy"] = 2 * length / best(lambda: target.copy_(source))
    return found
