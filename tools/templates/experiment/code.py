"""What the experiment asks, in one line.

```
python -m experiments.new_name
```

What is computed, by which paper, and what the reader should see.

Result (2 CPU cores, how long): the numbers.
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

import ef_optax as ef
from experiments import study

STUDY = study.Study("new_name", __doc__)
FLAGS = STUDY.flags
flags.DEFINE_integer("steps", 200, "Steps of descent.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Seed of the problem.", flag_values=FLAGS)


def optimizers() -> dict[str, optax.GradientTransformation]:
    """The methods by the names that the table shows."""
    return {
        "sgd": optax.sgd(0.1),
        "top_1": optax.chain(ef.compressed_mean(ef.top_k(k=1)), optax.sgd(0.1)),
        "ef_top_1": optax.chain(ef.error_feedback(ef.top_k(k=1)), optax.sgd(0.1)),
    }


def run() -> None:
    """Runs all methods, writes the table and the picture."""
    folder = STUDY.open()
    target = jnp.asarray(np.random.default_rng(FLAGS.seed).normal(size=10))

    ####################################################################################
    # Measure
    ####################################################################################
    distances = {}
    for name, tx in optimizers().items():
        iterates = study.descend(
            tx,
            lambda w, _: w - target,
            jnp.zeros(10),
            FLAGS.steps,
            jax.random.key(0),
            lambda w, _: w,
        )
        distances[name] = np.linalg.norm(iterates - target, axis=-1)
    rows = [{"method": name, "distance": float(d[-1])} for name, d in distances.items()]
    cells = [[f"`{row['method']}`", f"{row['distance']:.2g}"] for row in rows]
    text = "# What it asks\n\n" + study.markdown(["method", "distance to the optimum"], cells)

    ####################################################################################
    # Draw
    ####################################################################################
    figure, axes = study.panels(1, 1, (6, 4))
    colours = (study.BLACK, study.VERMILION, study.BLUE)
    for (name, values), colour in zip(distances.items(), colours, strict=True):
        axes[0, 0].plot(values, color=colour, label=name)
    axes[0, 0].set(xlabel="step", ylabel="distance to the optimum", yscale="log")
    axes[0, 0].legend(frameon=False)
    STUDY.close(folder, rows, text, figure)


def main(argv: list[str]) -> None:
    """Runs the study with these arguments; the first is the program's name."""
    STUDY.main(run, argv)


if __name__ == "__main__":
    main(sys.argv)
