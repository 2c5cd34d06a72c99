"""PAGE: an exact gradient from time to time, and differences of minibatch gradients in between."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from ef_optax.extend import (
    Array,
    MemoryLike,
    arguments,
    as_transformation,
    memory_for,
    trees,
)


class PageState(NamedTuple):
    """State of :func:`page`."""

    estimate: Any  # per worker, like the parameters: v
    last: Any  # the parameters of the last step
    steps: Array  # int32 scalar

    def points(self, params: Any) -> dict[str, Any]:
        """The last iterate, at which gradients are needed besides the parameters."""
        del params
        return {"page": self.last}


def page(*, memory: MemoryLike = None) -> optax.GradientTransformationExtraArgs:
    r"""PAGE: a full gradient from time to time, and minibatch gradient differences in between.

    .. math:: v' = \nabla f_i(x)\ \text{when exact, else}\
              v + \nabla f_i(x; \xi) - \nabla f_i(x^{\text{last}}; \xi)

    The caller draws the exact steps at random, because they need another batch: pass
    ``exact=True`` (or a boolean scalar, the same on all workers) to ``update`` if the gradients are
    those of the full local data. The first step counts as exact. EF21-PAGE is
    ``chain(page(), ef21(...))``.

    Args:
      memory: the dtype in which the estimate is stored, as in :func:`ef_optax.ef21`.

    Returns:
      The transformation; its state is a :class:`PageState`. Call
      ``update(grads["params"], state, params, grads=grads, exact=...)``.

    Raises:
      ValueError: at update, if parameters or gradients are missing.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = page()
      >>> params, state = jnp.zeros(1), tx.init(jnp.zeros(1))
      >>> grads = {"params": jnp.array([4.0]), "page": jnp.array([3.0])}
      >>> _, state = tx.update(grads["params"], state, params, grads=grads)
      >>> tx.update(grads["params"], state, params, grads=grads)[0].tolist()  # 4 + 4 - 3
      [5.0]

    References:
      Li, Bao, Zhang, Richtarik, "PAGE", ICML 2021; with EF21: Fatkhullin et al., "EF21 with Bells &
      Whistles", 2021.
    """
    memory = memory_for(memory)

    def init_fn(params: Any) -> PageState:
        return PageState(memory.zeros(params), trees.copy(params), jnp.zeros((), jnp.int32))

    def update_fn(
        updates: Any,
        state: PageState,
        params: Any = None,
        *,
        exact: Array | bool = False,
        **extra_args: Any,
    ) -> tuple[Any, PageState]:
        params = arguments.require_params("page", params)
        now = trees.wide(updates)
        before = arguments.gradient_at("page", "page", extra_args)
        v = trees.add(memory.read(state.estimate), trees.sub(now, before))
        v = trees.where((state.steps == 0) | jnp.asarray(exact), now, v)
        kept = memory.write(v, state.estimate, state.steps)
        return trees.emit(v, updates), PageState(kept, params, state.steps + 1)

    return as_transformation(init_fn, update_fn)
