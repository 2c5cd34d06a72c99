"""FetchSGD (Rothchild et al. 2020): the server keeps momentum and error as count sketches.

S   = mean_i S(g_i)                    a table of rows x columns for the whole model
S_u = rho S_u + S                      momentum
S_e = S_e + S_u                        error feedback
D   = top-k of U(S_e) ;  emit D        the k largest of all estimates
S_e = S_e - S(D)                       or: S_e = S_u = 0 where S(D) is not 0
"""

from __future__ import annotations

import zlib
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ef_optax.extend import (
    Array,
    AxisName,
    Exchange,
    ExchangeState,
    Identity,
    MemoryLike,
    as_key,
    as_transformation,
    check,
    check_ratio_or_k,
    memory_for,
    path_string,
    resolve_k,
    sketch,
    sketch_estimates,
    steps,
    top_k_indices,
    trees,
)

Clear = Literal["zero", "subtract"]


class FetchSGDState(NamedTuple):
    """State of :func:`fetch_sgd`, the same on all workers, which have no memory of their own."""

    momentum: Array  # (rows, columns): S_u, the sketch of the momentum
    error: Array  # (rows, columns): S_e, the sketch of what is not yet applied
    exchange: ExchangeState


def fetch_sgd(
    rows: int,
    columns: int,
    ratio: float | None = None,
    *,
    k: int | None = None,
    momentum: float = 0.9,
    clear: Clear = "zero",
    key: Any = 0,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""FetchSGD: virtual (server-side) error feedback and momentum inside a count sketch.

    .. math:: S_u' = \rho S_u + \text{mean}_i\,S(g_i), \quad S_e' = S_e + S_u', \quad
              \text{emit}\ \Delta = \text{top-}k(U(S_e')), \quad S_e'' = S_e' - S(\Delta)

    S is linear, so the sum of all sketches is the sketch of the sum. One table therefore remembers
    what each worker would otherwise have to, and workers may come and go. All leaves share the
    table and the k; the hashes are the same in every step. The rule works in gradient units, before
    plain ``optax.sgd(lr)`` (the momentum is inside), like the authors' code; with a constant rate
    the paper's step units are equivalent.

    The estimates U are medians over the rows of the table. They are noisy, and subtracting S(D)
    keeps this noise in the table. The authors report that this diverges. Their code instead sets
    the cells that D touches to zero in both tables, which is ``clear="zero"``.

    Args:
      rows: number of hash functions; an odd number from 3 to 7 gives a clean median.
      columns: buckets of each hash function.
      ratio: applied / total in (0, 1], for all leaves together.
      k: number of entries applied; give either ``k`` or ``ratio``.
      momentum: rho in [0, 1).
      clear: ``"zero"`` (the authors' code) or ``"subtract"`` (the paper's Algorithm 1).
      key: a JAX random key or an int for the hashes, the same on all workers.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: the dtype in which the two tables are stored, as in :func:`error_feedback`.

    Returns:
      The transformation, to be put before ``optax.sgd``; its state is a :class:`FetchSGDState`.
      Uplink: 32 rows columns bits, by an all-reduce. The emitted update has k entries that are not
      zero. All workers compute the same update from the table, so nothing is sent back.

    Raises:
      TypeError: if ``key`` is not a key. ValueError: for a bad ``rows``, ``columns``, ``ratio``,
        ``k`` or ``clear``, or a momentum outside [0, 1).

    Example:
      >>> import ef_optax as ef, jax, numpy as np
      >>> tx = ef.fetch_sgd(3, 16, k=1, momentum=0.0)
      >>> update, zeros, g = jax.jit(tx.update), np.zeros(50, "f4"), np.zeros(50, "f4")
      >>> g[7], g[9] = 5.0, 2.0
      >>> updates, state = update(g, tx.init(zeros))
      >>> float(updates[7]), len(np.flatnonzero(updates))
      (5.0, 1)
      >>> updates, state = update(zeros, state)  # the 2 was kept in the sketch
      >>> float(updates[9])
      2.0

    References:
      Rothchild, Panda, Ullah, Ivkin, Stoica, Braverman, Gonzalez, Arora, "FetchSGD:
      Communication-Efficient Federated Learning with Sketching", ICML 2020; the form in gradient
      units and ``"zero"`` as in the authors' code, kiddyboots216/CommEfficient.
    """
    check.count("fetch_sgd", "rows", rows)
    check.count("fetch_sgd", "columns", columns)
    check_ratio_or_k("fetch_sgd", ratio, k)
    check.decay("fetch_sgd", "momentum", momentum)
    check.word("fetch_sgd", "clear", clear, ("zero", "subtract"))
    key, exchange = as_key(key, "fetch_sgd"), Exchange(Identity(), axis_name)
    memory = memory_for(memory, axis_name)

    def keys_of(tree: Any) -> list[Array]:
        """The keys of the leaves' hashes."""
        paths = [path_string(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)]
        return [jax.random.fold_in(key, np.uint32(zlib.crc32(p.encode()))) for p in paths]

    def summed(leaves: list[Array], keys: list[Array], dtype: Any) -> Array:
        """The sketch S of all leaves together."""
        tables = [
            sketch(x.reshape(-1).astype(dtype), own, rows, columns)
            for x, own in zip(leaves, keys, strict=True)
        ]
        return sum(tables, jnp.zeros((rows, columns), dtype))

    def unsketch(S_e: Array, like: list[Array], keys: list[Array]) -> list[Array]:
        """The top-k of U(S_e), leaf by leaf."""
        parts = [sketch_estimates(S_e, own, x.size) for x, own in zip(like, keys, strict=True)]
        U = jnp.concatenate([jnp.zeros(0, S_e.dtype), *parts])
        chosen = top_k_indices(U, resolve_k(ratio, k, U.size))
        D = jnp.zeros_like(U).at[chosen].set(U[chosen])
        edges = np.cumsum([x.size for x in like])[:-1]
        flat = jnp.split(D, edges) if like else []
        return [part.reshape(x.shape) for part, x in zip(flat, like, strict=True)]

    def init_fn(params: Any) -> FetchSGDState:
        table = jnp.zeros((rows, columns), trees.widest(jax.tree.leaves(params)))
        S_u, S_e = memory.zeros(table), memory.zeros(table)
        return FetchSGDState(S_u, S_e, exchange.init(steps.lone(memory.read(S_e))))

    def update_fn(
        updates: Any, state: FetchSGDState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, FetchSGDState]:
        del params, extra_args
        g, treedef = jax.tree.flatten(updates)
        S_u, S_e = memory.read((state.momentum, state.error))
        keys, dtype = keys_of(updates), S_e.dtype
        out = exchange(steps.lone(summed(g, keys, dtype)), state.exchange)
        S = out.aggregate[steps.LONE]
        S_u = momentum * S_u + S
        S_e = S_e + S_u
        D = unsketch(S_e, g, keys)
        S_D = summed(D, keys, dtype)
        if clear == "subtract":
            S_e = S_e - S_D
        else:
            S_u, S_e = (jnp.where(S_D == 0, table, 0) for table in (S_u, S_e))
        after = FetchSGDState(
            momentum=memory.write(S_u, state.momentum, out.state.step, shared=True),
            error=memory.write(S_e, state.error, out.state.step, shared=True),
            exchange=out.state,
        )
        return trees.emit(treedef.unflatten(D), updates), after

    return as_transformation(init_fn, update_fn)
