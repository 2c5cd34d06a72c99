"""Estimators of a worker's own gradient, and the points at which they need gradients.

An estimator comes before a rule that tracks it: ``optax.chain(storm(0.1), ef.ef21(...))``. It needs
gradients at its own query points, which :func:`ef_optax.query_points` collects.
"""

from ef_optax.estimators.hessian_momentum import hessian_momentum
from ef_optax.estimators.igt import igt
from ef_optax.estimators.page import page
from ef_optax.estimators.points import HessianVector, Points
from ef_optax.estimators.storm import storm

__all__ = ["HessianVector", "Points", "hessian_momentum", "igt", "page", "storm"]
