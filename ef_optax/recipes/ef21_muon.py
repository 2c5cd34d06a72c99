"""EF21-Muon (Gruntkowska, Gaponov, Tovmasyan, Richtarik 2025): EF21 under Muon, both ways.

M_i = (1 - b) M_i + b grad f_i(W) ;  R_i = C_w(M_i - G_i) ;  G_i = G_i + R_i ;  G = G + mean R_i
X = X + lr LMO(G) ;  S = C_s(X - W) ;  W = W + S
"""

from __future__ import annotations

import optax

from ef_optax.extend import AxisName, Compressor, IsMatrix, MemoryLike, check, on_matrices
from ef_optax.feedback.ef21_momentum import ef21_momentum
from ef_optax.feedback.ef21_p import ef21_p
from ef_optax.recipes.orthogonalise import orthogonalise


def ef21_muon(
    learning_rate: optax.ScalarOrSchedule,
    compressor: Compressor,
    *,
    fresh_weight: optax.ScalarOrSchedule = 0.1,
    server: Compressor | None = None,
    weight_decay: float = 0.0,
    is_matrix: IsMatrix | None = None,
    batch_axes: int = 0,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""EF21-Muon: the workers' momenta travel by EF21, and the mean estimate is orthogonalised.

    .. math:: M_i' = (1 - b) M_i + b \nabla f_i(W), \quad G_i' = G_i + C_w(M_i' - G_i), \quad
              X' = X - \eta\,UV^T(\text{mean}\,G_i'), \quad W' = W + C_s(X' - W)

    It is a chain of :func:`ef_optax.ef21_momentum` with a dense first message,
    :func:`orthogonalise` and, with ``server``, :func:`ef_optax.ef21_p`: then the training loop's
    parameters are W, and the model to evaluate is ``params + behind`` of its state. The estimates
    are of the momentum, before Muon; feedback of Muon's output may fail for every step size.

    Leaves that are not matrices step by the rate in the direction of the sign, as embeddings and
    heads do in the paper (the unit ball of the largest magnitude in place of that of the spectral
    norm).

    The recurrence is taken from accounts of the paper by others (unverified).

    Args:
      learning_rate: eta, a number or a schedule: the radius of the ball.
      compressor: C_w, contractive.
      fresh_weight: b in (0, 1], the weight of the fresh gradient, or a schedule of it.
      server: C_s, contractive, for a compressed way back; None for none.
      weight_decay: w, decoupled.
      is_matrix: ``is_matrix(path, leaf)`` says which leaves are orthogonalised; None for all with
        two or more axes. Leave out embeddings and heads.
      batch_axes: number of leading axes of the matrices that count matrices: 1 for layers that are
        stacked for a scan.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: how momentum and estimates are stored, as in :func:`ef_optax.ef21`.

    Returns:
      The optimizer. Memory: a momentum and an estimate of each worker, the mean estimate, and X - W
      with ``server``. Bits: those of ``compressor``; 32 for each value in the first step.

    Raises:
      TypeError: if ``compressor`` or ``server`` is not a Compressor. ValueError: for an option out
        of range, and for compressors that EF21 refuses.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.recipes.ef21_muon(0.5, ef.top_k(k=1))
      >>> params = jnp.zeros(2)  # a vector
      >>> tx.update(jnp.array([3.0, -2.0]), tx.init(params), params)[0].tolist()
      [-0.5, 0.5]

    References:
      Gruntkowska, Gaponov, Tovmasyan, Richtarik, "Error Feedback for Muon and Friends", ICLR 2026
      (arXiv 2510.00643).
    """
    check.rate("ef21_muon", "learning_rate", learning_rate)
    check.weight("ef21_muon", "fresh_weight", fresh_weight, schedule=True)
    check.not_negative("ef21_muon", "weight_decay", weight_decay)
    check.count("ef21_muon", "batch_axes", batch_axes, least=0)
    uplink = ef21_momentum(
        compressor, fresh_weight, axis_name=axis_name, init="full", memory=memory
    )
    direction = on_matrices(orthogonalise(batch_axes=batch_axes), optax.scale_by_sign(), is_matrix)
    return optax.chain(
        uplink,
        direction,
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
        optax.identity() if server is None else ef21_p(server, memory=memory),
    )
