"""Image–text pretraining: two towers that agree on which text belongs to which picture.

CLIP (arXiv:2103.00020), with SigLIP's loss (arXiv:2303.15343) or MobileCLIP's distillation from
stored teachers (arXiv:2311.17049); CLIP with Quality Captions (arXiv:2405.08911) is this with
better captions. LiT (arXiv:2111.07991): `config.init_from` the weights of an image network, and
`config.optimizer.freeze=("^image/(?!head/)",)`.

Differences: of several captions of a picture (real and synthetic) each has a loss of its own over
the batch, and the losses are added, as MobileCLIP's code does for two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_vit.data import arguments as check
from hybrid_vit.data.spec import Field, Spec
from hybrid_vit.models.clip import CLIP
from hybrid_vit.models.initialization import initial_variables
from hybrid_vit.models.text import create_text_tower
from hybrid_vit.ops.contrastive import (
  Teachers,
  count_nearest,
  sigmoid_loss,
  softmax_loss,
)
from hybrid_vit.tasks.base import Batch, EvaluationData, EvaluationKind, Evaluator, Variables
from hybrid_vit.tasks.image_text_evaluation import ZERO_SHOT, evaluation_kinds, evaluators_for
from hybrid_vit.tasks.pictures import displayable, normalized
from hybrid_vit.tasks.registry import Context, register_task

LOSSES = ("softmax", "sigmoid")
# Where scale and bias begin, SigLIP's (section 3.2 of its paper).
_SIGMOID_SCALE, _SIGMOID_BIAS = 10.0, -10.0


@dataclasses.dataclass(frozen=True)
class ContrastiveSettings:
  """`config.task`; see `Contrastive`. `text_tower` is a name of `models.text.TEXT_TOWERS`."""

  text_tower: str = "clip_vit_b16"
  text_arguments: dict[str, Any] | None = None
  embedding_size: int = 512
  loss: str = "softmax"
  max_scale: float = 100.0
  contrastive_weight: float = 1.0
  distillation_weight: float = 0.0
  teacher_scale: float = 100.0

  def __post_init__(self) -> None:
    check.choice("config.task.loss", self.loss, LOSSES)
    check.whole("config.task.embedding_size", self.embedding_size)
    for name in ("max_scale", "teacher_scale"):
      if not getattr(self, name) > 0:
        raise ValueError(f"config.task.{name} is {getattr(self, name)}; above 0 was expected")
    weights = (self.contrastive_weight, self.distillation_weight)
    if min(weights) < 0 or not sum(weights):
      raise ValueError(
        f"config.task.contrastive_weight and distillation_weight are {weights[0]:g} and "
        f"{weights[1]:g}; none below 0 and one above were expected"
      )
    if self.distillation_weight and self.loss == "sigmoid":
      raise ValueError(
        "config.task.distillation_weight: teachers answer by a softmax over the batch, so "
        "config.task.loss 'softmax' was expected"
      )


@register_task("contrastive", ContrastiveSettings)
def build_contrastive(settings: ContrastiveSettings, context: Context) -> Contrastive:
  """The task of `config.task.name = "contrastive"`.

  Raises:
    ValueError: an unknown text tower or attribute of it.
  """
  image = context.make_network(settings.embedding_size)
  given = dict(settings.text_arguments or {})
  names = ("dtype", "remat", "scan_blocks")
  shared = {name: getattr(image, name) for name in names if hasattr(image, name)}
  try:
    text = create_text_tower(
      settings.text_tower, **{**shared, **given, "embedding_size": settings.embedding_size}
    )
  except (TypeError, ValueError) as error:
    raise ValueError(f"config.task.text_tower, config.task.text_arguments: {error}") from error
  sigmoid = settings.loss == "sigmoid"
  model = CLIP(image, text, settings.max_scale)
  if sigmoid:
    model = model.clone(initial_scale=_SIGMOID_SCALE, initial_bias=_SIGMOID_BIAS)
  return Contrastive(
    model=model,
    settings=dataclasses.replace(settings, text_arguments=None),
    text_arguments=tuple(sorted(given.items())),
    mean=tuple(context.preprocessing.mean),
    std=tuple(context.preprocessing.std),
  )


@dataclasses.dataclass(frozen=True)
class Contrastive:
  """Images `[B, H, W, 3]` and C captions of each, tokens `[B, C, L]`.

  The loss is contrastive_weight * the contrastive one + distillation_weight * the one against
  stored teachers, each over all rows of the batch and added up over the captions.

  Attributes:
    model: both towers.
    settings: as configured.
    text_arguments: attributes of the text tower that replace its own.
    mean: per channel.
    std: per channel.
  """

  model: CLIP
  settings: ContrastiveSettings
  text_arguments: tuple[tuple[str, Any], ...]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  # A part of a batch has other negatives: accumulation goes by `embed` and `embedded_loss`.
  separable: bool = False

  @property
  def context_length(self) -> int:
    """Tokens of a text."""
    return int(self.model.text.context_length)

  @property
  def spec(self) -> Spec:
    """A picture, tokens of its captions, and teachers' embeddings where there are teachers."""
    fields = {
      "image": Field("image", shape=(None, None, 3)),
      "text": Field("text", "int32", (None, self.context_length)),
    }
    if self.settings.distillation_weight:
      fields["image_teacher"] = Field("value", "float32", (None, None))
      fields["text_teacher"] = Field("value", "float32", (None, None, None))
    return Spec(fields, self.evaluation_kinds[ZERO_SHOT].fields)

  @property
  def evaluation_kinds(self) -> Mapping[str, EvaluationKind]:
    """Zero-shot sets and retrieval sets."""
    return evaluation_kinds(self.context_length)

  @property
  def measures(self) -> Mapping[str, str]:
    """See `Task`; those of a zero-shot set."""
    return self.evaluation_kinds[ZERO_SHOT].measures

  def stored_info(self) -> dict[str, Any]:
    """What `hybrid_vit.load_clip` builds the towers from."""
    return {
      "text_tower": self.settings.text_tower,
      "text_arguments": dict(self.text_arguments),
      "embedding_size": self.settings.embedding_size,
      "max_scale": self.settings.max_scale,
      "loss": self.settings.loss,
    }

  def init(self, rng: jax.Array, batch: Batch) -> dict[str, Any]:
    """See `Task`."""
    images = jax.ShapeDtypeStruct((1, *batch["image"].shape[1:]), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, self.context_length), jnp.int32)
    variables = initial_variables(self.model, rng, images, tokens)
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}

  def normalize(self, images: jax.Array) -> jax.Array:
    """uint8 `[B, H, W, 3]` → float32 with the network's mean and standard deviation."""
    return normalized(images, self.mean, self.std)

  def displayable(self, images: Any) -> Any:
    """Batch images as uint8, the normalisation undone."""
    return displayable(images, self.mean, self.std)

  def encode_image(self, variables: Variables, images: jax.Array) -> jax.Array:
    """Normalised `[B, H, W, 3]` → float32 `[B, D]` of unit length."""
    features: Any = self.model.apply(variables, images, None, train=False)
    return features[0]

  def encode_text(self, variables: Variables, tokens: jax.Array) -> jax.Array:
    """int32 `[T, L]` → float32 `[T, D]` of unit length."""
    features: Any = self.model.apply(variables, None, tokens, train=False)
    return features[1]

  def augment(self, batch: Batch, rng: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
    """Normalises the pictures."""
    del rng, step
    kept = ("text", "image_teacher", "text_teacher")
    found = {name: batch[name] for name in kept if name in batch}
    return {"image": self.normalize(batch["image"]), **found}

  def loss(
    self, variables: Variables, batch: Batch, rng: jax.Array
  ) -> tuple[jax.Array, dict[str, Any]]:
    """See `Task`. "top1" is how often a picture's own (first) text is its nearest of the batch."""
    embeddings, stats = self.embed(variables, batch, rng)
    loss, metrics = self.embedded_loss(variables, embeddings, batch)
    return loss, {"metrics": metrics, "batch_stats": stats}

  def embed(
    self, variables: Variables, batch: Batch, rng: jax.Array
  ) -> tuple[dict[str, jax.Array], Any]:
    """Augmented rows → {"image" `[B, D]`, "text" `[B, C, D]`}, and new batch statistics."""
    rows, captions, length = batch["text"].shape
    (images, texts, _), updated = self._apply(
      variables, batch["image"], batch["text"].reshape(rows * captions, length), rng
    )
    embeddings = {"image": images, "text": texts.reshape(rows, captions, -1)}
    return embeddings, updated.get("batch_stats", {})

  def embedded_loss(
    self, variables: Variables, embeddings: Mapping[str, jax.Array], batch: Batch
  ) -> tuple[jax.Array, dict[str, Any]]:
    """Loss of the whole batch, and metrics, by the scale (and bias) among the parameters."""
    params, settings = variables["params"], self.settings
    scale = self.model.scale_of(params["logit_scale"])
    images, texts = embeddings["image"], embeddings["text"]
    weight = jnp.asarray(images.shape[0], jnp.float32)
    contrastive = distillation = jnp.zeros((), jnp.float32)
    for k in range(texts.shape[1]):
      text = texts[:, k]
      if settings.contrastive_weight:
        contrastive += (
          sigmoid_loss(images, text, scale, params["logit_bias"])
          if settings.loss == "sigmoid"
          else softmax_loss(images, text, scale)
        )
      if settings.distillation_weight:
        teachers = Teachers(
          _unit_length(batch["image_teacher"]),
          _unit_length(batch["text_teacher"][:, k]),
          settings.teacher_scale,
        )
        distillation += softmax_loss(images, text, scale, teachers)
    loss = settings.contrastive_weight * contrastive + settings.distillation_weight * distillation
    metrics = {
      "loss": (loss * weight, weight),
      "top1": (count_nearest(images, texts[:, 0]), weight),
      "scale": (scale * weight, weight),
    }
    if settings.distillation_weight:
      metrics["distillation_loss"] = (distillation * weight, weight)
    return loss, metrics

  def activations(self, variables: Variables, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
    """Image, the image tower's endpoints, the text tower's for the first caption, embeddings."""
    found = {"image": batch["image"]}
    for tower, rows in (("image", batch["image"]), ("text", batch["text"][:, 0])):
      own = {name: variables.get(name, {}).get(tower, {}) for name in ("params", "batch_stats")}
      (answer, endpoints), _ = getattr(self.model, tower).apply(
        own, rows, train=True, rngs={"dropout": rng}, mutable=["batch_stats"]
      )
      found |= {f"{tower}/{name}": value for name, value in endpoints.items()}
      found[f"{tower}/embedding"] = answer
    return found

  def predict(self, variables: Variables, batch: Batch) -> jax.Array:
    """ "image" uint8 or normalised float32 `[B, H, W, 3]` → embeddings float32 `[B, D]`."""
    return self.encode_image(variables, self.normalize(batch["image"]))

  def evaluators(self, data: Sequence[EvaluationData]) -> list[Evaluator]:
    """See `Task`: by the sets' kinds."""
    return evaluators_for(self, data)

  def _apply(self, variables: Variables, images: Any, tokens: Any, rng: jax.Array) -> Any:
    return self.model.apply(
      variables, images, tokens, train=True, rngs={"dropout": rng}, mutable=["batch_stats"]
    )


def _unit_length(x: jax.Array) -> jax.Array:
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))
