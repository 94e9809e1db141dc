"""Reading PyTorch's files without PyTorch, and without running anything that they ask for.

Such a file is a pickle with the numbers beside it. A pickle names the functions and classes that
build its objects; here every name gives one of ours: the few that build tensors and arrays, and for
all others a stand-in that keeps what it is given and does nothing. So options, schedulers, deques
and whole modules may lie beside the tensors, and code of the file is never run.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

_STORAGES = {
  "DoubleStorage": np.float64,
  "FloatStorage": np.float32,
  "HalfStorage": np.float16,
  "BFloat16Storage": ml_dtypes.bfloat16,
  "LongStorage": np.int64,
  "IntStorage": np.int32,
  "ShortStorage": np.int16,
  "CharStorage": np.int8,
  "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
  "ComplexFloatStorage": np.complex64,
  "ComplexDoubleStorage": np.complex128,
  "UntypedStorage": np.uint8,
}
_DTYPES = {
  "float64": np.float64,
  "double": np.float64,
  "float32": np.float32,
  "float": np.float32,
  "float16": np.float16,
  "half": np.float16,
  "bfloat16": ml_dtypes.bfloat16,
  "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
  "float8_e5m2": ml_dtypes.float8_e5m2,
  "int64": np.int64,
  "long": np.int64,
  "int32": np.int32,
  "int": np.int32,
  "int16": np.int16,
  "int8": np.int8,
  "uint8": np.uint8,
  "uint16": np.uint16,
  "uint32": np.uint32,
  "uint64": np.uint64,
  "bool": np.bool_,
  "complex64": np.complex64,
  "complex128": np.complex128,
}
# The number with which a file of before 2020 (PyTorch 1.5) begins, and its only version.
_OLD_MAGIC, _OLD_VERSION = 0x1950A86A20F9469CFC6C, 1001


class StandIn(dict):
  """Takes the place of an object of any class that is not known here, and does nothing.

  What the object holds as a mapping are its items; its attributes are in `state`.
  """

  qualified_name = ""
  state: dict[Any, Any]

  def __new__(cls, *_: Any, **__: Any) -> StandIn:
    self = super().__new__(cls)
    self.state = {}
    return self

  def __init__(self, *_: Any, **__: Any):
    super().__init__()

  def __call__(self, *_: Any, **__: Any) -> StandIn:
    return StandIn()

  def __setstate__(self, state: Any) -> None:
    for part in state if isinstance(state, tuple) else (state,):
      if isinstance(part, Mapping):
        self.state.update(part)

  def append(self, _: Any) -> None:
    """Of lists; what stands in them is no weight."""

  extend = add = append

  # Dictionaries may have such objects as keys.
  __hash__ = object.__hash__  # type: ignore[assignment]
  __eq__ = object.__eq__


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """A tensor whose numbers still lie in the file.

  Attributes:
    storage: what holds the numbers, perhaps of several tensors.
    dtype: of the numbers.
    offset: of the first one in the storage, in numbers.
    shape: of the tensor.
    strides: in numbers.
  """

  storage: _Storage
  dtype: np.dtype
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]

  def array(self) -> np.ndarray:
    """Reads it.

    Raises:
      ValueError: it reaches beyond its storage, or the file is cut short.
    """
    numbers = self.storage.read(self.dtype)
    last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides))
    empty = 0 in self.shape
    if self.offset < 0 or min(self.strides, default=0) < 0 or min(self.shape, default=0) < 0:
      raise ValueError("a tensor of negative size")
    if not empty and self.offset + last >= len(numbers):
      raise ValueError(f"a tensor of shape {self.shape} reaches beyond its numbers")
    if empty:
      return np.zeros(self.shape, self.dtype)
    # NumPy's strides know no 8-bit floats: as plain bytes.
    raw = numbers[self.offset :].view(f"V{self.dtype.itemsize}")
    steps = tuple(stride * self.dtype.itemsize for stride in self.strides)
    view = np.lib.stride_tricks.as_strided(raw, self.shape, steps)
    return np.array(view, order="C").view(self.dtype)


class _Storage:
  def __init__(self, dtype: np.dtype):
    self.dtype = dtype
    self.bytes: Callable[[], bytes] | None = None
    self.big_endian = False
    # One that many tensors are parts of is read once.
    self.tensors = 0
    self._read: bytes | None = None

  def read(self, dtype: np.dtype) -> np.ndarray:
    if self.bytes is None:
      raise ValueError("a tensor without numbers")
    raw = self._read if self._read is not None else self.bytes()
    self._read = raw if self.tensors > 1 else None
    # Of a storage of bytes, a tensor of wider numbers may leave a rest.
    found = np.frombuffer(raw, dtype, count=len(raw) // np.dtype(dtype).itemsize)
    return found.byteswap() if self.big_endian else found


class _DType:
  """Of a tensor, or of the numbers of a storage: `torch.float32`, `torch.FloatStorage`."""

  def __init__(self, dtype: Any):
    self.dtype = np.dtype(dtype)


class _NumpyDType:
  def __init__(self, code: Any = "", *_: Any):
    self._code, self._order = code, "|"

  def __setstate__(self, state: Any) -> None:
    self._order = state[1] if isinstance(state, tuple) and len(state) > 1 else "|"

  def is_numeric(self) -> bool:
    return str(self._code)[:1] in "biufc"

  def dtype(self) -> np.dtype:
    return np.dtype((self._order if self._order in ("<", ">") else "") + str(self._code))


class _NumpyArray:
  """What NumPy's pickled arrays are built of; `array()` gives them."""

  def __init__(self, *_: Any):
    self._state: Any = None

  def __setstate__(self, state: Any) -> None:
    self._state = state

  def has_numbers(self) -> bool:
    """Whether it is an array of numbers, and not of texts or objects."""
    if not isinstance(self._state, tuple) or len(self._state) != 5:
      return False
    return isinstance(self._state[2], _NumpyDType) and self._state[2].is_numeric()

  def array(self) -> np.ndarray:
    """The array, which is one of numbers."""
    _, shape, dtype, is_fortran, raw = self._state
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    flat = np.frombuffer(raw, dtype.dtype())
    array = flat.reshape(shape, order="F" if is_fortran else "C")
    return np.array(array.astype(array.dtype.newbyteorder("=")), order="C")


def is_tensor(value: Any) -> bool:
  """Whether `value` has numbers, read or not."""
  return isinstance(value, (np.ndarray, StoredTensor)) or (
    isinstance(value, _NumpyArray) and value.has_numbers()
  )


def to_array(value: Any) -> np.ndarray:
  """The numbers of a tensor; NumPy lacks bfloat16 and 8-bit floats, which come as float32.

  Raises:
    ValueError: it cannot be read.
  """
  if isinstance(value, np.ndarray):
    return value
  array = value.array()
  is_short = array.dtype.kind == "V" or array.dtype.name.startswith(("bfloat16", "float8"))
  return array.astype(np.float32) if is_short else array


def read_torch(path: Path) -> Any:
  """What a file of `torch.save` holds: its containers, with a `StoredTensor` for each tensor.

  A plain pickle, which other libraries write, is read as well.

  Raises:
    Exception: whatever a broken or strange file brings up.
  """
  if zipfile.is_zipfile(path):
    return _read_zip(path)
  with path.open("rb") as file:
    return _read_stream(file, path)


def _read_zip(path: Path) -> Any:
  archive = zipfile.ZipFile(path)
  names = archive.namelist()
  root = next(name for name in names if name.endswith("data.pkl")).removesuffix("data.pkl")
  order = archive.read(f"{root}byteorder") if f"{root}byteorder" in names else b"little"
  unpickler = _Unpickler(io.BytesIO(archive.read(f"{root}data.pkl")))
  tree = unpickler.load()
  for key, storage in unpickler.storages.items():
    name = f"{root}data/{key}"
    storage.bytes = (lambda member: lambda: archive.read(member))(name) if name in names else None
    storage.big_endian = order == b"big"
  return tree


def _read_stream(file: BinaryIO, path: Path) -> Any:
  first = _Unpickler(file)
  tree = first.load()
  if not isinstance(tree, int) or tree != _OLD_MAGIC:
    return tree
  if _Unpickler(file).load() != _OLD_VERSION:
    raise ValueError("a version of PyTorch's files that is not known here")
  system = _Unpickler(file).load()
  unpickler = _Unpickler(file)
  tree = unpickler.load()
  for key in _Unpickler(file).load():
    count = int.from_bytes(file.read(8), "little")
    storage = unpickler.storages.get(str(key))
    start, length = file.tell(), count * (storage.dtype.itemsize if storage else 0)
    if storage is None:
      raise ValueError(f"numbers {key!r} that no tensor names")
    storage.bytes = (lambda a, n: lambda: _part(path, a, n))(start, length)
    storage.big_endian = isinstance(system, Mapping) and system.get("little_endian") is False
    file.seek(start + length)
  return tree


def _part(path: Path, start: int, length: int) -> bytes:
  with path.open("rb") as file:
    file.seek(start)
    found = file.read(length)
  if len(found) != length:
    raise ValueError("the file is cut short")
  return found


class _Unpickler(pickle.Unpickler):
  """Gives for every name that a pickle asks for one of ours."""

  def __init__(self, file: Any):
    # Texts of Python 2 are bytes; every byte is a letter of latin1.
    super().__init__(file, encoding="latin1")
    self.storages: dict[str, _Storage] = {}
    self._copies: dict[tuple[str, str], Any] = {}

  def find_class(self, module: str, name: str) -> Any:
    """One of ours for `module.name`, which is not imported."""
    key = (module, name)
    if key in _OURS:
      # A pickle can set attributes of what it was given: not of ours, but of a copy.
      return self._copies.setdefault(key, _copy(_OURS[key]))
    if module in ("torch", "torch.storage") and name in _STORAGES:
      return _DType(_STORAGES[name])
    if module == "torch" and name in _DTYPES:
      return _DType(_DTYPES[name])
    about = {"qualified_name": f"{module}.{name}"}
    return self._copies.setdefault(key, type("StandIn", (StandIn,), about))

  def persistent_load(self, pid: Any) -> Any:
    """The numbers that a tensor names."""
    kind, dtype, key = pid[:3]
    if kind == "module":  # a class, with its source in the old format
      return dtype
    if kind != "storage" or not isinstance(dtype, _DType):
      raise ValueError(f"numbers of an unknown kind, {kind!r}")
    return self.storages.setdefault(str(key), _Storage(dtype.dtype))


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
  """`torch._utils._rebuild_tensor` and its later versions."""
  if not isinstance(storage, _Storage):
    return StandIn()
  # The third version says the type at its end, for storages that are but bytes.
  own = [item.dtype for item in rest if isinstance(item, _DType)]
  dtype = own[0] if own else storage.dtype
  storage.tensors += 1
  return StoredTensor(storage, dtype, int(offset), tuple(size), tuple(stride))


def _subclass(function: Any, _: Any, arguments: Any, __: Any) -> Any:
  """`torch._tensor._rebuild_from_type_v2`."""
  return function(*arguments)


def _first(value: Any, *_: Any) -> Any:
  """`torch._utils._rebuild_parameter` and its like: the tensor that it is about."""
  return value


def _reconstructor(cls: Any, _: Any, contents: Any) -> Any:
  """`copyreg._reconstructor`, by which objects of the first pickles are made."""
  made = cls()
  if isinstance(made, StandIn) and isinstance(contents, Mapping):
    made.update(contents)
  return made


def _encode(text: Any, encoding: Any = "latin1") -> Any:
  """`_codecs.encode`, by which bytes are written in the second version of pickles."""
  return text.encode("latin1") if isinstance(text, str) and encoding == "latin1" else b""


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any = "C") -> _NumpyArray:
  """`numpy._core.numeric._frombuffer`, by which arrays are written in the fifth version."""
  array = _NumpyArray()
  array.__setstate__((1, shape, dtype, order == "F", bytes(raw)))
  return array


def _copy(ours: Any) -> Any:
  if ours is collections.OrderedDict:  # its attributes cannot be set
    return ours
  if isinstance(ours, type):
    return type(ours.__name__, (ours,), {})
  return lambda *arguments: ours(*arguments)


_REBUILD = "torch._utils"
_OURS: dict[tuple[str, str], Any] = {
  ("collections", "OrderedDict"): collections.OrderedDict,
  (_REBUILD, "_rebuild_tensor"): _tensor,
  (_REBUILD, "_rebuild_tensor_v2"): _tensor,
  (_REBUILD, "_rebuild_tensor_v3"): _tensor,
  (_REBUILD, "_rebuild_parameter"): _first,
  (_REBUILD, "_rebuild_parameter_with_state"): _first,
  (_REBUILD, "_rebuild_device_tensor_from_numpy"): _first,
  (_REBUILD, "_rebuild_first"): _first,
  ("torch._tensor", "_rebuild_from_type_v2"): _subclass,
  ("numpy.core.multiarray", "_reconstruct"): _NumpyArray,
  ("numpy._core.multiarray", "_reconstruct"): _NumpyArray,
  ("numpy.core.numeric", "_frombuffer"): _from_buffer,
  ("numpy._core.numeric", "_frombuffer"): _from_buffer,
  ("numpy", "dtype"): _NumpyDType,
  ("builtins", "set"): set,
  ("__builtin__", "set"): set,
  ("copyreg", "_reconstructor"): _reconstructor,
  ("copy_reg", "_reconstructor"): _reconstructor,
  ("_codecs", "encode"): _encode,
}
