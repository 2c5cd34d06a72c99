"""The State classes of all rules and estimators, with the names of their memories.

A state is a ``NamedTuple``; the comment beside each field says what it holds, and whether every
worker has its own. Use these classes to look inside a state and for annotations;
``tx.init(params)`` makes a state.

>>> import ef_optax as ef, jax.numpy as jnp
>>> state = ef.error_feedback(ef.top_k(0.1)).init(jnp.zeros(3))
>>> isinstance(state, ef.states.ErrorFeedbackState), state.residual.tolist()
(True, [0.0, 0.0, 0.0])
"""

from ef_optax._exchange.controlled import ControlState
from ef_optax._exchange.exchange import ExchangeState
from ef_optax._exchange.monitored import MonitorState
from ef_optax._rules.residuals import ResidualPolicyState
from ef_optax.activations.aq_sgd import AQSGDState
from ef_optax.estimators.hessian_momentum import HessianMomentumState
from ef_optax.estimators.igt import IGTState
from ef_optax.estimators.page import PageState
from ef_optax.estimators.storm import StormState
from ef_optax.feedback.adacomp import AdaCompState
from ef_optax.feedback.compressed_mean import CompressedMeanState
from ef_optax.feedback.dgc import DGCState
from ef_optax.feedback.dist_ef_sgdm import DistEFSGDMState
from ef_optax.feedback.double_squeeze import DoubleSqueezeState
from ef_optax.feedback.ec_sgd_diana import ShiftState
from ef_optax.feedback.econtrol import EControlState
from ef_optax.feedback.ecq_sgd import ECQState
from ef_optax.feedback.ef14 import ErrorFeedbackState
from ef_optax.feedback.ef21 import EF21State
from ef_optax.feedback.ef21_bidirectional import EF21BidirectionalState
from ef_optax.feedback.ef21_momentum import EF21MomentumState
from ef_optax.feedback.ef21_p import EF21PState
from ef_optax.feedback.ef21_partial_participation import EF21PartialParticipationState
from ef_optax.feedback.ef21_plus import EF21PlusState
from ef_optax.feedback.ef21_prox import ProximalState
from ef_optax.feedback.ef_bv import EFBVState
from ef_optax.feedback.ef_momentum import EFMomentumState
from ef_optax.feedback.fetch_sgd import FetchSGDState
from ef_optax.feedback.marina import MarinaState
from ef_optax.feedback.momentum_feedback import MomentumFeedbackState
from ef_optax.feedback.safe_ef import SafeEFState
from ef_optax.feedback.scalecom import ScaleComState
from ef_optax.feedback.sharded_optimizer import ShardedOptimizerState
from ef_optax.feedback.three_point_compressor import ThreePointState
from ef_optax.feedback.variance_based import VarianceBasedState
from ef_optax.local.beer import BeerState
from ef_optax.local.choco_sgd import ChocoState
from ef_optax.local.cser import CSERState
from ef_optax.local.local_steps import LocalStepsState
from ef_optax.local.noloco import NoLoCoState
from ef_optax.local.qsparse_local_sgd import QsparseLocalSGDState
from ef_optax.local.streaming import StreamingState
from ef_optax.policies.dense_steps import DenseStepsState
from ef_optax.policies.freeze import FreezeState
from ef_optax.recipes.dct_adamw import DctAdamWState
from ef_optax.recipes.distro import DistroState
from ef_optax.recipes.dual_averaging import DualAveragingState
from ef_optax.recipes.gpa import GPAState
from ef_optax.recipes.ldadam import LDAdamState
from ef_optax.recipes.micro_adam import MicroAdamState
from ef_optax.recipes.one_bit_adam import OneBitAdamState
from ef_optax.recipes.one_bit_lamb import OneBitLambState
from ef_optax.recipes.signum import SignumState
from ef_optax.recipes.zero_one_adam import ZeroOneAdamState

__all__ = [
    "AQSGDState",
    "AdaCompState",
    "BeerState",
    "CSERState",
    "ChocoState",
    "CompressedMeanState",
    "ControlState",
    "DGCState",
    "DctAdamWState",
    "DenseStepsState",
    "DistEFSGDMState",
    "DistroState",
    "DoubleSqueezeState",
    "DualAveragingState",
    "ECQState",
    "EControlState",
    "EF21BidirectionalState",
    "EF21MomentumState",
    "EF21PState",
    "EF21PartialParticipationState",
    "EF21PlusState",
    "EF21State",
    "EFBVState",
    "EFMomentumState",
    "ErrorFeedbackState",
    "ExchangeState",
    "FetchSGDState",
    "FreezeState",
    "GPAState",
    "HessianMomentumState",
    "IGTState",
    "LDAdamState",
    "LocalStepsState",
    "MarinaState",
    "MicroAdamState",
    "MomentumFeedbackState",
    "MonitorState",
    "NoLoCoState",
    "OneBitAdamState",
    "OneBitLambState",
    "PageState",
    "ProximalState",
    "QsparseLocalSGDState",
    "ResidualPolicyState",
    "SafeEFState",
    "ScaleComState",
    "ShardedOptimizerState",
    "ShiftState",
    "SignumState",
    "StormState",
    "StreamingState",
    "ThreePointState",
    "VarianceBasedState",
    "ZeroOneAdamState",
]
