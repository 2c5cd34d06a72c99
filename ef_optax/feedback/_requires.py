"""What each rule relies on, held against what a codec declares: the only place of such checks.

A codec declares its properties (:class:`ef_optax.Codec`), a rule's needs stand in ``REQUIRES``, and
:func:`exchange_for` brings the two together where a rule makes its exchange. A pair that is not
listed as refused works; tests enumerate all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from ef_optax._base import Codec
from ef_optax._collectives import AxisName
from ef_optax._compressor import Compressor, codec_of
from ef_optax._exchange import Exchange
from ef_optax.compressors.compose import PerLeaf
from ef_optax.compressors.scheduled import Scheduled


@dataclasses.dataclass(frozen=True)
class Need:
    """A property that a rule may ask for: the test, what is wrong without it, and the remedy."""

    met: Callable[[Codec], bool]
    reason: str
    remedy: str


NEEDS = {
    "additive": Need(
        lambda codec: codec.additive,
        "does not give the mean of what the workers sent, but the rule keeps the mean of the "
        "workers' estimates",
        "choose an additive compressor such as top_k or scaled_sign",
    ),
    "deterministic": Need(
        lambda codec: codec.deterministic,
        "is randomised, but the rule compares what it sends with its input",
        "choose a deterministic compressor such as top_k or scaled_sign",
    ),
    "independent": Need(
        lambda codec: codec.independent,
        "decides together with the other workers what is sent, but the rule tries out messages on "
        "each worker alone",
        "choose a compressor of one worker's own values such as top_k or scaled_sign",
    ),
    "unbiased": Need(
        lambda codec: codec.unbiased,
        "is biased, but the rule is defined for unbiased compressors only",
        "choose an unbiased compressor such as random_k(..., scaled=True) or natural, or a rule "
        "for biased ones such as ef21 or ef_bv",
    ),
    "broadcast": Need(
        lambda codec: bool({"gather", "reduce"} & set(codec.transports)),
        "travels only between several workers, but this message goes from one sender to all",
        "choose a compressor that is not an exchange of its own, such as top_k",
    ),
}

ESTIMATES = {"compressor": ("additive",)}
ANY = {"compressor": ()}

REQUIRES: dict[str, dict[str, tuple[str, ...]]] = {
    "compressed_mean": ANY,
    "cser": {"errors": ("additive",), "gradients": ("additive",)},
    "dgc": ANY,
    "diana": {"compressor": ("additive", "unbiased")},
    "dist_ef_sgdm": {"compressor": (), "server": ("broadcast",)},
    "double_squeeze": {"compressor": (), "server": ("broadcast",)},
    "econtrol": ESTIMATES,
    "ecq_sgd": ANY,
    "ef21": ESTIMATES,
    "ef21_bidirectional": {"compressor": ("additive",), "server": ("broadcast",)},
    "ef21_double_momentum": ESTIMATES,
    "ef21_momentum": ESTIMATES,
    "ef21_p": {"compressor": ("broadcast",)},
    "ef21_partial_participation": ESTIMATES,
    "ef21_plus": {"compressor": ("additive", "deterministic", "independent")},
    "ef21_w": ESTIMATES,
    "ef_bv": ESTIMATES,
    "ef_momentum": ANY,
    "error_feedback": ANY,
    "gradient_shift": ESTIMATES,
    "marina": {"compressor": ("additive", "unbiased")},
    "qsparse_local_sgd": ANY,
    "safe_ef": ANY,
    "three_point_compressor": {"compressor": ("additive",), "second": ("additive",)},
}
"""For each rule, and each compressor it takes, the needs by name."""


def exchange_for(
    rule: str, compressor: Compressor, axis_name: AxisName = None, argument: str = "compressor"
) -> Exchange:
    """The exchange of a rule's compressor, after the rule's needs have been held against it.

    Args:
      rule: the rule's name, a row of ``REQUIRES``.
      compressor: what the user gave; the choices of :func:`ef_optax.per_leaf` are checked when
        they are made.
      axis_name: the worker axis, or None.
      argument: the name of the rule's argument.

    Returns:
      The exchange.

    Raises:
      TypeError: if ``compressor`` is not a Compressor.
      ValueError: if its codec lacks what the rule needs, with the reason and the remedy.
    """
    codec, needs = codec_of(compressor, argument), REQUIRES[rule][argument]
    return Exchange(_held(rule, argument, codec, needs), axis_name)


def _held(rule: str, argument: str, codec: Codec, needs: tuple[str, ...]) -> Codec:
    """The codec if it has all that is needed; policies and schedules with checked parts."""
    if isinstance(codec, Scheduled):
        return Scheduled(
            codec.starts, tuple(_held(rule, argument, one, needs) for one in codec.codecs)
        )
    if isinstance(codec, PerLeaf) and needs:
        chooser: PerLeaf = codec

        def policy(path: str, like: jax.ShapeDtypeStruct) -> Compressor:
            chosen: Any = chooser.policy(path, like)
            leaf = codec_of(chosen, f"policy({path!r})").for_leaf(path, like)
            return Compressor(_held(rule, f"{argument}, at {path!r},", leaf, needs))

        return PerLeaf(policy)
    for name in needs:
        need = NEEDS[name]
        if not need.met(codec):
            raise ValueError(
                f"{rule}: {argument} {type(codec).__name__} {need.reason}; {need.remedy}."
            )
    return codec
