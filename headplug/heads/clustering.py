"""k-means in plain torch: on any device, deterministic for a seed, blind to global generators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny


def squared_distances(x: Tensor, centers: Tensor) -> Tensor:
    """Squared Euclidean distances between `(rows, features)` and `(kernels, features)`.

    Both are shifted by the mean centre, which changes no distance but keeps digits that would
    cancel where features have an offset.

    Returns:
        `(rows, kernels)`, never negative.

    >>> squared_distances(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[25.,  0.]])
    """
    shift = centers.detach().mean(0)
    x, centers = x - shift, centers - shift
    squares = x.square().sum(1, keepdim=True) + centers.square().sum(1)
    return (squares - 2 * x @ centers.T).clamp_min(0)


@torch.no_grad()
def k_means(rows: Tensor, k: int, seed: int = 0, steps: int = 100) -> Tensor:
    """Centres `(k, features)` by Lloyd's algorithm after k-means++ seeding, on the rows' device.

    A cluster that loses its rows moves to a row that is farthest from its centre. The generator is
    its own.

    Args:
        rows: `(rows, features)`, at least k of them, in float32.
        k: Number of centres.
        seed: Of the k-means++ draws.
        steps: Most steps taken; it stops when no row changes its cluster.

    >>> k_means(torch.tensor([[0.0], [1.0], [10.0], [11.0]]), 2).sort(0).values
    tensor([[ 0.5000],
            [10.5000]])
    """
    noise = torch.Generator(rows.device).manual_seed(seed)
    chance, chosen = rows.new_ones(len(rows)), []
    for i in range(k):  # the first of clocks that tick at rates `chance` is a draw with `chance`
        clock = torch.empty_like(chance).exponential_(generator=noise).clamp_min(TINY)
        chosen.append((chance / clock).argmax())
        squares = (rows - rows[chosen[-1]]).square().sum(1)
        chance = torch.minimum(chance, squares) if i else squares
    centers, clusters = rows[torch.stack(chosen)], None
    for _ in range(steps):
        before, (nearest, clusters) = clusters, squared_distances(rows, centers).min(1)
        if before is not None and torch.equal(before, clusters):
            break
        members = F.one_hot(clusters, k).to(rows)
        counts = members.sum(0)
        centers = members.T @ rows / counts.clamp_min(1)[:, None]
        centers[counts == 0] = rows[nearest.topk(int((counts == 0).sum())).indices]
    return centers
