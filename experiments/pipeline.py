"""A transformer cut in two: what activations in few bits do to the loss, and to the bytes.

```
python -m experiments.pipeline
```

The bundled sonnets, by character, and a transformer whose halves are two stages of a mesh. What
crosses the cut is compressed in both directions: directly, or by AQ-SGD as the difference from the
last activations of the same window of text. All runs have the same start, order of windows, rate
and number of steps. Three losses (nats per character) tell them apart: of the training windows in
the last epoch, and of held-out text, with dense activations and with those of the forward
compressor, because a model that was trained with an error may need it.

Each device holds all parameters, to keep the script short, and computes with those of its own
stage; the sum of the gradients over the stages is not counted as traffic of the cut.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jax.sharding import PartitionSpec as P

import ef_optax as ef
from experiments import study, text
from experiments.transformer import Block, Size, Transformer

STUDY = study.Study("pipeline", __doc__)
FLAGS = STUDY.flags
flags.DEFINE_string("data_dir", None, "A text; by default the bundled sonnets.", flag_values=FLAGS)
flags.DEFINE_integer("epochs", 40, "Passes over the windows.", lower_bound=2, flag_values=FLAGS)
flags.DEFINE_integer("batch_size", 64, "Windows in a step.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("length", 32, "Characters in a window.", lower_bound=2, flag_values=FLAGS)
flags.DEFINE_integer("width", 32, "Of the activations.", lower_bound=4, flag_values=FLAGS)
flags.DEFINE_integer("layers", 2, "Blocks, half of them on each side.", 2, flag_values=FLAGS)
flags.DEFINE_integer("windows", 512, "Training windows; 0: all.", 0, flag_values=FLAGS)
flags.DEFINE_float("lr", 3e-3, "Adam's learning rate.", 0, flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Of the start and the order.", flag_values=FLAGS)
flags.DEFINE_list("methods", None, "Some of METHODS; all by default.", flag_values=FLAGS)

STAGES = "stage"


class Method(NamedTuple):
    """How activations and gradients cross: expressions of `ef.parse`; None is dense."""

    forward: str | None
    backward: str | None
    remembers: bool = False  # AQ-SGD


def bits(count: int) -> str:
    return f"block_quantize({count})"


METHODS = {
    "dense": Method(None, None),
    **{f"direct {n}/8": Method(bits(n), bits(8)) for n in (4, 3, 2)},
    **{f"aq-sgd {n}/8": Method(bits(n), bits(8), remembers=True) for n in (4, 3, 2)},
    "direct 4/4": Method(bits(4), bits(4)),
    "aq-sgd 4/4": Method(bits(4), bits(4), remembers=True),
    "direct top-k 0.1": Method("top_k(0.1)", bits(8)),
    "aq-sgd top-k 0.1": Method("top_k(0.1)", bits(8), remembers=True),
}
"""Forward/backward bits a value; blocks of 256 values have a scale of 32 bits."""

LOOKS = {
    "dense": (study.BLACK, ":"),
    "direct": (study.VERMILION, "--"),
    "aq-sgd": (study.BLUE, "-"),
}

########################################################################################
# The model in two halves
########################################################################################


def first_half(model: Transformer, params: Any, tokens: jax.Array) -> jax.Array:
    """The embedding and the first half of the blocks of `Transformer`."""
    embed = nn.Embed(model.vocabulary, model.size.width, model.dtype)
    x = embed.apply({"params": params["embedding"]}, tokens)
    return _blocks(model, params, range(model.size.layers // 2), x)


def second_half(model: Transformer, params: Any, x: jax.Array) -> jax.Array:
    """The other blocks, the last norm and the head."""
    x = _blocks(model, params, range(model.size.layers // 2, model.size.layers), x)
    x = nn.RMSNorm(dtype=model.dtype).apply({"params": params["norm"]}, x)
    head = nn.Dense(model.vocabulary, False, model.dtype)
    return head.apply({"params": params["head"]}, x)


def _blocks(model: Transformer, params: Any, layers: range, x: jax.Array) -> jax.Array:
    block = Block(model.size, model.dtype)
    for layer in layers:
        x = block.apply({"params": params[f"block_{layer}"]}, x)
    return x


def cross_entropy(logits: jax.Array, windows: jax.Array) -> jax.Array:
    """Nats per character."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
    return jnp.mean(losses)


########################################################################################
# Training over the cut
########################################################################################


def cut_of(method: Method, examples: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`(init, apply)` of a cut between the stages, as `ef.activations.aq_sgd` has them."""
    forward = ef.parse(method.forward or "identity").build()
    backward = ef.parse(method.backward or "identity").build()
    if method.remembers:
        return ef.activations.aq_sgd(
            forward, backward, num_examples=examples, memory="bfloat16", axis_name=STAGES
        )
    cut = ef.activations.compress_activations(forward, backward, axis_name=STAGES)
    return lambda x: (), lambda x, state, index: (cut(x), state)


def stepper(
    model: Transformer, tx: optax.GradientTransformation, cut: Any, mesh: jax.sharding.Mesh
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`start(windows)` makes the state of the cut; `step` trains on a batch of windows."""
    init, apply = cut
    mapped = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)

    def hidden_like(windows: Any) -> jax.ShapeDtypeStruct:
        shape = (len(windows), windows.shape[1] - 1, model.size.width)
        return jax.ShapeDtypeStruct(shape, model.dtype)

    def start(windows: Any) -> Any:
        return jax.tree.map(lambda x: x[None], init(hidden_like(windows)))

    def loss(params: Any, state: Any, windows: jax.Array, index: jax.Array) -> Any:
        stage, like = jax.lax.axis_index(STAGES), hidden_like(windows)
        x = jax.lax.cond(
            stage == 0,
            lambda: first_half(model, params, windows[:, :-1]),
            lambda: jnp.zeros(like.shape, like.dtype),
        )
        x, state = apply(x, state, index)
        value = jax.lax.cond(
            stage == 1,
            lambda: cross_entropy(second_half(model, params, x), windows),
            lambda: jnp.zeros(()),
        )
        return value, state

    def local(params: Any, state: Any, windows: jax.Array, index: jax.Array) -> Any:
        own = jax.tree.map(lambda x: x[0], state)
        (value, own), gradient = jax.value_and_grad(loss, has_aux=True)(params, own, windows, index)
        value, gradient = jax.lax.psum((value, gradient), STAGES)
        return value, gradient, jax.tree.map(lambda x: x[None], own)

    whole, rows = P(), P(STAGES)
    differentiate = mapped(
        local, in_specs=(whole, rows, whole, whole), out_specs=(whole, whole, rows)
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params: Any, opt_state: Any, state: Any, windows: Any, index: Any) -> Any:
        value, gradient, state = differentiate(params, state, windows, index)
        updates, opt_state = tx.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, state, value

    return jax.jit(mapped(start, in_specs=whole, out_specs=rows)), step


@functools.cache
def held_out_loss(model: Transformer, forward: str | None) -> Callable[..., jax.Array]:
    """The loss with the activations of a forward compressor, in one process."""
    cut = ef.activations.compress_activations(ef.parse(forward or "identity").build())

    @jax.jit
    def loss(params: Any, windows: jax.Array) -> jax.Array:
        x = cut(first_half(model, params, windows[:, :-1]))
        return cross_entropy(second_half(model, params, x), windows)

    return loss


def permuted(compiled: Any) -> tuple[int, int]:
    """Bytes that the cut's messages have in a step, and in one of first visits."""
    sent = ef.wire_report(compiled).of("permute").collectives
    always = sum(c.message_bytes for c in sent if not c.conditional)
    branches = [c.message_bytes for c in sent if c.conditional] or [0]
    return always + min(branches), always + max(branches)


def train(
    method: Method, model: Transformer, params: Any, windows: np.ndarray, held_out: np.ndarray
) -> dict[str, Any]:
    """One run: the training loss by epoch, the final held-out losses, and the bytes of a step."""
    tx = optax.adam(FLAGS.lr)
    mesh = jax.make_mesh((2,), (STAGES,), devices=jax.devices()[:2])
    start, step = stepper(model, tx, cut_of(method, len(windows)), mesh)
    batch = min(FLAGS.batch_size, len(windows))
    params, opt_state = jax.device_put(
        (params, tx.init(params)), jax.sharding.NamedSharding(mesh, P())
    )
    state = start(windows[:batch])
    compiled = step.lower(
        params, opt_state, state, windows[:batch], np.arange(batch, dtype=np.int32)
    ).compile()
    rng, curve = np.random.default_rng(FLAGS.seed), []
    for _ in range(FLAGS.epochs):
        order, losses = rng.permutation(len(windows)).astype(np.int32), []
        for i in range(len(windows) // batch):
            index = order[i * batch : (i + 1) * batch]
            params, opt_state, state, loss = compiled(
                params, opt_state, state, windows[index], index
            )
            losses.append(float(loss))
        curve.append(float(np.mean(losses)))
    params = jax.device_get(params)
    usual, first = permuted(compiled)
    return {
        "curve": curve,
        "train": curve[-1],
        "held_out": float(held_out_loss(model, None)(params, held_out)),
        "held_out_compressed": float(held_out_loss(model, method.forward)(params, held_out)),
        "bytes": usual,
        "bytes_first": first,
    }


########################################################################################
# The study
########################################################################################


def run() -> None:
    """Trains with every method, writes the table and the picture."""
    with jax.enable_x64(False):
        _run()


def _run() -> None:
    names = FLAGS.methods or list(METHODS)
    if unknown := [name for name in names if name not in METHODS]:
        raise flags.IllegalFlagValueError(
            f"flag --methods={','.join(unknown)}: choose of {', '.join(METHODS)}."
        )
    if len(jax.devices()) < 2:
        raise flags.Error(
            "the two stages need 2 devices; on a CPU start with "
            "XLA_FLAGS=--xla_force_host_platform_device_count=2"
        )
    folder, data = STUDY.open(), text.load(FLAGS.data_dir)
    size = Size(FLAGS.layers, FLAGS.width, max(1, FLAGS.width // 16))
    model, length = Transformer(data.vocabulary, size), FLAGS.length + 1
    windows = data.train.spread(FLAGS.windows or len(data.train), length)
    held_out = data.held_out.spread(256, length)
    params = jax.jit(model.init)(jax.random.key(FLAGS.seed), windows[:1, :-1])["params"]
    rows = []
    for name in names:
        result = train(METHODS[name], model, jax.device_get(params), windows, held_out)
        rows.append({"method": name} | result)
        print(f"{name}: loss {result['train']:.4f}, held out {result['held_out']:.4f}", flush=True)
    head = ["method", "training loss", "held out", "held out, compressed", "bytes a step", "factor"]
    head.append("bytes at first visits")
    dense = next((row["bytes"] for row in rows if row["method"] == "dense"), None)
    cells = [
        [
            row["method"],
            *(f"{row[key]:.3f}" for key in ("train", "held_out", "held_out_compressed")),
            f"{row['bytes']:,}",
            f"{dense / row['bytes']:.1f}" if dense else "",
            f"{row['bytes_first']:,}" if METHODS[row["method"]].remembers else "",
        ]
        for row in rows
    ]
    words = (
        f"\n- {FLAGS.layers} blocks of width {FLAGS.width}; {len(windows)} windows of "
        f"{FLAGS.length} characters of {data.name}; {FLAGS.epochs} epochs in batches of "
        f"{FLAGS.batch_size}; Adam at {FLAGS.lr:g}; seed {FLAGS.seed}. Losses are in nats per "
        "character. Bytes are those of both directions in the compiled program.\n"
    )
    figure, axes = study.panels(1, 2, (10.5, 4.4), sharey=True)
    for row in rows:
        kind = row["method"].split()[0]
        colour, dashes = LOOKS[kind]
        place = axes[0, int("top-k" in row["method"])]
        for axis in axes[0] if kind == "dense" else [place]:
            axis.plot(
                range(1, len(row["curve"]) + 1),
                row["curve"],
                color=colour,
                linestyle=dashes,
                lw=2.2 if "2/" in row["method"] else 1.3,
                alpha=0.5 if "/4" in row["method"] else 1.0,
                label=row["method"],
            )
    for axis, title in zip(axes[0], ("quantised", "top-k of a tenth"), strict=True):
        axis.set(title=title, xlabel="epoch")
        axis.legend(frameon=False, fontsize=8)
    axes[0, 0].set(ylabel="training loss (nats per character)")
    table = "# A transformer in two stages\n\n" + study.markdown(head, cells)
    STUDY.close(folder, rows, table + words, figure)


def main(argv: list[str]) -> None:
    """Runs the study with these arguments; the first is the program's name."""
    STUDY.main(run, argv)


if __name__ == "__main__":
    main(sys.argv)
