"""L-BFGS for several smooth convex functions at once, each with its own line search.

All functions that are not done yet are evaluated together, at one point each: one that rejects its
point only shortens its step, while the others go on. Points are `(S, P)`, one row a function.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MEMORY = 10  # pairs of steps and changes of the gradient, Nocedal & Wright's m
ARMIJO = 0.1
NOISE = 1e-6  # of a value in float32: below it the slope decides, as in Hager & Zhang (2005)

Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def minimize(evaluate: Evaluate, start: Tensor, tol: float, max_iter: int) -> Tensor:
    """Descends until an estimate of what is left falls to `tol`.

    Args:
        evaluate: Of points `(A, P)` and the numbers `(A,)` of their functions: values `(A,)` in
            float64, gradients `(A, P)`, and estimates of value - minimum `(A,)`.
        start: `(S, P)`.
        tol: The estimate to reach.
        max_iter: Evaluations, at most.

    Returns:
        For each function the point with the lowest estimate that was met.
    """
    count = len(start)
    x = start.clone()
    best = start.clone()
    steps, changes = (start.new_zeros(count, MEMORY, start.shape[1]) for _ in range(2))
    inverse = start.new_zeros(count, MEMORY)  # 1 / (step · change); 0 where there is none yet
    active = torch.arange(count, device=start.device)
    value, gradient, left = evaluate(x, active)
    direction, rate = -gradient, start.new_ones(count)
    for _ in range(max_iter - 1):
        active = active[(left[active] > tol) & (rate[active] > 1e-4)]
        if not len(active):
            break
        d, t, g = direction[active], rate[active], gradient[active]
        trial = torch.addcmul(x[active], d, t[:, None])
        f, g1, estimate = evaluate(trial, active)
        slope, slope1 = (g * d).sum(1), (g1 * d).sum(1)
        better = estimate < left[active]
        left[active[better]], best[active[better]] = estimate[better], trial[better]
        f0 = value[active]
        enough = f <= f0 + ARMIJO * t * slope
        flat = (f <= f0 + NOISE * f0.abs()) & (slope1 <= (2 * ARMIJO - 1) * slope)
        taken = enough | flat
        shorter = (slope / (slope - slope1)).nan_to_num(0.1).clamp(0.1, 0.5)
        rate[active] = torch.where(taken, 1.0, t * shorter)
        now = active[taken]
        s, y = (d * t[:, None])[taken], (g1 - g)[taken]
        x[now], value[now], gradient[now] = trial[taken], f[taken], g1[taken]
        curvature = (s * y).sum(1)
        fit = curvature > 1e-7 * s.norm(dim=1) * y.norm(dim=1)
        for memory, new in ((steps, s), (changes, y), (inverse, 1 / curvature)):
            memory[now[fit]] = torch.cat([memory[now[fit], 1:], new[fit, None]], 1)
        direction[now] = _direction(g1[taken], steps[now], changes[now], inverse[now])
    return best


def _direction(gradient: Tensor, steps: Tensor, changes: Tensor, inverse: Tensor) -> Tensor:
    """The two loops of Nocedal (1980), for each row."""
    q = -gradient
    weights = []
    for i in reversed(range(MEMORY)):
        weights.append(inverse[:, i] * (steps[:, i] * q).sum(1))
        q = torch.addcmul(q, changes[:, i], weights[-1][:, None], value=-1)
    last = changes[:, -1].square().sum(1) * inverse[:, -1]
    q = q / torch.where(last > 0, last, 1.0)[:, None]
    for i in range(MEMORY):
        weight = weights.pop() - inverse[:, i] * (changes[:, i] * q).sum(1)
        q = torch.addcmul(q, steps[:, i], weight[:, None])
    return q
