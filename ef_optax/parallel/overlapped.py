"""Updates that are applied one step late, so that they travel while the next gradient is computed.

In time::

    this thread       gradient(t), apply(t-1), gradient(t+1), apply(t), ...
    a second thread                update(t) ..............., update(t+1) ...

A runtime may run the programs that one thread starts one after the other, as JAX does on CPUs. Here
a second thread starts the updates, whose collectives are then waited for by nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from ef_optax.parallel.specs import is_traced


class Overlapped:
    r"""An optimizer whose update of one step runs while the gradient of the next is computed.

    .. math:: x_{t+1} = x_t + u_{t-1}, \quad u_t = \text{update}(g(x_t)), \quad u_{-1} = 0

    A call starts the update of these gradients and returns the updates of the call before. What the
    caller computes next with them needs nothing that is on its way. Unlike
    :func:`ef_optax.exchanges.delayed`, which needs a runtime that runs the collectives and the
    computation of one program at the same time, it takes two programs: the gradient's must be
    another one than the update's. Any optimizer can be used. It is for CPUs, where it has been
    measured: a GPU or TPU runs its programs in the order in which they were started.

    Between two calls, and until :meth:`finish`, only programs without collectives may run, such as
    gradients of :func:`ef_optax.worker_value_and_grad`: collectives that two threads start could
    meet in another order on another process. A mesh of ``jax.set_mesh`` is known to the update;
    other contexts of JAX, which belong to a thread, are not.

    Args:
      update: the compiled ``update(grads, state, *args, **extra) -> (updates, state)``, such as
        ``jax.jit(tx.update)``. It may donate the state, and the gradients if the caller does not
        use them again.
      state: the optimizer's state, which belongs to this object from now on.
      updates: what the first call returns: zeros like the parameters, or what :meth:`finish` gave.

    Example:
      >>> import ef_optax as ef, jax, jax.numpy as jnp, optax
      >>> rule = ef.error_feedback(ef.top_k(k=1), axis_name="data")
      >>> tx = ef.simulate(optax.chain(rule, optax.sgd(1.0)), 2, "data")
      >>> params = jnp.zeros(2)
      >>> late = ef.parallel.Overlapped(jax.jit(tx.update), tx.init(params), jnp.zeros(2))
      >>> for gradient in ([3.0, 2.0], [1.0, 1.0], [0.0, 0.0]):
      ...     updates = late(jnp.array([gradient, gradient]), params)
      ...     params = params + updates
      ...     print(updates.tolist())
      [0.0, 0.0]
      [-3.0, -0.0]
      [-0.0, -3.0]
      >>> updates, state = late.finish()

    References:
      Stich, Karimireddy, "The Error-Feedback Framework: Better Rates for SGD with Delayed Gradients
      and Compressed Communication", 2020, with a delay of one step.
    """

    def __init__(self, update: Callable[..., tuple[Any, Any]], state: Any, updates: Any) -> None:
        if not callable(update):
            raise TypeError(f"update={update!r} is not callable: give the compiled tx.update.")
        self._update, self._updates, self._state = update, updates, state
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ef_optax-update")

    def __call__(self, grads: Any, *args: Any, **extra: Any) -> Any:
        """Starts the update of this step.

        Args:
          grads: gradients.
          args: what else the update takes: the parameters.
          extra: its extra arguments by name.

        Returns:
          The updates of the call before, to be applied now.

        Raises:
          TypeError: under ``jax.jit``, where nothing is started. What the update raises is passed
            on, and the state is that of before (which is lost if it was donated already).
        """
        if is_traced((grads, args, extra)):
            raise TypeError(
                "Overlapped is called with traced gradients: it starts a program, so call it "
                "outside of jax.jit, between the program of the gradient and the next one."
            )
        mesh = jax.sharding.get_mesh()

        def start() -> tuple[Any, Any]:
            if mesh.empty:
                return self._update(grads, self._state, *args, **extra)
            with jax.set_mesh(mesh):
                return self._update(grads, self._state, *args, **extra)

        # Waits until the program has been started, so that its arguments may be donated after it.
        after = self._thread.submit(start).result()
        before, (self._updates, self._state) = self._updates, after
        return before

    def finish(self) -> tuple[Any, Any]:
        """Waits for the update that is on its way; then collectives may be used again.

        Returns:
          Its updates and the state, both of which a checkpoint needs. The next call, if there is
          one, returns these updates, so apply them here only at the end of the training.
        """
        return jax.block_until_ready((self._updates, self._state))
