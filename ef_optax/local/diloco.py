"""DiLoCo (Douillard et al. 2023): Nesterov's momentum on the mean drift of H local steps.

every step:     x_i = x_i + Inner(grad f_i(x_i))
every H steps:  A = mean_i C(x - x_i) ;  m = b m + A ;  x = x - a (A + b m) ;  x_i = x
"""

from __future__ import annotations

import optax

from ef_optax.compressors.combine.identity import identity
from ef_optax.extend import AxisName, Compressor, MemoryLike, check
from ef_optax.feedback.compressed_mean import compressed_mean
from ef_optax.feedback.ef14 import error_feedback
from ef_optax.local.local_steps import local_steps


def diloco(
    inner: optax.GradientTransformation,
    period: int,
    learning_rate: optax.ScalarOrSchedule = 0.7,
    momentum: float = 0.9,
    *,
    compressor: Compressor | None = None,
    decay: float = 1.0,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""DiLoCo: H local steps, then Nesterov's momentum on the mean of the drifts.

    .. math:: A = \text{mean}_i\,(x - x_i), \quad m' = b\,m + A, \quad x' = x - a\,(A + b\,m')

    It is :func:`local_steps` with ``optax.sgd(a, momentum=b, nesterov=True)``. With a compressor,
    the drifts pass through :func:`ef_optax.error_feedback`, as in
    :func:`ef_optax.recipes.muloco`. With ``period=1``, inner SGD, a = 1 and b = 0 it is plain data
    parallelism.

    The gap to data parallelism grows with the number of workers and shrinks with the size of the
    model: 2.49 against 2.49 at one billion parameters, but 3.54 against 3.51 at 35 million.

    Args:
      inner: the optimizer of the local steps, ``optax.adamw(...)`` in the publication.
      period: H; 500 in the publication, 30 to 100 in later ones.
      learning_rate: a, a number or a schedule of the synchronisations.
      momentum: b in [0, 1).
      compressor: C, what is sent of the drifts; None sends them as they are, in one all-reduce.
      decay: what the residual keeps of itself, for a compressor.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: the dtype of x_i - x and of the residual, as in :func:`ef_optax.error_feedback`.

    Returns:
      The optimizer; its state is a :class:`LocalStepsState`.

    Raises:
      TypeError: if ``inner`` is not an Optax transformation. ValueError: for an option out of
        range.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp, optax
      >>> tx = ef.simulate(ef.local.diloco(optax.sgd(0.5), 1, 1.0, 0.0, axis_name="w"), 2, "w")
      >>> grads, params = jnp.array([[1.0], [3.0]]), jnp.zeros(1)
      >>> tx.update(grads, tx.init(params), params)[0].tolist()
      [-1.0]

    References:
      Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models", 2023;
      Therien et al., "MuLoCo", 2025 (arXiv 2505.23725). The numbers are of Douillard et al.,
      "Streaming DiLoCo", 2025, table 5.
    """
    check.count("diloco", "period", period)
    check.share("diloco", "decay", decay)
    check.rate("diloco", "learning_rate", learning_rate)
    check.share("diloco", "momentum", momentum)
    if compressor is None:  # nothing is left over, so nothing need be kept
        rule = compressed_mean(identity(), axis_name=axis_name)
    else:
        rule = error_feedback(compressor, axis_name=axis_name, decay=decay, memory=memory)
    step = optax.sgd(learning_rate, momentum=momentum or None, nesterov=bool(momentum))
    return local_steps(inner, period, optax.chain(rule, step), memory=memory)
