"""What theory says before the first step is run: constants, step sizes, bounds.

Everything here is host-side arithmetic in float64 on a few numbers per worker, except
:func:`curvature` and :func:`estimate`, which run Hessian-vector products of a JAX loss. One file a
subject:

- ``constants``: the smoothness constants of a problem, :class:`Smoothness`;
- ``curvature``: the same by power iteration, for losses without a closed form;
- ``contraction``: what a compressor's alpha becomes inside the analyses, ``xi(alpha)``;
- ``ef14``: bounds of the residual and of the gradient norm for classic error feedback;
- ``ef21``: step sizes and the rate of EF21 and its extensions;
- ``heterogeneity``: workers that differ: weights, cloning, rare features;
- ``difference``: EF-BV, DIANA, EControl, MARINA and three-point compressors;
- ``benefit``: when error feedback pays;
- ``tight``: the best steps and rates of EF14, EF21 and compressed gradient descent, attained;
- ``coordination``: what the step and the batch must do when compression begins.

A constant that could not be compared with its publication is called *unverified* in the docstring.
"""

from ef_optax.theory.benefit import communication_gain, delay_rounds
from ef_optax.theory.constants import Smoothness, least_squares, logistic_regression
from ef_optax.theory.contraction import beta, damped_contraction, repeated_contraction, theta, xi
from ef_optax.theory.coordination import ef21_batch, rate_factor
from ef_optax.theory.curvature import curvature, estimate
from ef_optax.theory.difference import (
    EFBVParameters,
    ThreePoint,
    diana_step,
    econtrol_strength,
    ef_bv_parameters,
    ef_bv_step,
    marina_step,
    three_point_constants,
    three_point_step,
)
from ef_optax.theory.ef14 import ef14_bound, ef14_residual_bound, ef14_tuned_bound
from ef_optax.theory.ef21 import (
    ef21_bound,
    ef21_heavy_ball_step,
    ef21_momentum_step,
    ef21_momentum_weight,
    ef21_partial_participation_step,
    ef21_pl_step,
    ef21_step,
)
from ef_optax.theory.heterogeneity import (
    Cloning,
    cloning,
    cloning_step,
    ef21_w_step,
    rare_feature_count,
    rare_features_step,
    weights,
)
from ef_optax.theory.tight import cgd_rate, cgd_step, tight_rate, tight_step

__all__ = [
    "Cloning",
    "EFBVParameters",
    "Smoothness",
    "ThreePoint",
    "beta",
    "cgd_rate",
    "cgd_step",
    "cloning",
    "cloning_step",
    "communication_gain",
    "curvature",
    "damped_contraction",
    "delay_rounds",
    "diana_step",
    "econtrol_strength",
    "ef14_bound",
    "ef14_residual_bound",
    "ef14_tuned_bound",
    "ef21_batch",
    "ef21_bound",
    "ef21_heavy_ball_step",
    "ef21_momentum_step",
    "ef21_momentum_weight",
    "ef21_partial_participation_step",
    "ef21_pl_step",
    "ef21_step",
    "ef21_w_step",
    "ef_bv_parameters",
    "ef_bv_step",
    "estimate",
    "least_squares",
    "logistic_regression",
    "marina_step",
    "rare_feature_count",
    "rare_features_step",
    "rate_factor",
    "repeated_contraction",
    "theta",
    "three_point_constants",
    "three_point_step",
    "tight_rate",
    "tight_step",
    "weights",
    "xi",
]
