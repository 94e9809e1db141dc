"""A stored network as one program of StableHLO with its weights, which JAX alone runs.

export_model(load_network("runs/flowers"), "flowers_program")

`model.jax` is what `jax.export` serialises: for several kinds of devices at once, with the number
of pictures open. `metadata.json` beside it says what goes in, what comes out and how photos are to
be prepared.
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

from hybrid_vit.ops.platforms import tracing_for
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
      float32 that is normalised already. Photos are resized and cropped outside.
    image_size: S; None for what the weights expect.
    batch_size: B; None leaves it open.
    precision: of products on devices that have several ("highest", "default", "float32", …); None
      for each device's own.

  Returns:
    The metadata.

  Raises:
    ValueError: unknown platforms, weights that are no numbers or too large for the format, or a
      directory that holds something else.
    ModuleNotFoundError: flatbuffers is not installed.
    RuntimeError: the program answers otherwise than the network; nothing is written.
  """
  target = _free(Path(directory).expanduser())
  _check(network, platforms)
  size = image_size or network.preprocessing.image_size
  dtype = jnp.uint8 if normalize else jnp.float32
  shape: tuple[Any, ...] = (batch_size or jax.export.symbolic_shape("b")[0], size, size, 3)
  with tracing_for(tuple(PLATFORMS[name] for name in platforms)), _precision(precision):
    # A function of its own, so that no trace for this process's devices is taken.
    exported = jax.export.export(jax.jit(_answers(network)), platforms=list(platforms))(
      jax.ShapeDtypeStruct(shape, dtype)
    )
  program = bytes(exported.serialize())
  output, here = exported.out_avals[0], jax.default_backend()
  checked = here in {PLATFORMS[name] for name in platforms}
  if checked:
    _hold(network, program, (batch_size or 2, size, size, 3), dtype, precision)
  metadata = {
    "network": network.name,
    "platforms": list(platforms),
    "input": {"shape": [str(n) for n in shape], "dtype": jnp.dtype(dtype).name},
    "output": {"shape": [str(n) for n in output.shape], "dtype": output.dtype.name},
    "answers": "logits" if network.num_classes else "features",
    "normalized_inside": normalize,
    "preprocessing": {**dataclasses.asdict(network.preprocessing), "image_size": size},
    "class_names": list(network.class_names),
    "loss": network.loss,
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


def _hold(
  network: StoredNetwork, program: bytes, shape: Sequence[int], dtype: Any, precision: str | None
) -> None:
  """Compares the program, as it is read from its bytes, with the network.

  Raises:
    RuntimeError: they differ.
  """
  rng = np.random.default_rng(0)
  images = (
    rng.integers(0, 256, shape, np.uint8)
    if dtype == jnp.uint8
    else rng.standard_normal(shape, np.float32)
  )
  with _precision(precision):
    expected = np.asarray(jax.jit(_answers(network))(images))
  found = np.asarray(jax.export.deserialize(bytearray(program)).call(images))
  apart = float(np.abs(found - expected).max())
  if not apart <= _TOLERANCE * max(float(expected.std()), 1e-6):
    raise RuntimeError(
      f"the exported program of {network.name} is {apart:.3g} from the network's answers, whose "
      f"deviation is {expected.std():.3g}: it is not written"
    )


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
