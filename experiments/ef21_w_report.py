"""The table, the measurements and the panels that the forms of the EF21-W study share."""

from __future__ import annotations

from typing import Any

from experiments import study
from experiments.ef21_w_methods import METHODS, TOLERANCE, Outcome


def measurements(name: str, form: str, outcomes: dict[Any, Outcome]) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl: one for each method, one for the problem."""
    outcome, place = outcomes[name, form], {"problem": name, "form": form}
    rows = [
        place
        | {"method": method, "step": outcome.steps[method]}
        | {"rounds": outcome.needed[method], "end": float(values[-1])}
        for method, values in outcome.curves.items()
    ]
    constants = outcome.constants
    rows.append(place | {"apart": outcome.apart, "gain": outcome.gain, "gained": outcome.gained})
    rows[-1] |= {key: getattr(constants, key) for key in ("L", "L_AM", "L_QM", "L_var")}
    return rows


def words(count: int | None) -> str:
    """A number of rounds, or a dash for more than were run."""
    return "-" if count is None else f"{count:,}"


def table_of(outcomes: dict[str, Outcome]) -> str:
    """The constants and the rounds of the exact form."""
    head = ["L_i", "n", "L_AM", "L_QM", "L_var", "step ratio", *METHODS, "apart"]
    cells = [
        [name, f"{o.constants.num_workers:,}", f"{o.constants.L_AM:.4g}"]
        + [f"{o.constants.L_QM:.4g}", f"{o.constants.L_var:.3g}", f"{o.gain:.2f}"]
        + [words(o.needed[method]) for method in METHODS]
        + [f"{o.apart:.0e}"]
        for name, o in outcomes.items()
    ]
    return study.markdown(head, cells)


def notes(workers: int, rounds: int) -> str:
    """What the columns mean."""
    return (
        f"\n- {workers:,} workers, top-1, theory steps. Rounds until the squared gradient norm is "
        f"{TOLERANCE:g} of the first; - where {rounds:,} rounds were not enough.\n"
        "- step ratio: of EF21-W, and EF21 (AM), to EF21 (QM). apart: largest difference of the "
        "curves of EF21 (AM) and EF21-W, which start at 1.\n"
    )


def draw(axis: Any, name: str, outcome: Outcome) -> None:
    """The curves of one problem, up to the end of the slowest."""
    for method, y in outcome.curves.items():
        label, colour, dashes, width = METHODS[method]
        axis.plot(y, color=colour, linestyle=dashes, lw=width, label=label)
    length = len(outcome.curves["ef21_w"]) - 1
    reached = [count for count in outcome.needed.values() if count]
    most = min(length, 1.1 * max(reached)) if reached else length
    axis.set_title(f"{name}\nstep {outcome.gain:.3g} times as long", fontsize=11)
    axis.set(xlabel="round", yscale="log")
    axis.set(xlim=(0, most), ylim=(TOLERANCE / 3 if reached else TOLERANCE * 10, 2))
