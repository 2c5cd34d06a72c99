"""Studies of workers that differ: rare features, and the dial of disagreement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from ef_optax import theory
from experiments import heterogeneity, logistic, rare_features, storage

Rows = list[dict[str, Any]]


def value(rows: Rows, key: str, **where: Any) -> Any:
    found = [row[key] for row in rows if key in row and where.items() <= row.items()]
    assert len(found) == 1
    return found[0]


########################################################################################
# Rare features
########################################################################################


def study_of(tmp_path: Path, *words: str) -> Rows:
    rare_features.main(["study", *words, f"--out_dir={tmp_path / 'out'}"])
    assert (tmp_path / "out/curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    return storage.read_rows(tmp_path / "out")


def accept(rows: Rows) -> None:
    """The step is more than ten times as long if features are rare, and hardly longer otherwise."""
    assert value(rows, "gain", problem="c/n = 0.05", method="rare") > 10
    assert value(rows, "gain", problem="c/n = 0.9", method="rare") < 1.2
    for row in rows:
        assert row["method"] != "exact" or row["gain"] >= 1
    slow, fast = (value(rows, "end", problem="c/n = 0.05", method=m) for m in ("QM", "rare"))
    assert fast < 1e-4 * slow


@pytest.mark.slow
def test_rare_features_allow_long_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rare_features, "POINTS", 20)
    accept(study_of(tmp_path, "--shares=0.05,0.9", "--rounds=13000"))


@pytest.mark.parametrize("share, count", [(0.05, 1), (0.5, 10), (0.9, 18), (0.31, 7)])
def test_every_feature_is_on_c_workers_and_every_worker_has_one(share: float, count: int) -> None:
    found = rare_features.owners(share, 20, 50, np.random.default_rng(0))
    np.testing.assert_array_equal(found.sum(0), count)
    assert found.any(1).all()


def test_rare_features_problem_is_that_of_the_description() -> None:
    problem = rare_features.synthetic(0.5, 20, 50, 3)
    a, b, minimum = problem.data
    for i, part in enumerate(a / np.sqrt(6)):
        own = np.flatnonzero(part.any(0))
        count = min(12, len(own))
        values = np.linalg.svd(part[:, own], compute_uv=False)[:count]
        expected = [0.9 * np.sqrt(19 * j / (len(own) - 1) + 1) + (i == 0) for j in range(count)]
        np.testing.assert_allclose(np.sort(values), expected, rtol=1e-9)
    noise = (b - a @ np.full(50, 0.5)) / np.sqrt(6)
    assert 1.9 < noise.max() <= 2 and -2 <= noise.min() < -1.9
    with jax.enable_x64(True):
        x = jnp.linspace(-1, 1, 50)
        slopes = np.asarray(rare_features.residual_gradients(x, problem.data))
        gap = float(rare_features.suboptimality(x, problem.data))
        at_minimum = rare_features.residual_gradients(jnp.asarray(minimum), problem.data)
    direct = [
        ((part @ z - rhs) ** 2).sum() / 12
        for z in (np.asarray(x), minimum)
        for part, rhs in zip(a, b, strict=True)
    ]
    assert gap == pytest.approx(np.mean(direct[:20]) - np.mean(direct[20:]), rel=1e-9)
    np.testing.assert_allclose(slopes[4], a[4].T @ (a[4] @ np.asarray(x) - b[4]) / 6, rtol=1e-12)
    np.testing.assert_allclose(np.asarray(at_minimum).mean(0), 0, atol=1e-9)
    L_i = [2 * np.linalg.norm(part, 2) ** 2 / 12 for part in a]
    np.testing.assert_allclose(problem.constants.L_i, L_i, rtol=1e-12)
    assert problem.shared_by == 10


def test_too_few_features_are_refused(tmp_path: Path) -> None:
    with pytest.raises(flags.Error, match="--shares=0.05"):
        rare_features.owners(0.05, 20, 10, np.random.default_rng(0))
    for words, message in (
        (["--shares=0"], r"--shares=0: numbers in \(0, 1\]"),
        (["--shares=x"], "--shares"),
        (["--datasets=absent", f"--data_dir={tmp_path}"], "absent"),
        (["--datasets=absent", "--data_dir="], "--data_dir"),
    ):
        with pytest.raises(SystemExit, match=message):
            rare_features.main(["study", *words, f"--out_dir={tmp_path / 'out'}"])
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_features_on_all_workers_gain_nothing(tmp_path: Path) -> None:
    lines = [f"{sign} 1:{sign} 2:0.5 3:-1\n" for sign in (1, -1)] * 8
    (tmp_path / "alike").write_text("".join(lines))
    words = ["--datasets=alike", f"--data_dir={tmp_path}", "--workers=4", "--rounds=40"]
    rows = study_of(tmp_path, *words)
    assert value(rows, "gain", method="rare") == pytest.approx(1)
    assert value(rows, "end", method="rare") == value(rows, "end", method="QM") < 1


########################################################################################
# The dial
########################################################################################


def test_the_dial_sorts_its_share_of_the_rows() -> None:
    labels = np.where(np.arange(103) % 3 == 0, 1.0, -1.0)
    features = np.arange(103.0)[:, None]
    for dial, lowest in ((0.0, 0), (0.5, 5), (1.0, 9)):
        parts = heterogeneity.deal(features, labels, 10, dial, seed=0)
        kept = np.concatenate([a for a, _ in parts]).ravel()
        assert len(kept) == len(set(kept)) == 100
        for a, b in parts:
            np.testing.assert_array_equal(labels[a.ravel().astype(int)], b)
        alike = [max((b > 0).sum(), (b < 0).sum()) for _, b in parts]
        assert sorted(alike)[1] >= lowest  # one worker may be at the border


def test_disagreement_grows_with_the_dial() -> None:
    features, labels = logistic.load(logistic.BUNDLED, None)
    with jax.enable_x64(True):
        found = [
            heterogeneity.disagreement(
                logistic.rows_of(heterogeneity.deal(features, labels, 20, dial, 0))
            )
            for dial in (0.0, 0.5, 1.0)
        ]
    assert 0 < found[0] < found[1] < found[2]


def test_tuning_takes_the_fewest_rounds_and_counts_no_passing_dip() -> None:
    steady = np.geomspace(1, 1e-9, 20)
    dip = np.where(np.arange(20) == 3, 1e-9, 1.0)
    lost = np.append(np.geomspace(1, 1e300, 19), np.inf)
    slow = np.geomspace(1, 1e-7, 20)
    norms = np.stack([dip, lost, slow, steady])[:, None]
    sent = np.broadcast_to(10.0 * np.arange(20), norms.shape)
    best = heterogeneity.tune(norms, sent)
    assert best.multiple == 8
    assert best.rounds == int((steady > heterogeneity.TOLERANCE).sum())
    assert best.bits == 10 * best.rounds
    never = heterogeneity.tune(norms[:2], sent[:2])
    assert never.rounds is None and never.bits is None and never.multiple == 1


@pytest.mark.slow
def test_learning_what_workers_disagree_about_reaches_the_tolerance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ("gd", "top_1", "ef14", "ef21", "econtrol", "clag", "marina")
    monkeypatch.setattr(heterogeneity, "MULTIPLES", np.array([4.0, 32.0, 256.0]))
    words = [f"--methods={','.join(kept)}", f"--out_dir={tmp_path / 'out'}"]
    words += ["--dials=1", "--rounds=700", "--runs=1"]
    heterogeneity.main(["study", *words])
    rows = storage.read_rows(tmp_path / "out")
    assert (tmp_path / "out/curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    found = {name: value(rows, "rounds", method=name) for name in kept}
    sent = {name: value(rows, "bits", method=name) for name in kept}
    assert found["top_1"] is None and found["ef14"] is None
    # Top-1 of 30 numbers: 64 bits and an index of 5.
    assert sent["ef21"] == 69 * found["ef21"] < sent["gd"] / 5
    assert sent["gd"] == 1920 * found["gd"]
    assert sent["econtrol"] == 69 * (found["econtrol"] - 1) + 1920  # a dense first message
    assert sent["clag"] < 69 * found["clag"]  # some messages were withheld
    dense = (sent["marina"] - 96 * found["marina"]) / (1920 - 96)
    assert dense == int(dense) and 1 <= dense < found["marina"] / 5


def test_an_expression_is_the_short_name_that_means_the_same() -> None:
    """With the same rate; the other bits of its messages are those of its compressor."""
    features, labels = logistic.load(logistic.BUNDLED, None)
    with jax.enable_x64(True):
        rows = logistic.rows_of(heterogeneity.deal(features[:60], labels[:60], 3, 1.0, seed=0))
        keys, rates = jax.random.split(jax.random.key(0), 1), np.array([0.5])
        of = lambda name: heterogeneity.curves(name, rates, keys, rows, 20)  # noqa: E731
        jax.tree.map(np.testing.assert_array_equal, of("ef21"), of("ef21(top_k(k=1))"))


def test_bad_dials_are_refused(tmp_path: Path) -> None:
    for words, message in (
        (["--dials=2"], r"--dials=2: numbers in \[0, 1\]"),
        (["--dials=x"], "--dials"),
        (["--workers=600"], "600 workers need as many rows"),
        (["--methods=ef12"], "--methods: .*ef21"),
        (["--methods=top_k(k=1)"], "is not a rule alone; write ef21"),
        (["--methods=ef21(top_k(k=1)) | sgd(0.1)"], "is not a rule alone"),
    ):
        with pytest.raises(SystemExit, match=message):
            heterogeneity.main(["study", *words, f"--out_dir={tmp_path / 'out'}"])
        assert not (tmp_path / "out").exists()


def test_theory_steps_of_the_dial_study() -> None:
    constants = theory.Smoothness(L=2.0, L_i=(1.0, 3.0))
    for name, method in heterogeneity.METHODS.items():
        step = method.step(constants, 8)
        assert 0 < step <= 0.5, name
