"""Gradient compression with error feedback for JAX, as composable Optax transformations.

A **compressor** defines what is sent, a **feedback rule** what is remembered, and an **exchange**
how it travels; everything else is built from these three. Ten names are enough to begin:

========================================= =====================================================
``top_k``, ``scaled_sign``                compressors: one value in a hundred, one bit per value
``error_feedback``, ``ef21``              rules: what compression drops is kept and sent later
``data_parallel``                         the chain on a mesh: messages cross it, not gradients
``simulate``                              the same chain with many workers and without devices
``worker_value_and_grad``                 every worker's own gradient, not averaged
``wire_report``                           the bytes that a compiled step really moves
``save``, ``restore``                     checkpoints, for another number of workers too
========================================= =====================================================

``help(ef_optax.top_k)`` has the formula, the arguments and an example, as for every public name;
``docs/how-to-choose.md`` compares compressors and rules, and ``docs/frameworks.md`` has the
shortest training steps in Flax, Equinox and plain JAX.

>>> import ef_optax as ef, jax.numpy as jnp, optax
>>> tx = optax.chain(ef.error_feedback(ef.top_k(0.25), axis_name="data"), optax.sgd(0.1))
>>> tx = ef.simulate(tx, 2, "data")  # or ef.data_parallel(tx, mesh, "data")
>>> params = jnp.zeros(4)
>>> grads = jnp.array([[4.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 2.0]])  # one row per worker
>>> updates, state = tx.update(grads, tx.init(params), params)
>>> state[0].residual.tolist()  # the residuals: the ones were not sent
[[0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]

Names that are used less often are in submodules: ``exchanges`` (how messages travel), ``policies``
(what changes over time), ``estimators`` (of a worker's gradient), ``local`` (several steps between
two exchanges), ``recipes`` (optimizers of the literature), ``activations`` (what crosses a cut of a
pipeline), ``parallel`` (hand-written maps, changing the number of workers), ``measure`` (statistics
of a run, counting bits), ``theory`` (step sizes and bounds), ``states`` (the State classes),
``checkpoint``, ``expressions`` (methods by name), and ``extend`` (to write your own).
"""

from typing import Any

from ef_optax import (
    activations,
    checkpoint,
    estimators,
    exchanges,
    expressions,
    extend,
    local,
    measure,
    parallel,
    policies,
    recipes,
    states,
    theory,
)
from ef_optax.checkpoint import restore, save
from ef_optax.compressors.combine.compose import compose
from ef_optax.compressors.combine.dense import dense
from ef_optax.compressors.combine.fcc import fcc
from ef_optax.compressors.combine.identity import identity
from ef_optax.compressors.combine.induced import induced
from ef_optax.compressors.combine.per_leaf import per_leaf
from ef_optax.compressors.combine.probabilistic_mix import probabilistic_mix
from ef_optax.compressors.combine.rotate import rotate
from ef_optax.compressors.combine.scale_to_contractive import scale_to_contractive
from ef_optax.compressors.combine.scheduled import scheduled
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.low_rank.acp_sgd import acp_sgd
from ef_optax.compressors.low_rank.atomo import atomo
from ef_optax.compressors.low_rank.dion_factors import dion_factors
from ef_optax.compressors.low_rank.gradiveq import gradiveq
from ef_optax.compressors.low_rank.greedy_lore import greedy_lore
from ef_optax.compressors.low_rank.power_sgd import power_sgd
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
from ef_optax.compressors.sparse.arc_top_k import arc_top_k
from ef_optax.compressors.sparse.bernoulli import bernoulli
from ef_optax.compressors.sparse.block_top_k import block_top_k
from ef_optax.compressors.sparse.comp_k import comp_k
from ef_optax.compressors.sparse.count_sketch import count_sketch
from ef_optax.compressors.sparse.dct_top_k import dct_top_k
from ef_optax.compressors.sparse.global_top_k import global_top_k
from ef_optax.compressors.sparse.mix_k import mix_k
from ef_optax.compressors.sparse.random_block import random_block
from ef_optax.compressors.sparse.random_k import random_k
from ef_optax.compressors.sparse.redsync import redsync
from ef_optax.compressors.sparse.row_top_k import row_top_k
from ef_optax.compressors.sparse.sampled_top_k import sampled_top_k
from ef_optax.compressors.sparse.shared_rows import shared_rows
from ef_optax.compressors.sparse.threshold import threshold
from ef_optax.compressors.sparse.top_k import top_k
from ef_optax.compressors.sparse.wangni import wangni
from ef_optax.estimators.points import query_points
from ef_optax.expressions import parse
from ef_optax.feedback.adacomp import adacomp
from ef_optax.feedback.clip21 import clip21
from ef_optax.feedback.compressed_mean import compressed_mean
from ef_optax.feedback.dgc import dgc
from ef_optax.feedback.dist_ef_sgdm import dist_ef_sgdm
from ef_optax.feedback.double_squeeze import double_squeeze
from ef_optax.feedback.ec_sgd_diana import ec_sgd_diana, gradient_shift
from ef_optax.feedback.econtrol import econtrol
from ef_optax.feedback.ecq_sgd import ecq_sgd
from ef_optax.feedback.ef14 import error_feedback
from ef_optax.feedback.ef21 import ef21
from ef_optax.feedback.ef21_bidirectional import ef21_bidirectional
from ef_optax.feedback.ef21_heavy_ball import ef21_heavy_ball
from ef_optax.feedback.ef21_momentum import ef21_double_momentum, ef21_momentum
from ef_optax.feedback.ef21_normalised import ef21_normalised, normalise, power_decay
from ef_optax.feedback.ef21_p import ef21_p
from ef_optax.feedback.ef21_page import ef21_page
from ef_optax.feedback.ef21_partial_participation import ef21_partial_participation
from ef_optax.feedback.ef21_plus import ef21_plus
from ef_optax.feedback.ef21_prox import ef21_prox, gradient_mapping, l1_prox, proximal
from ef_optax.feedback.ef21_w import ef21_w
from ef_optax.feedback.ef_bv import diana, ef_bv
from ef_optax.feedback.ef_momentum import ef_momentum
from ef_optax.feedback.fetch_sgd import fetch_sgd
from ef_optax.feedback.hierarchical import hierarchical
from ef_optax.feedback.marina import marina
from ef_optax.feedback.momentum_feedback import momentum_feedback
from ef_optax.feedback.neolithic import neolithic
from ef_optax.feedback.on_host import on_host
from ef_optax.feedback.safe_ef import safe_ef
from ef_optax.feedback.scalecom import scalecom
from ef_optax.feedback.sharded_optimizer import sharded_optimizer
from ef_optax.feedback.three_point_compressor import three_point_compressor
from ef_optax.feedback.variance_based import variance_based
from ef_optax.flat import flatten
from ef_optax.measure.message_bits import message_bits
from ef_optax.measure.monitor import monitor
from ef_optax.measure.wire import wire_report
from ef_optax.parallel.arguments import PerWorker
from ef_optax.parallel.gradients import worker_value_and_grad
from ef_optax.parallel.mesh import data_parallel
from ef_optax.parallel.simulation import simulate

__version__ = "0.1.0"

__all__ = [
    # Start here: error feedback on one worker, on a mesh, in a simulation
    "error_feedback",
    "top_k",
    "scaled_sign",
    "data_parallel",
    "simulate",
    "worker_value_and_grad",
    "wire_report",
    "save",
    "restore",
    # Compressors that keep some of the values
    "arc_top_k",
    "bernoulli",
    "block_top_k",
    "comp_k",
    "count_sketch",
    "dct_top_k",
    "global_top_k",
    "mix_k",
    "random_block",
    "random_k",
    "redsync",
    "row_top_k",
    "sampled_top_k",
    "shared_rows",
    "threshold",
    "wangni",
    # Compressors that round the values
    "adaq",
    "block_quantize",
    "cast",
    "dorefa",
    "drive",
    "eden",
    "fp8",
    "inceptionn",
    "linear_dithering",
    "log_quantize",
    "natural",
    "natural_dithering",
    "qsgd",
    "quantile_8bit",
    "quantile_sketch",
    "rms_sign",
    "row_sign",
    "scaled_half",
    "sigma_bins",
    "sign",
    "ternary",
    "three_lc",
    "threshold_sign",
    "two_bit",
    "two_mean_sign",
    "uniform",
    # Compressors by low rank, for matrices
    "acp_sgd",
    "atomo",
    "dion_factors",
    "gradiveq",
    "greedy_lore",
    "power_sgd",
    "svd",
    # Compressors made from other compressors, and the identity
    "Compressor",
    "compose",
    "dense",
    "fcc",
    "identity",
    "induced",
    "per_leaf",
    "probabilistic_mix",
    "rotate",
    "scale_to_contractive",
    "scheduled",
    # Rules that remember what is not sent: EF14 and related rules
    "adacomp",
    "dgc",
    "dist_ef_sgdm",
    "double_squeeze",
    "ec_sgd_diana",
    "econtrol",
    "ecq_sgd",
    "ef_momentum",
    "fetch_sgd",
    "momentum_feedback",
    "hierarchical",
    "safe_ef",
    "scalecom",
    "sharded_optimizer",
    "variance_based",
    # Rules that remember an estimate of the gradient: EF21 and related rules
    "clip21",
    "ef21",
    "ef21_bidirectional",
    "ef21_double_momentum",
    "ef21_heavy_ball",
    "ef21_momentum",
    "ef21_normalised",
    "ef21_p",
    "ef21_page",
    "ef21_partial_participation",
    "ef21_plus",
    "ef21_prox",
    "ef21_w",
    "three_point_compressor",
    # Rules for unbiased compressors, and rules without a memory
    "compressed_mean",
    "diana",
    "ef_bv",
    "marina",
    "neolithic",
    # Transformations to put before or after a rule in a chain
    "flatten",
    "gradient_mapping",
    "gradient_shift",
    "l1_prox",
    "normalise",
    "on_host",
    "power_decay",
    "proximal",
    # Around the training step
    "PerWorker",
    "message_bits",
    "monitor",
    "parse",
    "query_points",
    # By topic
    "activations",
    "checkpoint",
    "estimators",
    "exchanges",
    "expressions",
    "extend",
    "local",
    "measure",
    "parallel",
    "policies",
    "recipes",
    "states",
    "theory",
]


def __dir__() -> list[str]:
    """The public names, for tab completion."""
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    """Raises an error, which for a public name of a submodule says where it is."""
    rooms = (exchanges, policies, estimators, local, recipes, activations)
    for home in (*rooms, parallel, measure, states, extend, theory):
        if name in home.__all__:
            raise AttributeError(f"ef_optax has no {name}, but {home.__name__}.{name} exists.")
    raise AttributeError(f"module 'ef_optax' has no attribute {name!r}")
