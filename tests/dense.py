"""Dense tasks on a network that compiles in seconds, and small folders of photos with maps."""

import dataclasses
import io

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from hybrid_vit import sharding
from hybrid_vit.config import Config
from hybrid_vit.data.evaluation import EvaluationSet
from hybrid_vit.data.pipeline import EvaluationSettings
from hybrid_vit.models.registry import Preprocessing, create_model
from hybrid_vit.tasks.registry import Context, create_task, task_settings

NETWORK = "convnext_tiny"
# Maps of stride 4 and 8.
ARGUMENTS = {"depths": (1, 1), "widths": (8, 12), "output_norms": (1, 2)}
HEAD = {"name": "segformer", "channels": 8}
AUXILIARY = {"name": "fcn", "channels": 4, "level": -1}
# Without batch norm and dropout: rows by themselves.
PLAIN_HEAD = {"name": "fcn", "num_convs": 0, "level": -1, "dropout_rate": 0.0}
DEPTH_HEAD = {"name": "glpn", "channels": 8}
EXPECTS = Preprocessing(32, 1.0, "bilinear", (0.5,) * 3, (0.25,) * 3)
# Of photos in a folder; no two alike, none square.
SIZES = ((20, 33), (32, 24), (17, 40), (41, 30), (28, 29), (36, 22), (23, 44))


def make_task(name="segmentation", num_classes=4, info=None, arguments=ARGUMENTS, **fields):
  """A task by its settings, as a configuration would give them."""
  fields.setdefault("head", DEPTH_HEAD if name == "depth" else HEAD)
  settings = Config(fields, "config.task").as_dataclass(task_settings(name))
  context = Context(
    info=info or {},
    num_classes=num_classes,
    preprocessing=EXPECTS,
    make_network=lambda classes: create_model(NETWORK, num_classes=classes, **arguments),
  )
  return create_task(name, settings, context)


def with_answers(task, answer, **endpoints):
  """The same task with a network that answers what it is told, whatever it sees."""

  class Told:
    def apply(self, variables, images, train, **_):
      out = (jax.numpy.asarray(answer), {k: jax.numpy.asarray(v) for k, v in endpoints.items()})
      return (out, {}) if train else out

  return dataclasses.replace(task, model=Told())


def make_batch(task="segmentation", rows=8, size=32, classes=4, seed=0):
  """Pictures and maps of noise, some pixels of which have no class or depth."""
  rng = np.random.default_rng(seed)
  batch = {
    "image": rng.integers(0, 256, (rows, size, size, 3), np.uint8),
    "index": np.arange(rows, dtype=np.int32),
  }
  hidden = rng.random((rows, size, size)) < 0.2
  if task == "depth":
    depth = rng.uniform(0.5, 9.5, (rows, size, size)).astype(np.float32)
    return {**batch, "depth": np.where(hidden, np.float32(0), depth)}
  labels = rng.integers(0, classes, (rows, size, size)).astype(np.int32)
  return {**batch, "map": np.where(hidden, 255, labels).astype(np.int32)}


def drawn(task, batch, seed=1):
  """Variables of noise, of the sizes that the task's have."""
  shapes = jax.eval_shape(task.init, jax.random.key(0), batch)
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    noise = 0.2 * rng.normal(size=leaf.shape)
    return np.asarray(noise + 1.0 if path[-1].key in ("var", "scale") else noise, leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def example(index, classes=4):
  """(photo, map of classes, depth in millimetres) of a folder."""
  rng = np.random.default_rng(index)
  height, width = SIZES[index % len(SIZES)]
  photo = rng.integers(0, 256, (height, width, 3), np.uint8)
  labels = rng.integers(0, classes, (height, width)).astype(np.uint8)
  labels[:3, :4] = 255
  depth = rng.integers(500, 9500, (height, width)).astype(np.uint16)
  depth[-2:] = 0
  return photo, labels, depth


def png(values):
  """An array as the bytes of a PNG."""
  out = io.BytesIO()
  Image.fromarray(values).save(out, "PNG")
  return out.getvalue()


def write_folder(root, task="segmentation", count=7, classes=4):
  """A folder of photos with maps; the source that reads it."""
  word = "depth" if task == "depth" else "annotations"
  for i in range(count):
    photo, labels, depth = example(i, classes)
    for folder, values in (("images", photo), (word, depth if task == "depth" else labels)):
      path = root / folder / f"{i:03}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(png(values))
  return source_of(root, task, classes)


def source_of(root, task="segmentation", classes=4):
  """What reads such a folder."""
  return f"depth:{root}" if task == "depth" else f"maps:{root}?classes={classes}"


def evaluation_set(task, source, batch_size=4, mesh=None, split="all", **settings):
  """A source, opened for evaluation."""
  settings = EvaluationSettings(
    name="held_out", source=source, split=split, batch_size=batch_size, transform="decode",
    own_transform=False, **settings,
  )  # fmt: skip
  return EvaluationSet(
    settings, task.spec.evaluation, mesh or sharding.make_mesh({}, jax.devices()[:1])
  )


def config(task="segmentation", source="scenes:size=32,count=64", **changes):
  """A short training on drawn scenes."""
  values = ConfigDict()
  values.model = dict(name=NETWORK, arguments=ARGUMENTS)
  values.data = dict(source=source, batch_size=16, image_size=32, transform="decode|flip_lr")
  values.evaluation = dict(sets=dict(held_out=dict(split="validation[:20]", batch_size=8)))
  values.total_steps = 12
  values.task = dict(name=task, head=DEPTH_HEAD if task == "depth" else HEAD)
  if task == "segmentation":
    values.task.auxiliary = AUXILIARY
  values.optimizer = dict(
    name="adamw", learning_rate=4e-3, weight_decay=0.05, schedule=dict(name="constant")
  )
  values.evaluate_every_steps = 6
  values.log_every_steps = 3
  values.checkpoint = dict(every_steps=3, keep=9)
  values.update(changes)
  return values
