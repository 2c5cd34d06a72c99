"""LDAdam (Robert et al. 2025): Adam whose moments live in a moving subspace.

G = g + E ;  P = one power step from P_prev towards rho P_prev m^ + (1 - rho) G
h = P^T G ;  E = G - P h + b1/(1 - b1) (P_prev m - P P^T P_prev m)       nothing is lost on the way
m, v = Adam's moments of h, after m and v were carried over to the basis P
X = X - lr (P m^/(sqrt(v^) + eps) + w X)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ef_optax.compressors.combine.identity import identity
from ef_optax.extend import (
    Array,
    AxisName,
    IsMatrix,
    MemoryLike,
    as_transformation,
    check,
    einsum,
    from_thin_rows,
    like_of,
    memory_for,
    on_matrices,
    orthonormal,
    thin_rows,
    trees,
)
from ef_optax.feedback.compressed_mean import compressed_mean


class LDAdamState(NamedTuple):
    """State of the subspace inside :func:`ldadam`; the same on all workers."""

    steps: Array  # int32 scalar: steps made
    basis: Any  # for each matrix: P as (matrices, shorter side, r)
    momentum: Any  # m as (matrices, r, longer side)
    variance: Any  # v, like m
    residual: Any  # like the parameters: E


def ldadam(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    *,
    b1: float = 0.908,
    b2: float = 0.99,
    rho: float = 0.908,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    is_matrix: IsMatrix | None = None,
    others: optax.GradientTransformation | None = None,
    batch_axes: int = 0,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LDAdam: Adam with moments of rank r, and error feedback for gradient and moments.

    .. math:: G = g + E, \quad P' = \text{power step}, \quad h = P'^T G, \quad
              \tilde m = P'^T P m, \quad
              E' = G - P' h + \tfrac{b_1}{1 - b_1} (P m - P' \tilde m)

    The basis P follows :math:`\rho P\,m/(1 - b_1^t) + (1 - \rho) G` by one step of power iteration
    (the first one is the singular vectors of G). The moments are carried over:
    :math:`\tilde m` replaces m, and with bias-corrected m and v, squares element by element,
    :math:`\tilde v = |(P'^T P)^{\circ 2} (v - m^{\circ 2}) + \tilde m^{\circ 2}|`. What the change
    of basis loses of the momentum is returned to the gradient. With full rank nothing is lost.

    It saves memory on one worker too. The gradients are averaged dense, and everything else is the
    same on all workers; to compress the exchange, put a rule before the recipe and give it no axis.

    Each matrix is projected along its shorter side. The official code raises the elements of
    P'^T P to the fourth power where the definition has squares.

    Args:
      learning_rate: eta, a number or a schedule.
      rank: r, at most the shorter side of each matrix.
      b1: decay of the momentum, in [0, 1).
      b2: decay of the variance, in [0, 1).
      rho: weight of the momentum in what the basis follows, in [0, 1).
      eps: added to the square root of the variance, above 0.
      weight_decay: w, decoupled.
      is_matrix: ``is_matrix(path, leaf)`` says which leaves are projected; None for all with two or
        more axes. Leave out embeddings and heads, as the official code does.
      others: the optimizer of all other leaves, after the mean; None is AdamW with these options.
      batch_axes: number of leading axes of the matrices that count matrices: 1 for layers that are
        stacked for a scan.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: how E is stored, as in :func:`ef_optax.error_feedback`; the paper's saving needs a
        format of few bits, since E is as large as the gradient. (The authors keep it in the
        gradient's own buffer.)

    Returns:
      The optimizer. Memory for a matrix: r (shorter + 2 longer) and E. Bits: 32 for each value.

    Raises:
      TypeError: if ``others`` is not an Optax transformation. ValueError: for an option out of
        range.

    Example:
      >>> import ef_optax as ef, jax, jax.numpy as jnp
      >>> tx = ef.recipes.ldadam(0.5, rank=1)
      >>> params, g = jnp.zeros((2, 2)), jnp.array([[0.0, 3.0], [0.0, 0.0]])
      >>> updates, state = jax.jit(tx.update)(g, tx.init(params), params)
      >>> abs(updates).round(4).tolist()
      [[0.0, 0.5], [0.0, 0.0]]

    References:
      Robert et al., "LDAdam: Adaptive Optimization from Low-Dimensional Gradient Statistics", ICLR
      2025; IST-DASLab/LDAdam, ldadamw_torch/ldadamw.py.
    """
    check.rate("ldadam", "learning_rate", learning_rate)
    check.count("ldadam", "rank", rank)
    for option, value in (("b1", b1), ("b2", b2), ("rho", rho)):
        check.decay("ldadam", option, value)
    check.positive("ldadam", "eps", eps)
    check.not_negative("ldadam", "weight_decay", weight_decay)
    check.count("ldadam", "batch_axes", batch_axes, least=0)
    memory = memory_for(memory)

    def init_fn(params: Any) -> LDAdamState:
        def zeros(x: Array) -> tuple[Array, Array, Array]:
            number, a, b = jax.eval_shape(lambda x: thin_rows(x, batch_axes), x).shape
            r, dtype = min(rank, a), trees.widest(x)
            P, m = jnp.zeros((number, a, r), dtype), jnp.zeros((number, r, b), dtype)
            return P, m, jnp.zeros_like(m)

        P, m, v = trees.map_several(zeros, params) if jax.tree.leaves(params) else ((), (), ())
        return LDAdamState(jnp.zeros((), jnp.int32), P, m, v, memory.zeros(params))

    def update_fn(
        updates: Any, state: LDAdamState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, LDAdamState]:
        del params, extra_args
        t = state.steps
        if not jax.tree.leaves(updates):
            return updates, state._replace(steps=t + 1)

        def one(g: Array, E: Array, P: Array, m: Array, v: Array) -> tuple[Array, ...]:
            like = like_of(E)
            G = thin_rows(g.astype(E.dtype) + E, batch_axes)
            step, P, m, v, E = _step(G, P, m, v, t, b1, b2, rho, eps)
            step, E = (from_thin_rows(x, like, batch_axes) for x in (step, E))
            return step, P, m, v, E

        kept = memory.read(state.residual)
        step, P, m, v, E = trees.map_several(
            one, updates, kept, state.basis, state.momentum, state.variance
        )
        E = memory.write(E, state.residual, t, shared=True)
        return trees.emit(step, updates), LDAdamState(t + 1, P, m, v, E)

    decay = optax.add_decayed_weights(weight_decay)
    rate = optax.scale_by_learning_rate(learning_rate)
    if others is None:
        others = optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay)
    check.transformation("ldadam", "others", others)
    subspace = optax.chain(as_transformation(init_fn, update_fn), decay, rate)
    mean = compressed_mean(identity(), axis_name=axis_name)
    return optax.chain(mean, on_matrices(subspace, others, is_matrix))


def _step(
    G: Array,
    P_prev: Array,
    m: Array,
    v: Array,
    t: Array,
    b1: Any,
    b2: Any,
    rho: Any,
    eps: Any,
) -> tuple[Array, Array, Array, Array, Array]:
    """The step, and the next P, m, v and E, after ``t`` steps; the matrices are thin rows."""
    count = t.astype(G.dtype)
    fix1, fix2 = 1 - b1**count, 1 - b2**count  # the bias of m and v; 0 before the first step
    safe1, safe2 = (jnp.where(t == 0, 1, fix) for fix in (fix1, fix2))
    previous = einsum("nar,nrb->nab", P_prev, m)

    def first() -> Array:
        return jnp.linalg.svd(G, full_matrices=False)[0][..., : m.shape[1]]

    def later() -> Array:
        target = rho * previous / safe1 + (1 - rho) * G
        return orthonormal(einsum("nab,ncb,ncr->nar", target, target, P_prev))

    P = jax.lax.cond(t == 0, first, later)
    h = einsum("nar,nab->nrb", P, G)
    turn = einsum("nar,nas->nrs", P, P_prev)
    carried = einsum("nrs,nsb->nrb", turn, m)
    E = G - einsum("nar,nrb->nab", P, h)
    E = E + b1 / (1 - b1) * (previous - einsum("nar,nrb->nab", P, carried))
    spread = einsum("nrs,nsb->nrb", turn**2, v / safe2 - (m / safe1) ** 2)
    v = fix2 * jnp.abs(spread + (carried / safe1) ** 2)
    m = b1 * carried + (1 - b1) * h
    v = b2 * v + (1 - b2) * h**2
    fix1, fix2 = 1 - b1 ** (count + 1), 1 - b2 ** (count + 1)
    direction = (m / fix1) / (jnp.sqrt(v / fix2) + eps)
    return einsum("nar,nrb->nab", P, direction), P, m, v, E
