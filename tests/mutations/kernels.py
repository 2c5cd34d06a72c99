"""Faults of the kernels for GPU and TPU, and of the choice between them and the XLA form."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

HERE = "ef_optax/_kernels"
SIGNS = {p: f"{HERE}/signs_{p}.py" for p in ("tpu", "triton")}
TOP_K = {p: f"{HERE}/block_top_k_{p}.py" for p in ("tpu", "triton")}
DISPATCH = f"{HERE}/dispatch.py"
TESTS = "tests/kernels/test_kernels.py::"
OF_SIGNS = {
    "tpu": (f"{TESTS}test_signs_and_norm_in_interpret_mode[tpu-float32-33]",),
    "triton": (f"{TESTS}test_signs_and_norm_in_interpret_mode[cuda-float32-33]",),
}
LONG_SIGNS = {
    "tpu": (f"{TESTS}test_signs_and_norm_in_interpret_mode[tpu-float32-144861]",),
    "triton": (f"{TESTS}test_signs_and_norm_in_interpret_mode[cuda-float32-12288]",),
}
OF_TOP_K = {
    "tpu": (f"{TESTS}test_block_top_k_in_interpret_mode[tpu-float32-2048-21]",),
    "triton": (f"{TESTS}test_block_top_k_in_interpret_mode[cuda-float32-2048-21]",),
}

MUTATIONS = (
    Mutation(
        "GPU: what lies behind the end gets a sign bit",
        SIGNS["triton"],
        "plus = (x >= 0) & real",
        "plus = x >= 0",
        OF_SIGNS["triton"],
    ),
    Mutation(
        "GPU: zero counts as minus",
        SIGNS["triton"],
        "        plus = x >= 0\n",
        "        plus = x > 0\n",
        LONG_SIGNS["triton"],
    ),
    Mutation(
        "GPU: every program but the first reads its tile a word too early",
        SIGNS["triton"],
        "start = pl.program_id(0) * (_WORDS * WORD_BITS)",
        "start = pl.program_id(0) * (_WORDS * WORD_BITS - WORD_BITS)",
        (f"{TESTS}test_signs_and_norm_in_interpret_mode[cuda-float32-144861]",),
    ),
    Mutation(
        "GPU: the norm is a sum of values, not of magnitudes",
        SIGNS["triton"],
        "norms_ref[0] = jnp.sum(jnp.abs(x.astype(jnp.float32)))",
        "norms_ref[0] = jnp.sum(x.astype(jnp.float32))",
        OF_SIGNS["triton"],
    ),
    Mutation(
        "TPU: what lies behind the end adds to the norm",
        SIGNS["tpu"],
        "plus, magnitude = plus & real, jnp.where(real, magnitude, 0.0)",
        "plus = plus & real",
        LONG_SIGNS["tpu"],
    ),
    Mutation(
        "TPU: the upper half of a word lies over the lower",
        SIGNS["tpu"],
        "words_ref[...] = half(low) | half(~low) << _HALF",
        "words_ref[...] = half(low) | half(~low)",
        OF_SIGNS["tpu"],
    ),
    Mutation(
        "TPU: a row keeps the words of the next group of lanes",
        SIGNS["tpu"],
        "jnp.where(row == group, sums, 0.0)",
        "jnp.where(row == (group + 1) % _ROWS, sums, 0.0)",
        OF_SIGNS["tpu"],
    ),
    Mutation(
        "GPU: a tie too many is kept",
        TOP_K["triton"],
        "keep = above | (tie & (ties <= need))",
        "keep = above | (tie & (ties <= need + 1))",
        OF_TOP_K["triton"],
    ),
    Mutation(
        "GPU: ties that are not kept move the slots of what follows",
        TOP_K["triton"],
        "jnp.minimum(ties, need) - 1",
        "ties - 1",
        OF_TOP_K["triton"],
    ),
    Mutation(
        "GPU: the lowest bit of the threshold is not tried",
        TOP_K["triton"],
        "return (bit >= 0) & (kept != k)",
        "return (bit > 0) & (kept != k)",
        OF_TOP_K["triton"],
    ),
    Mutation(
        "TPU: the cut among the ties is one index too low",
        TOP_K["tpu"],
        "_count(tie & (index < t)) <= need",
        "_count(tie & (index < t)) < need",
        OF_TOP_K["tpu"],
    ),
    Mutation(
        "TPU: ranks go on from the block before",
        TOP_K["tpu"],
        "(i // rows == j // rows) & (j < i)",
        "j < i",
        OF_TOP_K["tpu"],
    ),
    Mutation(
        "TPU: an index is summed in one part, which bfloat16 does not hold",
        TOP_K["tpu"],
        "(over_lanes(found >> 6) << 6) + over_lanes(found & 63)",
        "(over_lanes(found >> 6) << 6) + over_lanes(found & 31)",
        OF_TOP_K["tpu"],
    ),
    Mutation(
        "leaves are taken by a kernel although integers have 64 bits",
        DISPATCH,
        "if jax.config.jax_enable_x64:",
        "if False:",
        (f"{TESTS}test_the_smallest_leaf_that_fits_and_what_does_not[signs]",),
    ),
    Mutation(
        "float16 is given to a kernel that does not know it",
        DISPATCH,
        "return x.dtype in _DTYPES and MIN_SIZE <= x.size <= _MAX_SIZE",
        "return MIN_SIZE <= x.size <= _MAX_SIZE",
        (f"{TESTS}test_the_smallest_leaf_that_fits_and_what_does_not[signs]",),
    ),
    Mutation(
        "TPU: the kernel is used for more slots than it is fast for",
        DISPATCH,
        "if k > _TPU_MAX_K:",
        "if k > 16 * _TPU_MAX_K:",
        (f"{TESTS}test_blocks_that_do_not_fit_take_the_xla_form",),
    ),
    Mutation(
        "the derivative of the norm lacks the signs",
        DISPATCH,
        "change = jnp.sum(jnp.sign(x).astype(norm.dtype) * dx.astype(norm.dtype))",
        "change = jnp.sum(dx.astype(norm.dtype))",
        (f"{TESTS}test_signs_and_norm_may_be_differentiated_through",),
    ),
)
