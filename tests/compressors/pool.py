"""Every codec that encodes and decodes one leaf, with example hyper-parameters, and inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

from ef_optax.compressors.combine.compose import compose
from ef_optax.compressors.combine.identity import identity
from ef_optax.compressors.combine.induced import induced
from ef_optax.compressors.combine.probabilistic_mix import probabilistic_mix
from ef_optax.compressors.combine.rotate import rotate
from ef_optax.compressors.combine.scale_to_contractive import scale_to_contractive
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.low_rank.atomo import atomo
from ef_optax.compressors.low_rank.svd import svd
from ef_optax.compressors.quantize.adaq import adaq
from ef_optax.compressors.quantize.block_quantize import block_quantize
from ef_optax.compressors.quantize.cast import cast
from ef_optax.compressors.quantize.dorefa import dorefa
from ef_optax.compressors.quantize.drive import drive
from ef_optax.compressors.quantize.eden import eden
from ef_optax.compressors.quantize.fp8 import fp8
from ef_optax.compressors.quantize.inceptionn import inceptionn
from ef_optax.compressors.quantize.linear_dithering import linear_dithering
from ef_optax.compressors.quantize.log_quantize import log_quantize
from ef_optax.compressors.quantize.natural import natural
from ef_optax.compressors.quantize.natural_dithering import natural_dithering
from ef_optax.compressors.quantize.qsgd import qsgd
from ef_optax.compressors.quantize.quantile_8bit import quantile_8bit
from ef_optax.compressors.quantize.quantile_sketch import quantile_sketch
from ef_optax.compressors.quantize.rms_sign import rms_sign
from ef_optax.compressors.quantize.row_sign import row_sign
from ef_optax.compressors.quantize.scaled_half import scaled_half
from ef_optax.compressors.quantize.scaled_sign import scaled_sign
from ef_optax.compressors.quantize.sigma_bins import sigma_bins
from ef_optax.compressors.quantize.sign import sign
from ef_optax.compressors.quantize.ternary import ternary
from ef_optax.compressors.quantize.three_lc import three_lc
from ef_optax.compressors.quantize.threshold_sign import threshold_sign
from ef_optax.compressors.quantize.two_bit import two_bit
from ef_optax.compressors.quantize.two_mean_sign import two_mean_sign
from ef_optax.compressors.quantize.uniform import uniform
from ef_optax.compressors.sparse.bernoulli import bernoulli
from ef_optax.compressors.sparse.block_top_k import block_top_k
from ef_optax.compressors.sparse.comp_k import comp_k
from ef_optax.compressors.sparse.dct_top_k import dct_top_k
from ef_optax.compressors.sparse.mix_k import mix_k
from ef_optax.compressors.sparse.random_block import random_block
from ef_optax.compressors.sparse.random_k import random_k
from ef_optax.compressors.sparse.redsync import redsync
from ef_optax.compressors.sparse.row_top_k import row_top_k
from ef_optax.compressors.sparse.sampled_top_k import sampled_top_k
from ef_optax.compressors.sparse.threshold import threshold
from ef_optax.compressors.sparse.top_k import top_k
from ef_optax.compressors.sparse.wangni import wangni


@dataclasses.dataclass(frozen=True)
class Case:
    """A codec of the pool, and its exemptions by definition."""

    make: Callable[[], Compressor]
    keeps_zero: bool = True  # a leaf of zeros decodes to zeros
    settles: bool = True  # a memory of what it does not send is bounded, at any shape in the tests
    shape: tuple[int, ...] = (5, 7)  # where constants and properties are tested
    worst: Callable[[tuple[int, ...]], np.ndarray] | None = None  # attains an "exact" constant


# ---------------------------------------------------------------------------- worst inputs


def leading(first: list[float], rest: float = 0.0, block: int | None = None) -> Any:
    """The first numbers, then ``rest`` to the end of the first block, then zeros."""

    def make(shape: tuple[int, ...]) -> np.ndarray:
        x = np.zeros(int(np.prod(shape)))
        x[: block or x.size] = rest
        x[: len(first)] = first
        return x.reshape(shape)

    return make


EQUAL = leading([], 1.0)
SPIKE = leading([1.0])


def ternary_worst(shape: tuple[int, ...]) -> np.ndarray:
    """(1, a, ..., a) with a = 1/(1 + sqrt d)."""
    return leading([1.0], 1 / (1 + np.sqrt(np.prod(shape))))(shape)


def column_spikes(shape: tuple[int, ...]) -> np.ndarray:
    x = np.zeros(shape)
    x[0] = 1.0
    return x


def first_column(shape: tuple[int, ...]) -> np.ndarray:
    """One value in each row."""
    x = np.zeros(shape)
    x[:, 0] = 1.0
    return x


def last_block(shape: tuple[int, ...]) -> np.ndarray:
    """Ones where the last block of 16 begins, which is not full."""
    x = np.zeros(int(np.prod(shape)))
    x[32:] = 1.0
    return x.reshape(shape)


def dct_worst(shape: tuple[int, ...]) -> np.ndarray:
    """All cosine coefficients equal, for a matrix of 6 rows and two chunks of 5 columns."""

    def basis(n: int) -> np.ndarray:
        t = np.arange(n)
        rows = np.cos(np.pi * (2 * t + 1) * t[:, None] / (2 * n)) * np.sqrt(2 / n)
        rows[0] /= np.sqrt(2)
        return rows

    assert shape == (6, 10)
    return np.tile(basis(6).T @ np.ones((6, 5)) @ basis(5), (1, 2))


CASES = {
    "identity": Case(identity, worst=EQUAL),
    "top_k": Case(lambda: top_k(0.2), worst=EQUAL),
    "row_top_k": Case(lambda: row_top_k(0.4), worst=EQUAL),
    "random_k": Case(lambda: random_k(0.2, 11), worst=EQUAL),
    "random_k-scaled": Case(lambda: random_k(0.6, 12, scaled=True), worst=EQUAL),
    "random_k-shared": Case(lambda: random_k(0.2, 15, shared_mask=True), worst=SPIKE),
    "sign": Case(sign),
    "scaled_sign": Case(scaled_sign, worst=SPIKE),
    "cast-bf16": Case(lambda: cast("bfloat16")),
    "cast-bf16-random": Case(lambda: cast("bfloat16", key=17)),
    "cast-f16": Case(lambda: cast("float16")),
    "cast-e5m2": Case(lambda: cast("float8_e5m2")),
    "compose-bf16-top_k": Case(lambda: compose(cast("bfloat16"), top_k(0.2))),
    "compose-sign-top_k": Case(lambda: compose(scaled_sign(), top_k(k=6))),
    "compose-qsgd-random_k": Case(lambda: compose(qsgd(31, 13), random_k(0.6, 14, scaled=True))),
    "compose-qsgd-random_block": Case(lambda: compose(qsgd(7, 16), random_block(0.3, 17))),
    "qsgd": Case(lambda: qsgd(7, 0)),
    "qsgd-linf-bucket": Case(lambda: qsgd(4, 1, norm="linf", bucket=10)),
    "linear_dithering": Case(lambda: linear_dithering(1, 2), worst=ternary_worst),
    "natural_dithering": Case(lambda: natural_dithering(4, 3)),
    "dorefa": Case(lambda: dorefa(3, 4, bucket=16), worst=SPIKE),
    "natural": Case(lambda: natural(5), worst=leading([], 4 / 3)),
    "ternary": Case(lambda: ternary(6), worst=ternary_worst),
    "ternary-shared": Case(lambda: ternary(8, shared_scale=True), worst=ternary_worst),
    "ternary-clipped-quartic": Case(lambda: ternary(7, clip_sigmas=1.5, packing="quartic")),
    "three_lc": Case(lambda: three_lc(1.5), worst=leading([1.0], 0.75)),
    "uniform": Case(lambda: uniform(4, bucket=16), worst=leading([1.0, -1.0])),
    "uniform-random": Case(lambda: uniform(3, bucket=16, key=8), worst=leading([1.0, -1.0])),
    "block_quantize": Case(lambda: block_quantize(4, block=16), worst=leading([7.0], 0.5, 16)),
    "block_quantize-random": Case(
        lambda: block_quantize(2, block=None, key=9), worst=ternary_worst
    ),
    "quantile_8bit": Case(quantile_8bit, shape=(600,)),
    "quantile_sketch": Case(lambda: quantile_sketch(5)),
    "sigma_bins": Case(lambda: sigma_bins(2)),
    "scaled_half": Case(scaled_half),
    "fp8": Case(lambda: fp8("e4m3")),
    "fp8-e5m2-leaf": Case(lambda: fp8("e5m2", rows=False)),
    "log_quantize": Case(lambda: log_quantize(3)),
    "inceptionn": Case(lambda: inceptionn(2**-8, capacity=0.4)),
    "svd": Case(lambda: svd(2), shape=(6, 9), worst=lambda s: np.eye(*s)),
    "atomo": Case(lambda: atomo(1, 30), settles=False, shape=(12, 11)),
    "dct_top_k": Case(lambda: dct_top_k(8, 3), shape=(6, 10), worst=dct_worst),
    "rotate-hadamard": Case(lambda: rotate(scaled_sign(), 31)),
    "rotate-dft": Case(lambda: rotate(qsgd(2, 32, norm="linf"), 33, kind="dft")),
    "rotate-kashin": Case(lambda: rotate(uniform(4, key=34), 35, kind="kashin")),
    "drive": Case(lambda: drive(36)),
    "drive-mse": Case(lambda: drive(37, scale="mse")),
    "eden": Case(lambda: eden(3, 38)),
    "induced": Case(lambda: induced(top_k(0.3), random_k(0.3, 40, scaled=True))),
    "scale_to_contractive": Case(lambda: scale_to_contractive(qsgd(2, 41))),
    "probabilistic_mix": Case(
        lambda: probabilistic_mix([natural(42), ternary(43)], [0.3, 0.7], 44)
    ),
    "probabilistic_mix-biased": Case(
        lambda: probabilistic_mix([top_k(0.2), sign()], [0.6, 0.4], 45)
    ),
    "rms_sign": Case(rms_sign),
    "row_sign": Case(row_sign, worst=first_column),
    "two_mean_sign": Case(two_mean_sign, worst=SPIKE),
    "two_mean_sign-columns": Case(
        lambda: two_mean_sign(columns=True), shape=(5, 7), worst=column_spikes
    ),
    "threshold_sign": Case(lambda: threshold_sign(0.3), keeps_zero=False),
    "two_bit": Case(lambda: two_bit(0.5)),
    "adaq": Case(lambda: adaq(0.3)),
    "block_top_k": Case(lambda: block_top_k(0.2, block=16), shape=(37,), worst=last_block),
    "threshold": Case(lambda: threshold(2.0, capacity=0.25)),
    "sampled_top_k": Case(lambda: sampled_top_k(0.1, sample=0.3)),
    "redsync": Case(lambda: redsync(0.1)),
    "random_block": Case(lambda: random_block(0.2, 20), worst=EQUAL),
    "random_block-scaled": Case(lambda: random_block(0.6, 21, scaled=True), worst=EQUAL),
    "bernoulli": Case(lambda: bernoulli(0.6, 22), worst=EQUAL),
    "bernoulli-plain": Case(lambda: bernoulli(0.4, 23, scaled=False), worst=EQUAL),
    "wangni": Case(lambda: wangni(0.3, 24), settles=False),
    "comp_k": Case(lambda: comp_k(8, 10, 25)),
    "mix_k": Case(lambda: mix_k(3, 4, 26), worst=EQUAL),
}

# One of each kind: these always run the costly tests, the others only in the slow run.
REPRESENTATIVE = (
    "identity",
    "top_k",
    "random_k",
    "sign",
    "scaled_sign",
    "cast-bf16",
    "compose-bf16-top_k",
    "qsgd",
    "natural",
    "ternary",
    "block_quantize",
)


SECOND_FORMS = {
    "bernoulli-plain",
    "block_quantize-random",
    "cast-e5m2",
    "cast-f16",
    "compose-qsgd-random_block",
    "drive-mse",
    "fp8-e5m2-leaf",
    "probabilistic_mix-biased",
    "random_block-scaled",
    "random_k-shared",
    "rotate-dft",
    "rotate-kashin",
    "ternary-shared",
    "two_mean_sign-columns",
    "uniform-random",
}
"""An option of a codec that is there without it: all their tests are slow. What the option changes
has a test of its own."""


def first_forms(names: Iterable[str]) -> list[Any]:
    """The names as parameters of a test; those of second forms are slow."""
    slow = pytest.mark.slow
    return [pytest.param(name, marks=slow if name in SECOND_FORMS else ()) for name in names]


def thinned(names: Iterable[str]) -> list[Any]:
    """The names as parameters of a costly test; all but the representative ones are slow."""
    marks = {name: () if name in REPRESENTATIVE else (pytest.mark.slow,) for name in names}
    return [pytest.param(name, marks=mark) for name, mark in marks.items()]


def inputs(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Leaves that try to break a codec: ties, spikes, extremes, order."""
    rng = np.random.default_rng(7)
    normal = rng.standard_normal(shape)
    flat = np.zeros(int(np.prod(shape)))
    if flat.size:
        flat[flat.size // 2] = -3.0
    draws = {
        "normal": normal,
        "shifted": normal + 2.5,
        "equal": np.where(normal < 0, -1.5, 1.5),
        "spike": flat.reshape(shape),
        "zeros": np.zeros(shape),
        "sorted": np.sort(normal.reshape(-1)).reshape(shape),
        "ties": np.round(2 * normal) / 2,
        "wide": normal * 10.0 ** rng.integers(-6, 7, shape),
        "huge": normal * 1e30,
        "tiny": normal * 1e-30,
        "denormal": np.sign(normal) * 1e-40,
    }
    return {name: np.asarray(x, np.float32) for name, x in draws.items()}
