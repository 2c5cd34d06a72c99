"""Local steps: H steps of any optimizer on every worker, then one step of the common model.

every step:     x_i = x_i + Inner(grad f_i(x_i))
every H steps:  D_i = x - x_i ;  x = x + Outer(D_1, ..., D_n) ;  x_i = x
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ef_optax.extend import (
    Array,
    AxisName,
    Exchange,
    ExchangeState,
    Identity,
    MemoryLike,
    arguments,
    as_transformation,
    check,
    memory_for,
    own_models,
    steps,
    trees,
)


class LocalStepsState(NamedTuple):
    """State of :func:`local_steps`."""

    step: Array  # int32 scalar: steps made
    ahead: Any  # per worker, like the parameters: x_i - x
    inner: Any  # per worker: the state of the inner optimizer
    outer: Any  # the state of the outer chain; a residual in it differs between the workers
    flags: ExchangeState | tuple[()]  # of one number per step, if all workers skip together

    roles = {"inner": "optimizer"}

    def points(self, params: Any) -> dict[str, Any]:
        """Each worker's own model, at which its gradient is taken; the common one needs none."""
        return own_models.own_model("params", self.ahead, params)


def local_steps(
    inner: optax.GradientTransformation,
    period: int,
    outer: optax.GradientTransformation,
    *,
    skip_together: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""H local steps of an inner optimizer, then one step of an outer one on the drifts.

    .. math:: x_i' = x_i + \text{Inner}(\nabla f_i(x_i)); \quad \text{every } H \text{ steps}\quad
              D_i = x - x_i', \quad x' = x + \text{Outer}(D_1, \dots, D_n), \quad x_i'' = x'

    D_i is a gradient of one worker that is taken every H steps, so ``outer`` is a chain like any
    other: a rule that exchanges, with any compressor and memory, then any Optax optimizer. These
    methods of the literature are chains:

    ==================  ===========================================================================
    local SGD           ``compressed_mean(identity(), axis_name=a)``, then ``optax.scale(-1)``
    DiLoCo              the same mean, then ``optax.sgd(0.7, momentum=0.9, nesterov=True)``:
                        :func:`diloco`
    SparseLoCo          ``error_feedback(C, decay=0.95, axis_name=a)``, then ``optax.sgd(1)``:
                        :func:`sparse_loco`
    MuLoCo              inner ``optax.contrib.muon``; ``error_feedback(C, decay=0.9, axis_name=a)``,
                        C once more, and Nesterov's momentum: :func:`ef_optax.recipes.muloco`
    Qsparse-local-SGD   inner ``optax.sgd``; ``error_feedback(C, axis_name=a)``, then
                        ``optax.scale(-1)``
    ==================  ===========================================================================

    The training loop's parameters are x, which changes every H steps and is what to evaluate and to
    store. Gradients are taken at each worker's x_i (:func:`query_points`), and only there. The
    inner optimizer's state stays on its worker, is kept over synchronisations and never averaged.
    It is a complete optimizer, so no transformation after it may change the updates; what stands
    before it (clipping, say) sees the gradients of single workers. Python loops and ``lax.scan``
    over steps give the same results.

    Nothing travels between two synchronisations. A worker whose gradient has a NaN, an infinity or
    a norm above 1.8e19 leaves out this one step of its own, and the others go on.

    Args:
      inner: the optimizer of the local steps, with its rate and its sign: ``optax.adamw(3e-4)``.
      period: H, at least 1.
      outer: the chain that gets the drifts of all workers and moves the common model.
      skip_together: a worker axis over which one number travels in every step, so that a bad
        gradient on one worker makes all of them skip the step; None as described above.
      memory: the dtype in which x_i - x is stored, as in :func:`ef_optax.error_feedback`.

    Returns:
      The optimizer; its state is a :class:`LocalStepsState`. ``update`` takes gradients at
      ``query_points(state, params)["params"]``.

    Raises:
      TypeError: if ``inner`` or ``outer`` is not an Optax transformation. ValueError: for a period
        below 1, and at update without parameters.

    Example:
      Two workers with f_i(x) = (x - b_i)^2 / 2, b = 0 and 8; x only moves every second step.

      >>> import ef_optax as ef, jax, jax.numpy as jnp, optax
      >>> mean = ef.compressed_mean(ef.identity(), axis_name="w")
      >>> outer = optax.chain(mean, optax.scale(-1.0))
      >>> tx = ef.simulate(ef.local.local_steps(optax.sgd(0.5), 2, outer), 2, "w")
      >>> x, b = jnp.zeros(()), jnp.array([0.0, 8.0])
      >>> state = tx.init(x)
      >>> for _ in range(2):
      ...     points = ef.query_points(state, x)
      ...     loss = lambda x, b: 0.5 * jnp.sum((x - b) ** 2)
      ...     losses, grads = ef.worker_value_and_grad(loss, 2, "w")(points, b)
      ...     updates, state = tx.update(grads["params"], state, x)
      ...     x = optax.apply_updates(x, updates)
      ...     print(x, losses)
      0.0 [ 0. 32.]
      3.0 [0. 8.]

    References:
      Stich, "Local SGD Converges Fast and Communicates Little", 2019; Douillard et al., "DiLoCo",
      2023; for the chains see the functions named above.
    """
    for name, value in (("inner", inner), ("outer", outer)):
        if not isinstance(value, optax.GradientTransformation):
            raise TypeError(
                f"local_steps: {name}={value!r} is not an Optax transformation such as "
                "optax.adamw(3e-4)."
            )
    check.count("local_steps", "period", period)
    check.axis(skip_together, "skip_together")
    flags = Exchange(Identity(), skip_together)
    inner, outer = optax.with_extra_args_support(inner), optax.with_extra_args_support(outer)
    memory = memory_for(memory)

    def init_fn(params: Any) -> LocalStepsState:
        return LocalStepsState(
            step=jnp.zeros((), jnp.int32),
            ahead=memory.zeros(params),
            inner=inner.init(params),
            outer=outer.init(trees.wide(params)),
            flags=() if skip_together is None else steps.silent_init(flags),
        )

    def update_fn(
        updates: Any, state: LocalStepsState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, LocalStepsState]:
        params = arguments.require_params("local_steps", params)
        x_i = state.points(params)["params"]
        ahead = memory.read(state.ahead)
        ahead, after = own_models.inner_step(inner, updates, state.inner, ahead, x_i, extra_args)
        zero, sent = _zeros(ahead), state.flags
        if isinstance(sent, ExchangeState):
            zero, sent = steps.silent(flags, ahead, sent)

        def synchronise() -> tuple[Any, Any, Any]:
            drift = trees.scale(-1, ahead)
            with own_models.unwatched():
                moved, new = outer.update(drift, state.outer, trees.wide(params), **extra_args)
            return moved, jax.tree.map(jnp.zeros_like, ahead), new

        def go_on() -> tuple[Any, Any, Any]:
            return zero, ahead, state.outer

        count = state.step + 1
        moved, ahead, new = own_models.every(period, count, synchronise, go_on, skip_together)
        return trees.emit(moved, updates), LocalStepsState(
            step=count,
            ahead=memory.write(ahead, state.ahead, count),
            inner=after,
            outer=new,
            flags=sent,
        )

    return as_transformation(init_fn, update_fn)


def _zeros(tree: Any) -> Any:
    """Zeros like ``tree`` that are the same on all workers, for JAX's types too."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
