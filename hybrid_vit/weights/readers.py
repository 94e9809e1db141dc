"""Reading checkpoints of other libraries: a file → names and NumPy arrays, and nothing else.

What a file is, is told from its content; its name may say anything. No code of a file is run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_vit.hub import Fetched, fetch, is_address
from hybrid_vit.paths import is_remote
from hybrid_vit.weights import branches, kinds, torch_file
from hybrid_vit.weights.kinds import CheckpointFileError

__all__ = ["CheckpointFile", "CheckpointFileError", "read_checkpoint", "write_safetensors"]

_TF_OBJECT = "/.ATTRIBUTES/VARIABLE_VALUE"
_TF_AVERAGE = "/ExponentialMovingAverage"


@dataclasses.dataclass(frozen=True)
class CheckpointFile:
  """What a file holds.

  Attributes:
    weights: name to array, as in the file; wrappers' prefixes ("module.") are taken off.
    kind: "PyTorch", "safetensors", "NumPy" or "TensorFlow".
    branch: where in the file the weights lay, such as "model_ema"; "" at its top.
    sha256: of each file that was read, by its name.
    meta: what a PyTorch file holds under "meta" beside the weights: mmsegmentation's classes.
    origin: of a file of the hub, its repository, commit and licence.
  """

  weights: dict[str, np.ndarray]
  kind: str
  branch: str
  sha256: dict[str, str]
  meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  origin: Mapping[str, str] = dataclasses.field(default_factory=dict)


def read_checkpoint(path: str | Path | Fetched, *, average: bool | None = None) -> CheckpointFile:
  """Reads a checkpoint of any of the known kinds.

  Args:
    path: a `.pth`/`.pt`/`.bin`, `.safetensors` or `.npz` file, the index of a file in several parts
      (`.index.json`), a directory with one of these, or the prefix of a TensorFlow checkpoint
      (needs TensorFlow): the part before ".index", or its directory; or an address of the hub,
      "hf:owner/name", or what `hub.fetch` gave of it.
    average: whether to take the running average of the weights; None: the file's only branch.

  Raises:
    CheckpointFileError: the file is missing, of another kind, broken, holds no weights, or holds
      both weights and their average while `average` is None.
    HubError: the hub does not give it.
    ModuleNotFoundError: the library that reads this kind is not installed.
  """
  if not isinstance(path, Fetched) and is_address(path):
    path = fetch(path)
  if isinstance(path, Fetched):
    file = read_checkpoint(path.path, average=average)
    return dataclasses.replace(file, origin=path.origin)
  if is_remote(path):
    raise CheckpointFileError(f"{path} lies in an object store: copy it to a local disk first")
  path = Path(path).expanduser()
  prefix = _tensorflow_prefix(path)
  if prefix is not None:
    weights, branch = _pick_tensorflow(_read_tensorflow(prefix), prefix, average)
    files = sorted(prefix.parent.glob(prefix.name + ".index")) + sorted(
      prefix.parent.glob(prefix.name + ".data-*")
    )
    return CheckpointFile(weights, "TensorFlow", branch, _sha256(files))
  if path.is_dir():
    path = kinds.file_in(path)
  if not path.is_file():
    raise CheckpointFileError(f"{path} does not exist")
  files = [path]
  if path.name.endswith(".json"):
    kind, tree, files = _read_parts(path)
  else:
    kind = kinds.kind_of(path)
    tree = _READERS[kind](path)
  try:
    weights, branch = branches.pick(tree, average)
  except branches.BranchError as error:
    raise CheckpointFileError(f"{path} {error}") from error
  except Exception as error:  # the numbers are read here
    raise CheckpointFileError(
      f"{path} is a file of weights that cannot be read: {error or type(error).__name__}"
    ) from error
  meta = tree.get("meta") if isinstance(tree, Mapping) else None
  meta = meta if isinstance(meta, Mapping) else {}
  return CheckpointFile(weights, kind, branch, _sha256(files), meta)


def _read_parts(index: Path) -> tuple[str, dict[str, Any], list[Path]]:
  """The kind, the tensors and the files of a checkpoint that is written in several."""
  try:
    places = json.loads(index.read_text())["weight_map"]
    names = sorted(set(places.values()))
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise CheckpointFileError(
      f"{index} is no index of a checkpoint in several files (a JSON with weight_map)"
    ) from error
  found: dict[str, Any] = {}
  kind = ""
  for name in names:
    part = index.parent / name
    if Path(name).name != name or not part.is_file():
      raise CheckpointFileError(f"{index} names {name}, which is not beside it: get it, too")
    kind = kinds.kind_of(part)
    found |= {k: v for k, v in _READERS[kind](part).items() if places.get(k) == name}
  lacking = sorted(set(places) - set(found))
  if lacking:
    raise CheckpointFileError(
      f"{places[lacking[0]]} has no tensor {lacking[0]}, which {index} names; {len(lacking)} lack"
    )
  return kind, found, [index, *(index.parent / name for name in names)]


def _read_npz(path: Path) -> dict[str, Any]:
  try:
    with np.load(path, allow_pickle=False) as archive:
      return {name: archive[name] for name in archive.files}
  except Exception as error:  # zipfile's, zlib's or NumPy's, as the damage has it
    raise CheckpointFileError(f"{path} is a .npz file that cannot be read: {error}") from error


def _read_safetensors(path: Path) -> dict[str, Any]:
  import ml_dtypes  # noqa: F401  registers bfloat16 and the float8 types with NumPy
  from safetensors.numpy import load_file

  try:
    return dict(load_file(path))
  except Exception as error:  # its own, or NumPy's, as the damage has it
    raise CheckpointFileError(
      f"{path} is a safetensors file that cannot be read: {error}"
    ) from error


def _read_torch(path: Path) -> Any:
  try:
    return torch_file.read_torch(path)
  except Exception as error:  # Whatever a broken or hostile file brings up.
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise CheckpointFileError(
      f"{path} is a PyTorch file, or another pickle, that cannot be read: {reason}"
    ) from error


_READERS = {"PyTorch": _read_torch, "safetensors": _read_safetensors, "NumPy": _read_npz}


def _tensorflow_prefix(path: Path) -> Path | None:
  """The prefix of a TensorFlow checkpoint that `path` means, or None."""
  match = re.fullmatch(r"(.+)\.(?:index|data-\d+-of-\d+)", path.name)
  if match:
    path = path.with_name(match[1])
  if path.with_name(path.name + ".index").is_file():
    return path
  if not path.is_dir():
    return None
  state = path / "checkpoint"
  if state.is_file():
    named = re.search(r'^model_checkpoint_path: "(.+)"', state.read_text(), re.MULTILINE)
    if named and (path / (Path(named[1]).name + ".index")).is_file():
      return path / Path(named[1]).name
  found = sorted(path.glob("*.index"))
  if len(found) > 1:
    names = ", ".join(entry.name for entry in found)
    raise CheckpointFileError(f"{path} holds several TensorFlow checkpoints, name one: {names}")
  return found[0].with_suffix("") if found else None


def _read_tensorflow(prefix: Path) -> dict[str, np.ndarray]:
  try:
    import tensorflow as tf
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      f"{prefix} is a TensorFlow checkpoint, and TensorFlow is not installed: "
      "pip install -e '.[tf]'"
    ) from error
  try:
    reader = tf.train.load_checkpoint(str(prefix))
    names = reader.get_variable_to_shape_map()
    values = {name: np.asarray(reader.get_tensor(name)) for name in names}
  except (tf.errors.OpError, IndexError, ValueError, RuntimeError) as error:
    raise CheckpointFileError(f"{prefix} is a TensorFlow checkpoint, broken: {error}") from error
  # Texts are the checkpoint's own bookkeeping.
  return {name: value for name, value in values.items() if value.dtype.kind not in "OSU"}


def _pick_tensorflow(
  arrays: Mapping[str, np.ndarray], path: Path, average: bool | None
) -> tuple[dict[str, np.ndarray], str]:
  """Variables by their own names, with their averages' values where those are asked for."""
  if any(name.endswith(_TF_OBJECT) for name in arrays):
    raise CheckpointFileError(f"{path} {kinds.TENSORFLOW_OBJECTS}")
  averages = {
    name.removesuffix(_TF_AVERAGE): value
    for name, value in arrays.items()
    if name.endswith(_TF_AVERAGE)
  }
  plain = {name: value for name, value in arrays.items() if not name.endswith(_TF_AVERAGE)}
  both = sorted(set(averages) & set(plain))
  if both and average is None:
    raise CheckpointFileError(
      f"{path} holds variables and their running averages ({both[0]}{_TF_AVERAGE}): say which, by "
      "--average or --no-average"
    )
  if average and not averages:
    raise CheckpointFileError(f"{path} holds no running averages (names in {_TF_AVERAGE})")
  if average or (averages and not both):
    # Moving statistics of norms may have no average of their own.
    return {**plain, **averages}, _TF_AVERAGE.removeprefix("/")
  return plain, ""


def write_safetensors(
  path: str | Path, weights: Mapping[str, np.ndarray], about: Mapping[str, Any]
) -> None:
  """Writes a `.safetensors` file, whole or not at all.

  Args:
    path: where to; its directory is made.
    weights: name to array.
    about: what is known of them; values that are no text are written as JSON.
  """
  from safetensors.numpy import save_file

  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  # A directory: the library writes a file of a name of its own beside the one that it is asked for,
  # and what it leaves when it is killed goes with the next call.
  partial = path.with_name(path.name + ".writing")
  shutil.rmtree(partial, ignore_errors=True)
  texts = {key: v if isinstance(v, str) else json.dumps(v) for key, v in about.items()}
  with contextlib.ExitStack() as stack:
    stack.callback(shutil.rmtree, partial, ignore_errors=True)
    partial.mkdir()
    written = partial / path.name
    save_file({name: np.array(v, order="C") for name, v in weights.items()}, written, texts)
    written.replace(path)


def _sha256(files: Iterable[Path]) -> dict[str, str]:
  sums = {}
  for path in files:
    with path.open("rb") as file:
      sums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
  return sums
