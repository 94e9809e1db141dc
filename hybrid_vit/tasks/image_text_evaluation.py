"""What an image and a text tower are worth: zero-shot classification, and retrieval both ways.

Alec Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML
2021, arXiv:2103.00020, section 3.1: a class is the mean of the unit-length embeddings of its
prompts, brought to unit length again, and a picture is of the class with the largest cosine.
Retrieval is COCO's and Flickr's: of a picture any of its captions, of a caption its picture.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from hybrid_vit import sharding
from hybrid_vit.config import Config
from hybrid_vit.data.classes import wordnet_numbers
from hybrid_vit.data.imagenet_variants import padded_sets
from hybrid_vit.data.prompts import DEFAULT_TEMPLATES, prompts, read_names, read_templates
from hybrid_vit.data.spec import MASK, Field
from hybrid_vit.data.tokenizer import ClipTokenizer
from hybrid_vit.plots import plot_predictions
from hybrid_vit.tasks.base import (
  Batch,
  EvaluationData,
  EvaluationKind,
  Evaluator,
  Variables,
  summed,
)
from hybrid_vit.tasks.classification import competing_only, ranked
from hybrid_vit.tasks.pictures import displayable, normalized
from hybrid_vit.tasks.retrieval import RECALLS, recalls
from hybrid_vit.weights.stored import imagenet_class_names

ZERO_SHOT, RETRIEVAL = "zero_shot", "retrieval"
# Captions of a picture in retrieval, as COCO's and Flickr's protocol has them.
MOST_CAPTIONS = 5
# Prompts that are encoded at once.
_PROMPTS = 256
# Pictures in a drawing.
_DRAWN = 24


class ImageText(Protocol):
  """What is measured: a task, or stored weights. Embeddings are float32 of unit length."""

  @property
  def model(self) -> Any:
    """Both towers; `model.text.context_length` is how many tokens a text has."""
    ...

  def normalize(self, images: jax.Array) -> jax.Array:
    """uint8 `[B, H, W, 3]` → float32 as the network takes it; floats as they are."""
    ...

  def encode_image(self, variables: Variables, images: jax.Array) -> jax.Array:
    """Normalised `[B, H, W, 3]` → `[B, D]`."""
    ...

  def encode_text(self, variables: Variables, tokens: jax.Array) -> jax.Array:
    """int32 `[T, L]` → `[T, D]`."""
    ...


@dataclasses.dataclass(frozen=True)
class Encoders:
  """`ImageText` of a `models.clip.CLIP` and the mean and deviation of its pictures."""

  model: Any
  mean: tuple[float, ...]
  std: tuple[float, ...]

  def normalize(self, images: jax.Array) -> jax.Array:
    """See `ImageText`."""
    return normalized(images, self.mean, self.std)

  def encode_image(self, variables: Variables, images: jax.Array) -> jax.Array:
    """See `ImageText`."""
    return self.model.apply(variables, images, None, train=False)[0]

  def encode_text(self, variables: Variables, tokens: jax.Array) -> jax.Array:
    """See `ImageText`."""
    return self.model.apply(variables, None, tokens, train=False)[1]


@dataclasses.dataclass(frozen=True)
class ZeroShotOptions:
  """`options` of a zero-shot set.

  Attributes:
    templates: of the prompts: a list, a text file with one a line, or "imagenet", OpenAI's 80.
    class_names: a text file with a name for each class, one a line; None for the set's own, where
      WordNet's numbers are spoken as the first word of the class.
  """

  templates: tuple[str, ...] | str = DEFAULT_TEMPLATES
  class_names: str | None = None


@dataclasses.dataclass(frozen=True)
class RetrievalOptions:
  """`options` of a retrieval set: none."""


def evaluation_kinds(context_length: int) -> dict[str, EvaluationKind]:
  """Both kinds of sets, for a text tower of that many tokens; see `tasks.base.Task`."""
  image = Field("image", shape=(None, None, 3))
  text = Field("text", "int32", (MOST_CAPTIONS, context_length), ragged=True)
  return {
    ZERO_SHOT: EvaluationKind(
      {"image": image, "label": Field("value", "int32", minimum=0)}, {"top1": "max", "top5": "max"}
    ),
    RETRIEVAL: EvaluationKind(
      {"image": image, "text": text},
      dict.fromkeys(RECALLS, "max"),
      f"|all_captions({MOST_CAPTIONS})|tokenize({context_length})",
    ),
  }


def kind_of(kind: str, context_length: int) -> EvaluationKind:
  """One of `evaluation_kinds`; "" is zero-shot.

  Raises:
    ValueError: a kind that is none.
  """
  known = evaluation_kinds(context_length)
  if (kind or ZERO_SHOT) not in known:
    raise ValueError(f"kind {kind!r} is not one of {', '.join(known)}")
  return known[kind or ZERO_SHOT]


def evaluators_for(task: ImageText, data: Sequence[EvaluationData]) -> list[Evaluator]:
  """One for each set, by its `settings.kind`; one that names none is a zero-shot set.

  Raises:
    ValueError: a kind that is none, or options that the kind does not have.
  """
  made: list[Evaluator] = []
  for item in data:
    kind = getattr(item.settings, "kind", "") or ZERO_SHOT
    if kind not in _EVALUATORS:
      raise ValueError(f"{item.name}: kind {kind!r} is not one of {', '.join(_EVALUATORS)}")
    options_class, evaluator = _EVALUATORS[kind]
    fields = Config(dict(item.settings.options), f"config.evaluation.sets.{item.name}.options")
    options: Any = fields.as_dataclass(options_class)
    fields.assert_all_read()
    made.append(evaluator(task, item, options))
  return made


class ZeroShotEvaluator:
  """Top-1 and top-5 of classes that are known by their names alone, every picture counted once."""

  def __init__(self, task: ImageText, data: EvaluationData, options: ZeroShotOptions):
    self.name, self._task, self._data = data.name, task, data
    self._names = _class_names(data, options)
    self._templates = read_templates(options.templates)
    tokenizer = ClipTokenizer(task.model.text.context_length)
    texts = [text for row in prompts(self._names, self._templates) for text in row]
    self._tokens = tokenizer(texts)
    subset, sets = data.info.get("class_subset"), data.info.get("label_sets")
    self._competing = None if subset is None else np.isin(np.arange(len(self._names)), subset)
    self._label_sets = None if sets is None else padded_sets(sets)
    self._encode = _Gathered(self._prompts)
    self._evaluate_batch = jax.jit(self.evaluate_batch)
    self._likely = _Gathered(self._probabilities)

  def class_embeddings(self, variables: Variables) -> np.ndarray:
    """Of all classes, float32 `[K, D]` of unit length."""
    mesh = _mesh_of(variables)
    ways = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
    size = -(-min(_PROMPTS, len(self._tokens)) // ways) * ways
    sums: Any = 0.0
    for start in range(0, len(self._tokens), size):
      part = self._tokens[start : start + size]
      rows: Any = np.pad(part, ((0, size - len(part)), (0, 0)))
      if mesh is not None:
        # Each device encodes its part.
        rows = sharding.put_tree(rows, sharding.batch_sharding(mesh))
      found = np.asarray(self._encode(variables, rows))[: len(part)]
      total = np.zeros((len(self._names), found.shape[1]))
      np.add.at(total, np.arange(start, start + len(part)) // len(self._templates), found)
      sums = sums + total
    lengths = np.linalg.norm(sums, axis=-1, keepdims=True)
    return (sums / np.maximum(lengths, 1e-12)).astype(np.float32)

  def evaluate_batch(
    self, variables: Variables, batch: Batch, classes: jax.Array
  ) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Sums and weights over the rows whose "mask" is 1."""
    logits = self._cosines(variables, batch["image"], classes)
    return ranked(competing_only(logits, self._competing), batch, self._label_sets)

  def run(self, variables: Variables) -> dict[str, float]:
    """See `Evaluator`; "examples" is the number of pictures that counted.

    Raises:
      ValueError: no picture counted.
    """
    classes = self.class_embeddings(variables)
    totals = summed(self._data, lambda v, b: self._evaluate_batch(v, b, classes), variables)
    if not totals or not totals["top1"][1]:
      raise ValueError(f"evaluation set {self.name!r} holds no readable picture")
    means = {key: total / weight for key, (total, weight) in totals.items()}
    return {**means, "examples": totals["top1"][1]}

  def draw(self, variables: Variables, path: Path) -> bool:
    """A grid of pictures with true and predicted names and the probability of the prediction."""
    sample = self._data.sample(_DRAWN)
    if not len(sample["label"]):
      return False
    classes = self.class_embeddings(variables)
    probabilities = np.asarray(self._likely(variables, sample["image"], classes))
    if jax.process_index() == 0:
      plot_predictions(
        _shown(self._task, sample["image"]),
        [self._names[int(i)] for i in sample["label"]],
        [self._names[int(i)] for i in probabilities.argmax(-1)],
        [float(p) for p in probabilities.max(-1)],
        path,
      )
    return True

  def _prompts(self, variables: Variables, tokens: jax.Array) -> jax.Array:
    return _unit(self._task.encode_text(variables, tokens))

  def _probabilities(
    self, variables: Variables, images: jax.Array, classes: jax.Array
  ) -> jax.Array:
    logits = competing_only(self._cosines(variables, images, classes), self._competing)
    return jax.nn.softmax(jnp.exp(variables["params"]["logit_scale"]) * logits)

  def _cosines(self, variables: Variables, images: jax.Array, classes: jax.Array) -> jax.Array:
    pictures = self._task.encode_image(variables, self._task.normalize(images))
    return jnp.matmul(_unit(pictures), classes.T, precision=jax.lax.Precision.HIGHEST)


class RetrievalEvaluator:
  """Recalls of pictures by captions and of captions by pictures, over the whole set."""

  def __init__(self, task: ImageText, data: EvaluationData, options: RetrievalOptions):
    del options
    self.name, self._task, self._data = data.name, task, data
    self._encode = _Gathered(self._embeddings)

  def run(self, variables: Variables) -> dict[str, float]:
    """See `Evaluator`; "examples" is the number of pictures, "captions" that of captions.

    Raises:
      ValueError: no picture with a caption counted.
    """
    gathered: list[list[np.ndarray]] = [[], [], [], []]
    for batch, _ in self._data.batches():
      # Each row is gathered once; what is compared then lies whole on every process.
      found = self._encode(variables, batch)
      for listed, value in zip(gathered, found):
        listed.append(np.asarray(value))
    if not gathered[0] or not np.concatenate(gathered[2]).any():
      raise ValueError(f"evaluation set {self.name!r} holds no readable picture with a caption")
    images, texts, there, counted = map(np.concatenate, gathered)
    images, texts, there = images[counted], texts[counted], there[counted]
    owners = np.repeat(np.arange(len(there)), there.sum(1))
    sizes = {"examples": float(len(images)), "captions": float(len(owners))}
    return {**recalls(images, texts[there], owners), **sizes}

  def draw(self, variables: Variables, path: Path) -> bool:
    """Pictures under the caption, of all that are drawn, that is nearest to each."""
    sample = self._data.sample(_DRAWN)
    if not len(sample["image"]):
      return False
    batch = {**sample, MASK: np.ones(len(sample["image"]), np.float32)}
    images, texts, there, _ = map(np.asarray, self._encode(variables, batch))
    if jax.process_index() or not there.any():
      return bool(there.any())
    tokenizer = ClipTokenizer(sample["text"].shape[-1])
    said = [tokenizer.decode(row[1 : row.argmax()]) for row in sample["text"][there]]
    owners = np.repeat(np.arange(len(there)), there.sum(1))
    scale = np.exp(np.asarray(variables["params"]["logit_scale"]))
    probabilities = np.asarray(jax.nn.softmax(jnp.asarray(scale * images @ texts[there].T)))
    best = probabilities.argmax(-1)
    own = {int(owner): i for i, owner in reversed(list(enumerate(owners)))}
    true = [
      # Any of its own captions is right.
      said[b] if owners[b] == i else said[own[i]] if i in own else "without a caption"
      for i, b in enumerate(best)
    ]
    names, sure = [said[b] for b in best], [float(p) for p in probabilities.max(-1)]
    plot_predictions(_shown(self._task, sample["image"]), true, names, sure, path)
    return True

  def _embeddings(self, variables: Variables, batch: Batch) -> tuple[jax.Array, ...]:
    """Pictures `[B, D]`, captions `[B, K, D]`, which of these there are, which pictures count."""
    tokens = batch["text"]
    images = self._task.encode_image(variables, self._task.normalize(batch["image"]))
    texts = self._task.encode_text(variables, tokens.reshape(-1, tokens.shape[-1]))
    counted = batch[MASK] > 0
    there = jnp.any(tokens > 0, axis=-1) & counted[:, None]
    return _unit(images), _unit(texts).reshape(*tokens.shape[:2], -1), there, counted


_EVALUATORS: dict[str, tuple[type, Any]] = {
  ZERO_SHOT: (ZeroShotOptions, ZeroShotEvaluator),
  RETRIEVAL: (RetrievalOptions, RetrievalEvaluator),
}


def _class_names(data: EvaluationData, options: ZeroShotOptions) -> tuple[str, ...]:
  own = tuple(data.info.get("class_names", ()))
  if options.class_names is not None:
    given = read_names(options.class_names)
    if own and len(own) != len(given):
      raise ValueError(
        f"{options.class_names} has {len(given)} names, and evaluation set {data.name!r} "
        f"{len(own)} classes"
      )
    return given
  if not own:
    raise ValueError(
      f"evaluation set {data.name!r} does not say what its classes are called: give a file of "
      "names, one a line, as options.class_names"
    )
  spoken = dict(zip(wordnet_numbers(), imagenet_class_names()))
  return tuple(spoken.get(name, name) for name in own)


def _unit(x: jax.Array) -> jax.Array:
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


def _mesh_of(variables: Variables) -> Any:
  """The mesh that variables lie on; None on one device."""
  placed = getattr(jax.tree.leaves(variables)[0], "sharding", None)
  return placed.mesh if isinstance(placed, NamedSharding) else None


def _shown(task: ImageText, images: np.ndarray) -> np.ndarray:
  mean, std = (getattr(task, name, ()) for name in ("mean", "std"))
  return displayable(np.asarray(images), mean, std)


class _Gathered:
  """A function of variables and more, compiled; what it gives lies whole on every process."""

  def __init__(self, function: Any):
    self._function = function
    self._compiled: dict[Any, Any] = {}

  def __call__(self, variables: Variables, *rest: Any) -> Any:
    mesh = _mesh_of(variables)
    if mesh not in self._compiled:
      where = None if mesh is None else sharding.replicated(mesh)
      self._compiled[mesh] = jax.jit(self._function, out_shardings=where)
    return self._compiled[mesh](variables, *rest)
