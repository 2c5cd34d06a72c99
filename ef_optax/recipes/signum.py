"""Signum with majority vote (Bernstein, Zhao, Azizzadenesheli, Anandkumar 2019).

m_i = b m_i + (1 - b) g_i ;  send sign(m_i)
x = x - lr (sign(sum_i sign(m_i)) + w x)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import optax

from ef_optax.exchanges.majority import majority_vote
from ef_optax.extend import AxisName, MemoryLike, as_transformation, check, memory_for, trees
from ef_optax.feedback.compressed_mean import compressed_mean


class SignumState(NamedTuple):
    """State of the votes inside :func:`signum`."""

    momentum: Any  # per worker, like the parameters: m_i
    vote: Any  # a CompressedMeanState


def signum(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float = 0.9,
    *,
    weight_decay: float = 0.0,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Signum: every worker sends the signs of its momentum, and the majority decides.

    .. math:: m_i' = b\,m_i + (1 - b)\,g_i, \quad
              x' = x - \eta\,(\text{sign}(\textstyle\sum_i \text{sign}(m_i')) + w\,x)

    There is no error feedback, so with few workers it need not converge; :func:`ef_sign_sgd` does.
    All coordinates move by the rate, whatever their gradients; a coordinate on which an even number
    of workers is split does not move. A worker votes +1 where its momentum is exactly zero, but a
    leaf that is zero as a whole does not vote (:func:`ef_optax.exchanges.majority_vote`).

    Args:
      learning_rate: eta, a number or a schedule; about a tenth of SGD's, or less.
      momentum: b in [0, 1); 0 is signSGD with majority vote.
      weight_decay: w, decoupled from the signs, as in the paper.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: how the momentum is stored, as in :func:`ef_optax.error_feedback`.

    Returns:
      The optimizer. Memory: one momentum, which differs between workers. Bits: d + 32 for a leaf of
      d values.

    Raises:
      ValueError: for an option out of range.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.simulate(ef.recipes.signum(0.5, axis_name="w"), 3, "w")
      >>> grads = jnp.array([[9.0, -1.0], [-1.0, -1.0], [-1.0, 5.0]])  # one row a worker
      >>> tx.update(grads, tx.init(jnp.zeros(2)), jnp.zeros(2))[0].tolist()
      [0.5, 0.5]

    References:
      Bernstein, Zhao, Azizzadenesheli, Anandkumar, "signSGD with Majority Vote is Communication
      Efficient and Fault Tolerant", ICLR 2019, Algorithm 1.
    """
    check.rate("signum", "learning_rate", learning_rate)
    check.decay("signum", "momentum", momentum)
    check.not_negative("signum", "weight_decay", weight_decay)
    votes = compressed_mean(majority_vote(), axis_name=axis_name)
    memory = memory_for(memory, axis_name)

    def init_fn(params: Any) -> SignumState:
        return SignumState(memory.zeros(params), votes.init(params))

    def update_fn(
        updates: Any, state: SignumState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, SignumState]:
        del params, extra_args
        past = trees.scale(momentum, memory.read(state.momentum))
        m = trees.axpy(1 - momentum, trees.wide(updates), past)
        majority, vote = votes.update(m, state.vote)
        kept = memory.write(m, state.momentum, state.vote.exchange.step)
        return trees.emit(majority, updates), SignumState(kept, vote)

    return optax.chain(
        as_transformation(init_fn, update_fn),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
