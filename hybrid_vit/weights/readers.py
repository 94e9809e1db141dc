"""Reading checkpoints of other libraries: a file → names and NumPy arrays, and nothing else.

What a file is, is told from its content; its name may say anything. No code of a file is run:
PyTorch files are opened with `weights_only=True` alone, and objects of classes that are not its own
(a training's options, say) come back as stand-ins that do nothing.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import re
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

# Where training code keeps the weights, and where their running average.
_WEIGHTS = ("model", "state_dict", "model_state_dict", "module", "net")
_AVERAGES = ("model_ema", "state_dict_ema", "ema_state_dict", "model_ema_state_dict", "ema")
_WRAPPERS = r"^(?:module\.|_orig_mod\.)+"
_TF_AVERAGE = "/ExponentialMovingAverage"
# What old (not zip) files of the published trainings hold beside tensors: options and figures.
_OLD_FOREIGN_NAMES = (
  "argparse.Namespace",
  "yacs.config.CfgNode",
  "numpy.core.multiarray.scalar",
  "numpy._core.multiarray.scalar",
  "numpy.dtype",
  "_codecs.encode",
  "__builtin__.input",
  "builtins.input",
)


class CheckpointFileError(ValueError):
  """A file that cannot be read as a checkpoint; the message names it and says what it is."""


@dataclasses.dataclass(frozen=True)
class CheckpointFile:
  """What a file holds.

  Attributes:
    weights: name to array, as in the file; wrappers' prefixes ("module.") are taken off.
    kind: "PyTorch", "safetensors", "NumPy" or "TensorFlow".
    branch: where in the file the weights lay, such as "model_ema"; "" at its top.
    sha256: of each file that was read, by its name.
  """

  weights: dict[str, np.ndarray]
  kind: str
  branch: str
  sha256: dict[str, str]


def read_checkpoint(path: str | Path, *, average: bool | None = None) -> CheckpointFile:
  """Reads a checkpoint of any of the known kinds.

  Args:
    path: a `.pth`/`.pt` (needs PyTorch), `.safetensors` or `.npz` file, or the prefix of a
      TensorFlow checkpoint (needs TensorFlow): the part before ".index", or its directory.
    average: whether to take the running average of the weights; None: the file's only branch.

  Raises:
    CheckpointFileError: the file is missing, of another kind, broken, holds no weights, or holds
      both weights and their average while `average` is None.
    ModuleNotFoundError: the library that reads this kind is not installed.
  """
  path = Path(path).expanduser()
  prefix = _tensorflow_prefix(path)
  if prefix is not None:
    weights, branch = _pick_tensorflow(_read_tensorflow(prefix), prefix, average)
    files = sorted(prefix.parent.glob(prefix.name + ".index")) + sorted(
      prefix.parent.glob(prefix.name + ".data-*")
    )
    return CheckpointFile(weights, "TensorFlow", branch, _sha256(files))
  if path.is_dir():
    raise CheckpointFileError(f"{path} is a directory and holds no TensorFlow checkpoint")
  if not path.is_file():
    raise CheckpointFileError(f"{path} does not exist")
  kind = _kind(path)
  tree = {"PyTorch": _read_torch, "safetensors": _read_safetensors, "NumPy": _read_npz}[kind](path)
  weights, branch = _pick_branch(tree, path, average)
  return CheckpointFile(weights, kind, branch, _sha256([path]))


def _kind(path: Path) -> str:
  """ "PyTorch", "safetensors" or "NumPy".

  Raises:
    CheckpointFileError: anything else.
  """
  with path.open("rb") as file:
    head = file.read(512)
  if head.startswith(b"PK"):
    try:
      with zipfile.ZipFile(path) as archive:
        members = archive.namelist()
    except zipfile.BadZipFile as error:
      raise CheckpointFileError(f"{path} is a zip file cut short: get it again") from error
    if any(name.endswith("/data.pkl") for name in members):
      return "PyTorch"
    if members and all(name.endswith(".npy") for name in members):
      return "NumPy"
    raise CheckpointFileError(f"{path} is a zip file of something else: unpack it first")
  if len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**27:
    return "safetensors"
  if head[:1] == b"\x80":
    return "PyTorch"
  raise CheckpointFileError(f"{path} is {_description(path, head)}")


def _description(path: Path, head: bytes) -> str:
  if not head:
    return "empty"
  if head.startswith(b"\x1f\x8b"):
    return f"gzip-compressed: unpack it first (tar -xzf {path.name}) and give what was in it"
  if tarfile.is_tarfile(path):
    return (
      "a tar file. PyTorch before 0.1.10 wrote its checkpoints so, which only running their "
      "code can open: rewrite it where you trust it, or unpack it if it is an archive"
    )
  if head.lstrip()[:1] == b"<":
    return "a web page: the download's address gave a page in place of the file"
  if head.startswith(b"version https://git-lfs"):
    return "a Git LFS pointer: the real file was not downloaded (git lfs pull)"
  return "no checkpoint that is known here (.pth, .pt, .safetensors, .npz, TensorFlow)"


def _read_npz(path: Path) -> dict[str, Any]:
  try:
    with np.load(path, allow_pickle=False) as archive:
      return {name: archive[name] for name in archive.files}
  except (ValueError, OSError, zipfile.BadZipFile) as error:
    raise CheckpointFileError(f"{path} is a .npz file that cannot be read: {error}") from error


def _read_safetensors(path: Path) -> dict[str, Any]:
  import ml_dtypes  # noqa: F401  registers bfloat16 and the float8 types with NumPy
  import safetensors
  from safetensors.numpy import load_file

  try:
    return dict(load_file(path))
  except (safetensors.SafetensorError, KeyError, ValueError) as error:
    raise CheckpointFileError(
      f"{path} is a safetensors file that cannot be read: {error}"
    ) from error


def _read_torch(path: Path) -> Any:
  try:
    import torch
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      f"{path} is a PyTorch checkpoint, and PyTorch is not installed: pip install -e '.[torch]'"
    ) from error
  serialization = torch.serialization
  try:
    foreign: Iterable[str] = _OLD_FOREIGN_NAMES
    if zipfile.is_zipfile(path):
      foreign = serialization.get_unsafe_globals_in_checkpoint(path)
    stand_ins: list[Any] = [
      (_NumpyStandIn if name.startswith("numpy.") else _StandIn, name) for name in foreign
    ]
    with serialization.safe_globals(stand_ins):
      tree = torch.load(path, map_location="cpu", weights_only=True)
  except Exception as error:  # The reader raises whatever a broken or hostile file brings up.
    text = str(error)
    said = re.search(r"WeightsUnpickler error:\s*(.+)", text) or re.search(r"(.+)", text)
    reason = said[1].split(". ")[0].strip() if said else type(error).__name__
    raise CheckpointFileError(
      f"{path} is a PyTorch file that cannot be read safely (weights_only=True): {reason}"
    ) from error
  return _to_numpy(tree, torch)


class _StandIn:
  """Takes the place of a class that is not PyTorch's: its objects are dicts that do nothing."""

  def __new__(cls, *_: Any) -> Any:
    # PyTorch's reader fills and builds exact OrderedDicts, not subclasses.
    return collections.OrderedDict()


class _NumpyStandIn:
  """Takes the place of NumPy's dtype and scalars, whose state is no dict."""

  def __init__(self, *_: Any):
    pass

  def __setstate__(self, _: Any) -> None:
    pass


def _to_numpy(tree: Any, torch: Any) -> Any:
  if isinstance(tree, torch.Tensor):
    tensor = tree.detach()
    # NumPy has no bfloat16; every one of its values is a float32.
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
  if isinstance(tree, Mapping):
    return {key: _to_numpy(value, torch) for key, value in tree.items()}
  return tree


def _pick_branch(tree: Any, path: Path, average: bool | None) -> tuple[dict[str, np.ndarray], str]:
  """The arrays of one branch of what a file holds, and the branch's name."""
  branch: list[str] = []
  while not _is_flat(tree):
    plain = [name for name in _WEIGHTS if _has_arrays(tree, name)]
    averages = [name for name in _AVERAGES if _has_arrays(tree, name)]
    if not plain and not averages:
      found = ", ".join(map(str, list(tree)[:8])) if isinstance(tree, Mapping) else type(tree)
      raise CheckpointFileError(f"{path} holds no weights that are known here; it holds: {found}")
    if plain and averages and average is None:
      raise CheckpointFileError(
        f"{path} holds the weights ({plain[0]}) and their running average ({averages[0]}): say "
        "which, by --average or --no-average"
      )
    if average and not averages and not branch:
      raise CheckpointFileError(
        f"{path} holds no running average; it holds: {', '.join(map(str, tree))}"
      )
    if average is False and not plain:
      raise CheckpointFileError(f"{path} holds the running average ({averages[0]}) alone")
    name = averages[0] if averages and (average or not plain) else plain[0]
    branch.append(name)
    tree = tree[name]
  if average and not branch:
    raise CheckpointFileError(f"{path} holds one set of weights, and no running average")
  arrays = {str(k): v for k, v in tree.items() if isinstance(v, np.ndarray)}
  wrapped = all(re.match(_WRAPPERS, name) for name in arrays)
  if wrapped:
    arrays = {re.sub(_WRAPPERS, "", name): value for name, value in arrays.items()}
  return arrays, ".".join(branch)


def _is_flat(tree: Any) -> bool:
  return (
    isinstance(tree, Mapping)
    and any(isinstance(value, np.ndarray) for value in tree.values())
    and not any(_has_arrays(tree, name) for name in (*_WEIGHTS, *_AVERAGES))
  )


def _has_arrays(tree: Any, name: str) -> bool:
  branch = tree.get(name) if isinstance(tree, Mapping) else None
  if not isinstance(branch, Mapping):
    return False
  return any(isinstance(v, np.ndarray) for v in branch.values()) or any(
    _has_arrays(branch, inner) for inner in (*_WEIGHTS, *_AVERAGES)
  )


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
  partial = path.with_name(path.name + ".partial")
  texts = {key: v if isinstance(v, str) else json.dumps(v) for key, v in about.items()}
  with contextlib.ExitStack() as stack:
    stack.callback(partial.unlink, missing_ok=True)
    save_file({name: np.array(v, order="C") for name, v in weights.items()}, partial, texts)
    partial.replace(path)


def _sha256(files: Iterable[Path]) -> dict[str, str]:
  sums = {}
  for path in files:
    with path.open("rb") as file:
      sums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
  return sums
