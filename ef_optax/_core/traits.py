"""The properties of a codec on which rules, combinators and transports may rely."""

from __future__ import annotations

import dataclasses
from typing import Literal

Granularity = Literal["leaf", "group"]
Basis = Literal["exact", "bound", "asymptotic", "none"]


@dataclasses.dataclass(frozen=True)
class Traits:
    """The declared properties of a codec, which its property ``traits`` returns.

    Tests check each declared property, and have a counterexample for each that is declared false.

    Attributes:
      unbiased: ``E C(x) = x``.
      linear: ``C(a x + b y) = a C(x) + b C(y)`` for the same randomness.
      homogeneous: ``C(a x) = a C(x)`` for every a > 0 (tested for powers of two, up to rounding).
      deterministic: no randomness; otherwise the codec has a field ``key``.
      additive: the aggregate is the weighted mean of what the workers sent.
      independent: what is sent of x depends only on this worker's x (and on randomness).
      broadcast: a single sender can use it, such as a server that answers all workers; False for
        an exchange that only makes sense between several workers.
      streams: the residual takes one pass over x and the message, so it is cheaper to compute x
        again (as the sum of gradient and memory) than to store x when the message is made.
      stateful: the codec carries state from step to step (``init``).
      granularity: ``"leaf"``, or ``"group"`` for a codec that receives the list of its leaves.
      basis: what kind of constants ``alpha`` and ``omega`` are: ``"exact"`` (some input attains
        them), ``"bound"`` (proved, but perhaps not attained), ``"asymptotic"`` (there is no
        constant, but a limit for long vectors, which the documentation gives), or ``"none"``.
    """

    unbiased: bool = False
    linear: bool = False
    homogeneous: bool = True
    deterministic: bool = True
    additive: bool = True
    independent: bool = True
    broadcast: bool = True
    streams: bool = False
    stateful: bool = False
    granularity: Granularity = "leaf"
    basis: Basis = "none"


NAMES = frozenset(field.name for field in dataclasses.fields(Traits))


def common(*traits: Traits) -> Traits:
    """The traits of a codec that is made of others: the traits that all of them have.

    Its constants are bounds if those of all of them are known. A codec that has state, streams or
    takes groups of leaves must declare this itself.

    >>> both = common(Traits(unbiased=True, basis="exact"), Traits(deterministic=False))
    >>> both.unbiased, both.deterministic, both.homogeneous, both.basis
    (False, False, True, 'none')
    """
    known = all(one.basis in ("exact", "bound") for one in traits)
    return Traits(
        unbiased=all(one.unbiased for one in traits),
        linear=all(one.linear for one in traits),
        homogeneous=all(one.homogeneous for one in traits),
        deterministic=all(one.deterministic for one in traits),
        additive=all(one.additive for one in traits),
        independent=all(one.independent for one in traits),
        broadcast=all(one.broadcast for one in traits),
        basis="bound" if known else "none",
    )
