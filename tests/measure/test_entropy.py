"""Counts of entropy codes against implementations of the codes themselves."""

from __future__ import annotations

import numpy as np
import pytest

from ef_optax.measure.entropy import (
    arithmetic_bits,
    elias_delta_bits,
    elias_gamma_bits,
    run_length_bits,
    sparse_elias_bits,
    zero_run_bits,
)


def gamma(v: int) -> str:
    return "0" * (v.bit_length() - 1) + format(v, "b")


def delta(v: int) -> str:
    return gamma(v.bit_length()) + format(v, "b")[1:]


@pytest.mark.parametrize("values", [[1], [2, 3], range(1, 200), [2**20, 2**31 - 1]])
def test_elias_codes(values) -> None:
    assert elias_gamma_bits(list(values)) == sum(len(gamma(v)) for v in values)
    assert elias_delta_bits(list(values)) == sum(len(delta(v)) for v in values)


def test_sparse_elias() -> None:
    codes = np.asarray([[0, 2, 0], [0, 0, -5]])
    expected = len(delta(2)) + len(delta(4)) + 2 + len(delta(2)) + len(delta(5))
    assert sparse_elias_bits(codes) == expected
    assert sparse_elias_bits(np.zeros(5, int)) == 0


def test_arithmetic_bits() -> None:
    """A published value; a constant vector needs only its histogram."""
    assert arithmetic_bits([1, 2, 3, 4, 5]) == pytest.approx(89.82311, abs=2e-5)
    assert arithmetic_bits(np.ones(7)) == pytest.approx(np.log2(8 * np.e) + 66)


def run_length(mask, width: int) -> str:
    out, run, full = "", 0, 2**width - 1
    for bit in [*mask, 1]:
        if bit:
            out += format(run, f"0{width}b")
            run = 0
        else:
            run += 1
            if run == full:
                out += format(full, f"0{width}b")
                run = 0
    return out


@pytest.mark.parametrize("width", [1, 2, 5])
def test_run_length(width: int) -> None:
    mask = np.random.default_rng(width).random(200) < 0.1
    assert run_length_bits(mask, width) == len(run_length(mask, width))


def zero_runs(ternary: np.ndarray) -> list[int]:
    """3LC's bytes, one by one."""
    digits = np.pad(ternary, (0, -ternary.size % 5)).reshape(-1, 5) + 1
    out, run = [], 0
    for byte in [*(digits @ [81, 27, 9, 3, 1]).tolist(), None]:
        if byte == 121 and run < 14:
            run += 1
            continue
        if run:
            out.append(121 if run == 1 else 241 + run)
        run = 1 if byte == 121 else 0
        if byte not in (121, None):
            out.append(byte)
    return out


@pytest.mark.parametrize("size", [0, 3, 70, 75, 400])
def test_zero_runs(size: int) -> None:
    rng = np.random.default_rng(size)
    ternary = np.where(rng.random(size) < 0.02, rng.choice([-1, 1], size), 0)
    assert zero_run_bits(ternary) == 8 * len(zero_runs(ternary))


@pytest.mark.parametrize(
    "make",
    [
        lambda: elias_gamma_bits([0, 1]),
        lambda: elias_delta_bits([1.5]),
        lambda: run_length_bits([1], 0),
        lambda: zero_run_bits([2]),
    ],
)
def test_bad_arguments(make) -> None:
    with pytest.raises(ValueError):
        make()
