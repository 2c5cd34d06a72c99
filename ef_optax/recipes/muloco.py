"""MuLoCo (Therien et al. 2025): Muon on every worker, a few bits with feedback, Nesterov outside.

every step:     x_i = x_i + Muon(grad f_i(x_i))
every H steps:  e_i = b e_i + x - x_i ;  c_i = C(e_i) ;  e_i = e_i - c_i
                A = C(mean_i c_i) ;  m = mu m + A ;  x = x - a (A + mu m) ;  x_i = x
"""

from __future__ import annotations

from typing import Any

import optax

from ef_optax.compressors.combine.identity import identity
from ef_optax.compressors.combine.per_leaf import per_leaf
from ef_optax.compressors.quantize.sigma_bins import sigma_bins
from ef_optax.extend import AxisName, Compressor, MemoryLike, check
from ef_optax.feedback.ef14 import error_feedback
from ef_optax.local.local_steps import local_steps


def muloco(
    learning_rate: optax.ScalarOrSchedule,
    period: int = 30,
    *,
    outer_rate: optax.ScalarOrSchedule = 0.9,
    outer_momentum: float = 0.8,
    decay: float = 0.9,
    compressor: Compressor | None = None,
    quantise_mean: bool = True,
    inner: optax.GradientTransformation | None = None,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""MuLoCo: local steps of Muon, and DiLoCo's outer step on drifts of a few bits with feedback.

    .. math:: e_i' = b\,e_i + x - x_i, \quad c_i = C(e_i'), \quad e_i'' = e_i' - c_i, \quad
              A = C(\text{mean}_i\,c_i)

    and Nesterov's momentum on A. The chain is :func:`ef_optax.local.local_steps` with ``inner``
    Muon, :func:`ef_optax.error_feedback`, the compressor once more, and ``optax.sgd``. The mean is
    rounded again because a ring that reduces in a few bits does so; every worker computes it
    itself here, so it costs no traffic.

    ``optax.contrib.muon`` takes AdamW for leaves that are not matrices. The publication also takes
    AdamW for the embedding and the head: give ``inner`` with its
    ``muon_weight_dimension_numbers`` for them. The public code adds the rate twice (into e and
    again in the step), which is left out.

    Args:
      learning_rate: of Muon, a number or a schedule of the steps.
      period: H.
      outer_rate: a, a number or a schedule of the synchronisations; 0.8 to 0.9 in the publication.
      outer_momentum: mu in [0, 1); 0.8 to 0.9.
      decay: b in [0, 1].
      compressor: C, which runs on single workers too; None is ``ef.sigma_bins(2)`` for matrices,
        and vectors (norms, biases) as they are.
      quantise_mean: whether C is applied to the mean as well.
      inner: the inner optimizer; None is ``optax.contrib.muon(learning_rate, beta=0.9)``.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: the dtype of x_i - x and of the residual, as in :func:`ef_optax.error_feedback`.

    Returns:
      The optimizer; its state is a :class:`ef_optax.states.LocalStepsState`. Memory per worker: the
      drift, the residual and Muon's momentum; the outer momentum is common. Bits: those of C once
      every H steps.

    Raises:
      TypeError: if ``compressor`` is not a Compressor. ValueError: for an option out of range.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp, optax
      >>> tx = ef.simulate(ef.recipes.muloco(0.02, period=2, axis_name="w"), 2, "w")
      >>> params = {"w": jnp.zeros((4, 4)), "b": jnp.zeros(4)}
      >>> state = tx.init(params)
      >>> type(state).__name__, state.outer[0].residual["w"].shape
      ('LocalStepsState', (2, 4, 4))

    References:
      Therien et al., "MuLoCo: Muon is a practical inner optimizer for DiLoCo", 2025 (arXiv
      2505.23725), by its code, facebookresearch/MuLoCo: quantized_outer_sgd.py.
    """
    check.rate("muloco", "learning_rate", learning_rate)
    check.count("muloco", "period", period)
    check.rate("muloco", "outer_rate", outer_rate)
    check.decay("muloco", "outer_momentum", outer_momentum)
    check.share("muloco", "decay", decay)
    check.flag("muloco", "quantise_mean", quantise_mean)
    if compressor is None:
        compressor = per_leaf(_matrices_only)
    rule = error_feedback(compressor, axis_name=axis_name, decay=decay, memory=memory)
    again = compressor if quantise_mean else optax.identity()
    nesterov = optax.sgd(outer_rate, momentum=outer_momentum or None, nesterov=bool(outer_momentum))
    muon = optax.contrib.muon(learning_rate, beta=0.9) if inner is None else inner
    return local_steps(muon, period, optax.chain(rule, again, nesterov), memory=memory)


def _matrices_only(path: str, like: Any) -> Compressor:
    del path
    return sigma_bins(2) if len(like.shape) > 1 else identity()
