"""Accordion (Agarwal et al. 2021): little compression where the gradient changes fast."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from ef_optax.compressors.combine.per_leaf import per_leaf
from ef_optax.extend import Compressor, check, codec_of, path_string


def accordion(
    light: Compressor,
    heavy: Compressor,
    norms: Any,
    previous: Any = None,
    *,
    threshold: float = 0.5,
    rate_fell: bool = False,
) -> Compressor:
    r"""Light compression of the layers in a critical regime, heavy compression of the others.

    .. math:: \frac{|\Delta_{\text{previous}} - \Delta|}{\Delta_{\text{previous}}} \ge \eta

    Delta is the norm of a layer's gradient, accumulated over an interval. A layer is critical if it
    changed by at least the threshold since the interval before, in the first interval, and in the
    one after the learning rate fell. Choose again every 10 epochs or so; every new choice is
    compiled anew, and the memories of the rule stay.

    Args:
      light: for critical layers, such as ``ef.power_sgd(4)``.
      heavy: for the others, such as ``ef.power_sgd(1)``.
      norms: the accumulated norm of each leaf in this interval, a tree of numbers like the
        parameters. It must be the same on all workers, such as of the mean updates.
      previous: the same of the interval before; None in the first one.
      threshold: eta, positive; 0.5 in the public code.
      rate_fell: whether the learning rate was decayed since the last choice.

    Returns:
      A :func:`ef_optax.per_leaf` compressor for these leaves.

    Raises:
      ValueError: for a threshold that is not positive, or trees of different structure.

    Example:
      >>> import ef_optax as ef
      >>> before, now = {"a": 4.0, "b": 4.0}, {"a": 3.5, "b": 1.0}
      >>> chosen = ef.policies.accordion(ef.top_k(0.5), ef.top_k(0.1), now, before)
      >>> [chosen.codec.for_leaf(path, None).ratio for path in ("a", "b")]
      [0.1, 0.5]

    References:
      Agarwal, Wang, Lee, Venkataraman, Papailiopoulos, "Accordion: Adaptive Gradient Communication
      via Critical Learning Regime Identification", MLSys 2021; details as in the official code,
      uw-mad-dash/Accordion.
    """
    codec_of(light, "light")
    codec_of(heavy, "heavy")
    check.positive("accordion", "threshold", threshold)
    check.flag("accordion", "rate_fell", rate_fell)

    def critical(now: Any, before: Any) -> bool:
        now, before = float(np.asarray(now)), float(np.asarray(before))
        return before == 0 or abs(before - now) / before >= threshold

    if previous is None or rate_fell:
        flags = jax.tree.map(lambda _: True, norms)
    else:
        flags = jax.tree.map(critical, norms, previous)
    own = {path_string(path): flag for path, flag in jax.tree_util.tree_leaves_with_path(flags)}
    return per_leaf(lambda path, _: light if own[path] else heavy)
