"""The language model's job: what it refuses, and that all ways to run it give the same numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from experiments import lm, report, storage
from experiments.lm_methods import SHORT, Methods
from experiments.transformer import SIZES, Size
from tests.paths import ROOT

pytestmark = pytest.mark.usefixtures("standard_promotion")

TEXT = "To be, or not to be, that is the question. " * 20
METHOD = "local.diloco(sgd(cosine(0.1)), 2)"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Runs the job in this process on a text and with a model that are very small."""
    monkeypatch.setitem(SIZES, "0.2M", Size(layers=1, width=16, heads=2))
    (tmp_path / "a.txt").write_text(TEXT)

    def call(name: str, *words: str) -> Path:
        given = [f"--data_dir={tmp_path / 'a.txt'}", f"--methods={METHOD}", "--workers=2"]
        given += ["--steps=2", "--eval_every=1", "--length=8", "--eval_tokens=64", "--batch_size=4"]
        monkeypatch.setattr("sys.argv", ["lm", *given, f"--out_dir={tmp_path / name}", *words])
        lm.main(lm.sys.argv)
        return tmp_path / name

    return call


def test_the_files_of_a_run_with_local_steps(run: Callable[..., Path]) -> None:
    folder = run("simulated", "--simulate")
    rows = storage.read_rows(folder)
    assert [row["epoch"] for row in rows] == [1, 2]
    assert all(row["bits_per_character"] == row["test_loss"] / math.log(2) for row in rows)
    config, wire = (storage.read_json(folder / f"{name}.json") for name in ("config", "wire"))
    assert config["about"]["expressions"] == {METHOD: METHOD}
    assert config["about"]["tokens_per_step"] == 2 * 4 * 8
    # Dense drifts, and a word of the exchange's own, every second step; the table has the average.
    sent = 4 * config["about"]["parameters"] + 4
    assert (wire[METHOD]["message_bytes"], wire[METHOD]["period"]) == (sent, 2)
    assert report.average(wire[METHOD])["message_bytes"] == sent // 2
    table = (folder / "table.md").read_text()
    assert f"| `{METHOD}` | its own |" in table and f"| {sent // 2:,} | 2.0x |" in table
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_simulated_workers_do_what_devices_and_rows_of_devices_do(run: Callable[..., Path]) -> None:
    simulated = run("simulated", "--simulate")
    split = run("split", "--fsdp=4", "--accumulate=2")
    for a, b in zip(storage.read_rows(simulated), storage.read_rows(split), strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=2e-5)
        assert a["test_loss"] == pytest.approx(b["test_loss"], rel=2e-5)


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--simulate", "--methods=ef_top_k", "--dtype=bfloat16", "--remat")
    straight = run("straight", *words)
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as caught:
        patched.setattr(lm.comparison.processes.Stop, "agreed", lambda self: True)
        run("stopped", *words)
    assert caught.value.code == 130
    assert len(storage.read_rows(straight.with_name("stopped"))) == 1
    found = [storage.read_rows(f) for f in (straight, run("stopped", *words, "--resume"))]
    for one, other in zip(*found, strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps=3", "--eval_every=2"], "--steps=3 is no multiple of --eval_every=2"),
        (["--batch_size=3", "--accumulate=2"], "no multiple of --accumulate=2"),
        (["--warmup=1"], "--warmup=1.0 must lie in [0, 1)"),
        (["--simulate", "--fsdp=2"], "--fsdp must be 1"),
        (["--workers=5", "--fsdp=2"], "--workers=5 of 2 devices each, but there are 8 devices"),
        (["--batch_size=3", "--fsdp=2"], "no multiple of --fsdp=2"),
        (["--length=500"], "no held-out file of a.txt has 501 tokens"),
        (["--data_dir=/nowhere"], "neither a folder nor a file"),
        (["--methods=adamv"], "or adamw. Short names are adamw"),
        (["--methods=top_k(0.1)"], "is a compressor; write error_feedback(top_k(0.1)) | sgd"),
        (["--methods=cosine(0.1)"], "cosine(0.1)"),
        (["--lr=muon=x"], "positive number"),
        (["--size=7B"], "--size"),
        (["--seeds=0"], "at least one run"),
        (["surplus"], "unexpected argument 'surplus'"),
    ],
)
def test_what_cannot_work_is_one_line_before_anything_is_written(
    run: Callable[..., Path], tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        run("out", *words)
    text = str(caught.value.code)
    assert text.startswith("error: ") and "\n" not in text and message in text
    assert not (tmp_path / "out").exists()


def test_short_names_are_expressions_that_take_the_rate_of_lr() -> None:
    methods = Methods(", ".join(SHORT), ["adamw=0.5"], steps=100, warmup=0.1)
    assert methods.rates["adamw"] == 0.5 and methods.rates["muon"] == 0.01
    assert methods.expressions["adamw"] == SHORT["adamw"].format(rate=0.5)
    assert [methods.period(name) for name in ("adamw", "diloco", "sparse_loco")] == [1, 15, 15]


def test_the_schedule_rises_then_falls_to_a_tenth_of_its_peak() -> None:
    methods = Methods("sgd(cosine(0.1))", [], steps=100, warmup=0.1)
    (call,) = [c for c in methods.parsed("sgd(cosine(0.1))").calls() if c.name == "cosine"]
    schedule = call.build("data")
    found = [float(schedule(step)) for step in (0, 5, 10, 55, 100)]
    np.testing.assert_allclose(found, [0.0, 0.05, 0.1, 0.055, 0.01], rtol=1e-5, atol=1e-8)


def test_held_out_rows_are_padded_to_the_devices_and_counted_once() -> None:
    rows, real = lm.batched(np.ones((5, 3), np.int32), devices=4)
    assert rows.shape == (1, 8, 3) and real.sum() == 5 and rows.sum() == 15
    rows, real = lm.batched(np.ones((130, 3), np.int32), devices=4)
    assert rows.shape == (3, 64, 3) and real.sum() == 130


PRESETS = sorted((ROOT / "experiments" / "presets").glob("lm_*.flags"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_presets_are_complete_and_say_what_they_are(preset: Path) -> None:
    lm.FLAGS.unparse_flags()
    lm.FLAGS(["lm", f"--flagfile={preset}"])
    Methods(lm.FLAGS.methods, lm.FLAGS.lr, lm.FLAGS.steps, lm.FLAGS.warmup)
    assert lm.FLAGS.steps % lm.FLAGS.eval_every == 0
    header = preset.read_text().split("\n--")[0]
    for word in ("Result:", "Command:", "Hardware:", "Learning rates:"):
        assert word in header, f"{preset.name} does not state its {word}"


@pytest.mark.slow
def test_the_preset_for_a_gpu_at_a_thousandth_of_its_steps(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a small model, because eight programs are compiled."""
    monkeypatch.setitem(SIZES, "10M", Size(layers=1, width=16, heads=2))
    words = (ROOT / "experiments" / "presets" / "lm_gpu.flags").read_text().splitlines()
    given = [word for word in words if word.startswith("--")]
    given += ["--steps=1", "--eval_every=1", "--length=8", "--batch_size=1", "--eval_tokens=64"]
    given = [word for word in given if not word.startswith("--out_dir")]
    folder = run("preset", *given)
    rows = storage.read_rows(folder)
    assert len(rows) == 8 and all(math.isfinite(row["test_loss"]) for row in rows)
