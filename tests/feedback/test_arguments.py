"""Numbers given to a rule: nonsense is refused by name, traced hyperparameters are accepted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ef_optax as ef

TOP = ef.top_k(k=1)
FACTORS = {
    "clip21 threshold": ef.clip21,
    "dgc momentum": lambda x: ef.dgc(TOP, momentum=x),
    "dgc clip_norm": lambda x: ef.dgc(TOP, clip_norm=x),
    "econtrol strength": lambda x: ef.econtrol(TOP, x),
    "ecq_sgd alpha": lambda x: ef.ecq_sgd(TOP, x, 1.0),
    "ecq_sgd beta": lambda x: ef.ecq_sgd(TOP, 1.0, x),
    "ef21_heavy_ball decay": lambda x: ef.ef21_heavy_ball(TOP, x),
    "ef21_momentum fresh_weight": lambda x: ef.ef21_momentum(TOP, x),
    "ef_bv lam": lambda x: ef.ef_bv(TOP, x, 1.0),
    "ef_momentum beta": lambda x: ef.ef_momentum(TOP, x),
    "error_feedback decay": lambda x: ef.error_feedback(TOP, decay=x),
    "fetch_sgd momentum": lambda x: ef.fetch_sgd(3, 16, k=1, momentum=x),
    "scalecom beta": lambda x: ef.scalecom(k=1, beta=x),
}
"""A rule and its argument, a number for which a half is fine."""

COUNTS = {
    "dgc_warmup warmup_epochs": lambda x: ef.policies.dgc_warmup(0.1, 100, x),
    "fcc rounds": lambda x: ef.fcc(TOP, x),
    "marina participants": lambda x: ef.marina(ef.identity(), 0.5, key=0, participants=x),
    "qsparse_local_sgd period": lambda x: ef.local.qsparse_local_sgd(TOP, 0.1, x),
}


@pytest.mark.parametrize("name", FACTORS)
def test_factors_may_be_injected(name: str) -> None:
    """An injected number has the same effect as the same Python number."""
    params, grads = jnp.zeros(3), jnp.array([3.0, 2.0, 1.0])

    def make(factor):
        return FACTORS[name](factor)

    def run(tx: optax.GradientTransformationExtraArgs) -> jax.Array:
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(grads, state, params)
        return updates

    injected = optax.inject_hyperparams(make)(factor=0.5)
    got, expected = jax.jit(lambda: (run(injected), run(FACTORS[name](0.5))))()
    assert np.allclose(got, expected, rtol=1e-6), name


@pytest.mark.parametrize("bad", [-1.0, float("nan"), True, "half", (0.5,), jnp.ones(2)])
@pytest.mark.parametrize("name", FACTORS)
def test_bad_factors_are_refused_by_name(name: str, bad) -> None:
    with pytest.raises(ValueError, match=f"{name.split()[1]}=.* must be a"):
        FACTORS[name](bad)


def test_a_share_of_zero_means_none() -> None:
    """A memory may be given up, and momentum may be left out."""
    for make in (
        lambda: ef.error_feedback(TOP, decay=0.0),
        lambda: ef.ecq_sgd(TOP, 0.5, 0.0),
        lambda: ef.local.diloco(optax.sgd(0.1), 2, momentum=0.0),
        lambda: ef.recipes.demo(0.1, decay=0.0),
    ):
        assert make().init(jnp.zeros(3))


@pytest.mark.parametrize("bad", [-1, True, 2.0, "two", None, jnp.int32(2), float("inf")])
@pytest.mark.parametrize("name", COUNTS)
def test_bad_counts_are_refused_by_name(name: str, bad) -> None:
    if bad is None and name == "marina participants":
        return
    with pytest.raises(ValueError, match=f"{name.split()[1]}=.* must be a whole number"):
        COUNTS[name](bad)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ef.top_k(True), "ratio=True must be a number"),
        (lambda: ef.inceptionn([2**-10]), "error_bound=.* must be a power of two"),
        (lambda: ef.scheduled(5, [TOP, TOP]), "boundaries=5 must be whole numbers"),
        (lambda: ef.marina(ef.identity(), lambda t: 0.1, key=0), "probability=.* must be a number"),
        (lambda: ef.power_decay(1.0, "half"), "power='half' must be a number"),
        (lambda: ef.ef21_normalised(TOP, ["sgdm"]), "estimator=.* must be one of"),
    ],
)
def test_other_nonsense_is_refused_by_name(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda x: ef.neolithic(TOP, 2, x),
        lambda x: ef.double_squeeze(TOP, x),
        lambda x: ef.dist_ef_sgdm(TOP, 0.1, server=x),
        lambda x: ef.local.cser(TOP, x, 0.1, 2),
    ],
    ids=["neolithic", "double_squeeze", "dist_ef_sgdm", "cser"],
)
@pytest.mark.parametrize("bad", [0, "", ()])
def test_only_none_stands_for_the_default_compressor(make, bad) -> None:
    with pytest.raises(TypeError, match="is not a Compressor"):
        make(bad)


@pytest.mark.parametrize("name", [name for name in COUNTS if "warmup" not in name])
def test_a_count_of_zero_is_refused_where_there_must_be_one(name: str) -> None:
    with pytest.raises(ValueError, match="=0 must be a whole number of at least 1"):
        COUNTS[name](0)
