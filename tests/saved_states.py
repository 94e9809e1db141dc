"""States of a small network, saved, damaged and restored."""

import errno
import functools

import jax
import jax.numpy as jnp

from hybrid_vit import checkpoints, sharding
from hybrid_vit.checkpoints import Checkpointer
from hybrid_vit.train_state import create_state
from tests import small


@functools.cache
def layout_and_state(fsdp=1, width=64):
  """(shardings, state) on a mesh of eight devices, or on one where `fsdp` is 1."""
  mesh = sharding.make_mesh({"fsdp": fsdp, "data": -1}, jax.devices()[: 8 if fsdp > 1 else 1])
  task = small.make_task(width=width)
  make = functools.partial(
    create_state, task=task, optimizer=small.adamw(task), batch=small.make_batch(), ema=True
  )
  abstract = jax.eval_shape(make, jax.random.key(0))
  layout = sharding.state_shardings(abstract, sharding.DEFAULT_RULES, mesh)
  return layout, jax.jit(make, out_shardings=layout)(jax.random.key(0))


def target(**arguments):
  """What `restore` is to fill."""
  layout, state = layout_and_state(**arguments)
  return checkpoints.abstract_like(state, layout)


def at(step, state=None):
  """A state of that step whose floats all differ from those of other steps."""
  state = layout_and_state()[1] if state is None else state
  move = lambda x: x + step if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
  return jax.tree.map(move, state.replace(rng=None)).replace(
    rng=state.rng, step=jax.device_put(jnp.int32(step), state.step.sharding)
  )


# What is known of the weights.
INFO = {"name": "conv", "num_classes": 10, "class_names": ("a", "b"), "preprocessing": {"size": 8}}


def save(workdir, *steps, **options):
  checkpointer = Checkpointer(
    workdir, run_config={"seed": 3, "sizes": (1, 2)}, info=INFO, keep_best=False, **options
  )
  for step in steps:
    assert checkpointer.save(at(step), step, {"loss": [0.1 + step, 16.0]})
  checkpointer.close()


def restore(workdir, begin_anew=False, **arguments):
  checkpointer = Checkpointer(workdir, keep_best=False)
  try:
    return checkpointer.restore(target(**arguments), begin_anew=begin_anew)
  finally:
    checkpointer.close()


@functools.cache
def weights(offset):
  """Evaluation variables that differ from those of another offset."""
  return dict(at(offset).ema)


def everything_in(directory):
  """Sizes of its files, by path."""
  return {p.relative_to(directory): size_of(p) for p in directory.rglob("*")}


def damage(checkpoint, how):
  """Changes the largest data file of a checkpoint's state."""
  path = max((p for p in (checkpoint / "state").rglob("*") if "d" in p.parts), key=size_of)
  content = bytearray(path.read_bytes())
  if how == "flip":
    content[len(content) // 2] ^= 1
  else:
    del content[len(content) // 2 :]
  path.write_bytes(content)


def size_of(path):
  """Bytes of a file, 0 of anything else."""
  return path.stat().st_size if path.is_file() else 0


def failures():
  """What a file system, and readers that wrap its errors, raise in passing."""
  wrapped = Exception("Encountered error while reading array index")
  wrapped.__cause__ = ValueError(
    'UNAVAILABLE: Error reading local file "/data/run/state/manifest.ocdbt" '
    "[OS error 116: ESTALE Stale file handle]"
  )
  newer = ValueError(
    'OUT_OF_RANGE: Error reading "params/0" in OCDBT database at local file "/data/run/state/": '
    "Input/output error [os_error_code='5']"
  )
  return {
    "newer": newer,
    "stale": OSError(errno.ESTALE, "Stale file handle", "/data/run/state/_METADATA"),
    "right": PermissionError(errno.EACCES, "Permission denied", "/data/run/state/_METADATA"),
    "wrapped": wrapped,
    "memory": MemoryError("no memory"),
    "unknown": RuntimeError("something new"),
  }
