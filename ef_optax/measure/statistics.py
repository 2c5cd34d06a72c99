"""Norms, ratios, angles and bytes of a running optimizer, from its state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ef_optax._numeric import check
from ef_optax._numeric.dtypes import Array
from ef_optax.measure import _records

By = Literal["leaf"] | Callable[[str], str] | None
"""How leaves are grouped."""


def statistics(opt_state: Any, by: By = None) -> dict[str, Array]:
    r"""Statistics of every monitored exchange, as scalars that may still be traced.

    For the sums over the entries of a group of leaves and the mean over the workers, with g the
    gradient of the rule, e its residual, p the input of the exchange, c the message and d the
    number of entries:

    ============================ ================================================================
    ``gradient_norm`` ...        the 2-norms of g, p, c and e: ``input_norm``, ``message_norm``,
                                 ``residual_norm``. For a rule that has an estimate in place of a
                                 residual, e is p - c: the gradient minus the new estimate. A rule
                                 that remembers neither has no e
    ``residual_to_gradient``     :math:`\|e\| / \|g\|`
    ``residual_zeros``           the share of entries of e that are exactly zero
    ``relative_error``           :math:`\|p - c\| / \|p\|`
    ``alpha_hat``                the measured contraction, :math:`1 - \|p - c\|^2 / \|p\|^2`
    ``alpha_promised``           the codec's own alpha, the least of the group
    ``phi``                      :math:`\|p\|_1^2 / (d \|p\|_2^2)`, the contraction of scaled signs
    ``message_cosine``           of c and p
    ``values_ratio``             d / (entries of c that are not zero)
    ``bits_ratio``               32 d / (bits of the message, with indices and scales)
    ``message_bytes``            what a worker contributed in all steps, without headers
    ``link_bytes``               what it sent and received, by ring and pairwise algorithms
    ``lemma3_ratio``             :math:`\|e\|^2 \alpha^2 / (4 (1 - \alpha) \max_t \|g_t\|^2)`, at
                                 most 1 if the promise holds (Karimireddy et al. 2019, Lemma 3)
    ``age_mean``, ``age_max``    with ``age=True``: exchanges since an entry was last sent
    ``aggregate_cosine``         with ``dense_mean=True``: of the aggregate and the mean of all p;
                                 also ``aggregate_norm`` and ``aggregate_error``, the norm of their
                                 difference over that of the mean
    ``dropped_mass``             the 1-norm of all that a policy of the residual dropped so far;
                                 ``dropped_share`` is this for a step, over :math:`\|p\|_1`
    ``rounded_mass``             the 1-norm of all that the storage of e lost so far
    ``conservation_error``       with ``conservation=True``: :math:`\|p - c - r\| / \|p\|`, r being
                                 the residual that the exchange returned
    ============================ ================================================================

    The plain name is that of all leaves together; a group follows it, as in
    ``alpha_hat/conv1/kernel``. There are also ``steps`` and ``skipped_steps``. If several exchanges
    are monitored, each name begins with that of the exchange: ``uplink/alpha_hat``.

    Args:
      opt_state: a state that :func:`ef_optax.monitor` made, of one worker or of all.
      by: None for the total; ``"leaf"`` to have each leaf too; or a function of a leaf's path, such
        as ``lambda path: path.split("/")[0]``, to have each group too.

    Returns:
      A flat dictionary of float32 scalars. What is undefined is NaN: a ratio to zero, or a promise
      that is not known.

    Raises:
      ValueError: if nothing in ``opt_state`` is monitored, or for an unknown ``by``.

    Example:
      >>> import ef_optax as ef, jax, jax.numpy as jnp
      >>> tx = ef.simulate(ef.monitor(ef.ef21(ef.top_k(k=1), axis_name="w")), 2, "w")
      >>> grads = {"w": jnp.array([[3.0, 4.0], [0.0, 5.0]])}
      >>> params = {"w": jnp.zeros(2)}
      >>> _, state = tx.update(grads, tx.init(params), params)
      >>> seen = jax.jit(lambda s: ef.measure.statistics(s, by="leaf"))(state)
      >>> round(float(seen["alpha_hat/w"]), 2)  # 1 - (9 + 0) / (25 + 25)
      0.82
    """
    result: dict[str, Array] = {}
    for found in _records.monitored_exchanges(opt_state):
        result |= _of_exchange(found, _records.sums(found), by, jnp)
    return result


def summary(opt_state: Any, by: By = None) -> dict[str, float]:
    """:func:`statistics` as Python floats, for any logger; what is undefined is left out.

    All numbers come to the host in one transfer. If there are several processes, all of them must
    call this.

    Args:
      opt_state: a state that :func:`ef_optax.monitor` made, of one worker or of all.
      by: the groups, as in :func:`statistics`.

    Returns:
      A flat dictionary: ``{"alpha_hat": 0.31, ...}``.

    Raises:
      ValueError: if nothing in ``opt_state`` is monitored.

    Example:
      >>> import ef_optax as ef, jax, jax.numpy as jnp
      >>> tx = ef.monitor(ef.error_feedback(ef.scaled_sign()))
      >>> params = {"w": jnp.zeros(64), "b": jnp.zeros(2)}
      >>> _, state = jax.jit(tx.update)({"w": jnp.ones(64), "b": jnp.ones(2)}, tx.init(params))
      >>> seen = ef.measure.summary(state, by="leaf")
      >>> seen["alpha_hat"], seen["message_bytes/w"], seen["steps"]
      (1.0, 12.0, 1.0)
    """
    found = _records.monitored_exchanges(opt_state)
    numbers = jax.device_get(_read([(one.state, one.residual, one.dropped) for one in found]))
    result: dict[str, float] = {}
    for one, (sums, steps, skipped) in zip(found, numbers, strict=True):
        named = one._replace(state=one.state._replace(step=steps, skipped=skipped))
        values = _of_exchange(named, sums, by, np)
        result |= {name: float(x) for name, x in values.items() if not np.isnan(x)}
    return result


@jax.jit
def _read(exchanges: list[tuple[Any, ...]]) -> Any:
    """The sums of each exchange, from its state and the rule's memories; and both of its counts."""
    return [
        (
            _records.sums(_records.Found("", state, residual, dropped)),
            state.step,
            state.skipped,
        )
        for state, residual, dropped in exchanges
    ]


def _of_exchange(found: _records.Found, sums: Mapping[str, Any], by: By, xp: Any) -> dict[str, Any]:
    """All statistics of one exchange; ``xp`` is jax.numpy, or numpy for numbers on the host."""
    if not (by is None or callable(by)):
        check.word("statistics", "by", by, ("leaf",))
    names = _records.leaf_names(found)
    start = f"{found.name}/" if found.name else ""
    result = {f"{start}steps": found.state.step, f"{start}skipped_steps": found.state.skipped}
    groups: dict[str, list[int]] = {"": list(range(len(names)))}
    if by is not None:
        for i, name in enumerate(names):
            groups.setdefault(f"/{by(name) if callable(by) else name}", []).append(i)
    with np.errstate(divide="ignore", invalid="ignore"):
        for group, members in groups.items():
            own = _of_group(sums, np.asarray(members, np.int32), xp)
            own["steps"] = found.state.step
            result |= {f"{start}{name}{group}": value for name, value in _formulas(own, xp).items()}
    return result


_EXTREMES = {"promised_alpha": "min", "oldest": "max"}
"""What a group has of its leaves in place of their sum."""


def _of_group(sums: Mapping[str, Any], members: np.ndarray, xp: Any) -> dict[str, Any]:
    dtype = np.float64 if xp is np else np.float32  # double precision costs nothing on the host
    result = {}
    for name, numbers in sums.items():
        own = numbers[members].astype(dtype)
        if not len(members):
            result[name] = xp.zeros((), own.dtype)
        else:
            result[name] = getattr(xp, _EXTREMES.get(name, "sum"))(own)
    return result


def _formulas(s: Mapping[str, Any], xp: Any) -> dict[str, Any]:
    """The statistics of a group from its sums, in the letters of :func:`statistics`."""

    def norm(name: str) -> Any:
        return xp.sqrt(s[name])

    def bytes_of(name: str) -> Any:
        return (s[f"{name}_low"] + 4294967296.0 * s[f"{name}_high"]) / 8

    alpha, d = s["promised_alpha"], s["size"]
    result = {
        "gradient_norm": norm("gradient"),
        "input_norm": norm("input"),
        "message_norm": norm("message"),
        "relative_error": _ratio(norm("error"), norm("input"), xp),
        "alpha_hat": 1 - _ratio(s["error"], s["input"], xp),
        "alpha_promised": alpha,
        "phi": _ratio(s["input_magnitudes"] ** 2, d * s["input"], xp),
        "message_cosine": _ratio(s["product"], norm("input") * norm("message"), xp),
        "values_ratio": _ratio(d, s["message_nonzeros"], xp),
        "bits_ratio": _ratio(32 * d, s["message_bits"], xp),
        "message_bytes": bytes_of("message"),
        "link_bytes": bytes_of("link"),
    }
    if "residual" in s:
        e = norm("residual")
        result["residual_norm"] = e
        result["residual_to_gradient"] = _ratio(e, norm("gradient"), xp)
        result["residual_zeros"] = _ratio(s["residual_zeros"], d, xp)
    if "memory" in s:
        bound = 4 * (1 - alpha) * s["largest_gradient"]
        result["lemma3_ratio"] = _ratio(alpha**2 * s["memory"], bound, xp)
    if "dropped" in s:
        result["dropped_mass"] = s["dropped"]
        steps = xp.asarray(s["steps"], s["dropped"].dtype)
        result["dropped_share"] = _ratio(s["dropped"], steps * s["input_magnitudes"], xp)
    if "rounded" in s:
        result["rounded_mass"] = s["rounded"]
    if "age" in s:
        result |= {"age_mean": _ratio(s["age"], d, xp), "age_max": s["oldest"]}
    if "aggregate" in s:
        norms = norm("aggregate") * norm("mean_input")
        result["aggregate_cosine"] = _ratio(s["aggregate_product"], norms, xp)
        result["aggregate_norm"] = norm("aggregate")
        result["aggregate_error"] = _ratio(norm("aggregate_error"), norm("mean_input"), xp)
    if "loss" in s:
        result["conservation_error"] = _ratio(norm("loss"), norm("input"), xp)
    return result


def _ratio(a: Any, b: Any, xp: Any) -> Any:
    """``a / b``, NaN where b is zero."""
    return xp.where(b == 0, xp.nan, a / xp.where(b == 0, 1, b))
