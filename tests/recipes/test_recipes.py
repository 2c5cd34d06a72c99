"""Optimizers of the literature against NumPy, on three workers that differ, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.fft

import ef_optax as ef
from tests.feedback.problem import (
    AXIS,
    GRADS,
    ROUNDS,
    SIZES,
    START,
    WORKERS,
    close,
    flat,
    per_leaf,
    run,
)
from tests.oracles import compress, ef14, iterates, one_bit, recipes
from tests.oracles import run as take
from tests.parallel.ways import N, workers

pytestmark = pytest.mark.usefixtures("standard_promotion")

DENSE = np.array([True] * 3 + [False] * 4)  # the vector of the problem, and not its matrix


def mean(x):
    return np.mean([grad(x) for grad in GRADS], axis=0)


def falling(t):
    return 0.05 / (1 + t)


def warming(t: int) -> int:
    """DGC's warm-up over two epochs of three steps to a quarter of the matrix."""
    return [3, 2, 1][min(t // 3, 2)]


def dgc_sgd(**options):
    return ef.recipes.dgc_sgd(0.02, momentum=0.8, weight_decay=0.1, axis_name=AXIS, **options)


def rms_sign(x: np.ndarray) -> np.ndarray:
    return np.linalg.norm(x) / np.sqrt(len(x)) * np.where(x >= 0, 1, -1)


ADAM = {"eta": 0.02, "freeze_step": 8, "b1": 0.8, "b2": 0.9, "eps": 1e-3, "w": 0.1}


def one_bit_adam(**options):
    own = {"b1": 0.8, "b2": 0.9, "eps": 1e-3, "weight_decay": 0.1}
    return ef.recipes.one_bit_adam(0.02, 8, **own, **options)


def exact_sgd(rate, **options):
    mean = ef.compressed_mean(ef.identity(), axis_name=AXIS)
    return optax.chain(mean, optax.sgd(rate, **options))


CASES = {
    "ef_sign_sgd": (
        lambda: ef.recipes.ef_sign_sgd(falling, axis_name=AXIS),
        lambda: ef14.step_units(GRADS, per_leaf(compress.scaled_sign), START, falling),
    ),
    "ef_sign_sgd with top-k": (
        lambda: ef.recipes.ef_sign_sgd(falling, compressor=ef.top_k(k=2), axis_name=AXIS),
        lambda: ef14.step_units(GRADS, per_leaf(compress.top_k(2)), START, falling),
    ),
    "signum": (
        lambda: ef.recipes.signum(0.05, 0.7, weight_decay=0.1, axis_name=AXIS),
        lambda: recipes.signum(GRADS, START, 0.05, 0.7, 0.1),
    ),
    "dgc_sgd": (
        lambda: dgc_sgd(ratio=0.25),
        lambda: recipes.dgc_sgd(GRADS, lambda t: 1, DENSE, START, 0.02, 0.8, 0.1, False),
    ),
    "dgc_sgd, Nesterov and warm-up": (
        lambda: dgc_sgd(ratio=0.25, nesterov=True, steps_per_epoch=3, warmup_epochs=2),
        lambda: recipes.dgc_sgd(GRADS, warming, DENSE, START, 0.02, 0.8, 0.1, True),
    ),
}
CASES["one_bit_adam"] = (
    lambda: one_bit_adam(compressor=ef.rms_sign(), axis_name=AXIS),
    lambda: recipes.one_bit_adam(GRADS, per_leaf(rms_sign), START, **ADAM),
)


def tiles(x):
    """The coefficients of tiles of at most 2 x 2: each element of the vector, and the matrix."""
    return [*x[:3, None], scipy.fft.dctn(x[3:].reshape(2, 2), norm="ortho").reshape(-1)]


def untiled(parts):
    matrix = scipy.fft.idctn(parts[3].reshape(2, 2), norm="ortho")
    return np.concatenate([*parts[:3], matrix.reshape(-1)])


DEMO = {"decay": 0.9, "k": 1, "chunk": 2, "weight_decay": 0.1, "axis_name": AXIS}
CASES["demo"] = (
    lambda: ef.recipes.demo(falling, **DEMO),
    lambda: recipes.demo(GRADS, tiles, untiled, 1, START, falling, 0.9, 0.1),
)
CASES["distro"] = (
    lambda: ef.recipes.distro(falling, votes=False, **DEMO),
    lambda: recipes.demo(GRADS, tiles, untiled, 1, START, falling, 0.9, 0.1, ahead=True),
)
LAMB = {"b1": 0.8, "b2": 0.9, "eps": 1e-3}


def one_bit_lamb(C, freeze_step=8, **options):
    own = {"weight_decay": 0.1, "coefficients": (0.3, 0.9), "compressor": C, "axis_name": AXIS}
    return ef.recipes.one_bit_lamb(0.05, freeze_step, **own, **LAMB, **options)


def lamb_oracle(C, freeze=8):
    bounds = {"low": 0.3, "high": 0.9, "factors": (0.8, 1.2), "change": 0.05}
    return one_bit.one_bit_lamb(GRADS, C, SIZES, START, 0.05, freeze, w=0.1, **LAMB, **bounds)


CASES["one_bit_lamb"] = (
    lambda: one_bit_lamb(ef.rms_sign(), factors=(0.8, 1.2), factor_change=0.05),
    lambda: lamb_oracle(rms_sign),
)
CASES["gpa"] = (
    lambda: ef.recipes.gpa(exact_sgd(0.05), 0.8, 0.6),
    lambda: recipes.gpa(GRADS, START, 0.05, 0.8, 0.6),
)
CASES["econtrol_dual_averaging"] = (
    lambda: ef.recipes.econtrol_dual_averaging(
        ef.top_k(k=1), falling, 0.3, ef.l1_prox(0.2), step_weight=lambda t: 1 + t, axis_name=AXIS
    ),
    lambda: recipes.econtrol_dual_averaging(
        GRADS, per_leaf(compress.top_k(1)), START, falling, 0.3, lambda t: 1 + t, 0.2
    ),
)
SLOW = {"ef_sign_sgd with top-k", "dgc_sgd"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES]
)
def test_recipes_against_numpy(name: str) -> None:
    make, oracle = CASES[name]
    close(run(ef.simulate(make(), WORKERS, AXIS)).x, iterates(oracle(), ROUNDS))


ZERO_ONE = {"b1": 0.8, "b2": 0.9, "eps": 1e-3}


def zero_one_adam(C, freeze, kappa, scaler, clipper, w=0.1):
    return ef.recipes.zero_one_adam(
        falling,
        freeze,
        weight_decay=w,
        var_update_scaler=kappa,
        local_step_scaler=scaler,
        local_step_clipper=clipper,
        compressor=C,
        axis_name=AXIS,
        **ZERO_ONE,
    )


def test_zero_one_adam_against_numpy() -> None:
    """Rare updates of the variance, the freeze, and intervals of 1, 2, 4 and 4 local steps."""
    got = run(ef.simulate(zero_one_adam(ef.top_k(k=2), 8, 2, 3, 4), WORKERS, AXIS))
    oracle = one_bit.zero_one_adam(
        GRADS, per_leaf(compress.top_k(2)), START, falling, 8, 2, 3, 4, w=0.1, **ZERO_ONE
    )
    steps = take(oracle, ROUNDS)
    close(got.x, [s.x for s in steps])
    close(got.x[:, None] + flat(got.state.ahead, 2), [s.y for s in steps])


def test_power_sgd_momentum_against_numpy() -> None:
    """For a matrix, whose gradients are noise; the first factor is that of the state."""
    gradients = np.random.default_rng(0).standard_normal((8, WORKERS, 5, 4))
    x = np.random.default_rng(1).standard_normal((5, 4))
    with jax.enable_x64(True):
        tx = ef.recipes.power_sgd_momentum(0.1, 1, momentum=0.8, weight_decay=0.1, axis_name=AXIS)
        tx, params = ef.simulate(tx, WORKERS, AXIS), jnp.asarray(x)
        state, update = tx.init(params), jax.jit(tx.update)
        q = np.asarray(state[0].exchange.codec).T
        expected = take(recipes.power_sgd_momentum(gradients, q, x, 0.1, 0.8, 0.1), 8)
        for g, step in zip(gradients, expected, strict=True):
            updates, state = update(jnp.asarray(g), state, params)
            params = optax.apply_updates(params, updates)
            close(params, step.x)
            close(state[0].residual, step.e)


def sgd(step):
    """Gradient descent on the mean, whose step is made from gradient and iterate."""
    x, memory = START, np.zeros_like(START)
    while True:
        change, memory = step(mean(x), x, memory)
        x = x - change
        yield x


def twice(g, x, m):
    m = 0.8 * m + g + 0.1 * x
    return 0.02 * (g + 0.1 * x + m), m


def adam_frozen_after_8(rate=lambda t: 0.02, w=0.1):
    """Adam without bias correction, whose variance is that of the eighth step from then on."""
    m, v, t = np.zeros_like(START), np.zeros_like(START), 0

    def step(g, x, _):
        nonlocal m, v, t
        m, v, t = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2 if t < 8 else v, t + 1
        return rate(t - 1) * (m / (np.sqrt(v) + 1e-3) + w * x), None

    return step


def lamb():
    """You et al. 2020 with a clipped trust ratio for each leaf."""
    m, v = np.zeros_like(START), np.zeros_like(START)

    def step(g, x, _):
        nonlocal m, v
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        u, done = m / (np.sqrt(v) + 1e-3) + 0.1 * x, []
        for part in (slice(0, 3), slice(3, 7)):
            ratio = np.linalg.norm(x[part]) / np.linalg.norm(u[part])
            done.append(0.05 * np.clip(ratio, 0.3, 0.9) * u[part])
        return np.concatenate(done), None

    return step


EDGES = {
    "1-bit Adam(C = I) = Adam with a variance that is frozen": (
        lambda: one_bit_adam(compressor=ef.identity(), axis_name=AXIS),
        adam_frozen_after_8(),
    ),
    "GPA(mu_y = 1, SGD) = heavy ball": (
        lambda: ef.recipes.gpa(exact_sgd(0.1), 0.8, 1.0),
        lambda g, x, m: (0.02 * (0.8 * m + g), 0.8 * m + g),
    ),
    "GPA(mu_x = 0) = its inner optimizer": (
        lambda: ef.recipes.gpa(exact_sgd(0.02, momentum=0.8, nesterov=True), 0.0, 0.3),
        lambda g, x, m: (0.02 * (g + 0.8 * (0.8 * m + g)), 0.8 * m + g),
    ),
    "0/1 Adam(C = I, all variances, H = 1) = 1-bit Adam(C = I)": (
        lambda: zero_one_adam(ef.identity(), 8, 100, 100, 1, w=0.0),
        adam_frozen_after_8(falling, 0.0),
    ),
    "1-bit LAMB(no freeze) = LAMB without bias correction": (
        lambda: one_bit_lamb(ef.rms_sign(), 100),
        lamb(),
    ),
    "EControl with dual averaging(C = I, psi = 0, a = 1) = SGD": (
        lambda: ef.recipes.econtrol_dual_averaging(ef.identity(), 0.05, 0.3, axis_name=AXIS),
        lambda g, x, m: (0.05 * g, m),
    ),
    "EF-signSGD(C = I) = SGD": (
        lambda: ef.recipes.ef_sign_sgd(0.05, compressor=ef.identity(), axis_name=AXIS),
        lambda g, x, m: (0.05 * g, m),
    ),
    "DeMo(all coefficients) = signSGD of the mean gradient": (
        lambda: ef.recipes.demo(0.02, k=9, weight_decay=0.1, axis_name=AXIS),
        lambda g, x, m: (0.02 * (np.sign(g) + 0.1 * x), m),
    ),
    "PowerSGD with momentum, full rank = SGD with its momentum": (
        lambda: ef.recipes.power_sgd_momentum(
            0.02, 2, momentum=0.8, weight_decay=0.1, axis_name=AXIS
        ),
        twice,
    ),
}


SECOND = {  # to oracles that the recipe follows with a compressor too
    "0/1 Adam(C = I, all variances, H = 1) = 1-bit Adam(C = I)",
    "1-bit LAMB(no freeze) = LAMB without bias correction",
    "DeMo(all coefficients) = signSGD of the mean gradient",
}


@pytest.mark.parametrize(
    "edge", [pytest.param(e, marks=pytest.mark.slow if e in SECOND else ()) for e in EDGES]
)
def test_without_compression_it_is_plain(edge: str) -> None:
    make, step = EDGES[edge]
    iterator = sgd(step)
    close(run(ef.simulate(make(), WORKERS, AXIS)).x, [next(iterator) for _ in range(ROUNDS)])


def test_dgc_sgd_of_vectors_is_sgd_with_momentum_and_coupled_weight_decay() -> None:
    """Dense leaves are never masked, so that weight decay and gradients have one momentum."""
    params = {"x": jnp.asarray(START, jnp.float32)}
    for nesterov in (False, True):
        ours = ef.recipes.dgc_sgd(0.02, momentum=0.8, weight_decay=0.1, nesterov=nesterov)
        plain = optax.chain(
            optax.add_decayed_weights(0.1), optax.sgd(0.02, momentum=0.8, nesterov=nesterov)
        )
        seen = []
        for tx in (ours, plain):
            x, state, path = params, tx.init(params), []
            for _ in range(4):
                updates, state = tx.update({"x": 0.5 * x["x"]}, state, x)
                x = optax.apply_updates(x, updates)
                path.append(x["x"])
            seen.append(path)
        np.testing.assert_allclose(*seen, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["auto", "explicit"])
def test_one_bit_adam_on_a_mesh(where: str) -> None:
    """As in the simulation, with the two shots of the default; the server's part is its owner's."""
    params = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
    rng, seen = np.random.default_rng(0), []
    draw = lambda x: rng.standard_normal((N, *x.shape), np.float32)  # noqa: E731
    grads = [jax.tree.map(draw, params) for _ in range(4)]
    for mode in ("simulate", where):
        tx, x, given = ef.recipes.one_bit_adam(0.1, 2, axis_name="data"), params, grads
        if mode == "simulate":
            tx = ef.simulate(tx, N, "data")
        else:
            mesh = workers(mode)
            tx = ef.data_parallel(tx, mesh, "data")
            x = jax.device_put(x, jax.NamedSharding(mesh, jax.P()))
            given = jax.device_put(grads, jax.NamedSharding(mesh, jax.P("data")))
        state, update = tx.init(x), jax.jit(tx.update)
        for g in given:
            updates, state = update(g, state, x)
            x = jax.block_until_ready(optax.apply_updates(x, updates))
        seen.append(jax.device_get((x, state[0].momentum, state[0].feedback.residual)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), *seen)


def test_what_had_no_gradient_does_not_move() -> None:
    """A sign cannot be zero, so a row without a gradient would get momentum from the others'."""
    tx = ef.simulate(ef.recipes.one_bit_adam(0.1, 2, axis_name=AXIS), 2, AXIS)
    params = jnp.zeros((3, 2))
    state, update, rng = tx.init(params), jax.jit(tx.update), np.random.default_rng(0)
    for _ in range(5):
        g = rng.standard_normal((2, 3, 2)).astype(np.float32)
        g[:, 1] = 0.0
        updates, state = update(g, state, params)
        assert not np.any(updates[1]) and np.all(updates[0] != 0)
    assert np.any(state[0].feedback.residual[:, 1]) and not np.any(state[0].momentum[1])


def test_distro_counts_votes() -> None:
    """Two workers want opposite means of a tile: values are averaged, votes cancel."""
    grads = jnp.asarray([[5.0, 5.0], [-1.0, -1.0]])
    for votes, step in ((True, 0.0), (False, -0.5)):
        tx = ef.recipes.distro(0.5, k=1, chunk=2, votes=votes, axis_name=AXIS)
        tx = ef.simulate(tx, 2, AXIS)
        updates, state = tx.update(grads, tx.init(jnp.zeros(2)), jnp.zeros(2))
        np.testing.assert_array_equal(updates, [step, step])
        np.testing.assert_allclose(state[0].feedback.residual, 0, atol=1e-6)  # no votes subtracted
        np.testing.assert_array_equal(state[0].ahead, [[1, 1], [-1, -1]])


def test_signum_keeps_its_momentum_in_float32() -> None:
    """Whatever the dtypes of parameters and gradients, the state keeps its form."""
    tx = ef.recipes.signum(0.1)
    params = jnp.zeros(3, jnp.bfloat16)
    state = tx.init(params)
    for dtype in ("bfloat16", "float32"):
        _, after = jax.eval_shape(tx.update, jnp.ones(3, dtype), state, params)
        assert state[0].momentum.dtype == after[0].momentum.dtype == jnp.float32


def test_recipes_by_name() -> None:
    text = "dgc_sgd(0.1, 0.01, nesterov=True)"
    assert isinstance(ef.parse(text).build("data"), optax.GradientTransformation)
    assert str(ef.parse(f"recipes.{text}")) == f"recipes.{text}"


def test_what_differs_between_workers() -> None:
    """Momentum after the exchange is common, momentum before it is each worker's own."""
    params = {"w": jnp.zeros((3, 2))}
    own = ef.simulate(ef.recipes.signum(0.1, axis_name=AXIS), 2, AXIS).worker_axes(params)
    assert all(jax.tree.leaves(own[0].momentum))
    tx = ef.recipes.power_sgd_momentum(0.1, 1, axis_name=AXIS)
    own = ef.simulate(tx, 2, AXIS).worker_axes(params)
    assert all(jax.tree.leaves(own[0].residual)) and not any(jax.tree.leaves(own[2]))


def test_float32_numbers_for_each_parameter_of_a_large_matrix() -> None:
    """With one worker, who keeps the server's residual of `two_shot` whole."""
    parts = {
        "one_bit_adam(0.1, 8)": ("momentum", "variance", "residual", "server's residual"),
        "zero_one_adam(0.1, 8)": ("drift", "own momentum", "residual", "server's", "mean", "v"),
        "one_bit_lamb(0.1, 8)": ("momentum", "v", "fresh v", "residual", "server's residual"),
        "ef_sign_sgd(0.1)": ("residual",),
        "signum(0.1)": ("momentum",),
        "dgc_sgd(0.1)": ("momentum", "residual"),
        "power_sgd_momentum(0.1, 1)": ("residual", "momentum"),
        "demo(0.1)": ("residual",),
        "dion(0.1, 1)": ("momentum",),
        "dion2(0.1, 0.25)": ("momentum",),
        "trion(0.1, 4)": ("momentum",),
        "ef21_muon(0.1, top_k(0.25))": ("momentum", "own estimate", "mean estimate"),
        "muloco(0.1, 15)": ("drift", "residual", "momentum", "outer momentum"),
        "econtrol_dual_averaging(top_k(0.25), 0.1, 0.3)": ("e", "h", "mean h", "start", "sum"),
    }
    like = {"w": jax.ShapeDtypeStruct((256, 512), jnp.float32)}
    for name, numbers in parts.items():
        found = ef.measure.state_bytes(ef.parse(f"recipes.{name}").build(None), like) / 4
        assert found == pytest.approx(len(numbers), rel=0.01), name
