"""Every rule of the library with example options, for the tests that run over all of them."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import ef_optax as ef

N, AXIS = 4, "data"
TOP, SIGN = ef.top_k(k=2), ef.scaled_sign()
UNBIASED = ef.random_k(0.6, 5, scaled=True)
WEIGHTS = (0.125, 0.125, 0.25, 0.5)

Make = Callable[[], optax.GradientTransformation]


def given(
    tx: optax.GradientTransformation, arguments: Callable[[Any], dict[str, Any]]
) -> optax.GradientTransformationExtraArgs:
    """A rule with the further arguments that it needs, made from its gradients."""
    tx = optax.with_extra_args_support(tx)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        return tx.update(updates, state, params, **arguments(updates), **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def met(grads: Any) -> dict[str, Any]:
    """A constraint that holds, with the gradient of one that does not matter."""
    return {"constraint": jnp.float32(-1.0), "constraint_grads": grads}


def squares(grads: Any) -> dict[str, Any]:
    """The squares of a batch of one sample."""
    return {"squares": jax.tree.map(jnp.square, grads)}


RULES: dict[str, Make] = {
    "acp_sgd": lambda: ef.error_feedback(ef.acp_sgd(1, start_step=1), axis_name=AXIS),
    "adacomp": lambda: ef.adacomp(2, axis_name=AXIS),
    "adacomp one bin": lambda: ef.adacomp(50, axis_name=AXIS),
    "clip21": lambda: ef.clip21(0.5, axis_name=AXIS),
    "compressed_mean": lambda: ef.compressed_mean(SIGN, axis_name=AXIS),
    "clip_residual": lambda: ef.policies.clip_residual(
        ef.error_feedback(TOP, axis_name=AXIS), 0.5, axis_name=AXIS
    ),
    "delayed": lambda: ef.error_feedback(ef.exchanges.delayed(TOP), axis_name=AXIS),
    "delayed_start": lambda: ef.ef21(ef.policies.delayed_start(TOP, 1), axis_name=AXIS),
    "dense_steps": lambda: ef.policies.dense_steps(
        ef.error_feedback(TOP, axis_name=AXIS), lambda step: step % 2 == 0, axis_name=AXIS
    ),
    "dgc": lambda: ef.dgc(TOP, nesterov=True, clip_norm=1.0, axis_name=AXIS),
    "dgc warm-up": lambda: ef.dgc(ef.policies.dgc_warmup(0.4, 1, 2), axis_name=AXIS),
    "diana": lambda: ef.diana(UNBIASED, axis_name=AXIS),
    "dist_ef_sgdm": lambda: ef.dist_ef_sgdm(SIGN, 0.1, axis_name=AXIS),
    "double_squeeze": lambda: ef.double_squeeze(TOP, SIGN, axis_name=AXIS),
    "ec_sgd_diana": lambda: ef.ec_sgd_diana(TOP, UNBIASED, 0.25, axis_name=AXIS),
    "econtrol": lambda: ef.econtrol(TOP, 0.1, axis_name=AXIS, init="full"),
    "ecq_sgd": lambda: ef.ecq_sgd(TOP, 0.5, 0.9, axis_name=AXIS),
    "ef21": lambda: ef.ef21(TOP, axis_name=AXIS, init="full"),
    "ef21 zero": lambda: ef.ef21(SIGN, axis_name=AXIS, init="zero"),
    "ef21 unbiased": lambda: ef.ef21(UNBIASED, axis_name=AXIS),
    "ef21_bidirectional": lambda: ef.ef21_bidirectional(TOP, SIGN, axis_name=AXIS),
    "ef21_double_momentum": lambda: ef.ef21_double_momentum(TOP, 0.5, axis_name=AXIS),
    "ef21_heavy_ball": lambda: ef.ef21_heavy_ball(TOP, 0.5, axis_name=AXIS),
    "ef21_momentum": lambda: ef.ef21_momentum(UNBIASED, 0.5, axis_name=AXIS),
    "ef21_normalised": lambda: ef.ef21_normalised(TOP, axis_name=AXIS),
    "ef21_p": lambda: optax.chain(
        ef.compressed_mean(UNBIASED, axis_name=AXIS), optax.scale(-0.1), ef.ef21_p(TOP)
    ),
    "ef21_partial_participation": lambda: ef.ef21_partial_participation(
        TOP, 0.5, 3, weights=WEIGHTS, axis_name=AXIS
    ),
    "ef21_plus": lambda: ef.ef21_plus(TOP, axis_name=AXIS, init="full"),
    "ef21_prox": lambda: ef.ef21_prox(TOP, ef.l1_prox(0.1), 0.1, axis_name=AXIS),
    "ef21_w": lambda: ef.ef21_w(SIGN, WEIGHTS, axis_name=AXIS),
    "ef_bv": lambda: ef.ef_bv(UNBIASED, 0.3, 0.8, axis_name=AXIS),
    "ef_momentum": lambda: ef.ef_momentum(TOP, 0.5, axis_name=AXIS),
    "error_feedback": lambda: ef.error_feedback(TOP, axis_name=AXIS, decay=0.9, injection=0.5),
    "error_feedback corrected": lambda: ef.error_feedback(
        UNBIASED, axis_name=AXIS, learning_rate=ef.power_decay(0.1, 1.0)
    ),
    "fcc": lambda: ef.error_feedback(ef.fcc(SIGN, 2), axis_name=AXIS),
    "fetch_sgd": lambda: ef.fetch_sgd(3, 5, k=2, axis_name=AXIS),
    "flush": lambda: ef.econtrol(ef.policies.flush(TOP, 2), 0.1, axis_name=AXIS),
    "gradual": lambda: ef.error_feedback(
        ef.policies.gradual(ef.top_k, optax.linear_schedule(0.9, 0.3, 4), 4, levels=2),
        axis_name=AXIS,
    ),
    "gradiveq": lambda: ef.error_feedback(
        ef.gradiveq(0.5, samples=1, period=2, slice_size=2), axis_name=AXIS
    ),
    "hold_bytes": lambda: ef.ef21(ef.policies.hold_bytes([ef.top_k(k=1), TOP], 14), axis_name=AXIS),
    "hold_contraction": lambda: ef.error_feedback(
        ef.policies.hold_contraction([SIGN, TOP, ef.top_k(k=3)], 0.7, window=1), axis_name=AXIS
    ),
    "global_top_k": lambda: ef.error_feedback(ef.global_top_k(0.4), axis_name=AXIS),
    "momentum_feedback": lambda: ef.momentum_feedback(TOP, 0.9, axis_name=AXIS),
    "neolithic": lambda: ef.neolithic(SIGN, 2, ef.top_k(k=1), axis_name=AXIS),
    "on_host": lambda: ef.econtrol(
        TOP, 0.1, memory=ef.on_host(ef.block_quantize(8, block=4)), axis_name=AXIS
    ),
    "rescale_residual": lambda: given(
        ef.policies.rescale_residual(ef.error_feedback(TOP, axis_name=AXIS)),
        lambda _: {"loss_scale": 2.0},
    ),
    "reset_residual": lambda: ef.policies.reset_residual(
        ef.dgc(TOP, axis_name=AXIS), 2, axis_name=AXIS
    ),
    "safe_ef": lambda: given(ef.safe_ef(TOP, axis_name=AXIS), met),
    "scheduled": lambda: ef.error_feedback(ef.scheduled([1], [SIGN, TOP]), axis_name=AXIS),
    "steer_residual": lambda: ef.policies.steer_residual(
        ef.error_feedback(TOP, axis_name=AXIS),
        injection=ef.policies.OfNorm(lambda norm: 0.5 + norm / 2),
        retention=0.9,
        axis_name=AXIS,
    ),
    "two_shot": lambda: ef.error_feedback(ef.exchanges.two_shot(SIGN), axis_name=AXIS),
    "scalecom": lambda: ef.scalecom(k=2, beta=0.5, axis_name=AXIS),
    "sharded_optimizer": lambda: ef.sharded_optimizer(
        optax.sgd(0.1, 0.9), TOP, SIGN, axis_name=AXIS
    ),
    "three_point clag": lambda: ef.three_point_compressor("clag", TOP, zeta=2.0, axis_name=AXIS),
    "three_point v1": lambda: ef.three_point_compressor("v1", TOP, axis_name=AXIS, init="full"),
    "three_point v2": lambda: ef.three_point_compressor("v2", TOP, second=UNBIASED, axis_name=AXIS),
    "three_point v3": lambda: ef.three_point_compressor(
        "v3", TOP, second=SIGN, zeta=2.0, axis_name=AXIS
    ),
    "three_point v4": lambda: ef.three_point_compressor("v4", TOP, second=SIGN, axis_name=AXIS),
    "three_point v5": lambda: ef.three_point_compressor(
        "v5", TOP, probability=0.5, key=1, axis_name=AXIS
    ),
    "variance_based": lambda: given(
        ef.variance_based(0.5, capacity=0.5, decay=0.9, axis_name=AXIS), squares
    ),
}
"""Rules that need only the gradients, or arguments made from them here."""

WITH_POINTS: dict[str, Make] = {
    "beer": lambda: ef.local.beer(optax.sgd(0.1), TOP, 0.3, mean_every=2, axis_name=AXIS),
    "choco_sgd": lambda: ef.local.choco_sgd(
        optax.sgd(0.1, 0.9),
        SIGN,
        0.3,
        graph=ef.local.metropolis([(0, 1), (1, 2), (1, 3)]),
        mean_every=2,
        axis_name=AXIS,
    ),
    "cser": lambda: ef.local.cser(SIGN, TOP, 0.1, 2, axis_name=AXIS),
    "cser without gradients": lambda: ef.local.cser(SIGN, None, 0.1, 2, axis_name=AXIS),
    "ef21_page": lambda: ef.ef21_page(TOP, axis_name=AXIS),
    "diloco": lambda: ef.local.diloco(
        optax.sgd(0.1, 0.9), 2, compressor=SIGN, decay=0.5, axis_name=AXIS
    ),
    "local_steps": lambda: ef.local.local_steps(
        optax.sgd(0.1, 0.9),
        2,
        optax.chain(ef.ef21(TOP, axis_name=AXIS), optax.sgd(1.0)),
        skip_together=AXIS,
    ),
    "marina": lambda: ef.marina(UNBIASED, 0.2, 0, axis_name=AXIS),
    "pp-marina": lambda: ef.marina(UNBIASED, 0.2, 0, participants=2, axis_name=AXIS),
    "qsparse_local_sgd": lambda: ef.local.qsparse_local_sgd(TOP, 0.1, 2, axis_name=AXIS),
    "sparse_loco": lambda: ef.local.sparse_loco(optax.sgd(0.1, 0.9), 2, TOP, axis_name=AXIS),
    "streaming": lambda: ef.local.streaming(
        optax.sgd(0.1, 0.9),
        2,
        optax.chain(ef.error_feedback(TOP, axis_name=AXIS), optax.sgd(0.7)),
        2,
        delay=1,
        mixing=0.5,
    ),
    "noloco": lambda: ef.local.noloco(optax.sgd(0.1, 0.9), 2, 0, mean_every=2, axis_name=AXIS),
    "normalised mvr": lambda: ef.ef21_normalised(TOP, "mvr", axis_name=AXIS),
    "normalised igt": lambda: ef.ef21_normalised(TOP, "igt", axis_name=AXIS),
    "normalised rhm": lambda: ef.ef21_normalised(TOP, "rhm", key=0, axis_name=AXIS),
}
"""Rules that need gradients at other points."""

RECIPES: dict[str, Make] = {
    "dct_adamw": lambda: ef.recipes.dct_adamw(0.1, 1, others=optax.sgd(0.1), axis_name=AXIS),
    "demo": lambda: ef.recipes.demo(0.1, k=1, chunk=2, weight_decay=0.1, axis_name=AXIS),
    "dion": lambda: ef.recipes.dion(0.1, 1, others=optax.sgd(0.1), axis_name=AXIS),
    "dion2": lambda: ef.recipes.dion2(0.1, 0.5, others=optax.sgd(0.1), axis_name=AXIS),
    "distro": lambda: ef.recipes.distro(0.1, k=1, chunk=2, weight_decay=0.1, axis_name=AXIS),
    "dgc_sgd": lambda: ef.recipes.dgc_sgd(
        0.1, 0.4, weight_decay=0.1, steps_per_epoch=1, warmup_epochs=2, axis_name=AXIS
    ),
    "econtrol_dual_averaging": lambda: ef.recipes.econtrol_dual_averaging(
        TOP, 0.1, 0.5, ef.l1_prox(0.1), axis_name=AXIS
    ),
    "ef21_muon": lambda: ef.recipes.ef21_muon(0.1, TOP, server=SIGN, axis_name=AXIS),
    "ef_sign_sgd": lambda: ef.recipes.ef_sign_sgd(0.1, axis_name=AXIS),
    "ldadam": lambda: ef.recipes.ldadam(0.1, 1, others=optax.sgd(0.1), axis_name=AXIS),
    "micro_adam": lambda: ef.recipes.micro_adam(0.1, 0.5, window=2, axis_name=AXIS),
    "loco": lambda: ef.recipes.loco(
        optax.sgd(0.1, 0.9), reset_every=2, weights=ef.block_quantize(8), axis_name=AXIS
    ),
    "gpa": lambda: ef.recipes.gpa(
        optax.chain(ef.error_feedback(TOP, axis_name=AXIS), optax.sgd(0.1)), 0.9
    ),
    "muloco": lambda: ef.recipes.muloco(
        0.1, 2, compressor=SIGN, inner=optax.sgd(0.1), axis_name=AXIS
    ),
    "zero_one_adam": lambda: ef.recipes.zero_one_adam(
        0.1, 2, weight_decay=0.1, var_update_scaler=1, local_step_scaler=1, axis_name=AXIS
    ),
    "one_bit_lamb": lambda: ef.recipes.one_bit_lamb(0.1, 1, weight_decay=0.1, axis_name=AXIS),
    "one_bit_adam": lambda: ef.recipes.one_bit_adam(0.1, 1, weight_decay=0.1, axis_name=AXIS),
    "power_sgd_momentum": lambda: ef.recipes.power_sgd_momentum(
        0.1, 1, weight_decay=0.1, axis_name=AXIS
    ),
    "signum": lambda: ef.recipes.signum(0.1, weight_decay=0.1, axis_name=AXIS),
    "trion": lambda: ef.recipes.trion(0.1, 1, others=optax.sgd(0.1), axis_name=AXIS),
}
"""Optimizers of the literature."""

EVERY = RULES | WITH_POINTS

ALL = EVERY | RECIPES

MIXED = {"dgc_sgd"}
"""With dense leaves beside others. Their residual is zero on all workers, which ``worker_axes``
knows and JAX's types do not, so these are not run in a checked map with specs made from it."""

UNSPLIT = {"loco", "sharded_optimizer"}
"""Optimizers on flat shards of the leaves, which refuse leaves that are split over model axes."""

FEW = ("dgc warm-up", "ef21", "ef21_p", "fetch_sgd", "pp-marina", "qsparse_local_sgd", "two_shot")
"""One of each kind: these always run, the others only in the slow run."""


def thinned(names: Iterable[str]) -> list[Any]:
    """The names as parameters of a test; all but a few are slow."""
    return [pytest.param(n, marks=() if n in FEW else (pytest.mark.slow,)) for n in names]


Arguments = dict[tuple[str, str], Callable[[ef.Compressor], optax.GradientTransformation]]

COMPRESSED: Arguments = {
    ("compressed_mean", "compressor"): lambda C: ef.compressed_mean(C, axis_name=AXIS),
    ("cser", "errors"): lambda C: ef.local.cser(C, SIGN, 0.1, 2, axis_name=AXIS),
    ("cser", "gradients"): lambda C: ef.local.cser(SIGN, C, 0.1, 2, axis_name=AXIS),
    ("dgc", "compressor"): lambda C: ef.dgc(C, axis_name=AXIS),
    ("diana", "compressor"): lambda C: ef.diana(C, 0.5, axis_name=AXIS),
    ("dist_ef_sgdm", "compressor"): lambda C: ef.dist_ef_sgdm(C, 0.1, server=SIGN, axis_name=AXIS),
    ("dist_ef_sgdm", "server"): lambda C: ef.dist_ef_sgdm(SIGN, 0.1, server=C, axis_name=AXIS),
    ("double_squeeze", "compressor"): lambda C: ef.double_squeeze(C, SIGN, axis_name=AXIS),
    ("double_squeeze", "server"): lambda C: ef.double_squeeze(SIGN, C, axis_name=AXIS),
    ("econtrol", "compressor"): lambda C: ef.econtrol(C, 0.1, axis_name=AXIS),
    ("ecq_sgd", "compressor"): lambda C: ef.ecq_sgd(C, 0.5, 0.9, axis_name=AXIS),
    ("ef21", "compressor"): lambda C: ef.ef21(C, axis_name=AXIS),
    ("ef21_bidirectional", "compressor"): lambda C: ef.ef21_bidirectional(C, SIGN, axis_name=AXIS),
    ("ef21_bidirectional", "server"): lambda C: ef.ef21_bidirectional(SIGN, C, axis_name=AXIS),
    ("ef21_double_momentum", "compressor"): lambda C: ef.ef21_double_momentum(
        C, 0.5, axis_name=AXIS
    ),
    ("ef21_momentum", "compressor"): lambda C: ef.ef21_momentum(C, 0.5, axis_name=AXIS),
    ("ef21_p", "compressor"): lambda C: optax.chain(
        ef.compressed_mean(SIGN, axis_name=AXIS), ef.ef21_p(C)
    ),
    ("ef21_partial_participation", "compressor"): lambda C: ef.ef21_partial_participation(
        C, 0.5, 0, axis_name=AXIS
    ),
    ("ef21_plus", "compressor"): lambda C: ef.ef21_plus(C, axis_name=AXIS),
    ("ef21_w", "compressor"): lambda C: ef.ef21_w(C, WEIGHTS, axis_name=AXIS),
    ("ef_bv", "compressor"): lambda C: ef.ef_bv(C, 0.5, axis_name=AXIS),
    ("ef_momentum", "compressor"): lambda C: ef.ef_momentum(C, 0.5, axis_name=AXIS),
    ("error_feedback", "compressor"): lambda C: ef.error_feedback(C, axis_name=AXIS),
    ("error_feedback, blended", "compressor"): lambda C: ef.error_feedback(
        C, axis_name=AXIS, injection=0.5
    ),
    ("gradient_shift", "compressor"): lambda C: optax.chain(
        ef.gradient_shift(C, 0.5, axis_name=AXIS), ef.compressed_mean(SIGN, axis_name=AXIS)
    ),
    ("marina", "compressor"): lambda C: ef.marina(C, 0.5, 0, axis_name=AXIS),
    ("momentum_feedback", "compressor"): lambda C: ef.momentum_feedback(C, axis_name=AXIS),
    ("qsparse_local_sgd", "compressor"): lambda C: ef.local.qsparse_local_sgd(
        C, 0.1, 2, axis_name=AXIS
    ),
    ("safe_ef", "compressor"): lambda C: ef.safe_ef(C, axis_name=AXIS),
    ("three_point_compressor", "compressor"): lambda C: ef.three_point_compressor(
        "clag", C, zeta=1.0, axis_name=AXIS
    ),
    ("three_point_compressor", "second"): lambda C: ef.three_point_compressor(
        "v2", TOP, second=C, axis_name=AXIS
    ),
}
"""Every compressor that a rule takes: (rule, argument) -> a maker from that compressor."""


def side_by_side(rules: dict[str, Any]) -> optax.GradientTransformation:
    """Several rules in one program; each has the entry of the tree with its name."""

    def init(params: Any) -> Any:
        return {name: tx.init({name: params[name]}) for name, tx in rules.items()}

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        del params
        out = {name: tx.update({name: grads[name]}, state[name]) for name, tx in rules.items()}
        return {name: u[name] for name, (u, _) in out.items()}, {n: s for n, (_, s) in out.items()}

    return optax.GradientTransformation(init, update)


WHOLE = {"cser", "cser without gradients", "ef21_p", "ef21_prox", "qsparse_local_sgd"}
WHOLE |= {
    "beer",
    "choco_sgd",
    "diloco",
    "local_steps",
    "noloco",
    "sharded_optimizer",
    "sparse_loco",
    "streaming",
    *RECIPES,
}
"""Whole optimizers: their updates are steps already."""


ALONE = {
    "zero_one_adam",
    "beer",
    "choco_sgd",
    "diloco",
    "muloco",
    "noloco",
    "sparse_loco",
    "streaming",
}
"""Rules in which a worker with a bad gradient leaves out its own step, and the others go on."""


@functools.cache
def _twin(cls: type) -> type:
    """A named tuple with the fields of a State class and without its methods."""
    twin = collections.namedtuple(cls.__name__, cls._fields)
    twin.original = cls
    return twin


def together(
    names: Iterable[str],
    rate: float | None = None,
    elsewhere: float = 0.5,
    around: Callable[[Any], Any] = optax.with_extra_args_support,
) -> optax.GradientTransformation:
    """Several rules in one transformation, each for its own copy of the parameters.

    Parameters, gradients and states are dictionaries by rule; each rule sees a tree with that one
    entry, so that paths (and with them partition specs) are those of the whole tree.

    Args:
      names: of ``EVERY``.
      rate: every rule that is not a whole optimizer is followed by gradient descent at this rate.
      elsewhere: what a rule gets at other points, as a multiple of the gradient.
      around: what each rule is wrapped in.
    """

    def made(name: str) -> optax.GradientTransformationExtraArgs:
        tx = ALL[name]()
        if rate is not None and name not in WHOLE:
            tx = optax.chain(tx, optax.sgd(rate))
        return around(tx)

    rules = {name: made(name) for name in names}

    def has_points(x: Any) -> bool:
        return isinstance(x, tuple) and hasattr(type(x), "points")

    def blind(state: Any) -> Any:
        """The state without its points, which must not be asked for the whole tree."""
        one = lambda x: _twin(type(x))(*x) if has_points(x) else x  # noqa: E731
        return jax.tree.map(one, state, is_leaf=has_points)

    def seeing(state: Any) -> Any:
        """The inverse of ``blind``."""
        twin = lambda x: hasattr(type(x), "original")  # noqa: E731
        one = lambda x: type(x).original(*x) if twin(x) else x  # noqa: E731
        return jax.tree.map(one, state, is_leaf=twin)

    def init(params: Any) -> Any:
        return {name: blind(tx.init({name: params[name]})) for name, tx in rules.items()}

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        updates, after = {}, {}
        for name, tx in rules.items():
            own, g = {name: params[name]}, {name: grads[name]}
            before = seeing(state[name])
            other = jax.tree.map(lambda x: elsewhere * x, g)
            points = {p: g if p == "params" else other for p in ef.query_points(before, own)}
            u, new = tx.update(g, before, own, grads=points)
            updates[name], after[name] = u[name], blind(new)
        return updates, after

    return optax.GradientTransformation(init, update)
