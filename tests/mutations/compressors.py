"""Faults of the compressors: scales, signs, levels, constants, bits, and what is made of others."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

SPARSE, QUANTIZE, LOW_RANK, COMBINE = (
    f"ef_optax/compressors/{room}" for room in ("sparse", "quantize", "low_rank", "combine")
)
CODECS = "tests/compressors/test_codecs.py::"
TESTS = "tests/compressors"
EXCHANGES = "tests/exchanges/test_exchanges.py::"

MUTATIONS = (
    # ---------------------------------------------------------------- sparse
    Mutation(
        "a ratio is rounded down",
        "ef_optax/compressors/_ratio.py",
        "math.ceil(fractions.Fraction(str(ratio)) * size)",
        "math.floor(fractions.Fraction(str(ratio)) * size)",
        (f"{TESTS}/test_sparsifiers.py::test_a_ratio_keeps_the_next_whole_number_of_values",),
    ),
    Mutation(
        "sparse messages are not weighted",
        f"{SPARSE}/_sparse.py",
        "values = values * weights[:, None].astype(values.dtype)",
        "values = values * 1",
        (f"{CODECS}test_message[top_k]",),
    ),
    Mutation(
        "the sum over the workers is taken for their mean",
        f"{SPARSE}/_sparse.py",
        "return values / jnp.asarray(values.shape[0] if total is None else total, dtype)",
        "return values",
        (f"{CODECS}test_message[top_k]",),
    ),
    Mutation(
        "what was sent is added to the residual",
        f"{SPARSE}/_sparse.py",
        "return add_at(x, indices, -values)",
        "return add_at(x, indices, values)",
        (f"{CODECS}test_message[top_k]",),
    ),
    Mutation(
        "random-k lacks the factor that makes it unbiased",
        f"{SPARSE}/_random_positions.py",
        "factor = x.size / self.count(x.size) if self.scaled and x.size else 1.0",
        "factor = 1.0",
        (f"{CODECS}test_variance[random_k-scaled]",),
    ),
    Mutation(
        "a coin that sends the leaf does not scale it",
        f"{SPARSE}/bernoulli.py",
        "factor = 1 / self.p if self.scaled else 1.0",
        "factor = 1.0",
        (f"{CODECS}test_variance[bernoulli]",),
    ),
    Mutation(
        "a threshold sends entries for which there is no room",
        f"{SPARSE}/_threshold.py",
        "fits = passed <= capacity",
        "fits = passed <= 2 * capacity",
        (f"{TESTS}/test_sparsifiers.py::test_threshold_counts_what_found_no_room",),
    ),
    Mutation(
        "a sketch has no signs",
        f"{SPARSE}/count_sketch.py",
        "jnp.where(words >> 31 == 0, 1, -1)",
        "jnp.where(words >> 31 == 0, 1, 1)",
        (f"{EXCHANGES}test_sketch_estimates_are_unbiased_in_each_row",),
    ),
    Mutation(
        "Wangni: what is sent is not divided by its probability",
        f"{SPARSE}/wangni.py",
        "flat = jnp.where(kept, flat / safe_divisor(p), jnp.zeros((), flat.dtype))",
        "flat = jnp.where(kept, flat, jnp.zeros((), flat.dtype))",
        (f"{CODECS}test_variance[wangni]",),
    ),
    # ---------------------------------------------------------------- quantizers
    Mutation(
        "the scale of signs is the sum of magnitudes, not their mean",
        f"{QUANTIZE}/scaled_sign.py",
        '"scale": (norm / float(max(1, x.size)))[None]',
        '"scale": norm[None]',
        (f"{CODECS}test_contraction[scaled_sign]",),
    ),
    Mutation(
        "the residual of signs counts zero as minus",
        f"{QUANTIZE}/_sign.py",
        "return x - jnp.where(x >= 0, scale, -scale)",
        "return x - jnp.where(x > 0, scale, -scale)",
        (f"{CODECS}test_message[scaled_sign]",),
    ),
    Mutation(
        "the width of a level number is one bit short",
        f"{QUANTIZE}/_dithering.py",
        "return bits_for(2 * self.levels + 1)",
        "return bits_for(2 * self.levels)",
        (
            f"{TESTS}/test_dithering.py::test_the_largest_level_of_either_sign_has_a_code_of_its_own",
        ),
    ),
    Mutation(
        "negative values come back positive",
        f"{QUANTIZE}/_dithering.py",
        "return jnp.where(signed < 0, -value, value)",
        "return value",
        (f"{CODECS}test_message[qsgd]", f"{CODECS}test_variance[qsgd]"),
    ),
    Mutation(
        "the variance of QSGD is given as the smaller of its bounds where it is the larger",
        f"{QUANTIZE}/_dithering.py",
        "return min(length / s**2, math.sqrt(length) / s)",
        "return length / s**2 / 4",
        (f"{TESTS}/test_dithering.py::test_qsgd_variance_formula", f"{CODECS}test_variance[qsgd]"),
    ),
    Mutation(
        "natural compression makes an infinity of the largest numbers",
        f"{QUANTIZE}/natural.py",
        "jnp.minimum(raised, top - 1)",
        "raised",
        (f"{TESTS}/test_dithering.py::test_natural_at_the_ends_of_the_range",),
    ),
    Mutation(
        "uniform levels are one too many",
        f"{QUANTIZE}/uniform.py",
        "return 2**self.width - 1",
        "return 2**self.width",
        (f"{TESTS}/test_quantizers.py::test_uniform_by_hand",),
    ),
    Mutation(
        "the standard deviation that clips is that of another scale",
        f"{QUANTIZE}/ternary.py",
        "limit = self.clip_sigmas * largest * jnp.std(x / largest)",
        "limit = self.clip_sigmas * jnp.std(x / largest)",
        (f"{TESTS}/test_dithering.py::test_ternary_clipping",),
    ),
    Mutation(
        "the two means are over all entries",
        f"{QUANTIZE}/two_mean_sign.py",
        "return [plus, np.uint32(x.size) - plus], list(sums)",
        "return [plus * 0 + np.uint32(x.size)] * 2, list(sums)",
        (f"{TESTS}/test_signs.py::test_two_means",),
    ),
    Mutation(
        "DRIVE's scale is the one of least error where it should be unbiased",
        f"{QUANTIZE}/eden.py",
        'if kind == "mse":',
        "if kind:",
        (f"{TESTS}/test_transforms.py::test_drive_scale_by_hand",),
    ),
    Mutation(
        "three levels: half a step is sent",
        f"{QUANTIZE}/three_lc.py",
        "jnp.round(x / safe_divisor(scale))",
        "jnp.sign(x) * jnp.ceil(jnp.abs(x) / safe_divisor(scale))",
        (f"{TESTS}/test_dithering.py::test_three_lc_sends_above_half_of_its_step",),
    ),
    Mutation(
        "ARC-Top-K: every worker sends the rows that its own sketch chooses",
        f"{SPARSE}/arc_top_k.py",
        "for batch, sketch in zip(batches, sketches, strict=True):",
        "for batch, sketch in zip(batches, own_sketches, strict=True):",
        (f"{TESTS}/test_arc_top_k.py::test_arc_top_k_between_workers",),
    ),
    Mutation(
        "ARC-Top-K: the residual keeps the rows that were sent",
        f"{SPARSE}/arc_top_k.py",
        "chosen[number], -own[number])",
        "chosen[number], 0 * own[number])",
        (f"{TESTS}/test_arc_top_k.py::test_arc_top_k_between_workers",),
    ),
    Mutation(
        "ARC-Top-K: the same directions in every step",
        f"{SPARSE}/arc_top_k.py",
        "dataclasses.replace(workers, path=0)",
        "dataclasses.replace(workers, path=0, step=0)",
        (f"{TESTS}/test_arc_top_k.py::test_arc_top_k_between_workers",),
    ),
    # ---------------------------------------------------------------- low rank
    Mutation(
        "PowerSGD: the directions of the last step are not kept",
        f"{LOW_RANK}/power_sgd.py",
        "batch.scatter(unless_zero(q, old))",
        "batch.scatter(old)",
        (f"{TESTS}/test_low_rank.py::test_power_sgd_between_workers",),
    ),
    Mutation(
        "PowerSGD: the left factor is not orthonormal",
        f"{LOW_RANK}/power_sgd.py",
        "P = [orthonormal(p) for p in P]",
        "P = [p for p in P]",
        (f"{TESTS}/test_low_rank.py::test_power_sgd_between_workers",),
    ),
    Mutation(
        "the directions are lost in a step without gradient",
        f"{LOW_RANK}/_averaged_factors.py",
        "return jnp.where(jnp.any(new != 0, axis=(-2, -1), keepdims=True), new, old)",
        "return new",
        (f"{TESTS}/test_low_rank.py::test_directions_outlast_a_step_without_gradient[power_sgd]",),
    ),
    Mutation(
        "ACP-SGD: both steps of a pair update the same factor",
        f"{LOW_RANK}/acp_sgd.py",
        "return Stages(Timeline((1, 2), 0, 2), (left, right))",
        "return Stages(Timeline((1, 2), 0, 2), (left, left))",
        (f"{TESTS}/test_low_rank.py::test_acp_sgd_between_workers",),
    ),
    Mutation(
        "ATOMO: singular values are not divided by their probabilities",
        f"{LOW_RANK}/atomo.py",
        "scale = jnp.where(chosen, singular / safe_divisor(p), 0)",
        "scale = jnp.where(chosen, singular, 0)",
        (f"{CODECS}test_variance[atomo]",),
    ),
    Mutation(
        "low-rank messages of stacked matrices are averaged over the matrices",
        f"{LOW_RANK}/_factors.py",
        "left = left * weights[:, None, None, None].astype(left.dtype)",
        "left = left * 1",
        (f"{CODECS}test_message[svd]", f"{TESTS}/test_low_rank.py::test_batch_axes"),
    ),
    # ---------------------------------------------------------------- made of others
    Mutation(
        "the quantizer inside a sparsifier draws with the sparsifier's key",
        f"{COMBINE}/compose.py",
        "inner = None if key is None else jax.random.fold_in(key, 1)",
        "inner = key",
        (f"{TESTS}/test_codecs.py::test_the_parts_of_a_compressor_draw_apart",),
    ),
    Mutation(
        "an induced compressor sends the whole twice",
        f"{COMBINE}/induced.py",
        "rest = self.biased.residual(x, first)",
        "rest = x",
        (f"{CODECS}test_variance[induced]",),
    ),
    Mutation(
        "the mean of shrunk messages is not shrunk",
        f"{COMBINE}/scale_to_contractive.py",
        "return mean * jnp.asarray(self.factor(like.shape), like.dtype)",
        "return mean",
        (f"{CODECS}test_message[scale_to_contractive]",),
    ),
    Mutation(
        "rounds of compression send the same again",
        f"{COMBINE}/fcc.py",
        "x = self.inner.residual(x, messages[-1])",
        "x = x",
        ("tests/feedback/test_ef14_kin.py::test_fcc_of_top_k_is_a_larger_top_k",),
    ),
    Mutation(
        "a mixture takes the next of its compressors",
        f"{COMBINE}/probabilistic_mix.py",
        "jnp.sum(draw >= thresholds, dtype=jnp.int32)",
        "jnp.sum(draw < thresholds, dtype=jnp.int32)",
        (f"{EXCHANGES}test_mixture_uses_its_probabilities",),
    ),
    Mutation(
        "a stage begins one step late",
        f"{COMBINE}/scheduled.py",
        "number = sum(start <= within for start in self.starts) - 1",
        "number = max(1, sum(start < within for start in self.starts)) - 1",
        (f"{TESTS}/test_scheduled.py::test_each_leaf_follows_its_own_schedule",),
    ),
    Mutation(
        "the state of the first stage moves in every stage",
        "ef_optax/_core/policy.py",
        "return *state[:number], inner, *state[number + 1 :]",
        "return inner, *state[1:]",
        (f"{TESTS}/test_scheduled.py::test_only_the_active_state_moves",),
    ),
    Mutation(
        "a rotated message is quantized with the key of the rotation",
        f"{COMBINE}/rotate.py",
        "inner = None if self.inner.deterministic else jax.random.fold_in(key, 1)",
        "inner = None if self.inner.deterministic else key",
        (f"{TESTS}/test_codecs.py::test_the_parts_of_a_compressor_draw_apart",),
    ),
    Mutation(
        "the warm-up reaches its ratio one epoch early",
        "ef_optax/policies/dgc_warmup.py",
        "max(ratio ** ((epoch + 1) / (warmup_epochs + 1)), ratio)",
        "max(ratio ** ((epoch + 1) / max(warmup_epochs, 1)), ratio)",
        ("tests/feedback/test_ef14_kin.py::test_dgc_warmup_falls_from_epoch_to_epoch",),
    ),
    Mutation(
        "row_sign: all rows share the scale of the leaf",
        "ef_optax/compressors/quantize/row_sign.py",
        "jnp.sum(jnp.abs(rows), axis=1, dtype=scale_dtype(x.dtype)) / width",
        "jnp.full(rows.shape[:1], jnp.mean(jnp.abs(rows)), scale_dtype(x.dtype))",
        ("tests/compressors/test_row_sign.py::test_rows_that_do_not_occur_do_not_move",),
    ),
)
