"""What a rule may need of a compressor, held against what its codec declares.

A codec declares its properties (:class:`ef_optax.extend.Codec`). A rule names what it needs where
it makes its exchange: ``exchange_for("ef21", compressor, axis_name, needs=(ADDITIVE,
CONTRACTIVE))``. A pair that is not refused works; tests enumerate all of them.

One need is about shapes, and is looked at where the state is made: ``CONTRACTIVE``. A rule that
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
    "decides together with the other workers what is sent, but the rule tries out messages on each "
    "worker alone",
    "choose a compressor of one worker's own values such as top_k or scaled_sign",
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
    "choose a compressor that is not an exchange of its own, such as top_k",
)
CONTRACTIVE = Need(
    lambda codec: True,  # its error depends on the leaf: see HeldExchange
    "is no contraction",
    "use ef_optax.scale_to_contractive(compressor) or scaled=False, or a rule for unbiased "
    "compressors such as diana or marina",
)


def exchange_for(
    rule: str,
    compressor: Compressor,
    axis_name: AxisName = None,
    *,
    argument: str = "compressor",
    needs: Sequence[Need] = (),
) -> Exchange:
    """The exchange of a rule's compressor, after the rule's needs have been held against it.

    Args:
      rule: the rule's name.
      compressor: what the user gave. What :func:`ef_optax.per_leaf` chooses is checked where the
        leaves are known, in the exchange's ``init``.
      axis_name: the worker axis, or None.
      argument: the name of the rule's argument.
      needs: what the rule relies on, of ``ADDITIVE``, ``BROADCAST``, ``CONTRACTIVE``,
        ``DETERMINISTIC``, ``INDEPENDENT`` and ``UNBIASED``.

    Raises:
      TypeError: if ``compressor`` is not a Compressor.
      ValueError: if its codec lacks what the rule needs, with the reason and the remedy.
    """
    codec = codec_of(compressor, argument)
    require(f"{rule}: {argument}", codec, needs)
    return HeldExchange(codec, axis_name, asked_by=f"{rule}: {argument}", needs=tuple(needs))


def require(asked_by: str, codec: Codec, needs: Sequence[Need]) -> None:
    """Refuses a codec that lacks a need in some stage; a policy by leaf has none before a leaf."""
    for stage in stages_of(codec).stages:
        if not isinstance(stage.codec, LeafPolicy):
            for need in needs:
                need.check(asked_by, stage.codec)


@dataclasses.dataclass(frozen=True)
class HeldExchange(Exchange):
    """An exchange that holds each leaf's codec to a rule's needs, where its state is made."""

    asked_by: str = ""
    needs: tuple[Need, ...] = ()

    def init(self, tree: Any) -> ExchangeState:
        paths, likes, _ = self.located(tree)
        for path, like in zip(paths, likes, strict=True):
            codec = for_leaf(self.codec, path, like)
            require(f"{self.asked_by}, at {path!r},", codec, self.needs)
            if CONTRACTIVE in self.needs:
                self._require_contraction(codec, path, like)
        return super().init(tree)

    def _require_contraction(self, codec: Codec, path: str, like: jax.ShapeDtypeStruct) -> None:
        """Refuses a codec that makes the leaf's memory grow whatever the gradients are."""
        least = codec.least_error(like.shape, collectives.bound_size(self.axis_name))
        if least < 1:
            return
        raise ValueError(
            f"{self.asked_by} {codec.name} {CONTRACTIVE.reason} for the leaf {path!r} of "
            f"shape {like.shape}: its error is at least omega = {least:.3g} times the square of "
            f"any input, so what the rule remembers would grow at every step; {CONTRACTIVE.remedy}."
        )
