"""Faults of the numerical parts: norms, blocks, random numbers, order statistics, transforms."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

HERE = "ef_optax/_numeric"
NORMS = f"{HERE}/norms.py"
OF_BLOCKS = "tests/numeric/test_blocks.py::"
RANGES = (f"{OF_BLOCKS}test_a_2_norm_neither_overflows_nor_underflows",)
CODECS = "tests/compressors/test_codecs.py::"

MUTATIONS = (
    Mutation(
        "squares of small numbers are not taken in a scale of their own",
        NORMS,
        "plain < 2.0 ** (2 - largest // 2), plain >",
        "plain < 0.0, plain >",
        RANGES,
    ),
    Mutation(
        "squares of large numbers are not taken in a scale of their own",
        NORMS,
        "plain > 2.0 ** (largest - 8)",
        "plain > 2.0 ** (2 * largest)",
        RANGES,
    ),
    Mutation(
        "small numbers are not raised enough, so that some vanish",
        NORMS,
        "2.0 ** (3 * largest // 4 - 2)",
        "2.0 ** (largest // 8)",
        RANGES,
    ),
    Mutation(
        "the last block is scaled like the first",
        f"{HERE}/blocks.py",
        "*(one[-1:, None] for one in each)",
        "*(one[:1, None] for one in each)",
        (f"{OF_BLOCKS}test_blockwise_gives_each_value_what_its_block_has",),
    ),
    Mutation(
        "a maximum starts from zero",
        f"{HERE}/reductions.py",
        "return np.asarray(-np.inf if combine is lax.max else np.inf, dtype)",
        "return np.asarray(0.0 if combine is lax.max else np.inf, dtype)",
        (f"{OF_BLOCKS}test_sums_and_extremes_are_those_of_numpy",),
    ),
    Mutation(
        "a block's rest is combined in the wrong way",
        f"{HERE}/reductions.py",
        "return tuple(f(*pair) for f, pair in zip(combine, pairs, strict=True))",
        "return tuple(pair[0] for pair in pairs)",
        (f"{OF_BLOCKS}test_sums_and_extremes_are_those_of_numpy",),
    ),
    Mutation(
        "random rounding starts from the nearest integer",
        f"{HERE}/random.py",
        "low = jnp.floor(y)",
        "low = jnp.round(y)",
        (f"{CODECS}test_variance[qsgd]",),
    ),
    Mutation(
        "noise reaches up to two",
        f"{HERE}/random.py",
        "jnp.float32(2.0**-24)",
        "jnp.float32(2.0**-23)",
        ("tests/numeric/test_random_words.py::test_noise_is_uniform",),
    ),
    Mutation(
        "a random subset has an entry twice",
        f"{HERE}/random.py",
        "return jnp.where(indices < limit, indices, _permute(indices, seed, bits))",
        "return indices % limit",
        (f"{CODECS}test_variance[random_k-scaled]", "tests/conformance/test_foundation.py"),
    ),
    Mutation(
        "a random subset is a block of neighbours",
        f"{HERE}/random.py",
        "_ROUNDS = 6",
        "_ROUNDS = 0",
        ("tests/numeric/test_random_words.py::test_members_of_a_random_subset_are_no_neighbours",),
    ),
    Mutation(
        "infinities of a split leaf pass",
        f"{HERE}/finite.py",
        "lax.is_finite(lax.optimization_barrier(total))",
        "(lax.optimization_barrier(total) == total)",
        ("tests/numeric/test_finite.py::test_one_bad_number_is_found",),
    ),
    Mutation(
        "each small array is summed on its own",
        f"{HERE}/finite.py",
        "alone.append(lax.optimization_barrier(small))",
        "alone.append(small)",
        ("tests/numeric/test_finite.py::test_small_arrays_are_summed_together",),
    ),
    Mutation(
        "zero times an overflow tells, until a compiler joins constant factors",
        f"{HERE}/finite.py",
        "_sum(lax.mul(x, x) if squares else x)",
        "_sum(lax.mul(x, x) if squares else lax.mul(x, lax.full_like(x, 0)))",
        ("tests/numeric/test_finite.py::test_a_constant_factor_hides_no_infinity",),
    ),
    Mutation(
        "the rounding of a message may be skipped by a compiler",
        f"{HERE}/rounding.py",
        "return jax.lax.optimization_barrier(x.astype(dtype))",
        "return x.astype(dtype)",
        (f"{CODECS}test_no_compiler_may_skip_the_rounding",),
    ),
    Mutation(
        "axes of a batch of matrices are rows",
        f"{HERE}/matrix.py",
        "math.prod(shape[batch_axes:-1])",
        "math.prod(shape[:-1])",
        ("tests/compressors/test_low_rank.py::test_batch_axes",),
    ),
    Mutation(
        "an order statistic is the one below where entries are equal",
        f"{HERE}/order_statistics.py",
        'side="right"',
        'side="left"',
        ("tests/numeric/test_order_statistics.py",),
    ),
    Mutation(
        "negative numbers are in the wrong order",
        f"{HERE}/order_statistics.py",
        "return jnp.where(bits >> 31 == 1, ~bits, bits | np.uint32(1 << 31))",
        "return bits ^ np.uint32(1 << 31)",
        ("tests/numeric/test_order_statistics.py",),
    ),
    Mutation(
        "a product of matrices is taken in the backend's fast precision",
        f"{HERE}/linear.py",
        "HIGHEST",
        "DEFAULT",
        (f"{CODECS}test_products_keep_the_precision_of_their_dtype",),
    ),
    Mutation(
        "Hadamard's matrix is not orthonormal",
        f"{HERE}/transforms.py",
        "return x * jnp.asarray(1 / math.sqrt(size), x.dtype)",
        "return x * jnp.asarray(1 / size, x.dtype)",
        ("tests/compressors/test_transforms.py::test_hadamard_matrix",),
    ),
    Mutation(
        "the discrete Fourier transform is turned back by the wrong phase",
        f"{HERE}/transforms.py",
        "turned = turned * jnp.conj(_phases(key, parts.shape[1]))",
        "turned = turned * _phases(key, parts.shape[1])",
        ("tests/compressors/test_transforms.py::test_transforms_invert",),
    ),
    Mutation(
        "a share of zero is refused where it means none",
        f"{HERE}/check.py",
        "lambda x: 0 <= x <= 1, ",
        "lambda x: 0 < x <= 1, ",
        ("tests/feedback/test_arguments.py::test_a_share_of_zero_means_none",),
    ),
    Mutation(
        "a weight above one is accepted",
        f"{HERE}/check.py",
        'number(name, option, value, lambda x: 0 < x <= 1, "a number in (0, 1]")',
        'number(name, option, value, lambda x: 0 < x, "a number in (0, 1]")',
        ("tests/feedback/test_variance_based.py::test_bad_arguments_say_what_to_do",),
    ),
    Mutation(
        "a count of True is one",
        f"{HERE}/check.py",
        "whole = isinstance(value, int) and not isinstance(value, bool)",
        "whole = isinstance(value, int)",
        ("tests/feedback/test_arguments.py::test_bad_counts_are_refused_by_name",),
    ),
)
