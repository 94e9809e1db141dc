"""A stored network as one program of StableHLO with its weights, which JAX alone runs.

export_model(load_network("runs/flowers"), "flowers_program")

`model.jax` is what `jax.export` serialises: for several kinds of devices at once, with the number
of pictures open, and where it prepares them itself their size. `metadata.json` beside it says what
goes in, what comes out and how photos are to be prepared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_vit import recipes
from hybrid_vit.data.transforms import parse_transform
from hybrid_vit.models.registry import Preprocessing
from hybrid_vit.ops.platforms import tracing_for
from hybrid_vit.picture_preparation import prepared
from hybrid_vit.tasks.pictures import normalized
from hybrid_vit.weights.stored import StoredNetwork, check_finite

PROGRAM, METADATA = "model.jax", "metadata.json"
# jax.export's names of platforms → those by which operations choose their forms.
PLATFORMS = {"cpu": "cpu", "cuda": "gpu", "rocm": "gpu", "tpu": "tpu"}
# What the format holds in one file.
_MOST_BYTES = 2**31 - 2**24
# How far the program may be from the network, in standard deviations of the network's answers:
# both are compiled here, and differ in how XLA fuses them.
_TOLERANCE = 1e-3


def export_model(
  network: StoredNetwork,
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
    network: see `weights.stored.load_network`.
    directory: where to; new, or an earlier one of these.
    platforms: kinds of devices that it shall run on, of `PLATFORMS`.
    normalize: whether mean and deviation are a part of it: then it takes uint8 `[B, S, S, 3]`, else
      float32 that is normalised already.
    resize: whether resizing and cropping are a part of it, too: then it takes uint8 `[B, H, W, 3]`
      of any H and W, else photos are resized and cropped outside.
    image_size: S; None for what the weights expect.
    batch_size: B; None leaves it open.
    precision: of products on devices that have several ("highest", "default", "float32", …); None
      for each device's own.

  Returns:
    The metadata.

  Raises:
    ValueError: unknown platforms, weights that are no numbers or too large for the format,
      resizing without normalising, or a directory that holds something else.
    ModuleNotFoundError: flatbuffers is not installed.
    RuntimeError: the program answers otherwise than the network; nothing is written.
  """
  target = _free(Path(directory).expanduser())
  _check(network, platforms)
  if resize and not normalize:
    raise ValueError(
      "resizing inside and normalising outside was asked for: the program has 8-bit pictures "
      "after resizing and must normalise them; leave --no-normalize or --resize out"
    )
  size = image_size or network.preprocessing.image_size
  preprocessing = dataclasses.replace(network.preprocessing, image_size=size)
  dtype = jnp.uint8 if normalize else jnp.float32
  # Other names would be other sizes: those of one call's pictures are the same.
  sides = "h, w" if resize else f"{size}, {size}"
  shape = jax.export.symbolic_shape(f"{batch_size or 'b'}, {sides}, 3")
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
    pictures = _pictures(preprocessing, batch_size or 2, dtype, resize)
    _hold(network.name, program, _answers(network), pictures, precision)
  metadata = {
    "network": network.name,
    "platforms": list(platforms),
    "input": {"shape": [str(n) for n in shape], "dtype": jnp.dtype(dtype).name},
    "output": {"shape": [str(n) for n in output.shape], "dtype": output.dtype.name},
    "answers": "logits" if network.num_classes else "features",
    "normalized_inside": normalize,
    "resized_inside": resize,
    "preprocessing": dataclasses.asdict(preprocessing),
    "class_names": list(network.class_names),
    "loss": network.loss,
    "precision": precision,
    "source": network.metadata.get("source") or {},
    "jax": jax.__version__,
    "calling_convention": exported.calling_convention_version,
    "held_to_the_network_on": here if checked else None,
  }
  target.mkdir(parents=True, exist_ok=True)
  for name, content in (
    (PROGRAM, program),
    (METADATA, (json.dumps(metadata, indent=2) + "\n").encode()),
  ):
    partial = target / f"{name}.partial"
    partial.write_bytes(content)
    partial.replace(target / name)
  return metadata


def _answers(network: StoredNetwork) -> Any:
  """Pictures → float32 logits `[B, K]`, or where there is no classifier features `[B, D]`."""

  def answer(images: jax.Array) -> jax.Array:
    expected = network.preprocessing
    pictures = normalized(images, expected.mean, expected.std)
    logits, endpoints = network.model.apply(network.variables, pictures, train=False)
    return (endpoints["pre_logits"] if logits is None else logits).astype(jnp.float32)

  return answer


def _check(network: StoredNetwork, platforms: Sequence[str]) -> None:
  unknown = [name for name in platforms if name not in PLATFORMS]
  if unknown or not platforms:
    raise ValueError(f"platforms {', '.join(unknown) or 'none'}; known: {', '.join(PLATFORMS)}")
  check_finite(network)
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(network.variables))
  if size > _MOST_BYTES:
    raise ValueError(
      f"the weights of {network.name} take {size:,} bytes; the format holds {_MOST_BYTES:,}"
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
  preprocessing: Preprocessing, batch_size: int, dtype: Any, resize: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
  """What `_hold` compares on: noise, and with `resize` of two sizes."""
  rng, size = np.random.default_rng(0), preprocessing.image_size
  if dtype != jnp.uint8:
    given = rng.standard_normal((batch_size, size, size, 3), np.float32)
    return [(given, given)]
  # One that is shrunk and one that grows. Neither is more than twice as high as wide: such pictures
  # have other pixels before Pillow 13, see `ops.pillow_resize`.
  sides = [(size + 37, 2 * size + 1), (size, size // 2 + 1)] if resize else [(size, size)]
  photos = [rng.integers(0, 256, (batch_size, *side, 3), np.uint8) for side in sides]
  return [(given, _evaluated(given, preprocessing) if resize else given) for given in photos]


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
  if directory.exists() and not (directory / PROGRAM).is_file() and any(directory.iterdir()):
    raise ValueError(f"{directory} holds something else; a new directory was expected")
  return directory
