"""The studies of EF21: each runs from flags to picture and finds what it should show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import ef21_logreg, ef21_momentum, ef21_w, ef21_w_growth, libsvm, logistic, storage

Rows = list[dict[str, Any]]


def value(rows: Rows, key: str, **where: Any) -> Any:
    found = [row[key] for row in rows if key in row and where.items() <= row.items()]
    assert len(found) == 1
    return found[0]


@pytest.mark.slow
def test_ef21_w_is_ef21_and_the_gain_is_that_of_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    families = {"equal": lambda n, _: np.ones(n), "one": lambda n, _: np.array([100.0] + [1] * 19)}
    monkeypatch.setattr(ef21_w, "FAMILIES", families)
    monkeypatch.setattr(ef21_w, "UNEQUAL", ("one",))
    monkeypatch.setattr(ef21_w, "VARIANCES", (0, 300, 1000))
    ef21_w.main(["study", "--workers=20", "--rounds=6000", f"--out_dir={tmp_path / 'out'}"])
    rows = storage.read_rows(tmp_path / "out")
    assert (tmp_path / "out/curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for problem in ("equal", "one"):
        assert value(rows, "apart", problem=problem, form="exact") < 1e-9
    for form in ("exact", "partial"):
        place = {"problem": "one", "form": form}
        assert value(rows, "apart", **place) < 1e-9
        slow, fast = (value(rows, "rounds", method=f"ef21 ({m})", **place) for m in ("QM", "AM"))
        gain = value(rows, "gain", **place)
        assert gain > 2
        assert slow / fast == pytest.approx(gain, rel=0.2)
    ends = [value(rows, "rounds", problem="equal", method=method) for method in ef21_w.METHODS]
    assert len(set(ends)) == 1
    for spread in ef21_w.SPREADS:
        gains = [row["gain"] for row in rows if row.get("spread") == spread]
        lengths = [row["step gain"] for row in rows if row.get("spread") == spread]
        assert len(gains) == 3 and gains[0] == 1
        assert gains == sorted(gains) and gains[-1] > 2
        np.testing.assert_allclose(gains, lengths, rtol=0.2)


def test_ef21_w_problem_has_the_prescribed_constants() -> None:
    a, b = ef21_w.family("one worker 1000, others 1", 5, 0)
    found = [np.linalg.eigvalsh(0.2 * part.T @ part)[-1] for part in a]
    np.testing.assert_allclose(found, [1000, 1, 1, 1, 1], rtol=1e-12)
    assert a.shape == (5, 10, 10) and b.shape == (5, 10)
    for spread in ef21_w.SPREADS:
        for variance in (0, 30, 400):
            given = ef21_w_growth.spread(spread, variance, 50, np.random.default_rng(0))
            np.testing.assert_allclose([given.mean(), given.var()], [10, variance], atol=1e-9)
            assert given.min() > 0


@pytest.mark.slow
def test_one_row_a_step_is_the_gradient_on_average() -> None:
    with jax.enable_x64(True):
        data = ef21_w.family("exp(2 z), z normal", 3, 0)
        x = jnp.linspace(-1, 1, 10)
        keys = jax.random.split(jax.random.key(0), 20_000)
        arrays = jax.tree.map(jnp.asarray, data)
        drawn = jax.vmap(lambda key: ef21_w.of_one_row(x, arrays, key))(keys)
        exact = np.asarray(ef21_w.gradients(x, arrays))
    a, b = data
    slopes = [
        0.2 * part.T @ (part @ np.asarray(x) - target) for part, target in zip(a, b, strict=True)
    ]
    regulariser = 2e-3 * np.asarray(x) / (1 + np.asarray(x) ** 2) ** 2
    np.testing.assert_allclose(exact, slopes + regulariser, rtol=1e-12)
    error = np.asarray(drawn).std(0) / np.sqrt(len(keys))
    assert (abs(np.asarray(drawn).mean(0) - exact) < 5 * error).all()


def lines_of(rng: np.random.Generator, rows: int, features: int, steep: int) -> str:
    """LibSVM text; rows at a fixed interval are a hundred times as long as the others."""
    values = (
        rng.standard_normal((rows, features)) * np.where(np.arange(rows) % steep, 1, 100)[:, None]
    )
    return "".join(
        f"{1 + int(value[0] > 0)} "
        + " ".join(f"{j + 1}:{v:.6g}" for j, v in enumerate(value))
        + "\n"
        for value in values
    )


@pytest.mark.slow
def test_ef21_w_on_files_gains_nothing_where_workers_are_alike(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "libsvm").mkdir()
    (tmp_path / "libsvm/steep").write_text(lines_of(rng, 12, 5, 12))
    alike = [f"{sign} 1:{sign} 2:0.5 3:-1\n" for sign in (1, -1)] * 6
    (tmp_path / "libsvm/alike").write_text("".join(alike))
    words = ["--datasets=steep,alike", f"--data_dir={tmp_path}", "--workers=1000", "--rounds=60"]
    ef21_w.main(["study", *words, f"--out_dir={tmp_path / 'out'}"])
    rows = storage.read_rows(tmp_path / "out")
    assert value(rows, "gain", problem="alike") == pytest.approx(1, abs=1e-9)
    assert value(rows, "gained", problem="alike") < 1e-9
    assert value(rows, "gain", problem="steep") > 2  # one worker of twelve
    assert value(rows, "gained", problem="steep") > 1e-3
    assert value(rows, "apart", problem="steep") < 1e-9
    assert "| steep | 12 |" in (tmp_path / "out/table.md").read_text()


@pytest.mark.slow
def test_one_noisy_gradient_a_step_biases_ef21_but_not_its_momentum_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ef21_momentum, "STEPS", {0.03: 2000})
    ef21_momentum.main(["study", "--runs=64", f"--out_dir={tmp_path / 'out'}"])
    rows = storage.read_rows(tmp_path / "out")
    assert value(rows, "bias", method="ef21_sgd") < -0.04
    assert abs(value(rows, "bias", method="ef21_sgdm")) < 0.02
    assert value(rows, "ratio", rate=0.03) == pytest.approx(1.6, rel=0.15)
    np.testing.assert_allclose(ef21_momentum.NOISE.mean(0), 0, atol=1e-15)
    np.testing.assert_allclose((ef21_momentum.NOISE**2).sum(1).mean(), 1)


@pytest.mark.slow
def test_ef21_reaches_the_tolerance_where_ef14_stops(tmp_path: Path) -> None:
    words = ["study", "--multiples=128,256", "--rounds=1000", f"--out_dir={tmp_path / 'out'}"]
    ef21_logreg.main(words)
    rows = storage.read_rows(tmp_path / "out")
    first, second = (
        value(rows, "plateau", method="ef14", multiple=multiple) for multiple in (128, 256)
    )
    assert first > 1e-4
    assert 2.5 < second / first < 6
    for multiple in (128, 256):
        assert value(rows, "rounds", method="ef14", multiple=multiple) is None
        for method in ("ef21", "ef21_plus"):
            assert value(rows, "rounds", method=method, multiple=multiple) < 900


def test_gradients_of_the_logistic_regression() -> None:
    rng = np.random.default_rng(0)
    features, labels = rng.standard_normal((7, 3)), np.sign(rng.standard_normal(7))
    parts = libsvm.split(features, labels, 3)
    assert [len(b) for _, b in parts] == [2, 2, 3]

    def loss(x: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
        regulariser = 0.1 * (x**2 / (1 + x**2)).sum() + 0.1 * (x**2).sum()
        return np.log1p(np.exp(-b * (a @ x))).mean() + regulariser

    x, h = rng.standard_normal(3), 1e-6
    slopes = [
        [(loss(x + h * e, *part) - loss(x - h * e, *part)) / (2 * h) for e in np.eye(3)]
        for part in parts
    ]
    with jax.enable_x64(True):
        rows = jax.tree.map(jnp.asarray, logistic.rows_of(parts))
        found = logistic.gradients(jnp.asarray(x), rows, nonconvex=0.1, l2=0.2)
    np.testing.assert_allclose(found, slopes, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("low, high", [("0", "1"), ("1", "2"), ("-1", "+1")])
def test_libsvm_lines(low: str, high: str) -> None:
    features, labels = libsvm.parse([f"{high} 1:0.5 3:-2\n", f"{low} 2:1 # note\n", "\n"])
    np.testing.assert_array_equal(features, [[0.5, 0, -2], [0, 1, 0]])
    np.testing.assert_array_equal(labels, [1, -1])


@pytest.mark.parametrize(
    "line, message",
    [
        ("1 0:3", "line 2 .* start at 1"),
        ("1 a:3", "line 2"),
        ("x 1:3", "line 2"),
        ("2 1:3", "two different"),
    ],
)
def test_libsvm_says_what_is_wrong(line: str, message: str) -> None:
    with pytest.raises(libsvm.FormatError, match=message):
        libsvm.parse(["0 1:1", line, "1 1:1"], "file")


def test_a_file_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--data_dir"):
        words = ["--dataset=mushrooms", "--data_dir=", f"--out_dir={tmp_path / 'out'}"]
        ef21_logreg.main(["study", *words])
    with pytest.raises(SystemExit, match="absent"):
        ef21_logreg.main(["study", "--dataset=absent", f"--data_dir={tmp_path}"])
    assert not (tmp_path / "out").exists()
