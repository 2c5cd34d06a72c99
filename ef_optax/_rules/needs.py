"""What a rule may need of a compressor, checked against what its codec declares.

A codec declares its properties (:class:`ef_optax.extend.Codec`). A rule names its needs when it
makes its exchange: ``exchange_for("ef21", compressor, axis_name, needs=(ADDITIVE,
CONTRACTIVE))``. A pair that is not refused works; tests enumerate all pairs.

One need depends on shapes and is checked when the state is made: ``CONTRACTIVE``. The memory of a
rule that keeps what a codec drops follows ``E||e'||^2 = E||C(p) - p||^2``. If the codec's error on
noise is at least as large as its input, the memory grows at every step, because the memory becomes
like noise (:meth:`ef_optax.extend.Codec.noise_error`). Such codecs are refused: scaled random-k
with omega >= 1, QSGD with the 2-norm of a leaf or bucket of more than 4 s^2 values, ATOMO with less
than half of the full rank. This is common practice: random-k is scaled only without a memory
(BytePS switches the scaling off when it switches error feedback on).

A rule that keeps only a part, ``m' = a m + b (C(x) - x)``, tells ``exchange_for`` the two factors:
its memory of noise grows if ``a^2 + b^2`` times the error is above 1. These are DIANA and EF-BV
with a large rate, and error feedback whose memory is damped too little for the codec.

A codec with omega >= 1 is accepted if the large error occurs only for inputs that a memory does not
become. With the largest magnitude as the norm, dithering has no error on values of equal size, so
its memory stays bounded. ``ef_optax.scale_to_contractive`` gives what the theory asks for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from ef_optax._core.codec import Codec
from ef_optax._core.need import Need
from ef_optax._core.policy import LeafPolicy, for_leaf, stages_of
from ef_optax._exchange import collectives
from ef_optax._exchange.collectives import AxisName
from ef_optax._exchange.exchange import Exchange, ExchangeState
from ef_optax.compressors.compressor import Compressor, codec_of

ADDITIVE = Need(
    lambda codec: codec.additive,
    "does not give the mean of what the workers sent, but the rule keeps the mean of the workers' "
    "estimates",
    "choose an additive compressor such as top_k or scaled_sign",
)
DETERMINISTIC = Need(
    lambda codec: codec.deterministic,
    "is randomised, but the rule compares what it sends with its input",
    "choose a deterministic compressor such as top_k or scaled_sign",
)
INDEPENDENT = Need(
    lambda codec: codec.independent,
    "decides together with the other workers what is sent, but the rule tries messages on each "
    "worker separately",
    "choose a compressor that uses only one worker's values, such as top_k or scaled_sign",
)
UNBIASED = Need(
    lambda codec: codec.unbiased,
    "is biased, but the rule is defined for unbiased compressors only",
    "choose an unbiased compressor such as random_k(..., scaled=True) or natural, or a rule for "
    "biased ones such as ef21 or ef_bv",
)
BROADCAST = Need(
    lambda codec: codec.broadcast,
    "travels only between several workers, but this message goes from one sender to all",
    "choose a compressor without its own exchange, such as top_k",
)
CONTRACTIVE = Need(
    lambda codec: True,  # it depends on the leaf: see CheckedExchange
    "is not a contraction",
    "use ef_optax.scale_to_contractive(compressor), scaled=False, smaller buckets or more levels, "
    "or a rule for unbiased compressors such as diana or marina",
)


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """A memory ``m' = old m + error (C(x) - x)``, where ``x`` is as long as ``m``.

    >>> Recurrence(0.5, 0.5).growth(7.0)  # DIANA with the rate 1/2 and omega = 7
    2.0
    """

    old: Any
    error: Any
    remedy: str = CONTRACTIVE.remedy

    @property
    def known(self) -> bool:
        """Whether both factors are numbers; ``optax.inject_hyperparams`` makes them arrays."""
        return all(isinstance(x, int | float) for x in (self.old, self.error))

    def growth(self, noise_error: float) -> float:
        """The factor of the memory's squared norm in a step, for noise."""
        return float(self.old**2 + self.error**2 * noise_error)


def exchange_for(
    rule: str,
    compressor: Compressor,
    axis_name: AxisName = None,
    *,
    argument: str = "compressor",
    needs: Sequence[Need] = (),
    recurrence: Recurrence | None = None,
) -> Exchange:
    """The exchange of a rule's compressor, which is checked against the rule's needs.

    Args:
      rule: the rule's name.
      compressor: the user's argument. What :func:`ef_optax.per_leaf` chooses is checked in the
        exchange's ``init``, where the leaves are known.
      axis_name: the worker axis, or None.
      argument: the name of the rule's argument.
      needs: what the rule relies on, of ``ADDITIVE``, ``BROADCAST``, ``CONTRACTIVE``,
        ``DETERMINISTIC``, ``INDEPENDENT`` and ``UNBIASED``.
      recurrence: what the memory keeps of itself and of the codec's error, unless the rule needs
        ``CONTRACTIVE``, which is ``Recurrence(0, 1)``. It is not checked if a factor is an array.

    Raises:
      TypeError: if ``compressor`` is not a Compressor.
      ValueError: if its codec lacks what the rule needs, with the reason and the remedy.
    """
    codec, asked_by = codec_of(compressor, argument), f"{rule}: {argument}"
    require(asked_by, codec, needs)
    if CONTRACTIVE in needs:
        recurrence = Recurrence(0, 1)
    if recurrence is not None and not recurrence.known:
        recurrence = None
    return CheckedExchange(
        codec,
        axis_name,
        estimates=ADDITIVE in needs,
        asked_by=asked_by,
        needs=tuple(needs),
        recurrence=recurrence,
    )


def require(asked_by: str, codec: Codec, needs: Sequence[Need]) -> None:
    """Refuses a codec if one of its stages lacks a need; a policy by leaf is checked per leaf."""
    for stage in stages_of(codec).stages:
        if not isinstance(stage.codec, LeafPolicy):
            for need in needs:
                need.check(asked_by, stage.codec)


@dataclasses.dataclass(frozen=True)
class CheckedExchange(Exchange):
    """An exchange that checks each leaf's codec against a rule's needs when its state is made."""

    asked_by: str = ""
    needs: tuple[Need, ...] = ()
    recurrence: Recurrence | None = None

    def init(self, tree: Any) -> ExchangeState:
        paths, likes, _ = self.located(tree)
        for path, like in zip(paths, likes, strict=True):
            codec = for_leaf(self.codec, path, like)
            require(f"{self.asked_by}, at {path!r},", codec, self.needs)
            if self.recurrence is not None:
                self._require_bounded(self.recurrence, codec, path, like)
        return super().init(tree)

    def _require_bounded(
        self, recurrence: Recurrence, codec: Codec, path: str, like: jax.ShapeDtypeStruct
    ) -> None:
        """Refuses a codec under which noise makes the leaf's memory grow."""
        error = codec.noise_error(like.shape, collectives.bound_size(self.axis_name))
        if error < 1 or recurrence.growth(error) < 1:
            return
        raise ValueError(
            f"{self.asked_by} {codec.name} {CONTRACTIVE.reason} for the leaf {path!r} of "
            f"shape {like.shape}: its squared error on noise is {error:.3g} times that of the "
            "input, so what the rule remembers would grow at every step; "
            f"{recurrence.remedy.format(best=1 / (1 + error))}."
        )
