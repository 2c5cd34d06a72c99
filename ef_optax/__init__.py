"""Gradient compression with error feedback for JAX, as composable Optax transformations.

A compressor says what is sent, a feedback rule says what is remembered, an exchange says how it
travels; everything else is built from those three.
"""

from ef_optax._base import AllToAll as AllToAll
from ef_optax._base import Codec as Codec
from ef_optax._base import Gather as Gather
from ef_optax._base import Gathered as Gathered
from ef_optax._base import Max as Max
from ef_optax._base import Mean as Mean
from ef_optax._base import Outcome as Outcome
from ef_optax._base import Sum as Sum
from ef_optax._base import Workers as Workers
from ef_optax._compressor import Compressor as Compressor
from ef_optax._exchange import Exchange as Exchange
from ef_optax._exchange import ExchangeState as ExchangeState
from ef_optax.checkpoint import Checkpoint as Checkpoint
from ef_optax.checkpoint import restore as restore
from ef_optax.checkpoint import save as save
from ef_optax.compressors.adaq import adaq as adaq
from ef_optax.compressors.algebra import induced as induced
from ef_optax.compressors.algebra import probabilistic_mix as probabilistic_mix
from ef_optax.compressors.algebra import scale_to_contractive as scale_to_contractive
from ef_optax.compressors.bernoulli import bernoulli as bernoulli
from ef_optax.compressors.block_top_k import block_top_k as block_top_k
from ef_optax.compressors.cast import cast as cast
from ef_optax.compressors.codebook import quantile_8bit as quantile_8bit
from ef_optax.compressors.codebook import quantile_sketch as quantile_sketch
from ef_optax.compressors.codebook import sigma_bins as sigma_bins
from ef_optax.compressors.comp_mix import comp_k as comp_k
from ef_optax.compressors.comp_mix import mix_k as mix_k
from ef_optax.compressors.compose import compose as compose
from ef_optax.compressors.compose import dense as dense
from ef_optax.compressors.compose import message_bits as message_bits
from ef_optax.compressors.compose import per_leaf as per_leaf
from ef_optax.compressors.dct import dct_top_k as dct_top_k
from ef_optax.compressors.dithering import linear_dithering as linear_dithering
from ef_optax.compressors.dithering import natural_dithering as natural_dithering
from ef_optax.compressors.dithering import qsgd as qsgd
from ef_optax.compressors.dorefa import dorefa as dorefa
from ef_optax.compressors.drive import drive as drive
from ef_optax.compressors.drive import eden as eden
from ef_optax.compressors.entropy import arithmetic_bits as arithmetic_bits
from ef_optax.compressors.entropy import elias_delta_bits as elias_delta_bits
from ef_optax.compressors.entropy import elias_gamma_bits as elias_gamma_bits
from ef_optax.compressors.entropy import run_length_bits as run_length_bits
from ef_optax.compressors.entropy import sparse_elias_bits as sparse_elias_bits
from ef_optax.compressors.entropy import zero_run_bits as zero_run_bits
from ef_optax.compressors.fixed_levels import threshold_sign as threshold_sign
from ef_optax.compressors.fixed_levels import two_bit as two_bit
from ef_optax.compressors.global_top_k import global_top_k as global_top_k
from ef_optax.compressors.global_top_k import global_top_k_of_sum as global_top_k_of_sum
from ef_optax.compressors.identity import identity as identity
from ef_optax.compressors.leader_top_k import leader_top_k as leader_top_k
from ef_optax.compressors.low_rank import atomo as atomo
from ef_optax.compressors.low_rank import svd as svd
from ef_optax.compressors.majority import majority_vote as majority_vote
from ef_optax.compressors.narrow import fp8 as fp8
from ef_optax.compressors.narrow import log_quantize as log_quantize
from ef_optax.compressors.narrow import scaled_half as scaled_half
from ef_optax.compressors.natural import natural as natural
from ef_optax.compressors.perm_k import perm_k as perm_k
from ef_optax.compressors.power_sgd import power_sgd as power_sgd
from ef_optax.compressors.random_block import random_block as random_block
from ef_optax.compressors.rms_sign import rms_sign as rms_sign
from ef_optax.compressors.rotate import rotate as rotate
from ef_optax.compressors.scheduled import scheduled as scheduled
from ef_optax.compressors.sign import scaled_sign as scaled_sign
from ef_optax.compressors.sign import sign as sign
from ef_optax.compressors.sketch import count_sketch as count_sketch
from ef_optax.compressors.sparsify import random_k as random_k
from ef_optax.compressors.sparsify import top_k as top_k
from ef_optax.compressors.ternary import ternary as ternary
from ef_optax.compressors.ternary import three_lc as three_lc
from ef_optax.compressors.threshold import redsync as redsync
from ef_optax.compressors.threshold import sampled_top_k as sampled_top_k
from ef_optax.compressors.threshold import threshold as threshold
from ef_optax.compressors.two_mean import two_mean_sign as two_mean_sign
from ef_optax.compressors.two_shot import two_shot as two_shot
from ef_optax.compressors.uniform import block_quantize as block_quantize
from ef_optax.compressors.uniform import uniform as uniform
from ef_optax.compressors.wangni import wangni as wangni
from ef_optax.feedback.adacomp import AdaCompState as AdaCompState
from ef_optax.feedback.adacomp import adacomp as adacomp
from ef_optax.feedback.clip21 import clip21 as clip21
from ef_optax.feedback.compressed_mean import CompressedMeanState as CompressedMeanState
from ef_optax.feedback.compressed_mean import compressed_mean as compressed_mean
from ef_optax.feedback.cser import CSERState as CSERState
from ef_optax.feedback.cser import cser as cser
from ef_optax.feedback.dgc import DGCState as DGCState
from ef_optax.feedback.dgc import dgc as dgc
from ef_optax.feedback.dgc import dgc_warmup_ratio as dgc_warmup_ratio
from ef_optax.feedback.dist_ef_sgdm import DistEFSGDMState as DistEFSGDMState
from ef_optax.feedback.dist_ef_sgdm import dist_ef_sgdm as dist_ef_sgdm
from ef_optax.feedback.double_squeeze import DoubleSqueezeState as DoubleSqueezeState
from ef_optax.feedback.double_squeeze import double_squeeze as double_squeeze
from ef_optax.feedback.ec_sgd_diana import ShiftState as ShiftState
from ef_optax.feedback.ec_sgd_diana import ec_sgd_diana as ec_sgd_diana
from ef_optax.feedback.ec_sgd_diana import gradient_shift as gradient_shift
from ef_optax.feedback.econtrol import EControlState as EControlState
from ef_optax.feedback.econtrol import econtrol as econtrol
from ef_optax.feedback.ecq_sgd import ECQState as ECQState
from ef_optax.feedback.ecq_sgd import ecq_sgd as ecq_sgd
from ef_optax.feedback.ef14 import ErrorFeedbackState as ErrorFeedbackState
from ef_optax.feedback.ef14 import error_feedback as error_feedback
from ef_optax.feedback.ef21 import EF21State as EF21State
from ef_optax.feedback.ef21 import ef21 as ef21
from ef_optax.feedback.ef21_bidirectional import EF21BidirectionalState as EF21BidirectionalState
from ef_optax.feedback.ef21_bidirectional import ef21_bidirectional as ef21_bidirectional
from ef_optax.feedback.ef21_heavy_ball import ef21_heavy_ball as ef21_heavy_ball
from ef_optax.feedback.ef21_momentum import EF21MomentumState as EF21MomentumState
from ef_optax.feedback.ef21_momentum import ef21_double_momentum as ef21_double_momentum
from ef_optax.feedback.ef21_momentum import ef21_momentum as ef21_momentum
from ef_optax.feedback.ef21_p import EF21PState as EF21PState
from ef_optax.feedback.ef21_p import ef21_p as ef21_p
from ef_optax.feedback.ef21_partial_participation import (
    EF21PartialParticipationState as EF21PartialParticipationState,
)
from ef_optax.feedback.ef21_partial_participation import (
    ef21_partial_participation as ef21_partial_participation,
)
from ef_optax.feedback.ef21_plus import EF21PlusState as EF21PlusState
from ef_optax.feedback.ef21_plus import ef21_plus as ef21_plus
from ef_optax.feedback.ef21_prox import ef21_prox as ef21_prox
from ef_optax.feedback.ef21_prox import gradient_mapping as gradient_mapping
from ef_optax.feedback.ef21_prox import l1_prox as l1_prox
from ef_optax.feedback.ef21_prox import proximal as proximal
from ef_optax.feedback.ef21_w import ef21_w as ef21_w
from ef_optax.feedback.ef_bv import EFBVState as EFBVState
from ef_optax.feedback.ef_bv import diana as diana
from ef_optax.feedback.ef_bv import ef_bv as ef_bv
from ef_optax.feedback.ef_momentum import EFMomentumState as EFMomentumState
from ef_optax.feedback.ef_momentum import ef_momentum as ef_momentum
from ef_optax.feedback.fcc import fcc as fcc
from ef_optax.feedback.gradient_estimators import HessianMomentumState as HessianMomentumState
from ef_optax.feedback.gradient_estimators import IGTState as IGTState
from ef_optax.feedback.gradient_estimators import PageState as PageState
from ef_optax.feedback.gradient_estimators import StormState as StormState
from ef_optax.feedback.gradient_estimators import hessian_momentum as hessian_momentum
from ef_optax.feedback.gradient_estimators import igt as igt
from ef_optax.feedback.gradient_estimators import page as page
from ef_optax.feedback.gradient_estimators import storm as storm
from ef_optax.feedback.marina import MarinaState as MarinaState
from ef_optax.feedback.marina import marina as marina
from ef_optax.feedback.safe_ef import SafeEFState as SafeEFState
from ef_optax.feedback.safe_ef import safe_ef as safe_ef
from ef_optax.feedback.scalecom import ScaleComState as ScaleComState
from ef_optax.feedback.scalecom import scalecom as scalecom
from ef_optax.feedback.three_point_compressor import ThreePointState as ThreePointState
from ef_optax.feedback.three_point_compressor import (
    three_point_compressor as three_point_compressor,
)
from ef_optax.parallel.arguments import PerWorker as PerWorker
from ef_optax.parallel.change_workers import change_workers as change_workers
from ef_optax.parallel.gradients import worker_value_and_grad as worker_value_and_grad
from ef_optax.parallel.inference import worker_axes as worker_axes
from ef_optax.parallel.lift import Lifted as Lifted
from ef_optax.parallel.lift import abstract_state as abstract_state
from ef_optax.parallel.lift import state_specs as state_specs
from ef_optax.parallel.mesh import data_parallel as data_parallel
from ef_optax.parallel.points import HessianVector as HessianVector
from ef_optax.parallel.points import Points as Points
from ef_optax.parallel.points import query_points as query_points
from ef_optax.parallel.quarantine import exchange_states as exchange_states
from ef_optax.parallel.quarantine import guard as guard
from ef_optax.parallel.simulation import simulate as simulate
from ef_optax.wire import WireReport as WireReport
from ef_optax.wire import wire_report as wire_report

__version__ = "0.1.0"
