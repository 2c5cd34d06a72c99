"""Every combination of --sweep has its own folder and its own values, and one table joins them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from absl import flags

from experiments import comparison, storage, sweep
from experiments.arguments import Diverged, UsageError


@pytest.fixture
def values() -> flags.FlagValues:
    made = flags.FlagValues()
    comparison.define_flags(made, out_dir="runs/none", seeds=2)
    flags.DEFINE_integer("steps", 1, "A flag of the job.", flag_values=made)
    flags.DEFINE_integer("workers", 1, "Fixed in a process.", flag_values=made)
    flags.DEFINE_bool("multihost", False, "Not with a sweep.", flag_values=made)
    flags.DEFINE_string("methods", "", "Has names in braces.", flag_values=made)
    return made


def job_of(values: flags.FlagValues, seen: list[str]) -> Callable[[], None]:
    """Writes what a comparison writes, with a loss that is 100 times the rate over the steps."""

    def job() -> None:
        seen.append(f"{values.methods} {values.steps} {values.resume}")
        out, rate = Path(values.out_dir), float(values.methods.partition("(")[2].rstrip(")"))
        config = {
            "flags": {"methods": [values.methods], "seeds": values.seeds},
            "about": {"quantity": "loss"},
        }
        out.mkdir(parents=True)
        storage.write_text(out / "config.json", json.dumps(config))
        if rate > 1:
            raise Diverged(f"{values.methods}, seed 0: the loss is not finite")
        for seed in range(values.seeds):
            row = {"method": values.methods, "seed": seed, "epoch": 1}
            storage.append_row(out, row | {"test_loss": 100 * rate / values.steps + seed})
        wire = {values.methods: {"message_bytes": 4000, "link_bytes": 1}}
        storage.write_text(out / "wire.json", json.dumps(wire))

    return job


def test_all_combinations_run_and_one_table_joins_them(
    values: flags.FlagValues, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"--out_dir={tmp_path}", "--methods=sgd({rate})", "--resume"]
    monkeypatch.setattr("sys.argv", ["lm", *words, "--sweep=rate=0.1,0.2,9; steps=1,10"])
    values(sweep.sys.argv)
    seen: list[str] = []
    sweep.run(values, job_of(values, seen))
    assert seen == [
        f"sgd({rate}) {steps} True" for rate in ("0.1", "0.2", "9") for steps in ("1", "10")
    ]
    assert (tmp_path / "rate=0.2,steps=10" / "config.json").exists()
    lines = (tmp_path / "sweep.md").read_text().splitlines()
    # 100 x 0.1 / 10 and 1 more for the second seed: mean 1.5, sample deviation sqrt(1/2).
    assert "| 0.1 | 10 | `sgd(0.1)` | **1.5000 ± 0.7071** | 4,000 |" in lines
    assert "| 0.2 | 1 | `sgd(0.2)` | 20.5000 ± 0.7071 | 4,000 |" in lines
    assert "| 9 | 10 | `sgd(9)` | lost |  |" in lines


def test_without_a_sweep_the_job_runs_once(values: flags.FlagValues, tmp_path: Path) -> None:
    values(["lm", f"--out_dir={tmp_path / 'one'}", "--methods=sgd(0.1)"])
    seen: list[str] = []
    sweep.run(values, job_of(values, seen))
    assert len(seen) == 1 and not (tmp_path / "sweep.md").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rate", "is not name=value,value"),
        ("rate=1; rate=2", "with a new name"),
        ("rat=1", "rat is no flag and stands nowhere in braces; is it rate"),
        ("steps=1", "there are no values for {rate}"),
        ("workers=1,2", "workers cannot change within a sweep"),
    ],
)
def test_a_sweep_that_means_nothing_is_refused(
    values: flags.FlagValues, text: str, words: str
) -> None:
    values(["lm", "--methods=sgd({rate})"])
    with pytest.raises(UsageError, match=words):
        sweep.parse(text, values)


def test_values_may_be_expressions_with_commas(values: flags.FlagValues) -> None:
    values(["lm", "--methods=error_feedback({codec}) | sgd(0.1)"])
    found = sweep.parse("codec=top_k(0.1), compose(sigma_bins(2), top_k(0.1))", values)
    assert found == {"codec": ["top_k(0.1)", "compose(sigma_bins(2), top_k(0.1))"]}
