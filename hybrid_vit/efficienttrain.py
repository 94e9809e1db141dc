"""EfficientTrain and EfficientTrain++: easy, cheap pictures first, at equal final accuracy.

Yulin Wang et al., "EfficientTrain: Exploring Generalized Curriculum Learning for Training Visual
Backbones", ICCV 2023, arXiv:2211.09703; "EfficientTrain++: Generalized Curriculum Learning for
Efficient Visual Backbone Training", TPAMI 2024, arXiv:2405.08768. After the authors' launch scripts
(LeapLabTHU/EfficientTrain). Usable alone, in anybody's loop:

    for stage in stages("efficienttrain++", epochs=200):
      steps = round(stage.epochs * steps_per_epoch)
      for step in range(steps):
        images = augmented(stage.magnitude)                      # RandAugment, at the full size
        images = lanczos_resize(images, stage.size)              # hybrid_vit.ops.low_frequency_crop
        done = stage.begin + (stage.end - stage.begin) * step / steps
        rate = learning_rate(stage, done, peak=4e-3, end=1e-6)

The first version shows every example as often as the baseline, in stages of equal numbers of epochs
(its "compute" is what it saves); "++" gives its stages equal compute, so that small pictures come
more often. The authors restart their trainer with whole epochs for each stage: `launches`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NAMES = ("efficienttrain", "efficienttrain++")
# Of networks: who is shown which sizes. "deit" also warms up for a fifth of the training.
FAMILIES = ("usual", "convnext", "deit")
# The size that the tables are written for.
BASE_SIZE = 224
# What a baseline of 300 epochs costs, over what the published budget of 200 does.
PUBLISHED_SAVING = 1.5

_SIZES_OF_FIRST = (160, 160, 160, 192, 224)
_SIZES = {
  "usual": (96,) * 2 + (160,) * 4 + (224,) * 4,
  "convnext": (160,) * 6 + (224,) * 4,
  "deit": (96,) * 2 + (160,) * 4 + (192,) * 2 + (224,) * 2,
}
_WARMUP_EPOCHS = 20.0
_WARMUP_SHARE = {"deit": 0.2}

# For hosts that cannot decode as fast as small pictures are trained on: how often a loaded example
# is used at each size, and how many batches are kept for it. The authors have 4 for DeiT-S and
# ResNet-50, 2 for Swin-T and CSWin-T.
REPLAYS: Mapping[int, Mapping[int, tuple[int, int]]] = {
  4: {96: (4, 1920), 160: (2, 256)},
  2: {96: (2, 1024)},
}
_PIECES = 32


@dataclasses.dataclass(frozen=True)
class Stage:
  """A part of the training in which size and magnitude stay.

  Attributes:
    size: side of the pictures that the network sees.
    magnitude: of RandAugment.
    begin: how much of the schedule is done before it, in [0, 1].
    end: how much is done after it.
    epochs: passes over the data, counted in loaded examples.
    warmup: the part of the schedule that is warm-up, as this stage counts it.
    batch_factor: its batch over the usual one.
    replay: how often a loaded example is used, see `ReplayBuffer`.
    replay_batches: how many loaded batches are kept for that; 0 for none.
  """

  size: int
  magnitude: float
  begin: float
  end: float
  epochs: float
  warmup: float
  batch_factor: int = 1
  replay: int = 1
  replay_batches: int = 0


def stages(
  name: str,
  epochs: float,
  *,
  family: str = "usual",
  sizes: Sequence[int] | None = None,
  magnitude: float = 9.0,
  warmup_epochs: float = _WARMUP_EPOCHS,
  early_batch: int = 1,
  replay: int = 1,
) -> tuple[Stage, ...]:
  """The published table of a curriculum.

  Args:
    name: one of `NAMES`.
    epochs: the budget: for the first version the epochs of the baseline; for "++" as many epochs at
      the full size as the whole shall cost (200 for a baseline of 300 saves a third).
    family: one of `FAMILIES`; the first version has one table for all.
    sizes: the distinct sizes in rising order, the last one the full size, for a data set or network
      of other sizes (`fitted_sizes`); None for the published ones.
    magnitude: of the last stage; the first one of "++" has 0, the first version's 1/9 of it.
    warmup_epochs: of the current size; DeiT's is a fifth of the training by "++" whatever this is.
    early_batch: up to how many times the batch the stages of small pictures take, as far as a step
      keeps about its pixels. The paper's "early large batch"; its code is not published, so the
      rule is ours. The learning rate follows the batch: the caller's part.
    replay: 1, or a key of `REPLAYS`. Stages of which examples are replayed load fewer epochs.

  Raises:
    ValueError: an unknown name or family, a budget or batch that is not positive, or other sizes
      than the table has.
  """
  _check(name, epochs, family, early_batch, replay)
  table = published_sizes(name, family)
  distinct = sorted(set(table))
  if sizes is None:
    sizes = distinct
  if len(sizes) != len(distinct) or list(sizes) != sorted(sizes) or sizes[0] < 1:
    raise ValueError(
      f"{name}: sizes are {tuple(sizes)}; {len(distinct)} rising ones were expected, in the place "
      f"of {tuple(distinct)}"
    )
  own = dict(zip(distinct, sizes))
  count, full = len(table), sizes[-1]
  found = []
  for index, published in enumerate(table):
    size = own[published]
    # A pass over the data costs in proportion to the pixels.
    passes = epochs if name == "efficienttrain" else epochs * (full / size) ** 2
    times, batches = REPLAYS.get(replay, {}).get(published, (1, 0))
    warmup = warmup_epochs / passes
    if name == "efficienttrain++":
      warmup = _WARMUP_SHARE.get(family, warmup)
    level = (2 * index + 1) if name == "efficienttrain" else index
    found.append(
      Stage(
        size=size,
        magnitude=magnitude * level / 9.0,
        begin=index / count,
        end=(index + 1) / count,
        epochs=passes / count / times,
        warmup=warmup,
        batch_factor=max(1, min(early_batch, round((full / size) ** 2))),
        replay=times,
        replay_batches=batches,
      )
    )
  return tuple(found)


def published_sizes(name: str, family: str = "usual") -> tuple[int, ...]:
  """Side of the pictures in each stage, on ImageNet."""
  return _SIZES_OF_FIRST if name == "efficienttrain" else _SIZES[family]


def fitted_sizes(
  name: str, full_size: int, *, family: str = "usual", multiple: int = 2
) -> tuple[int, ...]:
  """The distinct sizes for another full size: the same fractions, to the nearest multiple.

  Args:
    name: one of `NAMES`.
    full_size: the last size, whatever it divides by.
    family: one of `FAMILIES`.
    multiple: of the other sizes, e.g. a network's patch.
  """
  distinct = sorted(set(published_sizes(name, family)))
  near = [max(1, math.floor(n * full_size / BASE_SIZE / multiple + 0.5)) for n in distinct[:-1]]
  return (*(min(n * multiple, full_size) for n in near), full_size)


def relative_cost(found: Sequence[Stage], cost: Mapping[int, float] | None = None) -> float:
  """What a training costs, in epochs of the full size.

  Args:
    found: its stages.
    cost: of a training step's picture, by size, in any unit; None for pixels.
  """
  full = found[-1].size
  ratio = {s.size: cost[s.size] / cost[full] if cost else (s.size / full) ** 2 for s in found}
  return sum(s.epochs * s.replay * ratio[s.size] for s in found)


def learning_rate(
  stage: Stage, done: Any, *, peak: float, end: float = 1e-6, start: float = 0.0
) -> Any:
  """Cosine over the share of the schedule that is done, after a linear warm-up; of arrays too.

  The warm-up of "++" is of so many epochs *of the stage's size*, so that the curve is another one
  at each size and the rate makes a small jump where the size changes: as published.

  Args:
    stage: that the step is of.
    done: in [0, 1].
    peak: after the warm-up.
    end: at 1.
    start: at 0.
  """
  done = np.asarray(done, np.float64)
  warm = start + (peak - start) * done / max(stage.warmup, 1e-12)
  progress = np.clip((done - stage.warmup) / max(1.0 - stage.warmup, 1e-12), 0.0, 1.0)
  cosine = end + 0.5 * (peak - end) * (1.0 + np.cos(np.pi * progress))
  return np.where(done < stage.warmup, warm, cosine)


@dataclasses.dataclass(frozen=True)
class Launch:
  """A stage as the authors' script starts it, in whole epochs of its own length.

  Attributes:
    size: as in `Stage`.
    magnitude: as in `Stage`.
    total_epochs: of a training at this size alone for the same compute; the cosine is laid over it.
    start_epoch: with which it goes on.
    end_epoch: before which it ends.
    warmup_epochs: of these.
  """

  size: int
  magnitude: float
  total_epochs: int
  start_epoch: int
  end_epoch: int
  warmup_epochs: int


def launches(
  name: str, epochs: int, *, family: str = "usual", replay: int = 1
) -> tuple[Launch, ...]:
  """The authors' own bookkeeping, roundings included; `stages` is the same without them."""
  found: list[Launch] = []
  times_before = 1
  for index, stage in enumerate(table := stages(name, epochs, family=family, replay=replay)):
    # One division, so that 300 epochs at (224 / 160) ** 2 are 588 and no rounding less.
    longer, shorter = (table[-1].size, stage.size) if name == "efficienttrain++" else (1, 1)
    passes = epochs * longer**2 / (shorter**2 * stage.replay)
    total = int(passes)
    start = 0
    if found:
      start = found[-1].end_epoch
      if times_before != stage.replay:
        start = round(start * times_before / stage.replay)
      if name == "efficienttrain++":
        start = round(start * found[-1].size ** 2 / stage.size**2)
    warmup = int(_WARMUP_EPOCHS / stage.replay)
    if name == "efficienttrain++" and family in _WARMUP_SHARE:
      warmup = int(_WARMUP_SHARE[family] * passes)
    end = int(total / len(table) * (index + 1))
    found.append(Launch(stage.size, stage.magnitude, total, start, end, warmup))
    times_before = stage.replay
  return tuple(found)


class ReplayBuffer:
  """Uses each loaded example several times, in batches that are mixed anew: for weak hosts.

  A loaded batch is cut into pieces, which are kept, the oldest given up; the batch that is trained
  on is the loaded one and (times - 1) as many pieces drawn from all that are kept, with
  replacement. Augmentation is not redone, mixup and cutmix come after. It begins empty in each
  stage, as the authors' does; pictures are kept as they come (theirs as float16).

  Args:
    times: the batch that is trained on over the loaded one.
    batches: how many loaded batches are kept.
    pieces: of a batch.

  Raises:
    ValueError: an argument below 1.
  """

  def __init__(self, times: int, batches: int, pieces: int = _PIECES):
    for name, value in (("times", times), ("batches", batches), ("pieces", pieces)):
      if value < 1:
        raise ValueError(f"ReplayBuffer: {name} is {value}; at least 1 was expected")
    self._times, self._most, self._pieces = times, batches * pieces, pieces
    self._kept: list[dict[str, np.ndarray]] = []

  def mix(self, batch: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The loaded rows `[B, …]` of each key, then replayed ones: `[times * B, …]`.

    Raises:
      ValueError: a batch that does not fall into the pieces.
    """
    if self._times == 1:
      return dict(batch)
    rows = {len(value) for value in batch.values()}
    if len(rows) != 1 or (size := rows.pop()) % self._pieces:
      raise ValueError(
        f"a batch of {sorted({len(value) for value in batch.values()})} rows does not fall into "
        f"{self._pieces} equal pieces to be replayed"
      )
    part = size // self._pieces
    for first in range(0, size, part):
      self._kept.append({k: np.array(v[first : first + part]) for k, v in batch.items()})
    del self._kept[: -self._most]
    drawn = rng.integers(len(self._kept), size=(self._times - 1) * self._pieces)
    return {
      key: np.concatenate([value, *(self._kept[i][key] for i in drawn)])
      for key, value in batch.items()
    }


def _check(name: str, epochs: float, family: str, early_batch: int, replay: int) -> None:
  if name not in NAMES:
    raise ValueError(f"no curriculum is named {name!r}; there are: {', '.join(NAMES)}")
  if family not in FAMILIES:
    raise ValueError(f"{name}: family is {family!r}; one of {', '.join(FAMILIES)} was expected")
  if not epochs > 0 or not math.isfinite(epochs):
    raise ValueError(f"{name}: the budget is {epochs} epochs; a number above 0 was expected")
  if early_batch < 1:
    raise ValueError(f"{name}: early_batch is {early_batch}; at least 1 was expected")
  known = list(itertools.chain((1,), REPLAYS))
  if replay not in known:
    raise ValueError(f"{name}: replay is {replay}; one of {known} was expected")
  if replay != 1 and name == "efficienttrain":
    raise ValueError("efficienttrain: replay belongs to efficienttrain++; 1 was expected")
