"""DisTrO, the DeMo of PsycheFoundation/psyche: gradients ahead, and votes on the wire.

g_i at x - lr sign(d_i), d_i and lr of the last step                        the look-ahead
d_i = b (d_i - q_i) + lr g_i ;  q_i = the k largest cosine coefficients of each tile of d_i
x = x - lr (sign(mean of each coefficient's signs over its senders) + w x)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ef_optax.compressors.quantize.sign import sign
from ef_optax.compressors.sparse.dct_top_k import dct_top_k
from ef_optax.exchanges.senders import mean_of_senders
from ef_optax.extend import (
    Array,
    AxisName,
    MemoryLike,
    arguments,
    as_transformation,
    check,
    memory_for,
    trees,
)
from ef_optax.feedback.ef14 import error_feedback


class DistroState(NamedTuple):
    """State of the momentum inside :func:`distro`."""

    ahead: Any  # per worker, int8 like the parameters: the signs of d_i, what was sent included
    last_rate: Array  # scalar: the rate of the last step
    feedback: Any  # an ErrorFeedbackState, whose residual is b (d_i - q_i), per worker

    def points(self, params: Any) -> dict[str, Any]:
        """Where this worker would go alone; the common parameters need no gradient."""

        def one(x: Array, ahead: Array) -> Array:
            return x - (self.last_rate * ahead.astype(self.last_rate.dtype)).astype(x.dtype)

        return {"params": jax.tree.map(one, params, self.ahead)}


def distro(
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay: float = 0.999,
    k: int = 4,
    chunk: int = 64,
    votes: bool = True,
    weight_decay: float = 0.0,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""DisTrO: DeMo with gradients at the point where the worker's own momentum points to.

    .. math:: g_i = \nabla f_i(x - \eta_{\text{last}}\,\text{sign}(d_i)), \quad
              d_i' = b\,(d_i - q_i) + \eta g_i, \quad q_i' = \text{top-}k(\text{DCT of } d_i')

    Two things differ from :func:`demo`. Gradients are taken ahead of the parameters, by the step
    that the worker would make with the signs of its own momentum, of which nothing is subtracted
    yet; take them at :func:`ef_optax.query_points`. And with ``votes`` only the signs of the
    coefficients travel, so that the step is the sign of the inverse transform of mean votes. What
    each worker subtracts is the coefficient itself, so the magnitudes are not sent later either.

    In the public code the messages of a step are applied while the next one is computed, so that
    the step comes one call later. Here it is applied at once.

    Args:
      learning_rate: eta, a number or a schedule; as small as that of a sign method.
      decay: b in [0, 1]; 0.999 by default and 0.995 in the run of Consilience.
      k: coefficients sent of each tile.
      chunk: the largest side of a tile.
      votes: whether only signs travel.
      weight_decay: w, decoupled.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: how the residual is stored, as in :func:`ef_optax.error_feedback`.

    Returns:
      The optimizer. Memory: a residual and a byte for each parameter, which differ between workers.
      Bits: k (1 + 12) for each tile of 64 x 64, and a word for each leaf; without votes those of
      :func:`demo`.

    Raises:
      ValueError: for an option out of range.

    Example:
      >>> import ef_optax as ef, jax, jax.numpy as jnp
      >>> tx = ef.recipes.distro(0.5, k=1, chunk=2)
      >>> params = jnp.zeros(2)
      >>> updates, state = jax.jit(tx.update)(jnp.array([3.0, 1.0]), tx.init(params), params)
      >>> updates.tolist(), ef.query_points(state, params)["params"].tolist()
      ([-0.5, -0.5], [-0.5, -0.5])

    References:
      PsycheFoundation/psyche, shared/modeling/src/distro.rs and trainer.rs. There is no publication
      of this form; DeMo is Peng, Quesnelle, Kingma, 2024.
    """
    check.rate("distro", "learning_rate", learning_rate)
    check.share("distro", "decay", decay)
    check.count("distro", "k", k)
    check.count("distro", "chunk", chunk)
    check.flag("distro", "votes", votes)
    check.not_negative("distro", "weight_decay", weight_decay)
    sent = mean_of_senders(dct_top_k(chunk, k), values=sign() if votes else None)
    rule = error_feedback(sent, axis_name=axis_name, decay=decay, memory=memory)
    memory = memory_for(memory)

    def init_fn(params: Any) -> DistroState:
        ahead = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.int8), params)
        return DistroState(ahead, jnp.zeros((), trees.widest(params)), rule.init(params))

    def update_fn(
        updates: Any, state: DistroState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, DistroState]:
        del params, extra_args
        rate = arguments.value_at(learning_rate, state.feedback.exchange.step)
        step = trees.scale(rate, trees.wide(updates))
        d = trees.add(memory.read(state.feedback.residual), step)
        out, feedback = rule.update(step, state.feedback)
        ahead = jax.tree.map(lambda x: jnp.sign(x).astype(jnp.int8), d)
        last = jnp.asarray(rate, state.last_rate.dtype)
        return trees.emit(out, updates), DistroState(ahead, last, feedback)

    return optax.chain(
        as_transformation(init_fn, update_fn),
        optax.scale_by_sign(),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
