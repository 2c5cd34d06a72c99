"""Error feedback in tiers: inside a pod over fast links, then between the pods over slow ones.

in_1 = g_i
tier k = 1 .. K:   p_k = in_k + e_k
                   c_k = C_k(p_k)           what travels, over the axis of tier k alone
                   e_k = p_k - c_k
                   in_{k+1} = mean of c_k over the group of tier k
emit in_{K+1}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optax

from ef_optax.extend import AxisName, Compressor, MemoryLike, check, codec_of, trees
from ef_optax.feedback.ef14 import error_feedback


def hierarchical(
    tiers: Sequence[tuple[AxisName, Compressor]], *, memory: MemoryLike = None
) -> optax.GradientTransformationExtraArgs:
    r"""Error feedback over several axes, with a compressor and a residual for each of them.

    .. math:: p_k = \text{in}_k + e_k, \quad c_k = C_k(p_k), \quad e_k' = p_k - c_k, \quad
              \text{in}_{k+1} = \text{mean}\,c_k

    Tier k averages over its own axis what the tier before it has averaged, so little needs to be
    compressed where links are fast, and only strongly compressed messages cross the slow ones. The
    iterate ``x - gamma sum_k mean e_k`` moves by the exact mean gradient. What passes from tier to
    tier is in float32 or wider, whatever the gradients are.

    With the identity in every tier but the last it is :func:`error_feedback` of each group's mean.
    Devices that a tier has averaged hold equal residuals from there on, and each of them sends the
    group's message along its own line of the mesh. Where parameters are split inside a group
    (``param_specs`` of :func:`data_parallel`), a device keeps and sends only its own part.

    Args:
      tiers: ``(axis_name, compressor)`` of each tier, in the order in which they average: the
        fastest links first. An axis name may be a tuple of names. Random compressors of two tiers
        draw different numbers only if their keys differ.
      memory: how the residuals are stored, as in :func:`error_feedback`.

    Returns:
      The transformation; its state is a tuple of :class:`ErrorFeedbackState`, one for each tier.
      Lift it over all axes together, ``data_parallel(tx, mesh, ("dcn", "ici"))``.

    Raises:
      TypeError: if a compressor is not a Compressor. ValueError: if there is no tier, if a tier is
        not such a pair, or if two tiers have an axis in common; at init, for a compressor that
        makes the residual grow.

    Example:
      Two pods of two workers, which send their largest value between the pods:

      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.hierarchical([("ici", ef.cast("bfloat16")), ("dcn", ef.top_k(k=1))])
      >>> tx = ef.simulate(tx, (2, 2), ("dcn", "ici"))
      >>> grads = jnp.array([[3.0, 0.0], [1.0, 2.0], [0.0, 4.0], [0.0, 4.0]])
      >>> updates, state = tx.update(grads, tx.init(jnp.zeros(2)), jnp.zeros(2))
      >>> updates.tolist()  # the means of the pods are [2, 1] and [0, 4]
      [1.0, 2.0]
      >>> state[1].residual.tolist()
      [[0.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]

    References:
      The tiers of BytePS and of Tang et al., "DoubleSqueeze", 2019, which is two tiers of which
      the second is the server alone.
    """
    chain = optax.with_extra_args_support(
        optax.chain(
            *(
                error_feedback(compressor, axis_name=axis_name, memory=memory)
                for axis_name, compressor in _checked(tiers)
            )
        )
    )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        mean, state = chain.update(trees.wide(updates), state, params, **extra_args)
        return trees.emit(mean, updates), state

    return optax.GradientTransformationExtraArgs(chain.init, update_fn)


def _checked(tiers: Any) -> list[tuple[AxisName, Compressor]]:
    """The tiers as a list.

    Raises:
      TypeError, ValueError: as :func:`hierarchical`.
    """
    pairs = list(tiers) if isinstance(tiers, Sequence) and not isinstance(tiers, str) else []
    # A compressor is a tuple of two as well: Optax's pair of functions.
    if not pairs or not all(type(pair) is tuple and len(pair) == 2 for pair in pairs):
        raise ValueError(
            f"hierarchical: tiers={tiers!r} must be a list of (axis_name, compressor), the fastest "
            "links first, such as [('ici', cast('bfloat16')), ('dcn', block_top_k(0.01))]."
        )
    seen: set[str] = set()
    for number, (axis_name, compressor) in enumerate(pairs):
        check.axis(axis_name, f"hierarchical: axis_name of tiers[{number}]")
        codec_of(compressor, f"hierarchical: compressor of tiers[{number}]")
        names = {axis_name} if isinstance(axis_name, str) else set(axis_name or ())
        if not names or names & seen:
            raise ValueError(
                f"hierarchical: axis_name={axis_name!r} of tiers[{number}] must be an axis that no "
                "tier before it has averaged over; give every tier its own axis of the mesh."
            )
        seen |= names
    return pairs
