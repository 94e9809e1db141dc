"""Files that PyTorch wrote (tests/make_torch_files.py), and pickles that mean harm."""

import contextlib
import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from hybrid_vit.weights import readers, torch_file

FILES = Path(__file__).parent.parent / "golden" / "torch"


def state():
  rng = np.random.default_rng(0)
  return {
    "stem.weight": rng.normal(size=(4, 3, 2, 2)).astype(np.float32),
    "halved": rng.normal(size=(5,)).astype(np.float16),
    "counter": np.array(7, np.int64),
    "flags": np.array([True, False]),
    "double": rng.normal(size=(2,)),
    "complex": np.array([1 + 2j], np.complex64),
  }


def assert_same(found, expected):
  assert set(found) == set(expected)
  for name, value in expected.items():
    assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
    np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("name", ["new", "old"])
def test_tensors_of_both_formats_whatever_lies_beside_them(name):
  file = readers.read_checkpoint(FILES / f"{name}.pth")
  assert (file.kind, file.branch) == ("PyTorch", "model")
  expected = {
    **state(),
    "brain": np.array([1.5, -2.25], np.float32),
    "eight": np.array([1.5, -2.0], np.float32),
    "parameter": np.ones(3, np.float32),
    "view": np.array([[4, 8], [6, 10]], np.float32),
    "shared": np.arange(4, dtype=np.float32),
    "wide": np.ones((3, 2), np.float32),
    "empty": np.zeros((0, 3), np.float32),
  }
  if name == "old":
    del expected["eight"]
  assert_same(file.weights, expected)


@pytest.mark.parametrize("name", ["module_new", "module_old"])
def test_a_whole_module_is_read_as_its_state_dict(name):
  weights = readers.read_checkpoint(FILES / f"{name}.pth").weights
  norm = {
    "weight": np.ones(5, np.float32),
    "bias": np.zeros(5, np.float32),
    "running_mean": np.zeros(5, np.float32),
    "running_var": np.ones(5, np.float32),
    "num_batches_tracked": np.array(0),
  }
  expected = {name: state()[name] for name in ("stem.weight", "halved")}
  # "mask", which is not saved in a state_dict, is not here either.
  assert_same(weights, expected | {f"norms.0.{name}": value for name, value in norm.items()})


def test_the_state_of_an_averaged_model_in_a_wrapper():
  plain = set(readers.read_checkpoint(FILES / "module_new.pth").weights)
  for average in (None, True):
    file = readers.read_checkpoint(FILES / "averaged.pth", average=average)
    assert set(file.weights) == plain
  with pytest.raises(readers.CheckpointFileError, match=r"average .*n_averaged.* alone"):
    readers.read_checkpoint(FILES / "averaged.pth", average=False)


def test_what_cannot_be_read_says_how_to_save_it():
  for name, message in [
    ("script.pt", r"is a TorchScript program.*torch\.jit\.load\(FILE.*state_dict\(\)"),
    ("sparse.pth", r"holds rare as sparse_tensor.*to_dense"),
  ]:
    with pytest.raises(readers.CheckpointFileError, match=message) as caught:
      readers.read_checkpoint(FILES / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_numpy_arrays(tmp_path, protocol):
  # Detectron2's files are such pickles.
  weights = {**state(), "order": np.asfortranarray(np.arange(6.0).reshape(2, 3))}
  weights["swapped"] = np.arange(3, dtype=">f4")
  tree = {"model": weights, "__author__": "x", "names": np.array(["a"], object)}
  path = tmp_path / "weights.pkl"
  path.write_bytes(pickle.dumps(tree, protocol=protocol))
  expected = {**weights, "swapped": np.arange(3, dtype=np.float32)}
  if protocol < 2:  # begins with no mark of a pickle
    assert_same(dict(_arrays(torch_file.read_torch(path)["model"])), expected)
  else:
    assert_same(readers.read_checkpoint(path).weights, expected)


def _arrays(tree):
  return {name: torch_file.to_array(value) for name, value in tree.items()}


def _zipped(path, pickled, **storages):
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("w/data.pkl", pickled)
    for key, raw in storages.items():
      archive.writestr(f"w/data/{key.removeprefix('s')}", raw)
  return path


class _Storage:
  def __init__(self, kind, key, count):
    self.pid = ("storage", _Named("torch", kind), key, "cpu", count)


class _Named:
  def __init__(self, module, name):
    self.module, self.name = module, name


class _Call:
  def __init__(self, function, *arguments):
    self.function, self.arguments = function, arguments


class _Pickler(pickle._Pickler):
  """Writes the names of functions that are not here, as PyTorch would."""

  def persistent_id(self, obj):
    return getattr(obj, "pid", None)

  def save(self, obj, save_persistent_id=True):
    if isinstance(obj, _Named):
      self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
    elif isinstance(obj, _Call):
      self.save(obj.function)
      self.save(obj.arguments)
      self.write(pickle.REDUCE)
    else:
      super().save(obj, save_persistent_id)


def dumps(tree):
  file = io.BytesIO()
  _Pickler(file, 2).dump(tree)
  return file.getvalue()


REBUILD = _Named("torch._utils", "_rebuild_tensor_v2")


def tensor(offset, size, stride, key="0", count=4):
  return _Call(REBUILD, _Storage("FloatStorage", key, count), offset, size, stride, False, {})


@pytest.mark.parametrize(
  ("offset", "size", "stride"),
  [(0, (5,), (1,)), (1, (4,), (1,)), (0, (2, 2), (3, 1)), (3, (2,), (-1,)), (-1, (1,), (1,))],
)
def test_a_tensor_beyond_its_numbers_is_refused(tmp_path, offset, size, stride):
  raw = struct.pack("<4f", 1, 2, 3, 4)
  good = _zipped(tmp_path / "good.pth", dumps({"a": tensor(1, (2,), (2,))}), s0=raw)
  np.testing.assert_array_equal(readers.read_checkpoint(good).weights["a"], [2, 4])
  bad = _zipped(tmp_path / "bad.pth", dumps({"a": tensor(offset, size, stride)}), s0=raw)
  with pytest.raises(readers.CheckpointFileError, match=r"bad\.pth holds a, which cannot be read"):
    readers.read_checkpoint(bad)


def test_numbers_that_are_not_in_the_file_are_missed(tmp_path):
  path = _zipped(tmp_path / "w.pth", dumps({"a": tensor(0, (2,), (1,), key="7")}))
  with pytest.raises(readers.CheckpointFileError, match=r"holds a, .*without numbers"):
    readers.read_checkpoint(path)


def test_numbers_of_a_big_endian_machine(tmp_path):
  path = _zipped(
    tmp_path / "w.pth", dumps({"a": tensor(0, (2,), (1,))}), s0=struct.pack(">4f", 1, 2, 3, 4)
  )
  with zipfile.ZipFile(path, "a") as archive:
    archive.writestr("w/byteorder", "big")
  np.testing.assert_array_equal(readers.read_checkpoint(path).weights["a"], [1, 2])


HARM = [
  _Call(_Named("os", "system"), "touch harmed"),
  _Call(_Named("builtins", "eval"), "open('harmed', 'w')"),
  _Call(_Named("builtins", "exec"), "open('harmed', 'w')"),
  _Call(_Named("subprocess", "Popen"), ["touch", "harmed"]),
  _Call(_Call(_Named("builtins", "getattr"), _Named("os", "path"), "join"), "a"),
  _Call(_Named("importlib", "import_module"), "antigravity"),
  _Call(_Named("torch.storage", "_load_from_bytes"), b"cos\nsystem\n(S'touch harmed'\ntR."),
  _Call(
    _Named("torch._tensor", "_rebuild_from_type_v2"),
    _Named("os", "system"), _Named("os", "x"), ("touch harmed",), {},
  ),
  _Call(_Named("copyreg", "_reconstructor"), _Named("os", "system"), _Named("os", "x"), "x"),
]  # fmt: skip


@pytest.mark.parametrize("harm", HARM, ids=lambda call: str(getattr(call.function, "name", "")))
def test_no_code_of_a_file_is_run(tmp_path, monkeypatch, harm):
  monkeypatch.chdir(tmp_path)
  tree = {"model": {"a": tensor(0, (2,), (1,))}, "harm": harm}
  path = _zipped(tmp_path / "w.pth", dumps(tree), s0=struct.pack("<4f", 1, 2, 3, 4))
  assert list(readers.read_checkpoint(path).weights) == ["a"]
  assert os.listdir(tmp_path) == ["w.pth"]


def test_a_file_cannot_change_the_reader(tmp_path):
  """A pickle may set attributes of what it was given."""
  path = tmp_path / "w.pkl"
  for given in (REBUILD, _Named("numpy", "dtype"), _Named("os", "system")):
    for state_of_it in ({"harmed": 1}, (None, {"harmed": 1, "array": 1, "is_numeric": 1})):
      path.write_bytes(dumps(given)[:-1] + dumps(state_of_it)[2:-1] + b"b.")
      # A class refuses it; of a function it is a copy.
      with contextlib.suppress(TypeError):
        torch_file.read_torch(path)
  for ours in (torch_file._tensor, torch_file._NumpyDType, torch_file.StandIn):
    assert not hasattr(ours, "harmed")
  assert callable(torch_file._NumpyDType.is_numeric)


def test_a_file_cut_short_or_damaged_is_an_error(tmp_path):
  for name in ("new", "old"):
    whole = (FILES / f"{name}.pth").read_bytes()
    for length in (100, len(whole) // 2, len(whole) - 5):
      path = tmp_path / "cut.pth"
      path.write_bytes(whole[:length])
      with pytest.raises(readers.CheckpointFileError, match=r"cut\.pth"):
        readers.read_checkpoint(path)
