"""What methods are worth on a language model: rates, seeds, sizes and lengths, and their tables.

```
python -m experiments.lm_study --data_dir=DIR                  # trains what is missing
python -m experiments.lm_study --data_dir=DIR --stages=tuned,seeds
python -m experiments.lm_study --report                        # the tables and the picture alone
```

Every finished run is one line of --records, so an interrupted study goes on where it was. Eight
simulated workers read other parts of the same text; a method is compiled once for all of its rates
and seeds. Rates are tuned by steps on `RATES`: from the middle to a neighbour while it is better.
"""

from __future__ import annotations

import functools
import os

os.environ.setdefault("PJRT_NPROC", "16")  # see experiments/train.py

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optax
from absl import flags

import ef_optax as ef
from ef_optax.measure.planner.links import seconds
from ef_optax.measure.planner.named import period_of
from experiments import lm, lm_study_report, programs, storage, study
from experiments.arguments import UsageError
from experiments.lm_study_report import Records
from experiments.programs import Programs
from experiments.workers import AXIS

FLAGS = flags.FlagValues()
_GIVEN: dict[str, Any] = {"flag_values": FLAGS}
_RECORDS = str(Path(__file__).parent / "records" / "lm_study.jsonl")
flags.DEFINE_string("records", _RECORDS, "The finished runs, one a line.", **_GIVEN)
flags.DEFINE_string("out_dir", "runs/lm_study", "Where study.md and study.png go.", **_GIVEN)
flags.DEFINE_string("data_dir", None, "A text, as for experiments.lm.", **_GIVEN)
flags.DEFINE_list("stages", [], "Which of them; default: all, in their order.", **_GIVEN)
flags.DEFINE_bool("report", False, "Train nothing.", **_GIVEN)
flags.DEFINE_string("step_time", "10ms", "Computation of a step, for the seconds.", **_GIVEN)

ADAMW, MUON = "adamw(cosine(PEAK), b2=0.99)", "muon(cosine(PEAK))"
EF14, EF21M = "error_feedback({})", "ef21_momentum({}, fresh_weight=0.1)"
PLAIN = "compressed_mean({})"


def _sparse_loco(period: int, ratio: float, also: str = "") -> str:
    compressor = f"compose(sigma_bins(2), top_k({ratio}))"
    return f"local.sparse_loco({ADAMW}, {period}, {compressor}{also})"


METHODS = {
    "AdamW": f"{PLAIN.format('identity()')} | {ADAMW}",
    "AdamW, top-k, EF14": f"{EF14.format('top_k(0.01)')} | {ADAMW}",
    "AdamW, top-k, EF21-SGDM": f"{EF21M.format('top_k(0.01)')} | {ADAMW}",
    "AdamW, top-k, no memory": f"{PLAIN.format('top_k(0.01)')} | {ADAMW}",
    "AdamW, top-k, EF21": f"ef21(top_k(0.01)) | {ADAMW}",
    "Muon": f"{PLAIN.format('identity()')} | {MUON}",
    "Muon, top-k, EF14": f"{EF14.format('top_k(0.01)')} | {MUON}",
    "Muon, top-k, EF21-SGDM": f"{EF21M.format('top_k(0.01)')} | {MUON}",
    "Muon, top-k, no memory": f"{PLAIN.format('top_k(0.01)')} | {MUON}",
    "DiLoCo, H = 15": f"local.diloco({ADAMW}, 15)",
    "DiLoCo, H = 30": f"local.diloco({ADAMW}, 30)",
    "SparseLoCo 3%, H = 15": _sparse_loco(15, 0.03),
    "SparseLoCo 3%, H = 15, all workers": _sparse_loco(15, 0.03, ", mean='workers'"),
    "SparseLoCo 0.5%, H = 15": _sparse_loco(15, 0.005),
    "SparseLoCo 1.6%, H = 15": _sparse_loco(15, 0.016),
    "SparseLoCo 6%, H = 15": _sparse_loco(15, 0.06),
    "SparseLoCo 3%, H = 30": _sparse_loco(30, 0.03),
    "SparseLoCo 3%, H = 100": _sparse_loco(100, 0.03),
    "MuLoCo, H = 15": "recipes.muloco(cosine(PEAK), 15)",
    "AdamW, sign, EF14": f"{EF14.format('scaled_sign()')} | {ADAMW}",
    "AdamW, sign, EF21-SGDM": f"{EF21M.format('scaled_sign()')} | {ADAMW}",
    "AdamW, sign, no memory": f"{PLAIN.format('scaled_sign()')} | {ADAMW}",
    "AdamW, top-k, EF14, mean of senders": (
        f"{EF14.format('exchanges.mean_of_senders(top_k(0.01))')} | {ADAMW}"
    ),
    "AdamW, ARC-top-k, EF14": f"{EF14.format('arc_top_k(0.01, key=0)')} | {ADAMW}",
    "AdamW, PowerSGD rank 4, EF14": f"{EF14.format('power_sgd(4, key=0)')} | {ADAMW}",
    "AdamW, 4 bits, EF14": f"{EF14.format('block_quantize(4)')} | {ADAMW}",
    "AdamW, 2-bit top-k, EF14": f"{EF14.format('compose(sigma_bins(2), top_k(0.01))')} | {ADAMW}",
    "1-bit Adam": "recipes.one_bit_adam(cosine(PEAK), 40, b2=0.99)",
    "DeMo": "recipes.demo(cosine(PEAK))",
    "Dion2, a quarter": "recipes.dion2(cosine(PEAK), 0.25)",
    "EF21-Muon": "recipes.ef21_muon(cosine(PEAK), top_k(0.01))",
}
"""The methods by the name that the tables have."""

DENSE_STEPS = {"1-bit Adam": 40, "EF21-Muon": 1}
"""The steps at the start in which these send whole gradients."""

RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
MIDDLE = 2
STEPS, EVALUATIONS = 200, 5


class Stage(NamedTuple):
    """Some methods, all with the same rates and seeds.

    Attributes:
      size: of the model.
      methods: names in `METHODS`.
      rates: "tune" (on `RATES`), "best" (the best of those that are known) or "middle".
      seeds: of every run.
      steps: of every run.
    """

    size: str
    methods: tuple[str, ...]
    rates: str
    seeds: tuple[int, ...] = (0,)
    steps: int = STEPS

    @property
    def setting(self) -> str:
        """What the records call the size and the number of steps."""
        return self.size if self.steps == STEPS else f"{self.size}, {self.steps} steps"


LEADING = (
    "AdamW",
    "AdamW, top-k, EF14",
    "AdamW, top-k, EF21-SGDM",
    "AdamW, top-k, no memory",
    "Muon",
    "Muon, top-k, EF14",
    "Muon, top-k, EF21-SGDM",
    "Muon, top-k, no memory",
)
REPEATED = LEADING + (
    "AdamW, 4 bits, EF14",
    "DeMo",
    "1-bit Adam",
    "MuLoCo, H = 15",
    "AdamW, PowerSGD rank 4, EF14",
    "AdamW, sign, EF14",
    "AdamW, sign, no memory",
    "SparseLoCo 3%, H = 15",
    "DiLoCo, H = 15",
)
SIZES = ("AdamW", "AdamW, top-k, EF14", "AdamW, top-k, EF21-SGDM", "DiLoCo, H = 15")
LENGTHS = ("AdamW", "AdamW, top-k, EF14", "AdamW, top-k, no memory", "AdamW, top-k, EF21-SGDM")
STAGES = {
    "leading": Stage("0.2M", LEADING, "middle"),
    "tuned": Stage("0.2M", LEADING, "tune"),
    "all": Stage("0.2M", tuple(METHODS), "tune"),
    "seeds": Stage("0.2M", REPEATED, "best", (0, 1, 2)),
    "size": Stage("1M", SIZES, "best"),
    "length": Stage("0.2M", LENGTHS, "tune", steps=1000),
    "length_seeds": Stage("0.2M", LENGTHS, "best", (0, 1, 2), steps=1000),
}
"""In the order in which they run."""


########################################################################################
# Training
########################################################################################


class Trainer:
    """Runs of one setting, each of which becomes a line of the records."""

    def __init__(self, stage: Stage, data_dir: str, records: Records) -> None:
        self.setting, self.steps, self.records = stage.setting, stage.steps, records
        lm.FLAGS.unparse_flags()
        lm.FLAGS(
            ["lm", "--simulate", f"--size={stage.size}", f"--steps={stage.steps}"]
            + [f"--eval_every={stage.steps // EVALUATIONS}", "--eval_tokens=8192"]
            + ["--batch_size=1", "--methods=adamw", f"--data_dir={data_dir}"]
        )
        job = lm.prepare()
        self.team, self.task, config = job.team, job.task, job.config
        if self.setting not in records.about:
            names = ("hardware", "parameters", "dense_bytes", "tokens_per_step")
            about = {name: config["about"][name] for name in names} | {"steps": stage.steps}
            about |= {"versions": config["versions"], "data": config["data"]}
            records.add({"setting": self.setting, "about": about})

    def losses_of(self, name: str) -> Callable[[float, int], float]:
        """(rate, seed) -> the held-out loss at the end; nothing that is known runs again."""
        compiled: list[Programs] = []

        def loss(rate: float, seed: int) -> float:
            known = self.records.loss(self.setting, name, rate, seed)
            if known is not None:
                return known
            if not compiled:
                compiled.append(self.compile(name))
            row = {"setting": self.setting, "method": name, "rate": rate, "seed": seed}
            self.records.add(row | self.run(compiled[0], rate, seed))
            found = self.records.loss(self.setting, name, rate, seed)
            assert found is not None
            print(f"{self.setting}, {name}, rate {rate:g}, seed {seed}: {found:.4f}", flush=True)
            return found

        return loss

    def compile(self, name: str) -> Programs:
        """One program for all rates and seeds; the records get the bytes of its steps."""
        chain = functools.partial(build, METHODS[name], self.steps)
        made = programs.build(chain, ef.identity(), self.task.training, self.team)
        if (self.setting, name) not in self.records.wire:
            period = period_of(ef.parse(_calls(METHODS[name]), _schedule(1.0, self.steps)))
            wire = made.wire | ({"period": period} if period > 1 else {})
            wire |= {"dense_steps": DENSE_STEPS[name]} if name in DENSE_STEPS else {}
            row = {
                "setting": self.setting,
                "method": name,
                "wire": wire,
                "expression": METHODS[name],
            }
            self.records.add(row)
        return made

    def run(self, compiled: Programs, rate: float, seed: int) -> dict[str, list[float]]:
        """Training losses as means of ten steps, and held-out losses; 1e30 is lost."""
        task, state = self.task, compiled.create(seed)
        train, held_out = [], []
        for epoch in range(task.epochs):
            for batches in task.training.batches(seed, epoch):
                state, losses = compiled.run_block(state, np.float32(rate), batches)
                train += np.asarray(losses).mean(1).reshape(-1, 10).mean(1).tolist()
            held_out.append(task.evaluate(state.params, {})["test_loss"])
        return {
            "train": [round(min(x, 1e30), 4) if math.isfinite(x) else 1e30 for x in train],
            "held_out": [round(x, 5) for x in held_out],
        }


def _calls(text: str) -> str:
    return text.replace("cosine(PEAK)", "cosine()")


def _schedule(peak: Any, steps: int) -> dict[str, Callable[..., Any]]:
    unit = optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 10, steps, 0.1)
    return {"cosine": lambda: lambda step: peak * unit(step)}


def build(text: str, steps: int, peak: Any) -> optax.GradientTransformationExtraArgs:
    """The optimizer of one worker; the peak of its schedule may be traced."""
    schedule = _schedule(peak, steps)
    return optax.with_extra_args_support(ef.parse(_calls(text), schedule).build(AXIS))


def train(stage: Stage, data_dir: str, records: Records) -> None:
    """Runs what the records do not have yet."""
    trainer = functools.cache(lambda: Trainer(stage, data_dir, records))
    for name in stage.methods:
        known = functools.partial(records.loss, stage.setting, name)
        if stage.rates == "tune":
            if not is_tuned(known):
                tune(trainer().losses_of(name))
            continue
        best = records.best_rate(stage.setting, name) or records.best_rate("0.2M", name)
        rate = best if stage.rates == "best" and best else RATES[MIDDLE]
        missing = [seed for seed in stage.seeds if known(rate, seed) is None]
        loss = trainer().losses_of(name) if missing else known
        for seed in missing:
            loss(rate, seed)


def tune(loss: Callable[[float, int], float]) -> float:
    """The rate with the lowest loss, by steps from the middle of `RATES`.

    >>> tune(lambda rate, seed: abs(rate - 0.001))
    0.001
    """
    return RATES[_descend(lambda i: loss(RATES[i], 0))]


def is_tuned(known: Callable[[float, int], float | None]) -> bool:
    """Whether `tune` would run nothing, from losses that may not be known yet."""
    try:
        _descend(lambda i: _must(known(RATES[i], 0)))
    except LookupError:
        return False
    return True


def _must(loss: float | None) -> float:
    if loss is None:
        raise LookupError
    return loss


def _descend(value: Callable[[int], float]) -> int:
    best = MIDDLE
    for direction in (-1, 1):
        while 0 <= best + direction < len(RATES) and value(best + direction) < value(best):
            best += direction
        if best != MIDDLE:
            break
    return best


########################################################################################
# The command
########################################################################################


def _stages() -> Iterator[Stage]:
    for name in FLAGS.stages or STAGES:
        if name not in STAGES:
            raise UsageError(f"--stages: {name!r} is none of {', '.join(STAGES)}")
        yield STAGES[name]


def run() -> None:
    """Trains what is missing and writes the tables."""
    stages, records = list(_stages()), Records(Path(FLAGS.records))
    try:
        seconds(FLAGS.step_time, "step_time")
    except ValueError as error:  # before hours of training, not after
        raise UsageError(str(error)) from None
    if not FLAGS.report:
        if not FLAGS.data_dir:
            raise UsageError("give --data_dir=DIR with a text, or --report for the tables alone")
        for stage in stages:
            train(stage, FLAGS.data_dir, records)
    out_dir = storage.folder(FLAGS.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    text = lm_study_report.write(records, out_dir, FLAGS.step_time)
    print(text + f"\nWritten: {out_dir / 'study.md'}, {out_dir / 'study.png'}")


def main(argv: list[str]) -> None:
    """Runs with these arguments; the first is the program's name."""
    study.command(FLAGS, __doc__ or "", argv, run)


if __name__ == "__main__":
    main(sys.argv)
