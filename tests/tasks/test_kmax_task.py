"""kMaX-DeepLab as a head of the tasks of masks: a step, an evaluation, its rules for pictures."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit import mask_inference
from hybrid_vit.data.scenes import SceneSource
from hybrid_vit.heads import mask_model
from hybrid_vit.mask_rules import KMAX, KMaXPanopticSettings
from hybrid_vit.tasks import kmax_inference as rules
from hybrid_vit.tasks import mask_methods
from hybrid_vit.tasks.kmax_losses import KMaXLoss
from tests import dense, masks

HEAD = {
  "name": "kmax", "channels": 16, "mask_channels": 8, "num_queries": 6, "num_heads": 2,
  "pixel_channels": (8, 8, 4, 4), "pixel_depths": (1, 1, 1, 1),
  "pixel_blocks": ("axial", "bottleneck", "bottleneck", "bottleneck"),
  "decoder_layers": (1, 0, 0), "decoder_hidden": 16, "batch_norm_momentum": 0.9,
}  # fmt: skip
# Maps of stride 4 to 32, of which the head needs all.
ARGUMENTS = {"depths": (1, 1, 1, 1), "widths": (8, 12, 16, 16), "output_norms": (1, 2, 3, 4)}
LOSS = {"contrast_pixels": 16, "semantic_pixels": 16}
# Of answers of noise some segments are left.
LOW = {
  "thing_threshold": 0.0, "stuff_threshold": 0.0, "pixel_threshold": 0.15,
  "overlap_threshold": 0.1,
}  # fmt: skip


def make_task(name="panoptic_segmentation", **fields):
  given = {"arguments": ARGUMENTS, "head": HEAD, "loss": LOSS, **fields}
  return masks.make_task(name, **given)


@functools.cache
def panoptic():
  """(task, batch of which the last picture has no segment, variables of noise)."""
  task = make_task(inference={"scale": None, **LOW})
  # The coarsest map has 2 x 2 cells.
  batch = masks.make_batch(task, source=SceneSource("train", size=64, count=64))
  batch["segment_labels"][-1], batch["segments"][-1] = -1, 255
  return task, batch, dense.drawn(task, batch)


def test_every_head_has_a_method():
  assert set(mask_model._HEADS) == set(mask_methods._METHODS)


def test_a_step_is_finite_and_reaches_the_parameters():
  task, batch, variables = panoptic()

  @jax.jit
  def step(params, batch, key):
    def loss(params):
      return task.loss({**variables, "params": params}, task.augment(batch, key, 0), key)

    return jax.value_and_grad(loss, has_aux=True)(params)

  (total, aux), gradient = step(variables["params"], batch, jax.random.key(1))
  found = {name: float(a / b) for name, (a, b) in aux["metrics"].items()}
  kinds = ("class", "dice", "mask", "contrast", "semantic")
  assert set(found) == {*(f"{kind}_loss" for kind in kinds), "loss"}
  assert np.isclose(found["loss"], total) and all(value > 0 for value in found.values())
  before = variables["batch_stats"]
  moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), aux["batch_stats"], before)
  assert all(jax.tree.leaves(moved))
  still = set()
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    assert np.isfinite(leaf).all(), name
    if np.abs(leaf).max() < 1e-6:
      still.add(name)
  # A softmax or a batch norm behind them takes out whatever is added.
  shifts = ("similarity_norm", "mask_norm", "update_norm", "retrieved_norm", "pixel_feature/conv")
  assert all(name.endswith(tuple(f"/{part}/bias" for part in shifts)) for name in still), still
  nothing = {**batch, "segment_labels": np.full_like(batch["segment_labels"], -1)}
  (alone, aux), gradient = step(variables["params"], nothing, jax.random.key(1))
  assert float(aux["metrics"]["mask_loss"][0]) == 0 and np.isfinite(alone)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


class Data:
  """An evaluation set of a few scenes."""

  name, part, info = "held_out", 0, masks.SCENES.info
  source = SceneSource("validation", size=32, count=2)

  def batches(self):
    rows = [dict(self.source[i]) for i in range(2)]
    names = ("image", "segments", "segment_labels", "segment_crowd")
    yield {"index": np.arange(2)}, {n: [row[n] for row in rows] for n in names}


def test_a_network_is_measured_by_its_own_rules():
  task, _, variables = panoptic()
  found = task.evaluators([Data()])[0].run(variables)
  assert found["examples"] == 2 and 0 <= found["pq"] <= 1 and 0 <= found["mean_iou"] <= 1
  image = Data.source[0]["image"]
  answer = task.picture_inference().answer(variables, image)
  raw = jax.jit(task.answers)(variables, image[None])
  restored = rules.restore_size(
    raw["mask_logits"].transpose(0, 2, 3, 1), (32, 32), (32, 32), (32, 32)
  )
  expected, segments = rules.panoptic_segments(
    np.asarray(raw["class_logits"][0]),
    np.asarray(restored[0]),
    things=task.thing_classes,
    **LOW,
  )
  assert segments
  np.testing.assert_array_equal(answer.panoptic(task.thing_classes).map, expected)


@pytest.mark.parametrize("width", [65, 64])
def test_masks_share_the_pixels_and_odd_pictures_keep_their_corners(width):
  rng = np.random.default_rng(0)
  classes = 2 * rng.normal(size=(1, 5, 4)).astype(np.float32)
  maps = 3 * rng.normal(size=(1, 5, 9, 17)).astype(np.float32)
  settings = KMaXPanopticSettings(
    scale=None, canvases=((33, width),), thing_threshold=0.2, stuff_threshold=0.1,
    pixel_threshold=0.3, overlap_threshold=0.1,
  )  # fmt: skip
  inference = mask_inference.MaskInference(
    lambda variables, images: {"class_logits": classes, "mask_logits": maps},
    settings,
    (0, 0, 0),
    KMAX,
  )
  answer = inference.answer(None, np.zeros((30, 50, 3), np.uint8))
  restored = rules.restore_size(
    jnp.asarray(maps.transpose(0, 2, 3, 1)), (33, width), (30, 50), (30, 50)
  )
  for query in range(5):
    np.testing.assert_allclose(answer.masks[..., query], restored[0, ..., query], atol=1e-5)
  scores = rules.semantic_scores(jnp.asarray(classes), restored)
  np.testing.assert_array_equal(answer.classes(), np.asarray(scores[0]).argmax(-1))
  found = answer.panoptic(things=(0, 1))
  expected, segments = rules.panoptic_segments(
    classes[0], np.asarray(restored[0]), things=(0, 1), thing_threshold=0.2, stuff_threshold=0.1,
    pixel_threshold=0.3, overlap_threshold=0.1,
  )  # fmt: skip
  assert len(segments) > 1 and found.segments == tuple(segments)
  np.testing.assert_array_equal(found.map, expected)
  objects = answer.objects(things=(1, 2))
  every = rules.instances(
    classes[0], np.asarray(restored[0]), things=(1, 2), pixel_threshold=0.3
  )  # fmt: skip
  kept = every.masks.any((1, 2))
  np.testing.assert_allclose(objects.scores, every.scores[kept], rtol=1e-4)


@dataclasses.dataclass(frozen=True)
class Fixed:
  """In the place of the network."""

  answer: dict

  def apply(self, variables, images, train):
    return self.answer, {}


def test_scores_of_classes_are_those_of_shared_pixels():
  rng = np.random.default_rng(1)
  answer = {
    "class_logits": jnp.asarray(rng.normal(size=(1, 6, 10)), jnp.float32),
    "mask_logits": jnp.asarray(5 * rng.normal(size=(1, 6, 9, 9)), jnp.float32),
  }
  task = dataclasses.replace(make_task("mask_segmentation"), model=Fixed(answer))
  scores = np.asarray(task.scores({}, np.zeros((1, 33, 33, 3), np.uint8)))
  classes = np.asarray(jax.nn.softmax(answer["class_logits"])[0, :, :-1])
  shares = np.asarray(jax.nn.softmax(answer["mask_logits"], axis=1)[0])
  # With aligned corners every fourth pixel is a cell of the map.
  expected = np.einsum("qhw,qk->hwk", shares, classes)
  np.testing.assert_allclose(scores[0, ::4, ::4], expected, atol=1e-5)


def test_settings_are_those_of_the_head():
  task = make_task("instance_segmentation", inference={"pixel_threshold": 0.2})
  assert task.loss_settings == KMaXLoss(**LOSS) and task.inference.pixel_threshold == 0.2
  # A loss that is a mean over pictures may be added up.
  assert task.separable


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"loss": {"num_points": 5}}, "`config.task.loss.num_points` is not read"),
    ({"loss": {"contrast_pixel": 5}}, "did you mean `config.task.loss.contrast_pixels`"),
    ({"loss": {"contrast_pixels": 0}}, "contrast_pixels is 0; at least 1"),
    ({"inference": {"object_threshold": 0.5}}, "`config.task.inference.object_threshold` is not"),
    ({"inference": {"stuff_threshold": 1.5}}, "inference.stuff_threshold"),
    ({"inference": {"scale": "large"}}, "`config.task.inference.scale` is 'large'"),
    ({"head": {"name": "kmx"}}, "did you mean 'kmax'"),
    ({"arguments": masks.ARGUMENTS}, "kmax"),
  ],
)
def test_settings_that_cannot_be_are_named(fields, message):
  with pytest.raises(ValueError, match=message):
    task = make_task(**fields)
    # What maps there are is seen when it is built.
    jax.eval_shape(task.init, jax.random.key(0), masks.make_batch(task))
