"""Depth from one picture: any backbone with a depth head, SILog and others, exact errors.

The head answers metres, above 0 and up to its `max_depth`; they are resized to the truth before the
loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_vit.data import arguments as check
from hybrid_vit.data.spec import Field, Spec
from hybrid_vit.dense_plots import plot_depths
from hybrid_vit.heads.registry import head_arguments
from hybrid_vit.map_inference import MapInference
from hybrid_vit.metrics.depth import DEPTH_METRICS, DepthProtocol, depth_metrics, depth_sums
from hybrid_vit.ops.resize import resize_bilinear
from hybrid_vit.tasks import depth_losses
from hybrid_vit.tasks.base import Batch, EvaluationData, Evaluator, Variables
from hybrid_vit.tasks.dense import DRAWN, DecoderSettings, DenseTask, build_model
from hybrid_vit.tasks.processes import local_variables, summed_over_processes
from hybrid_vit.tasks.registry import Context, register_task

LOSSES = ("silog", "sig_loss", "l1", "berhu")
_MEASURES = {
  "rmse": "min", "abs_rel": "min", "sq_rel": "min", "rmse_log": "min", "log10": "min",
  "silog": "min", "d1": "max", "d2": "max", "d3": "max",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DepthSettings(DecoderSettings):
  """`config.task`; see `DecoderSettings` and `Depth`.

  Attributes:
    loss: "silog" (weight `silog_weight`), "sig_loss", "l1" or "berhu"; see `depth_losses`.
    silog_weight: of the squared mean.
    gradient_weight: of `depth_losses.gradient_matching` beside the loss.
    chamfer_weight: of `depth_losses.bins_chamfer`, for a head that has bins.
    protocol: of the errors; its depths bound the truth in training, too.
  """

  loss: str = "silog"
  silog_weight: float = 0.5
  gradient_weight: float = 0.0
  chamfer_weight: float = 0.0
  protocol: DepthProtocol = dataclasses.field(default_factory=DepthProtocol)

  def __post_init__(self) -> None:
    super().__post_init__()
    check.choice("config.task.loss", self.loss, LOSSES)
    check.number("config.task.silog_weight", self.silog_weight, 0, 1)
    check.number("config.task.gradient_weight", self.gradient_weight, 0)
    check.number("config.task.chamfer_weight", self.chamfer_weight, 0)


@register_task("depth", DepthSettings)
def build_depth(settings: DepthSettings, context: Context) -> Depth:
  """The task of `config.task.name = "depth"`; the head's `max_depth` is the protocol's unless said.

  Raises:
    ValueError: a head that makes no depth.
  """
  name = settings.head.get("name", "")
  arguments = head_arguments(name)
  if "max_depth" not in arguments:
    raise ValueError(f"config.task.head {name!r} makes no depth: it has no `max_depth`")
  limits: dict[str, Any] = {
    "max_depth": settings.protocol.max_depth,
    "min_depth": settings.protocol.min_depth,
  }
  limits = {key: value for key, value in limits.items() if key in arguments}
  if "answer" in arguments:
    limits["answer"] = "bounded"
    if settings.head.get("answer") == "inverse":
      raise ValueError(
        "config.task.head.answer is 'inverse', depth up to an unknown scale; 'bounded' or "
        "'metric', which are metres, were expected"
      )
  if settings.chamfer_weight and "num_bins" not in arguments:
    raise ValueError(f"config.task.chamfer_weight: the head {name!r} has no bins")
  model = build_model(
    dataclasses.replace(settings, head={**limits, **settings.head}),
    context.make_network(0),
    1,
    context.batch_norm_groups,
  )
  return Depth(
    model=model,
    mean=tuple(context.preprocessing.mean),
    std=tuple(context.preprocessing.std),
    auxiliary_weight=settings.auxiliary_weight,
    inference=settings.inference,
    loss_name=settings.loss,
    silog_weight=settings.silog_weight,
    gradient_weight=settings.gradient_weight,
    chamfer_weight=settings.chamfer_weight,
    protocol=settings.protocol,
  )


@dataclasses.dataclass(frozen=True)
class Depth(DenseTask):
  """Images `[B, H, W, 3]` and depth, float32 `[B, H, W]` metres, 0 where nothing was measured.

  Attributes:
    loss_name: see `DepthSettings`; so are the others.
  """

  loss_name: str = "silog"
  silog_weight: float = 0.5
  gradient_weight: float = 0.0
  chamfer_weight: float = 0.0
  protocol: DepthProtocol = dataclasses.field(default_factory=DepthProtocol)
  # Each loss is over the measured pixels of the whole batch.
  separable: bool = False

  @property
  def spec(self) -> Spec:
    """A picture and its depth; in evaluation each of its own size."""
    return Spec(
      {
        "image": Field("image", shape=(None, None, 3)),
        "depth": Field("depth", "float32", (None, None), minimum=0),
      },
      {
        "image": Field("image", shape=(None, None, 3), on_host=True),
        "depth": Field("depth", "float32", (None, None), on_host=True),
      },
    )

  @property
  def measures(self) -> dict[str, str]:
    """See `Task`."""
    return dict(_MEASURES)

  def stored_info(self) -> dict[str, Any]:
    """See `Task`."""
    return {"max_depth": self.protocol.max_depth}

  def augment(self, batch: Batch, rng: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
    """Normalises the pictures; depth outside the protocol's becomes "not measured"."""
    del rng, step
    depth, protocol = batch["depth"], self.protocol
    inside = (depth > protocol.min_depth) & (depth < protocol.max_depth)
    return {"image": self.normalize(batch["image"]), "depth": jnp.where(inside, depth, 0.0)}

  def loss(
    self, variables: Variables, batch: Batch, rng: jax.Array
  ) -> tuple[jax.Array, dict[str, Any]]:
    """See `Task`. "abs_rel" is over the measured pixels of the batch."""
    (answer, found), updated = self.apply_in_training(variables, batch, rng)
    truth = batch["depth"]
    predicted = self._at_truth(answer, truth)
    total = self._loss(predicted, truth)
    weight = jnp.asarray(truth.shape[0], jnp.float32)
    metrics = {}
    if self.gradient_weight:
      edges = depth_losses.gradient_matching(predicted, truth)
      total = total + self.gradient_weight * edges
      metrics["gradient_loss"] = (edges * weight, weight)
    if self.chamfer_weight:
      chamfer = depth_losses.bins_chamfer(found["bin_centers"], truth)
      total = total + self.chamfer_weight * chamfer
      metrics["chamfer_loss"] = (chamfer * weight, weight)
    if "auxiliary" in found:
      auxiliary = self._loss(self._at_truth(found["auxiliary"], truth), truth)
      total = total + self.auxiliary_weight * auxiliary
      metrics["auxiliary_loss"] = (auxiliary * weight, weight)
    valid = truth > 0
    relative = jnp.where(valid, jnp.abs(predicted - truth) / jnp.where(valid, truth, 1.0), 0.0)
    metrics |= {
      "loss": (total * weight, weight),
      "abs_rel": (jnp.sum(relative), jnp.sum(valid, dtype=jnp.float32)),
    }
    return total, {"metrics": metrics, "batch_stats": updated.get("batch_stats", {})}

  def _at_truth(self, answer: jax.Array, truth: jax.Array) -> jax.Array:
    corners = self.inference.align_corners
    return resize_bilinear(answer, truth.shape[1:3], align_corners=corners)[..., 0]

  def _loss(self, predicted: jax.Array, truth: jax.Array) -> jax.Array:
    if self.loss_name == "silog":
      return depth_losses.silog(predicted, truth, weight=self.silog_weight)
    return getattr(depth_losses, self.loss_name)(predicted, truth)

  def picture_inference(self) -> MapInference:
    """What makes depth of pictures: `values(variables, photo)`."""
    return MapInference(self.answers, self.inference, softmax=False)

  def evaluators(self, data: Sequence[EvaluationData]) -> list[Evaluator]:
    """See `Task`."""
    inference = self.picture_inference()
    return [DepthEvaluator(self, item, inference) for item in data]


class DepthEvaluator:
  """Errors of each picture, averaged over a set."""

  def __init__(self, task: Depth, data: EvaluationData, inference: MapInference):
    self.name = data.name
    self._task, self._data, self._inference = task, data, inference

  def run(self, variables: Variables) -> dict[str, float]:
    """See `Evaluator`; "examples" is the number of pictures that counted.

    Raises:
      ValueError: nothing was measured in any picture.
    """
    own, protocol = local_variables(variables), self._task.protocol
    sums = np.zeros(len(DEPTH_METRICS) + 1)
    for _, host in self._data.batches():
      for image, truth in zip(host["image"], host["depth"]):
        if image is not None:
          predicted = self._inference.values(own, image)[..., 0]
          sums = sums + depth_sums(predicted[None], np.asarray(truth)[None], protocol)
    sums = summed_over_processes({"sums": sums}, self._data.part)["sums"]
    if not sums[-1]:
      raise ValueError(
        f"in no picture of evaluation set {self.name!r} is a depth between {protocol.min_depth:g} "
        f"and {protocol.max_depth:g} m (config.task.protocol)"
      )
    return {**depth_metrics(sums), "examples": float(sums[-1])}

  def draw(self, variables: Variables, path: Path) -> bool:
    """Photos with predicted and true depth and how far the two are apart."""
    own, examples = local_variables(variables), self._data.examples(DRAWN)
    if jax.process_index() or not examples:
      return bool(examples)
    plot_depths(
      [example["image"] for example in examples],
      [self._inference.values(own, example["image"])[..., 0] for example in examples],
      path,
      truths=[example["depth"] for example in examples],
    )
    return True
