"""Faults of the optimizers of the literature, and of the parts that were made for them."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

HERE = "ef_optax/recipes"
RECIPES = "tests/recipes/test_recipes.py"
MATRICES = "tests/recipes/test_matrices.py"
STATES = "tests/recipes/test_optimizer_states.py"
NUMPY = f"{RECIPES}::test_recipes_against_numpy"
DUAL = f"{NUMPY}[econtrol_dual_averaging]"

MUTATIONS = (
    Mutation(
        "dual averaging: the regulariser is weighed with the last weight only",
        f"{HERE}/dual_averaging.py",
        "x = prox(x, rate * weight)",
        "x = prox(x, rate * a)",
        (DUAL,),
    ),
    Mutation(
        "dual averaging: steps are taken from the last model",
        f"{HERE}/dual_averaging.py",
        "x = trees.axpy(-rate, z, state.start)",
        "x = trees.axpy(-rate, updates, trees.wide(params))",
        (DUAL,),
    ),
    Mutation(
        "dual averaging: all gradients weigh the same",
        f"{HERE}/dual_averaging.py",
        "z = trees.axpy(a, updates, state.total)",
        "z = trees.axpy(1.0, updates, state.total)",
        (DUAL,),
    ),
    Mutation(
        "signum: the momentum takes the dtype of the gradients",
        f"{HERE}/signum.py",
        "kept = memory.write(m, state.momentum, state.vote.exchange.step)",
        "kept = trees.emit(m, updates)",
        (f"{RECIPES}::test_signum_keeps_its_momentum_in_float32",),
    ),
    Mutation(
        "DeMo: the momentum does not decay",
        f"{HERE}/demo.py",
        "decay=decay, memory=memory",
        "memory=memory",
        (NUMPY,),
    ),
    Mutation(
        "DeMo: the step is the mean itself, without its sign",
        f"{HERE}/demo.py",
        "        optax.scale_by_sign(),\n",
        "",
        (NUMPY,),
    ),
    Mutation(
        "DisTrO: what was sent is subtracted before the look-ahead",
        f"{HERE}/distro.py",
        "jnp.sign(x).astype(jnp.int8), d)",
        "jnp.sign(x).astype(jnp.int8), memory.read(feedback.residual))",
        (NUMPY,),
    ),
    Mutation(
        "DisTrO: the look-ahead is made with the rate of the next step",
        f"{HERE}/distro.py",
        "last = jnp.asarray(rate, state.last_rate.dtype)",
        "last = jnp.asarray(arguments.value_at(learning_rate, feedback.exchange.step), rate.dtype)",
        (NUMPY,),
    ),
    Mutation(
        "DisTrO: values travel instead of votes",
        f"{HERE}/distro.py",
        "values=sign() if votes else None",
        "values=None",
        (f"{RECIPES}::test_distro_counts_votes",),
    ),
    Mutation(
        "momentum feedback: what was not sent decays too",
        "ef_optax/feedback/momentum_feedback.py",
        "lambda m, c: m - (1 - momentum) * c.astype(m.dtype)",
        "lambda m, c: momentum * m - 0 * c.astype(m.dtype)",
        (f"{MATRICES}::test_chosen_rows_against_numpy",),
    ),
    Mutation(
        "Dion: what decays is what is applied",
        "ef_optax/compressors/low_rank/dion_factors.py",
        "own=list(zip(P, R, strict=True))",
        "own=list(zip(P, Q, strict=True))",
        (f"{MATRICES}::test_dion_against_numpy",),
    ),
    Mutation(
        "Dion: a zero gradient makes the basis zero for ever",
        "ef_optax/compressors/low_rank/dion_factors.py",
        "batch.scatter(unless_zero(q, old))",
        "batch.scatter(q + 0 * old)",
        (f"{MATRICES}::test_a_zero_gradient_leaves_the_basis_of_dion",),
    ),
    Mutation(
        "shared rows: chosen by the norm of this worker's rows",
        "ef_optax/compressors/sparse/shared_rows.py",
        "norms = yield Mean(jnp.sum(jnp.abs(rows), axis=-1))",
        "norms = jnp.sum(jnp.abs(rows), axis=-1)\n        yield Mean(norms)",
        (f"{MATRICES}::test_chosen_rows_against_numpy",),
    ),
    Mutation(
        "shared rows: by the 2-norm",
        "ef_optax/compressors/sparse/shared_rows.py",
        "jnp.sum(jnp.abs(rows), axis=-1)",
        "jnp.sum(rows**2, axis=-1)",
        (f"{MATRICES}::test_chosen_rows_against_numpy",),
    ),
    Mutation(
        "shared rows: all parts count from the first row",
        "ef_optax/compressors/sparse/shared_rows.py",
        "local + length * ",
        "local + 0 * ",
        (f"{MATRICES}::test_chosen_rows_against_numpy",),
    ),
    Mutation(
        "the scale by width is that of the transposed matrix",
        f"{HERE}/orthogonalise.py",
        "(columns / max(1, rows)) ** 0.5",
        "(rows / max(1, columns)) ** 0.5",
        (f"{MATRICES}::test_chosen_rows_against_numpy",),
    ),
    Mutation(
        "EF21-Muon: the first message is compressed",
        f"{HERE}/ef21_muon.py",
        'init="full", ',
        "",
        (f"{MATRICES}::test_ef21_muon_against_numpy",),
    ),
    Mutation(
        "LDAdam: what the change of basis loses of the momentum is lost",
        f"{HERE}/ldadam.py",
        "    E = E + b1 / (1 - b1) * (previous",
        "    E = E + 0 * b1 * (previous",
        (f"{STATES}::test_ldadam_against_numpy",),
    ),
    Mutation(
        "LDAdam: the second moment is carried over by fourth powers, as in the official code",
        f"{HERE}/ldadam.py",
        "turn**2, v / safe2",
        "turn**4, v / safe2",
        (f"{STATES}::test_ldadam_against_numpy",),
    ),
    Mutation(
        "LDAdam: the basis follows the gradient alone",
        f"{HERE}/ldadam.py",
        "target = rho * previous / safe1 + (1 - rho) * G",
        "target = 0 * rho * previous + G",
        (f"{STATES}::test_ldadam_against_numpy",),
    ),
    Mutation(
        "DCT-AdamW: the moments stay where they are when other frequencies are chosen",
        f"{HERE}/dct_adamw.py",
        "kept = (chosen[:, :, None] == last[:, None, :]).astype(h.dtype)",
        "kept = jnp.eye(m.shape[1], dtype=h.dtype)[None] + 0 * last[:, None, :1]",
        (f"{STATES}::test_dct_adamw_against_numpy",),
    ),
    Mutation(
        "MicroAdam: the window counts its steps in the wrong direction",
        f"{HERE}/micro_adam.py",
        "age = (t - jnp.arange(window, dtype=t.dtype)) % window",
        "age = (jnp.arange(window, dtype=t.dtype) - t) % window",
        (f"{STATES}::test_micro_adam_against_numpy",),
    ),
    Mutation(
        "MicroAdam: the residual is not in 4 bits",
        f"{HERE}/micro_adam.py",
        "rule = error_feedback(largest, memory=memory)",
        "rule = error_feedback(largest)",
        (f"{STATES}::test_micro_adam_against_numpy", f"{STATES}::test_what_the_states_weigh"),
    ),
    Mutation(
        "GreedyLore: the directions of this worker",
        "ef_optax/compressors/low_rank/greedy_lore.py",
        "lam = yield Mean(jnp.sum(",
        "lam = (lambda x: x)(jnp.sum(",
        (f"{STATES}::test_greedy_lore_against_numpy",),
    ),
    Mutation(
        "the mean over senders: coefficients are counted as values of the leaf",
        "ef_optax/exchanges/senders.py",
        "        if isinstance(codec, CoefficientCodec):\n            return (yield",
        "        if False:\n            return (yield",
        (NUMPY,),
    ),
    Mutation(
        "the mean over senders: the votes are subtracted from the residual",
        "ef_optax/exchanges/senders.py",
        "residual=lambda: codec.residual(x, message),",
        "residual=lambda: x - codec.decode(self._unpacked(jax.tree.map(lambda m: m[None], "
        "self._packed(message, workers)), message), like),",
        ("tests/exchanges/test_transports.py::test_votes_travel_and_values_are_subtracted",),
    ),
)
