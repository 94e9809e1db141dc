"""A stored network as one program of StableHLO with its weights, which JAX alone runs.

export_model(load_network("runs/flowers"), "flowers_program")
export_model(load_task("runs/segmenter"), "segmenter_program")

`model.jax` is what `jax.export` serialises: for several kinds of devices at once, with the number
of pictures open, and where it prepares them itself their size. `metadata.json` beside it says what
goes in, what comes out and how photos are to be prepared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_vit import recipes
from hybrid_vit.data.arguments import sides
from hybrid_vit.data.transforms import parse_transform
from hybrid_vit.models.registry import Preprocessing
from hybrid_vit.ops.platforms import tracing_for
from hybrid_vit.picture_preparation import prepared
from hybrid_vit.stored_tasks import StoredTask
from hybrid_vit.tasks.pictures import normalized
from hybrid_vit.weights.stored import StoredNetwork, check_finite

PROGRAM, METADATA = "model.jax", "metadata.json"
# jax.export's names of platforms → those by which operations choose their forms.
PLATFORMS = {"cpu": "cpu", "cuda": "gpu", "rocm": "gpu", "tpu": "tpu"}
# Tasks whose answers are maps → what these are.
_MAPS = {
  "segmentation": "logits of each pixel",
  "mask_segmentation": "scores of each pixel",
  "depth": "metres of each pixel",
}
# What the format holds in one file.
_MOST_BYTES = 2**31 - 2**24
# How far the program may be from the network, in standard deviations of the network's answers:
# both are compiled here, and differ in how XLA fuses them.
_TOLERANCE = 1e-3


def export_model(
  network: StoredNetwork | StoredTask,
  directory: str | Path,
  *,
  platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
  normalize: bool = True,
  resize: bool = False,
  image_size: int | None = None,
  batch_size: int | None = None,
  precision: str | None = None,
) -> dict[str, Any]:
  """Writes the program and its metadata, and holds it to the network on this machine.

  Args:
    network: see `weights.stored.load_network`; or what makes maps, see `stored_tasks.load_task`.
    directory: where to; new, or an earlier one of these.
    platforms: kinds of devices that it shall run on, of `PLATFORMS`.
    normalize: whether mean and deviation are a part of it: then it takes uint8 `[B, S, S, 3]`, else
      float32 that is normalised already.
    resize: whether resizing and cropping are a part of it, too: then it takes uint8 `[B, H, W, 3]`
      of any H and W, else photos are resized and cropped outside.
    image_size: S; None for what the weights expect. (What makes maps may expect another height than
      width, the window of its inference.)
    batch_size: B; None leaves it open.
    precision: of products on devices that have several ("highest", "default", "float32", …); None
      for each device's own.

  Returns:
    The metadata.

  Raises:
    ValueError: unknown platforms, weights that are no numbers or too large for the format,
      resizing without normalising or for maps, a task that makes no maps, or a directory that
      holds something else.
    ModuleNotFoundError: flatbuffers is not installed.
    RuntimeError: the program answers otherwise than the network; nothing is written.
  """
  target = _free(Path(directory).expanduser())
  _check(network, platforms, resize)
  if resize and not normalize:
    raise ValueError(
      "resizing inside and normalising outside was asked for: the program has 8-bit pictures "
      "after resizing and must normalise them; leave --no-normalize or --resize out"
    )
  height, width = _input_size(network, image_size)
  preprocessing = network.preprocessing
  if not isinstance(network, StoredTask):
    preprocessing = dataclasses.replace(preprocessing, image_size=height)
  dtype = jnp.uint8 if normalize else jnp.float32
  # Other names would be other sizes: those of one call's pictures are the same.
  plane = "h, w" if resize else f"{height}, {width}"
  shape = jax.export.symbolic_shape(f"{batch_size or 'b'}, {plane}, 3")
  answers = _answers(network)
  whole = _with_preparation(answers, preprocessing) if resize else answers
  with tracing_for(tuple(PLATFORMS[name] for name in platforms)), _precision(precision):
    # A function of its own, so that no trace for this process's devices is taken.
    exported = jax.export.export(jax.jit(whole), platforms=list(platforms))(
      jax.ShapeDtypeStruct(shape, dtype)
    )
  program = bytes(exported.serialize())
  output, here = exported.out_avals[0], jax.default_backend()
  checked = here in {PLATFORMS[name] for name in platforms}
  if checked:
    pictures = _pictures(
      (batch_size or 2, height, width, 3), dtype, preprocessing if resize else None
    )
    _hold(_name(network), program, _answers(network), pictures, precision)
  metadata = {
    "network": _name(network),
    "platforms": list(platforms),
    "input": {"shape": [str(n) for n in shape], "dtype": jnp.dtype(dtype).name},
    "output": {"shape": [str(n) for n in output.shape], "dtype": output.dtype.name},
    "answers": _meaning(network),
    "normalized_inside": normalize,
    "resized_inside": resize,
    "preprocessing": dataclasses.asdict(preprocessing),
    **_of_task(network),
    "precision": precision,
    "source": network.metadata.get("source") or {},
    "jax": jax.__version__,
    "calling_convention": exported.calling_convention_version,
    "held_to_the_network_on": here if checked else None,
  }
  _write(target, {PROGRAM: program, METADATA: (json.dumps(metadata, indent=2) + "\n").encode()})
  return metadata


def _write(directory: Path, contents: Mapping[str, bytes]) -> None:
  """Writes files of which the last says what the others are: it is never beside another's."""
  directory.mkdir(parents=True, exist_ok=True)
  partial = {name: directory / f"{name}.partial" for name in contents}
  for name, content in contents.items():
    partial[name].write_bytes(content)
  (directory / METADATA).unlink(missing_ok=True)
  for name, path in partial.items():
    path.replace(directory / name)


def _answers(network: StoredNetwork | StoredTask) -> Any:
  """Pictures → float32 logits `[B, K]`, without a classifier features `[B, D]`; or `[B, H, W, K]`.

  A function of its own for each call.
  """
  if isinstance(network, StoredTask):
    maps, variables = network.task.picture_inference().answers, network.variables
    return lambda images: maps(variables, images).astype(jnp.float32)

  def answer(images: jax.Array) -> jax.Array:
    expected = network.preprocessing
    pictures = normalized(images, expected.mean, expected.std)
    logits, endpoints = network.model.apply(network.variables, pictures, train=False)
    return (endpoints["pre_logits"] if logits is None else logits).astype(jnp.float32)

  return answer


def _name(network: StoredNetwork | StoredTask) -> str:
  return network.network if isinstance(network, StoredTask) else network.name


def _meaning(network: StoredNetwork | StoredTask) -> str:
  if isinstance(network, StoredTask):
    return _MAPS[network.name]
  return "logits" if network.num_classes else "features"


def _of_task(network: StoredNetwork | StoredTask) -> dict[str, Any]:
  """What metadata says of the task, and for maps of how pictures of other sizes are seen."""
  if isinstance(network, StoredTask):
    return {
      "task": network.name,
      "class_names": list(getattr(network.task, "map_class_names", ())),
      "inference": dataclasses.asdict(network.task.inference),
    }
  return {"class_names": list(network.class_names), "loss": network.loss}


def _input_size(network: StoredNetwork | StoredTask, image_size: int | None) -> tuple[int, int]:
  """(height, width) of the program's pictures; of maps those of inference's windows, if any."""
  if image_size is None and isinstance(network, StoredTask):
    settings = network.task.inference
    if settings.mode == "slide":
      return sides("crop", settings.crop)
    if settings.size is not None:
      return sides("size", settings.size)
  size = image_size or network.preprocessing.image_size
  return size, size


def _check(network: StoredNetwork | StoredTask, platforms: Sequence[str], resize: bool) -> None:
  unknown = [name for name in platforms if name not in PLATFORMS]
  if unknown or not platforms:
    raise ValueError(f"platforms {', '.join(unknown) or 'none'}; known: {', '.join(PLATFORMS)}")
  if isinstance(network, StoredTask):
    if network.name not in _MAPS:
      raise ValueError(
        f"weights of the task {network.name!r} are not exported; those of classifiers and of "
        f"{', '.join(_MAPS)} are"
      )
    if resize:
      raise ValueError(
        "what makes maps sees pictures of its own sizes, and nothing is cropped: --resize is for "
        "classifiers"
      )
  else:  # a task's were looked at when they were read
    check_finite(network)
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(network.variables))
  if size > _MOST_BYTES:
    raise ValueError(
      f"the weights of {_name(network)} take {size:,} bytes; the format holds {_MOST_BYTES:,}"
    )
  try:
    import flatbuffers  # noqa: F401  jax.export writes by it
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      "exporting programs needs flatbuffers, which is not installed: pip install -e '.[export]'"
    ) from error


def _with_preparation(answers: Any, preprocessing: Preprocessing) -> Any:
  """Photos of any one size → `answers` to them."""

  def answer(photos: jax.Array) -> jax.Array:
    return answers(prepared(photos, preprocessing))

  return answer


def _hold(
  name: str,
  program: bytes,
  answers: Any,
  pictures: Sequence[tuple[np.ndarray, np.ndarray]],
  precision: str | None,
) -> None:
  """Compares the program, as it is read from its bytes, with the network.

  Args:
    name: of the network.
    program: what is compared.
    answers: the network as a function of prepared pictures.
    pictures: (what the program takes, the same prepared for the network), of some sizes.
    precision: see `export_model`.

  Raises:
    RuntimeError: they differ.
  """
  read, network = jax.export.deserialize(bytearray(program)), jax.jit(answers)
  for given, seen in pictures:
    with _precision(precision):
      expected = np.asarray(network(seen))
    apart = float(np.abs(np.asarray(read.call(given)) - expected).max())
    if not apart <= _TOLERANCE * max(float(expected.std()), 1e-6):
      raise RuntimeError(
        f"the exported program of {name} is {apart:.3g} from the network's answers to pictures of "
        f"{given.shape[1]} x {given.shape[2]}, whose deviation is {expected.std():.3g}: it is not "
        "written"
      )


def _pictures(
  shape: tuple[int, ...], dtype: Any, preparation: Preprocessing | None
) -> list[tuple[np.ndarray, np.ndarray]]:
  """What `_hold` compares on: noise, and where the program prepares it, of two sizes."""
  rng = np.random.default_rng(0)
  if preparation is None:
    given = (
      rng.integers(0, 256, shape, np.uint8)
      if dtype == jnp.uint8
      else rng.standard_normal(shape, np.float32)
    )
    return [(given, given)]
  # One that is shrunk and one that grows. Neither is more than twice as high as wide: such pictures
  # have other pixels before Pillow 13, see `ops.pillow_resize`.
  size = preparation.image_size
  photos = [
    rng.integers(0, 256, (shape[0], *side, 3), np.uint8)
    for side in [(size + 37, 2 * size + 1), (size, size // 2 + 1)]
  ]
  return [(photo, _evaluated(photo, preparation)) for photo in photos]


def _evaluated(photos: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
  """uint8 `[B, H, W, 3]` → `[B, S, S, 3]`, as evaluations read them."""
  transform = parse_transform(recipes.eval_transform(preprocessing), decoder="pil")
  rng = np.random.default_rng(0)
  return np.stack([transform({"image": photo}, rng)["image"] for photo in photos])


@contextlib.contextmanager
def _precision(name: str | None) -> Iterator[None]:
  with contextlib.ExitStack() as stack:
    if name is not None:
      stack.enter_context(jax.default_matmul_precision(name))
    yield


def _free(directory: Path) -> Path:
  # A killed run may have left no more than a part of the program.
  found = {path.name for path in directory.iterdir()} if directory.exists() else set()
  if found and found.isdisjoint((PROGRAM, f"{PROGRAM}.partial")):
    raise ValueError(f"{directory} holds something else; a new directory was expected")
  return directory
