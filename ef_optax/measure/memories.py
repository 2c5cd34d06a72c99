"""What the rules of a chain remember: its size, its norms and its distribution."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ef_optax import states
from ef_optax._core.context import path_string
from ef_optax._exchange.controlled import ControlState
from ef_optax._exchange.exchange import ExchangeState
from ef_optax._exchange.monitored import MonitorState
from ef_optax._numeric import check
from ef_optax._numeric.dtypes import Array
from ef_optax._rules import resting
from ef_optax._rules.memory import Memory
from ef_optax.parallel.inference import abstract
from ef_optax.parallel.lift import Lifted

_PARTS = {ControlState, ExchangeState, MonitorState}
_RULES = tuple({getattr(states, name) for name in states.__all__} - _PARTS)


def memory_statistics(
    opt_state: Any, params: Any, *, probabilities: Sequence[float] = (), by_leaf: bool = False
) -> dict[str, float]:
    """Norms, exact zeros and quantiles of what the rules in any state remember.

    The state need not be monitored. This reads the memories themselves, so it takes a pass over
    them, and a sort for quantiles.

    Args:
      opt_state: the state of a chain, of one worker or of all.
      params: the parameters, or their shapes and dtypes.
      probabilities: which quantiles of the *magnitudes* to give, such as ``(0.5, 0.99)``.
      by_leaf: whether to have each leaf too.

    Returns:
      A flat dictionary. ``0/residual/norm`` is the 2-norm of the field ``residual`` of the rule
      at ``opt_state[0]``, by the mean of its square over the workers; ``norm_largest`` is that of
      the worker with the largest one; ``zeros`` is the share of exact zeros, and ``quantile_0.5``
      the median magnitude, over all workers. A leaf's path follows:
      ``0/residual/norm/conv1/kernel``.

    Raises:
      ValueError: for a probability outside [0, 1].

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.error_feedback(ef.top_k(k=1))
      >>> params = jnp.zeros(3)
      >>> _, state = tx.update(jnp.array([5.0, -4.0, 3.0]), tx.init(params))
      >>> seen = ef.measure.memory_statistics(state, params, probabilities=(0.5,))
      >>> seen["residual/norm"], seen["residual/quantile_0.5"]
      (5.0, 3.0)
    """
    for p in probabilities:
        check.share("memory_statistics", "probabilities", p)
    check.flag("memory_statistics", "by_leaf", by_leaf)
    result = {}
    for name, tree in _memories(opt_state):
        for leaf, arrays, workers in _groups(tree, params, by_leaf):
            rows = int(workers) if workers == int(workers) else 1
            numbers = _numbers(arrays, jnp.asarray(probabilities, jnp.float32), rows)
            square, largest, zeros, *quantiles = np.asarray(numbers).tolist()
            total = max(sum(x.size for x in arrays), 1)
            result[f"{name}/norm{leaf}"] = (square / workers) ** 0.5
            result[f"{name}/norm_largest{leaf}"] = largest**0.5
            result[f"{name}/zeros{leaf}"] = zeros / total
            for p, value in zip(probabilities, quantiles, strict=True):
                result[f"{name}/quantile_{p:g}{leaf}"] = value
    return result


def memory_histogram(
    opt_state: Any, params: Any, bins: int = 30, *, by_leaf: bool = False
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The distribution of what the rules in any state remember, over all workers.

    Args:
      opt_state: the state of a chain, of one worker or of all.
      params: the parameters, or their shapes and dtypes.
      bins: how many intervals of equal length there are between the least and the largest value.
      by_leaf: whether to have each leaf too.

    Returns:
      A dictionary with the names of :func:`memory_statistics` without the statistic; each value
      is the counts (bins,) and the edges (bins + 1,), as of ``numpy.histogram``.

    Raises:
      ValueError: if ``bins`` is not a positive integer.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.error_feedback(ef.top_k(k=1))
      >>> params = jnp.zeros(3)
      >>> _, state = tx.update(jnp.array([5.0, 0.0, 4.0]), tx.init(params))
      >>> counts, edges = ef.measure.memory_histogram(state, params, 2)["residual"]
      >>> counts.tolist(), edges.tolist()
      ([2, 1], [0.0, 2.0, 4.0])
    """
    check.count("memory_histogram", "bins", bins)
    check.flag("memory_histogram", "by_leaf", by_leaf)
    result = {}
    for name, tree in _memories(opt_state):
        for leaf, arrays, _ in _groups(tree, params, by_leaf):
            counts, edges = jax.device_get(_histogram(arrays, bins))
            result[f"{name}{leaf}"] = counts.astype(int), edges
    return result


Space = Literal["all", "device", "host"]


def state_bytes(tx: optax.GradientTransformation, params: Any, *, space: Space = "all") -> float:
    """Bytes of state for each parameter on each worker, before anything is allocated.

    All of the state counts: the memories of the rules, and the moments of an optimizer after them.
    A leaf that differs between workers counts once for each worker, and so does one that all have.

    Args:
      tx: a transformation, lifted or not.
      params: the parameters, or their shapes and dtypes.
      space: ``"device"`` or ``"host"`` counts only what is in that memory between two steps; what
        is not :func:`ef_optax.on_host` is on the device.

    Returns:
      Bytes divided by the number of parameters.

    Raises:
      ValueError: if ``params`` has no entries, or for an unknown ``space``.

    Example:
      >>> import ef_optax as ef, jax, jax.numpy as jnp
      >>> params = jax.ShapeDtypeStruct((1000, 1000), jnp.float32)
      >>> round(ef.measure.state_bytes(ef.error_feedback(ef.top_k(0.01)), params), 2)
      4.0
      >>> round(ef.measure.state_bytes(ef.ef21(ef.top_k(0.01), memory="bfloat16"), params), 2)
      4.0
      >>> tx = ef.error_feedback(ef.top_k(0.01), memory=ef.on_host())
      >>> [round(ef.measure.state_bytes(tx, params, space=s), 2) for s in ("device", "host")]
      [0.0, 4.0]
    """
    check.word("state_bytes", "space", space, ("all", "device", "host"))
    count = sum(x.size for x in jax.tree.leaves(abstract(params)))
    if not count:
        raise ValueError("state_bytes: params has no entries; pass the parameters of the model.")
    if isinstance(tx, Lifted):
        state, rows = tx.abstract_state(params), tx.worker_axes(params)
    else:
        state = jax.eval_shape(tx.init, abstract(params))
        rows = jax.tree.map(lambda _: False, state)
    workers = tx.num_workers if isinstance(tx, Lifted) else 1

    def of_leaf(x: Any, own: bool, on_host: bool) -> float:
        counts = space == "all" or on_host == (space == "host")
        return _bytes(x) / (workers if own else 1) if counts else 0.0

    sizes = jax.tree.map(of_leaf, state, rows, resting.kinds(state))
    return sum(jax.tree.leaves(sizes)) / count


def _bytes(x: Any) -> int:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(x.shape, x.dtype))
    return x.size * x.dtype.itemsize


def _memories(opt_state: Any) -> Iterator[tuple[str, Any]]:
    """The fields with floating arrays of the states of all rules, by their paths."""
    is_rule = lambda x: isinstance(x, _RULES)  # noqa: E731
    for path, rule in jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=is_rule):
        if not is_rule(rule):
            continue
        for field, value in zip(rule._fields, rule, strict=True):
            exchanges = jax.tree.leaves(value, is_leaf=lambda x: isinstance(x, ExchangeState))
            if any(isinstance(x, ExchangeState) for x in exchanges):
                continue
            tree = Memory.read(value) if _floating(value) else None
            if tree is not None:
                yield "/".join([*([path_string(path)] if path else []), field]), tree


def _floating(value: Any) -> bool:
    """Whether there are floating arrays that are not single numbers of the rule."""
    return any(jnp.issubdtype(x.dtype, jnp.floating) and x.ndim for x in jax.tree.leaves(value))


def _groups(tree: Any, params: Any, by_leaf: bool) -> Iterator[tuple[str, list[Array], float]]:
    """The suffix of a group, its arrays, and how many workers have such arrays."""
    located = jax.tree_util.tree_leaves_with_path(tree)
    arrays = [x for _, x in located]
    of_params = sum(x.size for x in jax.tree.leaves(abstract(params)))
    fits = jax.tree.structure(tree) == jax.tree.structure(params)
    total = sum(x.size for x in arrays)
    workers = total / of_params if fits and of_params else 1.0
    yield "", arrays, workers
    if by_leaf:
        yield from ((f"/{path_string(path) or 'params'}", [x], workers) for path, x in located)


@functools.partial(jax.jit, static_argnums=2)
def _numbers(arrays: list[Array], probabilities: Array, rows: int) -> Array:
    """The sum of squares, that of the largest row, the number of zeros, and quantiles."""
    squares = sum(jnp.sum(jnp.square(x).reshape(rows, -1), 1) for x in arrays)
    squares = jnp.asarray(squares, jnp.float32) * jnp.ones(rows, jnp.float32)
    zeros = sum(jnp.sum((x == 0).astype(jnp.float32)) for x in arrays)
    numbers = [jnp.sum(squares), jnp.max(squares), jnp.asarray(zeros, jnp.float32)]
    if probabilities.size:
        flat = _end_to_end(arrays)
        found = jnp.quantile(jnp.abs(flat), probabilities.astype(flat.dtype))
        return jnp.concatenate([jnp.stack(numbers), found.astype(jnp.float32)])
    return jnp.stack(numbers)


@functools.partial(jax.jit, static_argnums=1)
def _histogram(arrays: list[Array], bins: int) -> tuple[Array, Array]:
    return jnp.histogram(_end_to_end(arrays), bins)


def _end_to_end(arrays: list[Array]) -> Array:
    flat = [x.reshape(-1).astype(jnp.float32) for x in arrays]
    return jnp.concatenate([*flat, jnp.zeros(0, jnp.float32)])
