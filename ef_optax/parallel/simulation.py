"""All workers in one process: the worker axis is a ``vmap`` axis."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from ef_optax._core import context
from ef_optax._exchange.collectives import AxisName, axis_names
from ef_optax.parallel import inference, specs
from ef_optax.parallel.arguments import all_arrays, check_gradients, check_params, split_extra
from ef_optax.parallel.lift import Lifted, flags_of, infer_flags, local_step, params_like


def simulate(
    tx: optax.GradientTransformation,
    num_workers: int | tuple[int, ...],
    axis_name: AxisName,
    *,
    param_specs: Any = None,
    model_axes: Mapping[str, int] | None = None,
    extra_args: dict[str, Any] | None = None,
) -> Lifted:
    """Runs all workers in one process: the worker axis is a ``vmap`` axis, no devices are needed.

    Args:
      tx: a chain that exchanges over ``axis_name``.
      num_workers: how many workers (one number for each axis of a tuple).
      axis_name: the name that ``tx`` uses for the worker axis.
      param_specs: partition specs of the parameters over ``model_axes``, to follow the trajectory
        of a mesh on which they are split (compression is per slice there).
      model_axes: name and size of each model axis that ``param_specs`` names.
      extra_args: examples of extra arguments that the update needs (``{"value": 0.0}``).

    Returns:
      A transformation with ``init(params)`` and ``update(grads, state, params)``, where each leaf
      of ``grads`` has a leading axis of ``num_workers`` and is not averaged; it emits one update.

    Raises:
      ValueError: if nothing in the chain exchanges, if updates differ between workers, or (at
        update) if gradients lack the worker axis.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp, optax
      >>> tx = optax.chain(ef.error_feedback(ef.top_k(k=1), axis_name="data"), optax.sgd(1.0))
      >>> tx = ef.simulate(tx, 2, "data")
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jnp.array([[3.0, 1.0], [1.0, 4.0]]), state, params)
      >>> updates.tolist(), state[0].residual.tolist()
      ([-1.5, -2.0], [[0.0, 1.0], [1.0, 0.0]])
    """
    sizes = inference.sizes_of(axis_name, num_workers)
    n = inference.worker_count(sizes)
    example = extra_args
    size_of = dict(zip(axis_names(axis_name), sizes, strict=True))

    def unfold(x: Any, own: frozenset[str]) -> Any:
        """The worker axis as one dimension for each of the leaf's own axes."""
        if not own or len(sizes) == 1:
            return x
        first = tuple(slice(None) if name in own else 0 for name in size_of)
        return x.reshape(*sizes, *x.shape[1:])[first]

    def fold(x: Any, own: frozenset[str]) -> Any:
        """The inverse of ``unfold``; repeated over the axes that are not the leaf's own."""
        if not own or len(sizes) == 1:
            return x
        missing = [i for i, name in enumerate(size_of) if name not in own]
        shape = x.shape[len(own) :]
        return jnp.broadcast_to(jnp.expand_dims(x, missing), (*sizes, *shape)).reshape(n, *shape)

    infer = functools.partial(infer_flags, tx, axis_name, sizes, extra_args)

    def lift_of(params: Any) -> context.Lift:
        sizes = dict(model_axes or {})
        found = {} if param_specs is None else specs.by_path(params, param_specs, axis_name, sizes)
        return context.Lift(found, sizes, simulated=True)

    def init_fn(params: Any) -> Any:
        check_params(params)
        lift = lift_of(params)
        flags = infer(params, lift)

        def one(_: Any) -> Any:
            with context.lifting(lift):
                return tx.init(params)

        bound = inference.bind_axes(one, axis_name, sizes, 0, 0)
        whole = bound(jnp.zeros(sizes, jnp.int32))
        skip = len(sizes)
        return jax.tree.map(
            lambda x, flag: x.reshape(n, *x.shape[skip:]) if flag else x[(0,) * skip], whole, flags
        )

    def update_core(
        updates: Any, state: Any, params: Any, extra_args: dict[str, Any]
    ) -> tuple[Any, Any]:
        lift = lift_of(params_like(updates, params))
        flags = flags_of(tx, axis_name, sizes, lift, params_like(updates, params), state, example)
        every = frozenset(axis_names(axis_name))
        own = jax.tree.map(lambda flag: every if flag else frozenset(), flags)
        if len(sizes) > 1:  # some leaves may differ over some of the axes only
            with context.lifting(lift):
                like = params_like(updates, params)
                own = inference.varying_axes(tx, like, axis_name, sizes, extra_args=example)
        traced, marks, fixed = split_extra(extra_args, n)
        own_extra = jax.tree.map(lambda mark: every if mark else frozenset(), marks)
        step = local_step(tx, lift, axis_name)

        def one(g: Any, s: Any, p: Any, x: Any) -> Any:
            return step(g, s, p, {**x, **fixed})

        arguments = (updates, state, params, traced)
        marks = (
            jax.tree.map(lambda _: every, updates),
            own,
            jax.tree.map(lambda _: frozenset(), params),
            own_extra,
        )
        bound = inference.map_axes(
            one,
            axis_names(axis_name),
            size_of,
            marks,
            lambda name: (None, jax.tree.map(lambda a: 0 if name in a else None, own)),
        )
        emitted, after = bound(*jax.tree.map(unfold, arguments, marks))
        return emitted, jax.tree.map(fold, after, own)

    compiled = jax.jit(update_core)  # one for all eager calls; inside a user's jit it is inlined

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        check_gradients(updates, params, n, axis_name)
        run = compiled if all_arrays(extra_args) else update_core
        return run(updates, state, params, extra_args)

    lifted = Lifted(init_fn, update_fn)
    lifted.axis_name, lifted.sizes = axis_name, sizes
    lifted.worker_axes = lambda params: infer(params, lift_of(params))
    lifted.state_specs = lambda params: jax.tree.map(
        lambda flag: P(axis_name) if flag else P(), lifted.worker_axes(params)
    )
    lifted.abstract_state = lambda params: jax.eval_shape(init_fn, params)
    return lifted
