"""Every rule with every codec: it raises at construction with the reason, or it works."""

from __future__ import annotations

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ef_optax as ef
from ef_optax._core.policy import for_leaf
from ef_optax._rules import needs as needs_module
from ef_optax._rules.needs import ADDITIVE, CONTRACTIVE, DETERMINISTIC, Need
from ef_optax.compressors.combine.scheduled import Scheduled
from tests.compressors.pool import CASES
from tests.exchanges.pool import EXCHANGES
from tests.feedback.rules import AXIS, COMPRESSED, TOP, N
from tests.paths import ROOT

CODECS = {name: case.make for name, case in CASES.items()} | EXCHANGES
QUICK = {"top_k", "majority_vote"}
PARAMS = {"w": np.ones((3, 2), np.float32), "b": np.ones(3, np.float32)}


NEEDS = {name: need for name, need in vars(needs_module).items() if isinstance(need, Need)}
"""All needs by name; whether ``CONTRACTIVE`` is met depends on the leaf."""


def asked(rule, argument):
    """The needs that a rule names for a compressor, recorded where it makes its exchange."""
    seen = {}

    def record(asked_by, codec, needs):
        seen[asked_by] = needs

    with mock.patch.object(needs_module, "require", record):
        COMPRESSED[rule, argument](TOP)
    return seen[f"{rule.partition(',')[0]}: {argument}"]


REQUIRES = {(rule, argument): asked(rule, argument) for rule, argument in COMPRESSED}
"""For each rule and each compressor that it takes, what it needs of it."""


def codec_parts(codec):
    """The codecs that may run: of a policy those of its leaves, of a schedule its stages."""
    likes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in PARAMS.items()}
    leaves = [for_leaf(codec, path, like) for path, like in likes.items()]
    stages = [leaf.codecs if isinstance(leaf, Scheduled) else (leaf,) for leaf in leaves]
    return [part for stage in stages for part in stage]


def lacks(rule, argument, codec):
    """The needs of the rule that the codec does not meet, by the declarations alone."""
    parts = codec_parts(codec)
    return [need for need in REQUIRES[rule, argument] if not all(need.met(p) for p in parts)]


KEEP_A_HALF = {
    ("diana", "compressor"): 0.5,
    ("ecq_sgd", "compressor"): 0.4,
    ("ef_bv", "compressor"): 0.5,
    ("ef_momentum", "compressor"): 0.5,
    ("error_feedback, blended", "compressor"): 0.5,
    ("gradient_shift", "compressor"): 0.5,
}
"""Rules whose memory keeps half of the codec's error, and this much of itself."""


def grows(rule, argument, codec):
    """Whether noise makes the rule's memory grow: half of it, squared, is a quarter."""
    workers = 1 if argument == "server" or rule == "ef21_p" else N
    parts = [(x.shape, part) for x in PARAMS.values() for part in codec_parts(codec)]
    worst = max(part.noise_error(shape, workers) for shape, part in parts)
    if (rule, argument) in KEEP_A_HALF:
        return KEEP_A_HALF[rule, argument] ** 2 + worst / 4 >= 1
    return CONTRACTIVE in REQUIRES[rule, argument] and worst >= 1


def one_step(tx, gradient):
    """What one worker does: the state's start and one update."""
    inner = optax.with_extra_args_support(tx)
    state = inner.init(PARAMS)
    points = dict.fromkeys(ef.query_points(state, PARAMS), gradient)
    more = {"constraint": jnp.float32(0), "constraint_grads": gradient}
    return inner.update(gradient, state, PARAMS, grads=points, **more)


def trace(tx):
    """One step of N workers, traced; parameters keep their shapes and dtypes."""
    grads = {k: jax.ShapeDtypeStruct((N, *x.shape), x.dtype) for k, x in PARAMS.items()}
    run = jax.vmap(functools.partial(one_step, tx), axis_name=AXIS, axis_size=N)
    updates, _ = jax.eval_shape(run, grads)
    assert {k: (u.shape, u.dtype) for k, u in updates.items()} == {
        k: (x.shape, x.dtype) for k, x in grads.items()
    }


def test_every_rule_that_takes_a_compressor_has_a_maker_here():
    """A file that makes an exchange from what the user gave names its rule in it.

    A rule that puts what it is given on a transport of its own takes what ``carried`` takes, as the
    transports do, and refuses the rest with their words.
    """
    named = set()
    for room in ("feedback", "local"):
        for path in (ROOT / "ef_optax" / room).glob("*.py"):
            text = path.read_text(encoding="utf-8")
            if "exchange_for(" in text and "carried(" not in text:
                made = {rule for rule, _ in COMPRESSED if f'"{rule.partition(",")[0]}"' in text}
                assert made, f"{path.name}: give its rule a maker in COMPRESSED"
                named |= made
    assert named == {rule for rule, _ in COMPRESSED}


def test_every_need_is_asked_for_by_some_rule():
    assert {need for needs in REQUIRES.values() for need in needs} == set(NEEDS.values())


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else (pytest.mark.slow,)) for n in CODECS]
)
def test_every_rule_with_this_codec_raises_or_works(name):
    for (rule, argument), make in COMPRESSED.items():
        compressor = CODECS[name]()
        missing = lacks(rule, argument, compressor.codec)
        if missing:
            with pytest.raises(ValueError, match=f"^{rule}: {argument}") as caught:
                make(compressor).init(PARAMS)  # a policy is checked in init, where it sees leaves
            text = str(caught.value)
            assert any(need.reason in text and need.remedy in text for need in missing)
        elif grows(rule, argument, compressor.codec):
            with pytest.raises(
                ValueError,
                match=f"^{rule.partition(',')[0]}: {argument} .* is not a contraction for",
            ):
                trace(make(compressor))
        else:
            trace(make(compressor))


def test_each_need_is_missed_by_some_codec():
    """A need that every codec meets tests nothing."""
    for name in NEEDS.keys() - {"CONTRACTIVE"}:
        need = NEEDS[name]
        parts = [part for make in CODECS.values() for part in codec_parts(make().codec)]
        assert {need.met(part) for part in parts} == {True, False}, name


def test_a_policy_and_a_schedule_are_held_to_the_needs_of_each_part():
    bad = ef.per_leaf(lambda path, x: ef.exchanges.majority_vote() if path == "b" else TOP)
    with pytest.raises(ValueError, match="at 'b', Sign by Majority does not give the mean"):
        ef.ef21(bad).init(PARAMS)
    for stages in ([TOP, ef.exchanges.majority_vote()], [TOP, bad]):
        with pytest.raises(ValueError, match="Sign by Majority does not give the mean"):
            ef.ef21(ef.scheduled([5], stages)).init(PARAMS)


RARE = ef.random_k(key=5, k=1, scaled=True)
LONG = {"w": jnp.ones((2, 4))}


def growth(tx):
    """How much larger the floating state is after 40 steps than after 10, with fixed gradients."""
    inner = optax.with_extra_args_support(tx)
    grads = {"w": jnp.linspace(1.0, 5.0, N * 8).reshape(N, 2, 4)}

    def one(g):
        more = {"constraint": jnp.float32(0), "constraint_grads": g}

        def step(state, _):
            points = dict.fromkeys(ef.query_points(state, LONG), g)
            _, state = inner.update(g, state, LONG, grads=points, **more)
            floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
            return state, sum(jnp.sum(jnp.abs(x)) for x in floats)

        return jax.lax.scan(step, inner.init(LONG), length=40)[1]

    sizes = np.asarray(jax.jit(jax.vmap(one, axis_name=AXIS))(grads), np.float64)
    return sizes[:, -1].max() / sizes[:, 9].max()


REMEMBERS = sorted(
    key for key, needs in REQUIRES.items() if CONTRACTIVE in needs and DETERMINISTIC not in needs
)


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "argument"), REMEMBERS)
def test_what_is_refused_grows(rule, argument, monkeypatch):
    """With the refusal taken away one entry in eight, times eight, is remembered without bound."""
    monkeypatch.setattr(needs_module.CheckedExchange, "_require_bounded", lambda *_: None)
    assert growth(COMPRESSED[rule, argument](RARE)) > 100


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "argument"), REMEMBERS)
def test_the_remedy_does_not_grow(rule, argument):
    made = COMPRESSED[rule, argument]
    with pytest.raises(ValueError, match=r"leaf 'w' of shape \(2, 4\): .* is 7 times that of"):
        ef.simulate(made(RARE), N, AXIS).init(LONG)
    assert growth(made(ef.scale_to_contractive(RARE))) < 10


def test_each_part_of_a_policy_and_a_schedule_must_be_contractive():
    mixed = ef.per_leaf(lambda path, x: RARE if path == "b" else TOP)
    with pytest.raises(ValueError, match=r"error_feedback: compressor RandomK .* leaf 'b'"):
        ef.error_feedback(mixed).init(PARAMS)
    for stages in ([TOP, RARE], [TOP, mixed], [RARE, TOP]):
        with pytest.raises(ValueError, match=r"Scheduled is not a contraction for the leaf 'b'"):
            ef.error_feedback(ef.scheduled([5], stages)).init(PARAMS)


def test_worst_case_constants_are_not_held_against_a_codec():
    """With the largest magnitude as the norm, a memory never becomes the worst leaf of QSGD."""
    quantizer = ef.qsgd(7, key=0, norm="linf")
    assert quantizer.codec.omega((1000,)) > 1
    ef.error_feedback(quantizer).init(jnp.zeros(1000))


def test_decay_and_injection_may_hold_an_unbiased_codec_down():
    """With omega = 7: b^2 omega, or (1 - s)^2 + s^2 omega, is below one; an array is not known."""
    for options in ({"decay": 0.3}, {"injection": 0.2}, {"decay": jnp.float32(0.9)}):
        ef.error_feedback(RARE, **options).init(LONG)
    for options in ({"decay": 0.5}, {"injection": 0.5}):
        with pytest.raises(ValueError, match="RandomK is not a contraction .* is 7 times that"):
            ef.error_feedback(RARE, **options).init(LONG)


def test_rules_that_keep_the_mean_of_the_workers_need_additive_codecs():
    """A ``mean`` in a State is moved by the aggregate, while the estimates move by ``sent``."""
    keep = set()
    for (rule, argument), make in COMPRESSED.items():
        states = make(ef.identity()).init(PARAMS)
        nodes = states if type(states) is tuple else (states,)
        if argument == "compressor" and any("mean" in getattr(s, "_fields", ()) for s in nodes):
            keep.add(rule)
    assert len(keep) > 8
    assert {r for r in keep if ADDITIVE not in REQUIRES[r, "compressor"]} == set()
