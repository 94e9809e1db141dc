"""What a file or a directory of weights is, told from its content, and what to do with others."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

# In the directories of transformers, timm and OpenCLIP; the first of them that is there is read.
_IN_DIRECTORIES = (
  "model.safetensors",
  "model.safetensors.index.json",
  "open_clip_model.safetensors",
  "pytorch_model.bin",
  "pytorch_model.bin.index.json",
  "open_clip_pytorch_model.bin",
)
_ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".npz", ".pth.tar")
_FROM_TENSORFLOW = (
  "in TensorFlow, numpy.savez('weights.npz', **{v.name.removesuffix(':0'): v.numpy() for v in "
  "tf.saved_model.load(DIR).variables})"
)
TENSORFLOW_OBJECTS = (
  "names its variables by the program's objects and not by their own names: " + _FROM_TENSORFLOW
)
_TO_NPZ = "numpy.savez('weights.npz', **{name: array, …})"


class CheckpointFileError(ValueError):
  """A file that cannot be read as a checkpoint; the message names it and says what it is."""


def kind_of(path: Path) -> str:
  """ "PyTorch", "safetensors" or "NumPy".

  Raises:
    CheckpointFileError: anything else.
  """
  with path.open("rb") as file:
    head = file.read(512)
  if head.startswith(b"PK"):
    return _kind_of_zip(path)
  if len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**27:
    return "safetensors"
  if head[:1] == b"\x80" and path.suffix != ".msgpack":
    return "PyTorch"
  raise CheckpointFileError(f"{path} is {_description(path, head)}")


def _kind_of_zip(path: Path) -> str:
  try:
    with zipfile.ZipFile(path) as archive:
      members = archive.namelist()
  except OSError:
    raise
  except Exception as error:  # BadZipFile, and what else its damaged headers bring up
    raise CheckpointFileError(
      f"{path} is a zip file cut short or damaged ({error}): get it again"
    ) from error
  names = {name.rpartition("/")[2] for name in members}
  if "constants.pkl" in names:
    raise CheckpointFileError(
      f"{path} is a TorchScript program (torch.jit.save): in PyTorch, "
      "torch.save(torch.jit.load(FILE, map_location='cpu').state_dict(), NEW_FILE)"
    )
  if "data.pkl" in names:
    return "PyTorch"
  if members and all(name.endswith(".npy") for name in members):
    return "NumPy"
  if "model.weights.h5" in names:
    raise CheckpointFileError(f"{path} is {_keras()}")
  raise CheckpointFileError(f"{path} is a zip file of something else: unpack it first")


def _keras() -> str:
  return (
    "a file of Keras: in Keras, numpy.savez('weights.npz', "
    "**{w.path: w.numpy() for w in keras.models.load_model(FILE).weights})"
  )


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
  if head.startswith(b"\x89HDF"):
    return _keras() + " (or another HDF5 file)"
  if head.startswith(b"\x93NUMPY"):
    return f"one array and not a checkpoint: {_TO_NPZ}"
  if path.suffix == ".msgpack":
    return (
      "a file of Flax: with Flax, tree = flax.serialization.msgpack_restore(open(FILE, 'rb')"
      f".read()), flax.traverse_util.flatten_dict(tree, sep='/'), {_TO_NPZ}"
    )
  if path.suffix == ".onnx":
    return (
      "an ONNX program: with onnx, "
      "numpy.savez('weights.npz', **{t.name: onnx.numpy_helper.to_array(t) for t in "
      "onnx.load(FILE).graph.initializer})"
    )
  for magic, name in ((b"GGUF", "GGUF"), (b"\x1c\x00\x00\x00TFL3", "TensorFlow Lite")):
    if head.startswith(magic):
      return f"a {name} file, whose numbers are made for running it: take the training's own file"
  return "no checkpoint that is known here (.pth, .pt, .bin, .safetensors, .npz, TensorFlow)"


def weights_among(names: Iterable[str]) -> list[str]:
  """Of the files of one directory the one that a library reads, else all that hold weights."""
  there = sorted(names)
  whole = next((name for name in _IN_DIRECTORIES if name in there), None)
  return [whole] if whole else [name for name in there if name.endswith(_ENDINGS)]


def file_in(directory: Path) -> Path:
  """The file of weights in a directory of transformers, timm or OpenCLIP, or its only one.

  Raises:
    CheckpointFileError: it is of another library, or has several; the message says what to do.
  """
  names = sorted(entry.name for entry in directory.iterdir())
  files = weights_among(name for name in names if (directory / name).is_file())
  if files and files[0] in _IN_DIRECTORIES:
    return directory / files[0]
  other = _library(directory, set(names))
  if other:
    raise CheckpointFileError(f"{directory} is {other}")
  if len(files) == 1:
    return directory / files[0]
  if files:
    raise CheckpointFileError(
      f"{directory} holds several files of weights, name one: {', '.join(files[:8])}"
    )
  found = f"it holds: {', '.join(names[:8])}" if names else "it is empty"
  raise CheckpointFileError(
    f"{directory} is a directory and holds no checkpoint that is known here; {found}"
  )


def _library(directory: Path, names: set[str]) -> str:
  """What wrote a directory that cannot be read here and how to save from it; "" if unknown."""
  ours = {"metadata.json", "weights"} <= names or {"state", "metadata"} <= names
  if ours or ("config.json" in names and names & {"export", "best", "checkpoints"}):
    return (
      "a directory of this package's own weights, which need no import: give it to "
      "--config.init_from, or to predict's or export_weights' option"
    )
  if "saved_model.pb" in names or "saved_model.pbtxt" in names:
    return "a TensorFlow SavedModel: " + _FROM_TENSORFLOW
  if "zero_to_fp32.py" in names or any(name.startswith("global_step") for name in names):
    return "a checkpoint of DeepSpeed: python zero_to_fp32.py . OUT, in it, and give OUT"
  if ".metadata" in names and any(name.endswith(".distcp") for name in names):
    return (
      "a distributed checkpoint of PyTorch: "
      "python -m torch.distributed.checkpoint.format_utils dcp_to_torch DIR FILE.pth"
    )
  marks = {"_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt", "checkpoint"}
  inside = {entry.name for step in directory.iterdir() if step.is_dir() for entry in step.iterdir()}
  if names & marks or inside & (marks - {"checkpoint"}):
    return (
      "a checkpoint of Orbax or Flax, of another program: restore its parameters there, then "
      f"flax.traverse_util.flatten_dict(params, sep='/') and {_TO_NPZ}"
    )
  if {"data.pkl", "data"} <= names:
    return (
      f"a PyTorch file, unpacked: pack it again (cd DIR/.. && zip -0 -r FILE.pth {directory.name})"
    )
  return ""
