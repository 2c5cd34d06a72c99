"""A chain whose exchanges record what they send."""

from __future__ import annotations

from typing import Any

import optax

from ef_optax._exchange.monitored import Wanted, monitoring
from ef_optax._numeric import check
from ef_optax.parallel.lift import Lifted


def monitor(
    tx: optax.GradientTransformation,
    *,
    age: bool = False,
    dense_mean: bool = False,
    conservation: bool = False,
    every: int = 1,
) -> optax.GradientTransformationExtraArgs:
    r"""The same transformation, whose exchanges record what goes in, what is sent, and its cost.

    For the input p of an exchange, what this worker sends c and the gradient g of the rule, the
    record has, for each leaf, the sums of one pass over p and c and of one over g:

    .. math:: \|p\|_2^2,\ \|p\|_1,\ \|c\|_2^2,\ \langle p, c\rangle,\ \|p - c\|_2^2,\ \|g\|_2^2

    It also has how many entries of c are not zero, how many of p - c are exactly zero, and the
    bits of all steps. :func:`ef_optax.measure.summary` makes norms, ratios and angles of them.
    Updates and memories are those of ``tx``. Nothing is sent for it, and nothing goes to the host
    until it is read.

    Args:
      tx: a rule, or a chain that has one; not lifted yet.
      age: also count, for each entry, the exchanges since it was last sent (4 bytes a parameter
        and worker).
      dense_mean: also compare the aggregate with the mean of the inputs. This costs a dense sum
        over the workers at every step, so it is for finding faults and not for saving bytes.
      conservation: also check that sent and residual together are the input; costs a decode.
      every: record only every so many exchanges, beginning with the first; the bytes and ``age``
        are those of all exchanges. In the others a rule with a residual computes nothing for the
        record. Statistics of p, c and g are then those of the last recorded exchange.

    Returns:
      The transformation. Its state is that of ``tx``, in which every
      :class:`~ef_optax.states.ExchangeState` has a :class:`~ef_optax.states.MonitorState`.

    Raises:
      TypeError: if ``tx`` is not a transformation, or an option is not a bool.
      ValueError: for ``every`` below 1, and if ``tx`` is lifted already; the monitor belongs inside
        the lift.

    Example:
      >>> import ef_optax as ef, jax, jax.numpy as jnp, optax
      >>> tx = ef.monitor(optax.chain(ef.error_feedback(ef.top_k(k=1)), optax.sgd(0.1)))
      >>> params = jnp.zeros(2)
      >>> g, state = jnp.array([4.0, 3.0]), tx.init(params)
      >>> updates, state = jax.jit(tx.update)(g, state, params)
      >>> seen = ef.measure.summary(state)
      >>> seen["residual_norm"], round(seen["residual_to_gradient"], 3)
      (3.0, 0.6)
    """
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(
            f"monitor: tx={tx!r} is not an Optax transformation; give it a rule or a chain that "
            "has one, as ef.monitor(ef.error_feedback(ef.top_k(0.01)))."
        )
    if isinstance(tx, Lifted):
        raise ValueError(
            "monitor: tx is lifted already; put the monitor inside, "
            "ef_optax.data_parallel(ef_optax.monitor(chain), mesh, axis_name)."
        )
    options = {"age": age, "dense_mean": dense_mean, "conservation": conservation}
    for name, value in options.items():
        check.flag("monitor", name, value)
    check.count("monitor", "every", every)
    wanted = Wanted(**options, every=every)

    def init_fn(params: Any) -> Any:
        with monitoring(wanted):
            return tx.init(params)

    update = optax.with_extra_args_support(tx).update
    return optax.GradientTransformationExtraArgs(init_fn, update)
