"""EF21-PAGE (Fatkhullin et al. 2021): EF21 on PAGE's variance-reduced gradients."""

from __future__ import annotations

import optax

from ef_optax.estimators.page import page
from ef_optax.extend import (
    AxisName,
    Compressor,
    MemoryLike,
    check,
    difference,
)
from ef_optax.feedback.ef21 import ef21


def ef21_page(
    compressor: Compressor,
    *,
    axis_name: AxisName = None,
    init: difference.Init = "full",
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""EF21-PAGE: ``chain(page(), ef21(compressor))``, minibatches with rare full gradients.

    .. math:: v_i' = \nabla f_i(x)\ \text{when exact, else}\ v_i + \nabla f_i(x; \xi) -
              \nabla f_i(x^{\text{last}}; \xi), \quad c_i = C(v_i' - g_i), \quad
              \text{emit mean}_i\,(g_i + c_i)

    Gradients of one minibatch are needed at two points (:func:`query_points`). The caller draws the
    exact steps at random, because they need another batch: see :func:`page`. If all steps are
    exact, it is :func:`ef21`.

    Args:
      compressor: what is sent; contractive, such as ``ef.top_k(0.01)``.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      init: the first estimates, as in :func:`ef21`; ``"full"`` as in the authors' code.
      memory: the dtype in which gradient and estimates are stored, as in :func:`ef21`.

    Returns:
      The transformation, to be put before ``optax.sgd``. Call
      ``update(grads["params"], state, params, grads=grads, exact=...)``.

    Raises:
      TypeError: if ``compressor`` is not a Compressor. ValueError: for an unknown ``init`` or a
        compressor that is not additive, and at update if parameters or gradients are missing.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.ef21_page(ef.top_k(k=1))
      >>> params = jnp.zeros(2)
      >>> g = {"params": jnp.array([4.0, 1.0]), "page": jnp.array([3.0, 1.0])}
      >>> _, state = tx.update(g["params"], tx.init(params), params, grads=g)
      >>> tx.update(g["params"], state, params, grads=g)[0].tolist()  # 4 + (4 - 3)
      [5.0, 1.0]

    References:
      Fatkhullin, Sokolov, Gorbunov, Li, Richtarik, "EF21 with Bells & Whistles", 2021; start as in
      the authors' code, IgorSokoloff/ef21_b-w_experiements_source_code.
    """
    check.word("ef21_page", "init", init, difference.INITS)
    return optax.with_extra_args_support(
        optax.chain(
            page(memory=memory), ef21(compressor, axis_name=axis_name, init=init, memory=memory)
        )
    )
