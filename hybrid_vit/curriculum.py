"""Phases: what a training looks like at each of its steps, as a pure function of the step.

A training is a list of phases, usually of one. Each has its transform, picture size, batch size,
length, and its share of the learning rate's schedule. From the step alone follow the phase, the
examples seen before it and how much of the schedule is done, so that nothing of it is in a
checkpoint. Usable alone, in anybody's loop:

    curriculum = Curriculum(phases)
    for step in range(start, curriculum.total_steps):
      phase = curriculum.phases[curriculum.phase_of(step)]
      first = curriculum.examples_before(step)         # the batch is examples first … first + B
      rate = schedule(curriculum.schedule_step(step))
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Phase:
  """A part of a training in which no shape changes.

  Attributes:
    steps: its length.
    batch_size: of all devices together.
    transform: of its pictures, see `hybrid_vit.data.transforms`.
    image_size: side of its pictures in pixels, as its transform was filled in with.
    shown_size: what the step makes of that, where it shrinks them, for people; None: it does not.
    share: of the schedule, beside the other phases' shares; None for its part of all steps.
    replay: how often a loaded example is shown, see `hybrid_vit.data.replaying`; 1 for once.
    replay_steps: from how many steps back at most.
    other_transforms: of batches on the second of `config.data.canvases`, and on further ones.
    warmup: the part of the schedule that is warm-up, as this phase counts it; None: as the schedule
      itself says.
    task: fields of the task's settings that are others in this phase.
    arguments: of the network that are others in this phase; tables of positions are resized where
      their shapes depend on them.
  """

  steps: int
  batch_size: int
  transform: str
  image_size: int
  share: float | None = None
  task: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  warmup: float | None = None
  shown_size: int | None = None
  replay: int = 1
  replay_steps: int = 1
  other_transforms: tuple[str, ...] = ()

  def __post_init__(self) -> None:
    if self.steps < 1:
      raise ValueError(f"a phase has {self.steps} steps; at least 1 was expected")
    if self.batch_size < 1:
      raise ValueError(f"a phase has a batch of {self.batch_size}; at least 1 was expected")
    if self.share is not None and not self.share > 0:
      raise ValueError(f"a phase has the share {self.share} of the schedule; above 0 was expected")

  def __str__(self) -> str:
    text = f"{self.steps:,} steps of {self.batch_size:,} at {self.image_size} px"
    if self.shown_size is not None:
      text += f", shrunk to {self.shown_size} px"
    return text if self.replay == 1 else f"{text}, each loaded picture shown {self.replay} times"


class Curriculum:
  """The phases of a training, one after the other.

  Attributes:
    phases: see `Phase`.
    total_steps: of all phases.
    total_examples: that all phases see, repeats counted.
    first_steps: the step at which each phase begins.

  Raises:
    ValueError: no phase, or shares in some phases only.
  """

  def __init__(self, phases: Sequence[Phase]):
    self.phases = tuple(phases)
    if not self.phases:
      raise ValueError("a training needs at least one phase")
    given = [phase.share for phase in self.phases if phase.share is not None]
    if given and len(given) < len(self.phases):
      raise ValueError(
        f"{len(given)} of {len(self.phases)} phases say their share of the schedule: all or none"
      )
    steps = [phase.steps for phase in self.phases]
    self.first_steps = tuple(itertools.accumulate(steps, initial=0))[:-1]
    self.total_steps = sum(steps)
    examples = [phase.steps * phase.batch_size for phase in self.phases]
    self._first_examples = tuple(itertools.accumulate(examples, initial=0))[:-1]
    self.total_examples = sum(examples)
    # Where each phase begins in the schedule, in steps of a training of one phase.
    shares = given or [float(n) for n in steps]
    scale = self.total_steps / sum(shares)
    self._shares = [share * scale for share in shares]
    self._first_shares = tuple(itertools.accumulate(self._shares, initial=0.0))[:-1]

  def phase_of(self, step: int) -> int:
    """The index of the phase that step `step` (from 0) belongs to; the last one beyond the end."""
    return bisect.bisect_right(self.first_steps, step) - 1

  def examples_before(self, step: int) -> int:
    """How many examples the steps before `step` have seen, replayed ones counted."""
    k = self.phase_of(step)
    return self._first_examples[k] + (step - self.first_steps[k]) * self.phases[k].batch_size

  def steps_for(self, examples: float) -> int:
    """The first step at which so many examples have been seen."""
    k = max(bisect.bisect_right(self._first_examples, examples) - 1, 0)
    left = max(examples - self._first_examples[k], 0)
    return self.first_steps[k] + int(np.ceil(left / self.phases[k].batch_size))

  def schedule_step(self, step: Any) -> Any:
    """How far the schedule is, in [0, total_steps], at a step; traced ones too.

    With one phase, or with shares that follow the steps, it is the step itself.
    """
    if np.allclose(self._shares, [phase.steps for phase in self.phases], rtol=1e-12):
      return step
    step = jnp.asarray(step, jnp.float32)
    borders = [*map(float, self.first_steps), float(self.total_steps)]
    return jnp.interp(
      step, jnp.asarray(borders), jnp.asarray([*self._first_shares, float(self.total_steps)])
    )

  def __str__(self) -> str:
    if len(self.phases) == 1:
      return str(self.phases[0])
    total = sum(self._shares)
    return "\n".join(
      f"phase {k} of {len(self.phases)}: {phase}, {share / total:.1%} of the schedule"
      for k, (phase, share) in enumerate(zip(self.phases, self._shares), start=1)
    )
