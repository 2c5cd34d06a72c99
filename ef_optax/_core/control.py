"""Controllers: which of several codecs is used is decided by what the exchanges before it cost.

A controlled codec has a few *levels*, which are all in the compiled program, and a controller. Once
every ``window`` exchanges the controller gets what was measured since its last decision, the same
on all workers, and chooses the level of the next ones. So the decision is part of the program, and
nothing is compiled again.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, ClassVar

from ef_optax._core.policy import StepPolicy
from ef_optax._numeric.dtypes import Array


class Controller(abc.ABC):
    """Chooses a level. Subclasses are frozen dataclasses.

    Attributes:
      window: exchanges between two decisions.
      measures: whether it needs the measured contraction, which costs a pass over what was not sent
        in every exchange, and a sum of two numbers over the workers at every decision.
    """

    window: int
    measures: ClassVar[bool] = False

    @abc.abstractmethod
    def begin(self, costs: Sequence[int]) -> tuple[Array | int, Any]:
        """The first level, and what the controller remembers before the first exchange.

        Args:
          costs: bytes of one worker's message at each level.

        Raises:
          ValueError: if it cannot work with these levels.
        """

    @abc.abstractmethod
    def decide(
        self, level: Array, memory: Any, costs: Sequence[int], contraction: Any
    ) -> tuple[Array, Any]:
        """The next level, and what is remembered then; a function of values that all workers have.

        Args:
          level: the level of the last ``window`` exchanges, an int32 scalar.
          memory: what the controller remembers.
          costs: as in :meth:`begin`.
          contraction: ``1 - sum(norm(x - C(x))^2) / sum(norm(x)^2)``, over all leaves and workers
            and the exchanges of the window; None unless it ``measures``.
        """


class LevelPolicy(StepPolicy):
    """A codec whose stages are levels: stage number j of its timeline is level j.

    Attributes:
      controller: what chooses the level.
    """

    controller: Controller
