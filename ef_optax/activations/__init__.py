"""What crosses a cut between two stages of a pipeline: activations forward, their gradients back.

:func:`compress_activations` compresses both directly; :func:`aq_sgd` sends the difference from what
it sent of the same training example before. Neither is error feedback of EF14: an error of a
gradient can be sent later, because an optimizer adds up what it receives; an error of an activation
has already changed the loss of its example, so nothing is owed.
"""

from ef_optax.activations.aq_sgd import AQSGD, aq_sgd
from ef_optax.activations.compress_activations import compress_activations

__all__ = ["AQSGD", "aq_sgd", "compress_activations"]
