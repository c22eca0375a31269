"""The loss of each kind of target, and its derivative written out.

Scores are `(K, S, B)` with samples innermost, so that a softmax over classes runs along vectors.
The losses are those of torch: `cross_entropy`, `binary_cross_entropy_with_logits` (the mean over
labels) and `mse_loss` (the mean over numbers).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from headplug.probing.models import Kind

FLOOR = 1e-20  # of a probability; far below float32's resolution next to 1, far above denormals


def derivative(kind: Kind, scores: Tensor, room: Tensor | None, values: Tensor) -> Tensor:
    """Of each sample's loss with respect to its scores `(K, S, B)`.

    It is in the memory of the scores or, for classes, in `room` if that is given.

    Probabilities are kept above `FLOOR`: denormal numbers are several times slower on a CPU, and
    this keeps them out of every product without touching the state of the process.
    """
    if kind == "classes":
        out = torch.softmax(scores, 0, out=room).clamp_(min=FLOOR)
        target = values.expand(1, *scores.shape[1:])
        return out.scatter_add_(0, target, scores.new_full((), -1.0).expand_as(target))
    dense = values.T.to(scores.dtype)[:, None]
    if kind == "multilabel":
        out = scores.sigmoid_().clamp_(min=FLOOR)
        return out.sub_(dense).div_(len(scores))
    return scores.sub_(dense).mul_(2 / len(scores))


def losses(kind: Kind, scores: Tensor, values: Tensor) -> Tensor:
    """The mean over samples, of each setting `(S,)`."""
    if kind == "classes":
        target = values.expand(1, *scores.shape[1:])
        return (scores.logsumexp(0) - scores.gather(0, target)[0]).mean(1)
    dense = values.T.to(scores.dtype)[:, None].expand_as(scores)
    if kind == "multilabel":
        every = F.binary_cross_entropy_with_logits(scores, dense, reduction="none")
    else:
        every = torch.square(scores - dense)
    return every.mean(dim=(0, 2))
