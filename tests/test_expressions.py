"""Methods by name: what a text says is made, and nothing else can be said."""

from __future__ import annotations

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given

import ef_optax as ef
from ef_optax.expressions import parse_list, vocabulary
from tests.public import public_names

LITERALS = st.one_of(
    st.integers(-100, 100), st.floats(allow_nan=False, allow_infinity=False), st.booleans(),
    st.none(), st.text(max_size=5),
)  # fmt: skip
ARGUMENTS = st.recursive(
    LITERALS.map(repr),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda xs: f"[{','.join(xs)}]"),
        st.lists(inner, max_size=3).map(lambda xs: f"({''.join(f'{x} ,' for x in xs)})"),
        inner.map(lambda x: f"call( {x}, option = {x})"),
    ),
    max_leaves=6,
)


def call(*args, **kwargs):
    """Takes anything; returns what it got."""
    return args, kwargs


@given(st.lists(st.lists(ARGUMENTS, max_size=2), min_size=1, max_size=3))
def test_the_text_of_an_expression_is_read_as_the_same_expression(parts) -> None:
    text = "|".join(f"call({','.join(args)})" for args in parts)
    known = {"call": call}
    expression = ef.parse(text, known)
    assert len(expression.parts) == len(parts)
    assert ef.parse(str(expression), known) == expression
    # Python itself reads the arguments as we do.
    for part, args in zip(expression.parts, parts, strict=True):
        expected = eval(f"call({','.join(args)})", {"call": call})  # noqa: S307
        assert repr(part.build(None)) == repr(expected)


def test_what_is_built_is_what_is_written_by_hand() -> None:
    text = "error_feedback(top_k(k=1), decay=0.5) | optax.sgd(0.5, momentum=0.9)"
    hand = optax.chain(
        ef.error_feedback(ef.top_k(k=1), axis_name="w", decay=0.5), optax.sgd(0.5, 0.9)
    )
    grads, params = jnp.array([[3.0, 1.0], [1.0, -2.0]]), jnp.zeros(2)

    def two_steps(tx):
        tx = ef.simulate(tx, 2, "w")
        _, state = tx.update(grads, tx.init(params), params)
        return tx.update(grads, state, params)

    for got, expected in zip(
        jax.tree.leaves(two_steps(ef.parse(text).build("w"))),
        jax.tree.leaves(two_steps(hand)),
        strict=True,
    ):
        np.testing.assert_array_equal(got, expected)


def test_the_worker_axis_reaches_every_rule_and_may_be_named() -> None:
    inner = "monitor(policies.clip_residual(error_feedback(top_k(k=1))))"
    tx = ef.simulate(ef.parse(inner).build("w"), 2, "w")
    tx.update(jnp.ones((2, 3)), tx.init(jnp.zeros(3)))
    named = ef.parse("ef21(top_k(k=1), axis_name='other')").build("w")
    with pytest.raises(NameError, match="'other'"):
        ef.simulate(named, 2, "w").init(jnp.zeros(3))


def test_a_name_alone_is_a_call_and_ours_come_first() -> None:
    codec = ef.parse("identity").build().codec
    assert codec == ef.identity().codec
    assert isinstance(ef.parse("optax.identity").build(), optax.GradientTransformation)
    assert ef.parse("top_k(0.1)").build().codec == ef.top_k(0.1).codec
    assert len(parse_list("ef21(top_k(k=1)) | sgd(0.1), adam(1e-3), optax.contrib.muon(0.1)")) == 3


def test_every_compressor_and_rule_has_its_name() -> None:
    makes = {"Compressor", "optax.GradientTransformationExtraArgs", "optax.GradientTransformation"}
    skipped = ("parallel.", "extend.", "measure.")
    for name, function in public_names().items():
        returned = getattr(function, "__annotations__", {}).get("return")
        if returned in makes and not name.startswith(skipped):
            assert vocabulary()[name.rpartition(".")[2]] is function, name
            assert vocabulary()[f"ef_optax.{name}" if "." not in name else name] is function


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ef21(topk(0.1))", r"'topk'.*use top_k"),
        ("eror_feedback(top_k(0.1))", "use error_feedback"),
        ("qqqq()", r"no public name.*use a name that help\(ef_optax\)"),
        ("top_k(0.1) | sgd(0.1)", r"inside a rule: error_feedback\(top_k\(0.1\)\)"),
        ("sgd(0.1, momentom=3)", "sgd.learning_rate.*unexpected keyword argument 'momentom'"),
        ("error_feedback()", "missing a required argument: 'compressor'"),
        ("sgd(0.1), adam(0.1)", "2 expressions.*parse_list"),
        ("", "is not an expression"),
        ("top_k(0.1", "is not an expression"),
        ("(" * 900 + ")" * 900, "is not an expression"),
        (" " * 20_000, "20000 characters"),
        ("save('file', 1)", "'save'"),
        ("__import__('os')", "'__import__'"),
        ("top_k.__class__", "'top_k.__class__'"),
        ("top_k(0.1).codec", "is not a call"),
        ("(lambda: sgd(0.1))()", "is not a call"),
        ("sgd([x for x in (1,)][0])", "neither a call nor a literal"),
        ("sgd(f'{1}')", "neither a call nor a literal"),
        ("sgd(*[0.1])", "neither a call nor a literal"),
        ("sgd(**{'learning_rate': 1})", r"after \*\* is not allowed"),
        ("sgd(9**9**9)", "neither a call nor a literal"),
        ("sgd(-'a')", "neither a call nor a literal"),
        ("sgd(b'a')", "neither a call nor a literal"),
    ],
)
def test_anything_else_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)^text=.*{message}") as caught:
        ef.parse(text)
    assert len(str(caught.value)) < 700


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(TypeError, match="must be a string"):
        ef.parse(ef.top_k(0.1))
