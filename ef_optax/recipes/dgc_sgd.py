"""SGD with Deep Gradient Compression (Lin et al. 2018), as its authors train with it.

c = mean of what DGC's velocities send            momentum is inside
b = m b + w x ;  D = b   (Nesterov: w x + m b)    weight decay has a momentum of its own
x = x - lr (c + D)
"""

from __future__ import annotations

import jax
import optax

from ef_optax.compressors.combine.identity import identity
from ef_optax.compressors.combine.per_leaf import per_leaf
from ef_optax.compressors.sparse.top_k import top_k
from ef_optax.extend import AxisName, Compressor, MemoryLike, check, plus
from ef_optax.feedback.dgc import dgc
from ef_optax.policies.dgc_warmup import dgc_warmup


def dgc_sgd(
    learning_rate: optax.ScalarOrSchedule,
    ratio: float = 0.001,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    steps_per_epoch: int | None = None,
    warmup_epochs: int = 4,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SGD with DGC: the largest velocities travel, with warm-up, clipping and factor masking.

    .. math:: c = \text{DGC}(g_1, \dots, g_n), \quad b' = m\,b + w x, \quad
              x' = x - \eta\,(c + b')

    It is :func:`ef_optax.dgc` with :func:`ef_optax.policies.dgc_warmup`, then plain SGD. The
    velocities include momentum. Weight decay is not compressed; in the official code it has a
    momentum buffer of its own, with Nesterov's form if the velocities have it, so that without
    compression the optimizer is ``optax.sgd`` with momentum and coupled weight decay. Leaves with
    fewer than two axes travel dense with local momentum.

    The k largest values of a leaf are sent exactly, where the official code estimates a threshold
    from a sample; ``ef.dgc(ef.sampled_top_k(...))`` does so too.

    Args:
      learning_rate: eta, a number or a schedule.
      ratio: the share of a leaf that is sent after the warm-up, in (0, 1].
      momentum: m in [0, 1).
      nesterov: whether velocities and weight decay have Nesterov's form.
      weight_decay: w.
      clip_norm: the threshold for the norm of the mean gradient, as in :func:`ef_optax.dgc`; None
        for no clipping.
      steps_per_epoch: steps in one epoch of the warm-up; None for no warm-up.
      warmup_epochs: epochs in which the ratio falls, at least 0.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: how velocities and residuals are stored, as in :func:`ef_optax.error_feedback`.

    Returns:
      The optimizer. Memory: two buffers that differ between workers, and that of the weight decay.
      Bits: those of ``ef.top_k(ratio)``, and 32 for each value of a dense leaf.

    Raises:
      ValueError: for an option out of range.

    Example:
      >>> import ef_optax as ef, jax, jax.numpy as jnp
      >>> tx = ef.recipes.dgc_sgd(1.0, 0.5, momentum=0.5)
      >>> update = jax.jit(tx.update)
      >>> params, g = jnp.zeros((2, 1)), jnp.array([[3.0], [2.0]])
      >>> _, state = update(g, tx.init(params), params)  # the 3 is sent
      >>> float(update(g, state, params)[0][1, 0])  # 2 + (0.5 * 2 + 2)
      -5.0

    References:
      Lin, Han, Mao, Wang, Dally, "Deep Gradient Compression", ICLR 2018; synxlin/
      deep-gradient-compression, dgc/optim/sgd.py for weight decay.
    """
    check.rate("dgc_sgd", "learning_rate", learning_rate)
    check.ratio("dgc_sgd", "ratio", ratio)
    check.decay("dgc_sgd", "momentum", momentum)
    check.flag("dgc_sgd", "nesterov", nesterov)
    check.not_negative("dgc_sgd", "weight_decay", weight_decay)
    if clip_norm is not None:
        check.positive("dgc_sgd", "clip_norm", clip_norm)
    if steps_per_epoch is not None:
        check.count("dgc_sgd", "steps_per_epoch", steps_per_epoch)
    check.count("dgc_sgd", "warmup_epochs", warmup_epochs, least=0)
    warm = steps_per_epoch is not None
    sparse = dgc_warmup(ratio, steps_per_epoch, warmup_epochs) if warm else top_k(ratio)

    def choose(_: str, leaf: jax.ShapeDtypeStruct) -> Compressor:
        return identity() if len(leaf.shape) < 2 else sparse

    without_decay = isinstance(weight_decay, int | float) and weight_decay == 0
    decay = optax.chain(
        optax.set_to_zero(),
        optax.add_decayed_weights(weight_decay),
        optax.trace(momentum, nesterov=nesterov),
    )
    return optax.chain(
        dgc(
            per_leaf(choose),
            momentum=momentum,
            nesterov=nesterov,
            clip_norm=clip_norm,
            axis_name=axis_name,
            memory=memory,
        ),
        optax.identity() if without_decay else plus(decay),
        optax.scale_by_learning_rate(learning_rate),
    )
