"""NEOLITHIC (Huang et al. 2022): the mean of R gradients, compressed R-fold in both directions.

ghat_i = (1/R) sum_r grad f_i(x; xi_r)
c_i = FCC_R(ghat_i) ;  emit FCC_R(mean_i c_i)
"""

from __future__ import annotations

import optax

from ef_optax.compressors.combine.fcc import fcc
from ef_optax.extend import AxisName, Compressor, check
from ef_optax.feedback.compressed_mean import compressed_mean


def neolithic(
    compressor: Compressor,
    rounds: int,
    server: Compressor | None = None,
    *,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""NEOLITHIC: a step takes R minibatches, and spends R messages on their mean gradient.

    .. math:: \hat g_i = \tfrac1R \sum_{r=1}^R \nabla f_i(x; \xi_{i,r}), \quad
              c_i = \text{FCC}_R(\hat g_i), \quad \text{emit FCC}_R(\text{mean}_i\,c_i)

    It is ``chain(compressed_mean(fcc(C, R), axis_name=a), compressed_mean(fcc(C_server, R)))``. The
    R gradients at the same x are averaged first: ``worker_value_and_grad(..., accumulate=R)``. So
    R minibatches cost R messages, like R steps of a plain method, but the compression error falls
    like ``(1 - alpha)^R``. Nothing is remembered from step to step. With the same FCC *and* a
    memory on both sides it is :func:`double_squeeze`.

    There is no server process: every worker gathers the messages and computes the server's part, so
    the downlink is computed and not transmitted. This gives the algorithm's iterates, for studying
    it.

    Args:
      compressor: C of the workers, contractive; stateless, for single leaves (:func:`fcc`).
      rounds: R, at least 1.
      server: C of the server, by default that of the workers. The identity switches the second
        compression off.
      axis_name: the worker axis (or a tuple of axes); None for one worker.

    Returns:
      The transformation, to be put before ``optax.sgd``.

    Raises:
      TypeError: if a compressor is not a stateless Compressor of single leaves. ValueError: if
        ``rounds`` is below 1.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.neolithic(ef.top_k(k=1), 2)  # twice top-1 is top-2
      >>> tx.update(jnp.array([3.0, 2.0, 1.0]), tx.init(jnp.zeros(3)))[0].tolist()
      [3.0, 2.0, 0.0]

    References:
      Huang, Chen, Yin, Yuan, "Lower Bounds and Nearly Optimal Algorithms in Distributed Learning
      with Communication Compression", NeurIPS 2022 (the algorithm follows other literature; it was
      not compared with the paper's text).
    """
    check.count("neolithic", "rounds", rounds)
    server = compressor if server is None else server
    return optax.with_extra_args_support(
        optax.chain(
            compressed_mean(fcc(compressor, rounds), axis_name=axis_name),
            compressed_mean(fcc(server, rounds)),
        )
    )
