"""3PC (Richtarik et al. 2022): three-point compressors, from EF21 over lazy aggregation to v5.

    g_i = C_{h, y}(grad f_i(x))     with h = g_i and y = grad f_i at the last iterate
    emit mean_i g_i

Every variant has one or two stages. Each stage moves h nearer to x and sends one message:

    toward:  h + C(x - h)        lazy:  the same if ||x - h||^2 > zeta ||x - y||^2, else h
    drift:   h + C(x - y)
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ef_optax.extend import (
    ADDITIVE,
    CONTRACTIVE,
    Array,
    AxisName,
    Compressor,
    Exchange,
    ExchangeState,
    MemoryLike,
    as_key,
    as_transformation,
    check,
    collectives,
    difference,
    exchange_for,
    memory_for,
    shares,
    steps,
    trees,
)

_Kind = Literal["toward", "lazy", "drift"]
Variant = Literal["ef21", "clag", "v1", "v2", "v3", "v4", "v5"]
VARIANTS = ("ef21", "clag", "v1", "v2", "v3", "v4", "v5")
WITH_SECOND = ("v2", "v3", "v4")
WITH_ZETA = ("clag", "v3")


class ThreePointState(NamedTuple):
    """State of :func:`three_point_compressor`."""

    estimate: Any  # per worker, like the parameters: g_i, the h of the next round
    last: Any  # per worker, like the parameters: the last gradient, the y of the next round
    mean: Any  # like the parameters: the mean of the estimates
    base: Any  # like the parameters: the mean of the last gradients for v1, else ()
    sent: Array  # per worker, float32 scalar: 0 if the last lazy message was withheld, else 1
    exchanges: tuple[ExchangeState, ...]  # one for each stage


@dataclasses.dataclass(frozen=True)
class _Stage:
    """What is added to an estimate h: C(x - h), unless withheld (``"lazy"``), or C(x - y)."""

    kind: _Kind
    exchange: Exchange
    zeta: float | None

    def __call__(self, x: Any, y: Any, h: Any, g: Any, state: ExchangeState) -> tuple[Any, ...]:
        """The next h and mean, the exchange's state, and whether a lazy message was sent."""
        if self.kind == "drift":
            out = self.exchange(trees.sub(x, y), state, want=("sent",))
            return trees.add(h, out.sent), trees.add(g, out.aggregate), out.state, None
        news = None
        if self.kind == "lazy":
            distance, drift = (trees.squared_norm(trees.sub(x, z)) for z in (h, y))
            news = (distance > jnp.asarray(self.zeta, drift.dtype) * drift).astype(jnp.float32)
        return *difference.track(self.exchange, x, h, g, state, present=news), news


def three_point_compressor(
    variant: Variant,
    compressor: Compressor,
    *,
    second: Compressor | None = None,
    zeta: float | None = None,
    probability: float | None = None,
    key: Any = None,
    axis_name: AxisName = None,
    init: difference.Init = "compressed",
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""3PC: the new estimate depends on the last estimate, the last gradient and a message.

    .. math:: g_i' = C_{g_i, \nabla f_i(x^{t-1})}(\nabla f_i(x^t)), \quad \text{emit mean}_i\,g_i'

    With h the estimate, y the last gradient, x the new one, C the compressor and Q the second one:

    ======== ==================================================================================
    variant  new estimate
    ======== ==================================================================================
    "ef21"   ``h + C(x - h)``
    "clag"   ``h + C(x - h)`` if ``||x - h||^2 > zeta ||x - y||^2``, else h. With the identity as
             compressor it is LAG
    "v1"     ``y + C(x - y)``; the server must know y, which costs a dense exchange every round
    "v2"     ``b = h + Q(x - y)``; ``b + C(x - b)``, Q unbiased
    "v3"     ``b`` = CLAG with Q and zeta; ``b + C(x - b)``
    "v4"     ``b = h + Q(x - h)``; ``b + C(x - b)``
    "v5"     x (sent dense) with probability p, the same for all workers, else ``h + C(x - y)``
    ======== ==================================================================================

    In the papers' accounting a withheld message costs nothing; in this program a message of the
    same size still travels. Step sizes: :func:`ef_optax.theory.three_point_step`. EF21 itself is
    cheaper as :func:`ef21`, which does not keep the last gradient.

    Args:
      variant: the row of the table.
      compressor: C, contractive.
      second: Q of v2, v3 and v4.
      zeta: the trigger of clag and v3, at least 0.
      probability: p of v5, in (0, 1].
      key: a JAX random key or an int, with which v5 draws its exact rounds.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      init: the first estimates, as in :func:`ef21`. v1 needs ``"full"``.
      memory: the dtype in which estimates and gradients are stored, as in :func:`ef21`.

    Returns:
      The transformation, to be put before ``optax.sgd``; its state is a :class:`ThreePointState`.

    Raises:
      TypeError: if a compressor is not a Compressor. ValueError: for an unknown variant, an option
        that the variant lacks or does not use, or a compressor that is not additive; at init, for a
        compressor that makes the memory of a leaf grow (scaled random-k with omega >= 1).

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.three_point_compressor("clag", ef.identity(), zeta=2.0)  # LAG
      >>> params = jnp.zeros(1)
      >>> _, state = tx.update(jnp.array([4.0]), tx.init(params), params)
      >>> tx.update(jnp.array([5.0]), state, params)[0].tolist()  # the change is too small to send
      [4.0]

    References:
      Richtarik, Sokolov, Fatkhullin, Gasanov, Li, Gorbunov, "3PC: Three Point Compressors for
      Communication-Efficient Distributed Training and a Better Theory for Lazy Aggregation", ICML
      2022.
    """
    rule = "three_point_compressor"
    check.word(rule, "init", init, difference.INITS)
    _check(variant, second, zeta, probability, key, init)
    key = None if key is None else as_key(key, rule)
    stages = _stages(variant, compressor, second, zeta, axis_name)
    main = stages[-1].exchange
    memory = memory_for(memory, axis_name)

    def init_fn(params: Any) -> ThreePointState:
        h, y, g, base = (memory.zeros(params) for _ in range(4))
        return ThreePointState(
            estimate=h,
            last=y,
            mean=g,
            base=base if variant == "v1" else (),
            sent=jnp.ones((), jnp.float32),
            exchanges=tuple(stage.exchange.init(memory.read(g)) for stage in stages),
        )

    def update_fn(
        updates: Any, state: ThreePointState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, ThreePointState]:
        del params, extra_args
        x, *others, last = trees.wide(updates), *state.exchanges
        h, y, g, base = memory.read((state.estimate, state.last, state.mean, state.base))
        all_sent = jnp.ones_like(state.sent)

        def begin() -> tuple[Any, ...]:
            ordinary = functools.partial(difference.track, main, x, h, g, last)
            own, mean, after = difference.start(init, main, x, h, g, last, ordinary)
            return own, mean, mean if variant == "v1" else (), all_sent, (*others, after)

        def go_on() -> tuple[Any, ...]:
            own, mean, known, sent, after = h, g, base, all_sent, []
            if variant == "v1":  # both sides start from the last gradients
                own, mean = y, base
                known, _ = steps.send_dense(main, x, last)
            for stage, before in zip(stages, state.exchanges, strict=True):
                own, mean, done, news = stage(x, y, own, mean, before)
                sent = sent if news is None else news
                after.append(done)
            return own, mean, known, sent, tuple(after)

        def exact() -> tuple[Any, ...]:
            mean, after = steps.send_dense(main, x, last)
            return x, mean, (), all_sent, (after,)

        def later() -> tuple[Any, ...]:
            if probability is None:
                return go_on()
            coin = jax.random.uniform(shares.draw(key, last.step, axis_name, shared=True))
            return collectives.agreed_cond(coin < probability, exact, go_on, axis=axis_name)

        own, mean, known, sent, after = steps.first_step(main, last, begin, later)
        kept = ThreePointState(
            estimate=memory.write(own, state.estimate, last.step),
            last=memory.write(x, state.last, last.step),
            mean=memory.write(mean, state.mean, last.step, shared=True),
            base=memory.write(known, state.base, last.step, shared=True),
            sent=sent,
            exchanges=after,
        )
        return trees.emit(mean, updates), kept

    return as_transformation(init_fn, update_fn)


def _stages(
    variant: Variant,
    compressor: Compressor,
    second: Compressor | None,
    zeta: float | None,
    axis_name: AxisName,
) -> tuple[_Stage, ...]:
    """The stages of a variant: that of Q, if it has one, then that of C."""
    rule = "three_point_compressor"
    exchange = exchange_for(rule, compressor, axis_name, needs=(ADDITIVE, CONTRACTIVE))
    kinds: dict[str, _Kind] = {"clag": "lazy", "v1": "drift", "v5": "drift"}
    main = _Stage(kinds.get(variant, "toward"), exchange, zeta)
    if second is None:
        return (main,)
    exchange = exchange_for(rule, second, axis_name, argument="second", needs=(ADDITIVE,))
    kinds = {"v2": "drift", "v3": "lazy", "v4": "toward"}
    return _Stage(kinds[variant], exchange, zeta), main


def _check(
    variant: Variant,
    second: Compressor | None,
    zeta: float | None,
    probability: float | None,
    key: Any,
    init: difference.Init,
) -> None:
    """Refuses an unknown variant, and options that it lacks or does not use."""
    rule = "three_point_compressor"
    check.word(rule, "variant", variant, VARIANTS)
    _needed(variant, "second", second, variant in WITH_SECOND)
    _needed(variant, "zeta", zeta, variant in WITH_ZETA)
    _needed(variant, "probability", probability, variant == "v5")
    _needed(variant, "key", key, variant == "v5")
    if zeta is not None:
        check.not_negative(rule, "zeta", zeta)
    if probability is not None:
        check.weight(rule, "probability", probability)
    if variant == "v1" and init != "full":
        raise ValueError(f'{rule}: init={init!r}; variant "v1" knows all gradients: init="full".')


def _needed(variant: str, name: str, value: Any, needed: bool) -> None:
    if needed != (value is not None):
        what = "needs" if needed else "does not use"
        raise ValueError(f"three_point_compressor: {name}={value!r}; {variant!r} {what} {name}.")
