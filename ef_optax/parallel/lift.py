"""The lift: one worker's transformation becomes one that takes a gradient from every worker.

``data_parallel`` (workers are devices of a mesh) and ``simulate`` (workers are a ``vmap`` axis)
have the same interface and follow the same trajectory:

    init(params)                    places and shapes the state
    update(grads, state, params)    grads have a leading worker axis and are not averaged

Leaves of the state that differ between workers get a leading worker axis; which ones is inferred
(see ``inference``). A step with a NaN or inf on any worker is skipped by all. This file has what
the two share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from ef_optax._core import context
from ef_optax._exchange.collectives import AxisName
from ef_optax.parallel import inference
from ef_optax.parallel.quarantine import keep_if_bad


class Lifted(optax.GradientTransformationExtraArgs):
    """A lifted transformation: the Optax pair, and what is known about its state.

    Attributes:
      axis_name: the worker axis. sizes: workers along each axis.
      worker_axes: ``worker_axes(params)`` tells which state leaves have a worker axis.
      state_specs: ``state_specs(params)`` gives the partition spec of each state leaf.
      abstract_state: ``abstract_state(params)`` gives shapes, dtypes and (on a mesh) shardings.
    """

    axis_name: AxisName
    sizes: inference.Sizes
    worker_axes: Callable[[Any], Any]
    state_specs: Callable[[Any], Any]
    abstract_state: Callable[[Any], Any]

    @property
    def num_workers(self) -> int:
        """The number of workers."""
        return inference.worker_count(self.sizes)


def local_step(
    tx: optax.GradientTransformation, lift: context.Lift, axis_name: AxisName
) -> Callable[..., Any]:
    """One worker's update with the step's quarantine, inside the map."""
    inner = optax.with_extra_args_support(tx)

    def step(grads: Any, state: Any, params: Any, extra: Mapping[str, Any]) -> tuple[Any, Any]:
        with context.lifting(lift):
            updates, new = inner.update(grads, state, params, **extra)
        return keep_if_bad(updates, new, state, axis_name, local=not lift.axis_sizes)

    return step


def params_like(updates: Any, params: Any) -> Any:
    """Shapes of the parameters, from the gradients where no parameters are given."""
    if params is not None:
        return inference.abstract(params)
    return jax.tree.map(lambda g: jax.ShapeDtypeStruct(g.shape[1:], g.dtype), updates)


def infer_flags(
    tx: optax.GradientTransformation,
    axis_name: AxisName,
    sizes: inference.Sizes,
    extra_args: dict[str, Any] | None,
    params: Any,
    lift: context.Lift,
) -> Any:
    """The flags of the state; model axes are emulated, so that no device is needed."""
    with context.lifting(lift.virtual()):
        return inference.worker_axes(tx, params, axis_name, sizes, extra_args=extra_args)


def flags_of(
    tx: optax.GradientTransformation,
    axis_name: AxisName,
    sizes: inference.Sizes,
    lift: context.Lift,
    params: Any,
    state: Any,
    extra_args: dict[str, Any] | None,
) -> Any:
    """The flags of a state that was lifted before, from the ranks of its leaves.

    Raises:
      ValueError: if the state was made by the chain inside instead of the lifted transformation.
    """
    with context.lifting(lift.virtual()):
        local = inference.local_state(tx, params, axis_name, sizes)
        flags = inference.leading_flags(local, state)
        if not any(jax.tree.leaves(flags)):  # equal on all workers, or not lifted
            varying = inference.varying_axes(tx, params, axis_name, sizes, extra_args=extra_args)
            if any(jax.tree.leaves(varying)):
                raise ValueError(
                    "state has no worker axis anywhere: it was made by the chain inside; make it "
                    "with the init of the lifted transformation."
                )
    return flags


def state_specs(tx: Any, params: Any) -> Any:
    """Partition spec of every state leaf of a lifted transformation, worker axis first.

    Args:
      tx: what :func:`data_parallel` or :func:`simulate` returned.
      params: parameters, or their shapes and dtypes.

    Returns:
      A tree of ``PartitionSpec`` shaped like the state, for ``in_specs``, donation and restore.

    Raises:
      TypeError: if ``tx`` is not lifted.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.simulate(ef.error_feedback(ef.top_k(0.1), axis_name="w"), 4, "w")
      >>> tuple(ef.parallel.state_specs(tx, jnp.zeros(3)).residual)
      ('w',)
    """
    return _lifted(tx).state_specs(params)


def abstract_state(tx: Any, params: Any) -> Any:
    """Shape, dtype and (on a mesh) sharding of every state leaf: the target of a restore.

    Args:
      tx: what :func:`data_parallel` or :func:`simulate` returned.
      params: parameters, or their shapes and dtypes.

    Returns:
      A tree of ``jax.ShapeDtypeStruct`` shaped like the state; nothing is allocated.

    Raises:
      TypeError: if ``tx`` is not lifted.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.simulate(ef.error_feedback(ef.top_k(0.1), axis_name="w"), 4, "w")
      >>> ef.parallel.abstract_state(tx, jnp.zeros(3)).residual.shape
      (4, 3)
    """
    return _lifted(tx).abstract_state(params)


def _lifted(tx: Any) -> Lifted:
    if not isinstance(tx, Lifted):
        raise TypeError(
            f"tx={type(tx).__name__} is not lifted; pass what data_parallel or simulate returned "
            "(for a hand-written map use ef_optax.parallel.worker_axes)."
        )
    return tx
