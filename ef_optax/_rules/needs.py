"""What each rule relies on, held against what a codec declares: the only place of such checks.

A codec declares its properties (:class:`ef_optax.extend.Codec`), a rule's needs stand in
``REQUIRES``, and :func:`exchange_for` brings the two together where a rule makes its exchange. A
pair that is not listed as refused works; tests enumerate all of them.

One need is about shapes, and is looked at where the state is made: ``"contractive"``. A rule that
keeps what a codec drops follows ``E||e'||^2 = E||C(p) - p||^2``, so a codec whose error is as long
as its input, or longer, *whatever that input is*, makes the memory grow at every step: scaled
random-k with omega >= 1 and its like (:meth:`ef_optax.extend.Codec.least_error`). These are
refused, as the field has it: who scales random-k does so without a memory (BytePS switches the
scaling off where it switches error feedback on). A codec whose omega >= 1 is about its *worst*
input is taken. The bounds of QSGD, dithering and the like grow with the square root of the leaf's
size and are attained by leaves of one large entry; under error feedback they are in common use and
their error on gradients is far below the bound. What the theory asks for is
``ef_optax.scale_to_contractive``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from ef_optax._core.codec import Codec
from ef_optax._core.policy import for_leaf
from ef_optax._exchange import collectives as coll
from ef_optax._exchange.collectives import AxisName
from ef_optax._exchange.exchange import Exchange, ExchangeState
from ef_optax.compressors.combine.per_leaf import PerLeaf
from ef_optax.compressors.combine.scheduled import Scheduled
from ef_optax.compressors.compressor import Compressor, codec_of


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
        lambda codec: codec.broadcast,
        "travels only between several workers, but this message goes from one sender to all",
        "choose a compressor that is not an exchange of its own, such as top_k",
    ),
}

CONTRACTIVE = "contractive"
"""The need that is looked at for each leaf, where its shape and the number of workers are known."""

ANY = {"compressor": ()}
MEMORY = {"compressor": (CONTRACTIVE,)}
ESTIMATES = {"compressor": ("additive", CONTRACTIVE)}
SHIFTS = {"compressor": ("additive",)}
SERVED = {"compressor": (CONTRACTIVE,), "server": ("broadcast", CONTRACTIVE)}

REQUIRES: dict[str, dict[str, tuple[str, ...]]] = {
    "compressed_mean": ANY,
    "cser": {"errors": ("additive", CONTRACTIVE), "gradients": ("additive",)},
    "dgc": MEMORY,
    "diana": {"compressor": ("additive", "unbiased")},
    "dist_ef_sgdm": SERVED,
    "double_squeeze": SERVED,
    "econtrol": ESTIMATES,
    "ecq_sgd": ANY,  # its two factors are there to hold the memory of an unbiased codec down
    "ef21": ESTIMATES,
    "ef21_bidirectional": {
        "compressor": ("additive", CONTRACTIVE),
        "server": ("broadcast", CONTRACTIVE),
    },
    "ef21_double_momentum": ESTIMATES,
    "ef21_momentum": ESTIMATES,
    "ef21_p": {"compressor": ("broadcast", CONTRACTIVE)},
    "ef21_partial_participation": ESTIMATES,
    "ef21_plus": {"compressor": ("additive", "deterministic", "independent", CONTRACTIVE)},
    "ef21_w": ESTIMATES,
    "ef_bv": SHIFTS,  # lam and nu are chosen for omega
    "ef_momentum": ANY,  # the damping makes a contraction of any omega < (1 + beta)/(1 - beta)
    "error_feedback": MEMORY,
    "error_feedback, blended": ANY,  # decay and injection hold the memory down, as in ecq_sgd
    "gradient_shift": SHIFTS,  # the rate is chosen for omega
    "marina": {"compressor": ("additive", "unbiased")},
    "qsparse_local_sgd": MEMORY,
    "safe_ef": MEMORY,
    "three_point_compressor": {"compressor": ("additive", CONTRACTIVE), "second": ("additive",)},
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
      The exchange, whose ``init`` looks at what depends on the leaves.

    Raises:
      TypeError: if ``compressor`` is not a Compressor.
      ValueError: if its codec lacks what the rule needs, with the reason and the remedy.
    """
    codec, needs = codec_of(compressor, argument), REQUIRES[rule][argument]
    declared = tuple(name for name in needs if name != CONTRACTIVE)
    held = _held(rule, argument, codec, declared)
    if CONTRACTIVE in needs:
        return ContractiveExchange(held, axis_name, asked_by=f"{rule}: {argument}")
    return Exchange(held, axis_name)


@dataclasses.dataclass(frozen=True)
class ContractiveExchange(Exchange):
    """An exchange for a memory of what was not sent; ``asked_by`` names rule and argument."""

    asked_by: str = ""

    def init(self, tree: Any) -> ExchangeState:
        paths, likes, _ = self.located(tree)
        for path, like in zip(paths, likes, strict=True):
            self._check(path, like)
        return super().init(tree)

    def _check(self, path: str, like: jax.ShapeDtypeStruct) -> None:
        """Refuses a codec that makes the leaf's memory grow whatever the gradients are."""
        codec = for_leaf(self.codec, path, like)
        least = codec.least_error(like.shape, coll.bound_size(self.axis_name))
        if least < 1:
            return
        raise ValueError(
            f"{self.asked_by} {type(codec).__name__} is no contraction for the leaf {path!r} of "
            f"shape {like.shape}: its error is at least omega = {least:.3g} times the square of "
            "any input, so what the rule remembers would grow at every step. Use "
            "ef_optax.scale_to_contractive(compressor) or scaled=False, or a rule for unbiased "
            "compressors such as diana or marina."
        )


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
            leaf = for_leaf(codec_of(chosen, f"policy({path!r})"), path, like)
            return Compressor(_held(rule, f"{argument}, at {path!r},", leaf, needs))

        return PerLeaf(policy)
    for name in needs:
        need = NEEDS[name]
        if not need.met(codec):
            raise ValueError(
                f"{rule}: {argument} {type(codec).__name__} {need.reason}; {need.remedy}."
            )
    return codec
