"""Tasks of masks on a network that compiles in seconds, their batches and their answers."""

import numpy as np
from ml_collections import ConfigDict

from hybrid_vit.config import Config
from hybrid_vit.data.scenes import SceneSource
from hybrid_vit.data.spec import kinds, on_device, resolve, row
from hybrid_vit.data.transforms import parse_transform
from hybrid_vit.mask_inference import MaskAnswer, PanopticInferenceSettings, RestoredMasks
from hybrid_vit.models.registry import create_model
from hybrid_vit.tasks.registry import Context, create_task, task_settings
from tests import dense

HEAD = {
  "name": "mask2former", "channels": 16, "mask_channels": 8, "num_queries": 6, "num_heads": 2,
  "encoder_layers": 1, "encoder_hidden": 16, "decoder_layers": 2, "decoder_hidden": 16,
  "norm_groups": 4,
}  # fmt: skip
# Maps of stride 4, 8 and 16: two of them are attended to.
ARGUMENTS = {"depths": (1, 1, 1), "widths": (8, 12, 16), "output_norms": (1, 2, 3)}
TRANSFORMS = {
  "panoptic_segmentation": "decode|flip_lr|keep_segments(5)",
  "instance_segmentation": "decode|flip_lr|drop_crowd|pack_masks(5)",
  "mask_segmentation": "decode|flip_lr",
}
SCENES = SceneSource("train", size=32, count=64)


def make_task(
  name="panoptic_segmentation", info=None, num_classes=None, arguments=ARGUMENTS, **fields
):
  """A task by its settings, as a configuration would give them."""
  given = {"head": HEAD, "loss": {"num_points": 32}, "max_objects": 5, **fields}
  context = Context(
    info=SCENES.info if info is None else info,
    num_classes=num_classes,
    preprocessing=dense.EXPECTS,
    make_network=lambda classes: create_model(dense.NETWORK, num_classes=classes, **arguments),
  )
  return create_task(name, Config(given, "config.task").as_dataclass(task_settings(name)), context)


def make_batch(task, name="panoptic_segmentation", rows=4, transform=None, source=SCENES):
  """Scenes as the loader makes rows of them."""
  text = transform or TRANSFORMS[name]
  apply = parse_transform(text, kinds=kinds(task.spec.train))
  fields = resolve(task.spec.train, apply, lambda: dict(source[0]))
  made = []
  for i in range(rows):
    example = apply(dict(source[i]), np.random.default_rng(i))
    made.append({n: row(f, n, example[n]) for n, f in on_device(fields).items()})
  return {n: np.stack([m[n] for m in made]) for n in made[0]}


def perfect(example, task):
  """What a network that makes no error says of a scene."""
  labels, size = example["segment_labels"], example["segments"].shape
  classes = np.full((len(labels) + 1, task.num_classes + 1), -20.0, np.float32)
  classes[np.arange(len(labels)), labels] = 20.0
  classes[-1, -1] = 20.0
  maps = np.stack([example["segments"] == i for i in range(len(labels))] + [np.zeros(size, bool)])
  masks = RestoredMasks(np.where(maps, 20.0, -20.0).astype(np.float32), size, size, size)
  return MaskAnswer(PanopticInferenceSettings(scale=None), classes, masks)


class Perfect:
  """In the place of `MaskInference`."""

  def __init__(self, task, source):
    self._task, self._source, self._next = task, source, 0

  def answer(self, variables, image):
    """The next picture's truth, or for variables that are "wrong" its masks of other classes."""
    example = self._source[self._next]
    assert np.array_equal(image, example["image"])
    self._next += 1
    found = perfect(example, self._task)
    if variables == "wrong":
      found.class_logits[:] = np.roll(found.class_logits, 1, axis=1)
    return found


def config(task="panoptic_segmentation", **changes):
  """A short training on drawn scenes."""
  values = ConfigDict()
  values.model = dict(name=dense.NETWORK, arguments=ARGUMENTS)
  values.data = dict(
    source="scenes:size=32,count=64", batch_size=8, image_size=32, transform=TRANSFORMS[task]
  )
  values.evaluation = dict(sets=dict(held_out=dict(split="validation[:12]", batch_size=8)))
  values.total_steps = 12
  values.task = dict(name=task, head=HEAD, loss=dict(num_points=32), max_objects=5)
  if task != "mask_segmentation":
    values.task.inference = dict(scale=None)
  values.optimizer = dict(
    name="adamw", learning_rate=2e-3, weight_decay=0.05, schedule=dict(name="constant")
  )
  values.evaluate_every_steps = 6
  values.log_every_steps = 3
  values.checkpoint = dict(every_steps=3, keep=9)
  values.update(changes)
  return values
