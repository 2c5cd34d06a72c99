"""Gradient compression with error feedback for JAX, as composable Optax transformations.

A compressor says what is sent, a feedback rule says what is remembered, an exchange says how it
travels; everything else is built from those three.
"""

from ef_optax._bits.fields import Packed as Packed
from ef_optax._bits.fields import pack as pack
from ef_optax._bits.fields import unpack as unpack
from ef_optax._core.codec import Codec as Codec
from ef_optax._core.outcome import Outcome as Outcome
from ef_optax._core.requests import AllToAll as AllToAll
from ef_optax._core.requests import Gather as Gather
from ef_optax._core.requests import Gathered as Gathered
from ef_optax._core.requests import Max as Max
from ef_optax._core.requests import Mean as Mean
from ef_optax._core.requests import Permute as Permute
from ef_optax._core.requests import Sum as Sum
from ef_optax._core.workers import Workers as Workers
from ef_optax._exchange.exchange import Exchange as Exchange
from ef_optax._exchange.exchange import ExchangeState as ExchangeState
from ef_optax.checkpoint import Checkpoint as Checkpoint
from ef_optax.checkpoint import restore as restore
from ef_optax.checkpoint import save as save
from ef_optax.compressors.combine.compose import compose as compose
from ef_optax.compressors.combine.dense import dense as dense
from ef_optax.compressors.combine.fcc import fcc as fcc
from ef_optax.compressors.combine.identity import identity as identity
from ef_optax.compressors.combine.induced import induced as induced
from ef_optax.compressors.combine.per_leaf import per_leaf as per_leaf
from ef_optax.compressors.combine.probabilistic_mix import probabilistic_mix as probabilistic_mix
from ef_optax.compressors.combine.rotate import rotate as rotate
from ef_optax.compressors.combine.scale_to_contractive import (
    scale_to_contractive as scale_to_contractive,
)
from ef_optax.compressors.combine.scheduled import scheduled as scheduled
from ef_optax.compressors.compressor import Compressor as Compressor
from ef_optax.compressors.low_rank.acp_sgd import acp_sgd as acp_sgd
from ef_optax.compressors.low_rank.atomo import atomo as atomo
from ef_optax.compressors.low_rank.gradiveq import gradiveq as gradiveq
from ef_optax.compressors.low_rank.power_sgd import power_sgd as power_sgd
from ef_optax.compressors.low_rank.svd import svd as svd
from ef_optax.compressors.quantize.adaq import adaq as adaq
from ef_optax.compressors.quantize.block_quantize import block_quantize as block_quantize
from ef_optax.compressors.quantize.cast import cast as cast
from ef_optax.compressors.quantize.dorefa import dorefa as dorefa
from ef_optax.compressors.quantize.drive import drive as drive
from ef_optax.compressors.quantize.eden import eden as eden
from ef_optax.compressors.quantize.fp8 import fp8 as fp8
from ef_optax.compressors.quantize.inceptionn import inceptionn as inceptionn
from ef_optax.compressors.quantize.linear_dithering import linear_dithering as linear_dithering
from ef_optax.compressors.quantize.log_quantize import log_quantize as log_quantize
from ef_optax.compressors.quantize.natural import natural as natural
from ef_optax.compressors.quantize.natural_dithering import natural_dithering as natural_dithering
from ef_optax.compressors.quantize.qsgd import qsgd as qsgd
from ef_optax.compressors.quantize.quantile_8bit import quantile_8bit as quantile_8bit
from ef_optax.compressors.quantize.quantile_sketch import quantile_sketch as quantile_sketch
from ef_optax.compressors.quantize.rms_sign import rms_sign as rms_sign
from ef_optax.compressors.quantize.scaled_half import scaled_half as scaled_half
from ef_optax.compressors.quantize.scaled_sign import scaled_sign as scaled_sign
from ef_optax.compressors.quantize.sigma_bins import sigma_bins as sigma_bins
from ef_optax.compressors.quantize.sign import sign as sign
from ef_optax.compressors.quantize.ternary import ternary as ternary
from ef_optax.compressors.quantize.three_lc import three_lc as three_lc
from ef_optax.compressors.quantize.threshold_sign import threshold_sign as threshold_sign
from ef_optax.compressors.quantize.two_bit import two_bit as two_bit
from ef_optax.compressors.quantize.two_mean_sign import two_mean_sign as two_mean_sign
from ef_optax.compressors.quantize.uniform import uniform as uniform
from ef_optax.compressors.sparse.bernoulli import bernoulli as bernoulli
from ef_optax.compressors.sparse.block_top_k import block_top_k as block_top_k
from ef_optax.compressors.sparse.comp_k import comp_k as comp_k
from ef_optax.compressors.sparse.count_sketch import count_sketch as count_sketch
from ef_optax.compressors.sparse.dct_top_k import dct_top_k as dct_top_k
from ef_optax.compressors.sparse.global_top_k import global_top_k as global_top_k
from ef_optax.compressors.sparse.mix_k import mix_k as mix_k
from ef_optax.compressors.sparse.random_block import random_block as random_block
from ef_optax.compressors.sparse.random_k import random_k as random_k
from ef_optax.compressors.sparse.redsync import redsync as redsync
from ef_optax.compressors.sparse.sampled_top_k import sampled_top_k as sampled_top_k
from ef_optax.compressors.sparse.threshold import threshold as threshold
from ef_optax.compressors.sparse.top_k import top_k as top_k
from ef_optax.compressors.sparse.wangni import wangni as wangni
from ef_optax.estimators.hessian_momentum import HessianMomentumState as HessianMomentumState
from ef_optax.estimators.hessian_momentum import hessian_momentum as hessian_momentum
from ef_optax.estimators.igt import IGTState as IGTState
from ef_optax.estimators.igt import igt as igt
from ef_optax.estimators.page import PageState as PageState
from ef_optax.estimators.page import page as page
from ef_optax.estimators.points import HessianVector as HessianVector
from ef_optax.estimators.points import Points as Points
from ef_optax.estimators.points import query_points as query_points
from ef_optax.estimators.storm import StormState as StormState
from ef_optax.estimators.storm import storm as storm
from ef_optax.exchanges.global_top_k_of_sum import global_top_k_of_sum as global_top_k_of_sum
from ef_optax.exchanges.leader import leader_top_k as leader_top_k
from ef_optax.exchanges.majority import majority_vote as majority_vote
from ef_optax.exchanges.perm import perm_k as perm_k
from ef_optax.exchanges.two_shot import two_shot as two_shot
from ef_optax.feedback.adacomp import AdaCompState as AdaCompState
from ef_optax.feedback.adacomp import adacomp as adacomp
from ef_optax.feedback.clip21 import clip21 as clip21
from ef_optax.feedback.compressed_mean import CompressedMeanState as CompressedMeanState
from ef_optax.feedback.compressed_mean import compressed_mean as compressed_mean
from ef_optax.feedback.dgc import DGCState as DGCState
from ef_optax.feedback.dgc import dgc as dgc
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
from ef_optax.feedback.ef21_normalised import ef21_normalised as ef21_normalised
from ef_optax.feedback.ef21_normalised import normalise as normalise
from ef_optax.feedback.ef21_normalised import power_decay as power_decay
from ef_optax.feedback.ef21_p import EF21PState as EF21PState
from ef_optax.feedback.ef21_p import ef21_p as ef21_p
from ef_optax.feedback.ef21_page import ef21_page as ef21_page
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
from ef_optax.feedback.fetch_sgd import FetchSGDState as FetchSGDState
from ef_optax.feedback.fetch_sgd import fetch_sgd as fetch_sgd
from ef_optax.feedback.marina import MarinaState as MarinaState
from ef_optax.feedback.marina import marina as marina
from ef_optax.feedback.neolithic import neolithic as neolithic
from ef_optax.feedback.safe_ef import SafeEFState as SafeEFState
from ef_optax.feedback.safe_ef import safe_ef as safe_ef
from ef_optax.feedback.scalecom import ScaleComState as ScaleComState
from ef_optax.feedback.scalecom import scalecom as scalecom
from ef_optax.feedback.three_point_compressor import ThreePointState as ThreePointState
from ef_optax.feedback.three_point_compressor import (
    three_point_compressor as three_point_compressor,
)
from ef_optax.feedback.variance_based import VarianceBasedState as VarianceBasedState
from ef_optax.feedback.variance_based import variance_based as variance_based
from ef_optax.flat import flatten as flatten
from ef_optax.local.cser import CSERState as CSERState
from ef_optax.local.cser import cser as cser
from ef_optax.local.qsparse_local_sgd import QsparseLocalSGDState as QsparseLocalSGDState
from ef_optax.local.qsparse_local_sgd import qsparse_local_sgd as qsparse_local_sgd
from ef_optax.measure.entropy import arithmetic_bits as arithmetic_bits
from ef_optax.measure.entropy import elias_delta_bits as elias_delta_bits
from ef_optax.measure.entropy import elias_gamma_bits as elias_gamma_bits
from ef_optax.measure.entropy import run_length_bits as run_length_bits
from ef_optax.measure.entropy import sparse_elias_bits as sparse_elias_bits
from ef_optax.measure.entropy import zero_run_bits as zero_run_bits
from ef_optax.measure.message_bits import message_bits as message_bits
from ef_optax.measure.wire import WireReport as WireReport
from ef_optax.measure.wire import wire_report as wire_report
from ef_optax.parallel.arguments import PerWorker as PerWorker
from ef_optax.parallel.change_workers import change_workers as change_workers
from ef_optax.parallel.gradients import worker_value_and_grad as worker_value_and_grad
from ef_optax.parallel.inference import worker_axes as worker_axes
from ef_optax.parallel.lift import Lifted as Lifted
from ef_optax.parallel.lift import abstract_state as abstract_state
from ef_optax.parallel.lift import state_specs as state_specs
from ef_optax.parallel.mesh import data_parallel as data_parallel
from ef_optax.parallel.quarantine import exchange_states as exchange_states
from ef_optax.parallel.quarantine import guard as guard
from ef_optax.parallel.simulation import simulate as simulate
from ef_optax.policies.dgc_warmup import dgc_warmup as dgc_warmup
from ef_optax.policies.dgc_warmup import dgc_warmup_ratio as dgc_warmup_ratio

__version__ = "0.1.0"
