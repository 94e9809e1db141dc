import hashlib
import importlib.util
import io
import pickle
import sys
import tarfile
import zipfile

import ml_dtypes
import numpy as np
import pytest

from hybrid_vit.weights import readers

HAS_TORCH = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="PyTorch is not installed")


def arrays():
  rng = np.random.default_rng(0)
  return {
    "stem.weight": rng.normal(size=(4, 3, 2, 2)).astype(np.float32),
    "stem.half": rng.normal(size=(5,)).astype(np.float16),
    "bn.num_batches_tracked": np.array(7, np.int64),
  }


def assert_same(found, expected):
  assert set(found) == set(expected)
  for name, value in expected.items():
    assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
    np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_npz_and_its_checksum(tmp_path):
  # The names of TensorFlow variables hold slashes.
  weights = {name.replace(".", "/"): value for name, value in arrays().items()}
  np.savez(tmp_path / "w.npz", **weights)
  file = readers.read_checkpoint(tmp_path / "w.npz")
  assert_same(file.weights, weights)
  digest = hashlib.sha256((tmp_path / "w.npz").read_bytes()).hexdigest()
  assert (file.kind, file.branch, file.sha256) == ("NumPy", "", {"w.npz": digest})


def test_safetensors_with_half_and_bfloat16_and_any_memory_order(tmp_path):
  weights = {
    **arrays(),
    "brain": np.array([1.5, -2.25, 3e38], ml_dtypes.bfloat16),
    "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "empty": np.zeros((0, 3), np.float32),
  }
  path = tmp_path / "new" / "w.safetensors"
  readers.write_safetensors(path, weights, {"format": "pt", "shape": [1, 2]})
  file = readers.read_checkpoint(path)
  assert file.kind == "safetensors"
  assert_same(file.weights, weights)
  header = path.read_bytes()[8:]
  assert b'"format":"pt"' in header and b"[1, 2]" in header
  assert [p.name for p in path.parent.iterdir()] == ["w.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
  path = tmp_path / "w.safetensors"
  readers.write_safetensors(path, {"a": np.zeros(2, np.float32)}, {})
  before = path.read_bytes()
  with pytest.raises(Exception, match="object"):
    readers.write_safetensors(path, {"a": np.array([None])}, {})
  assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_prefixes_of_wrappers_are_taken_off_where_all_names_have_them(tmp_path):
  x = np.zeros(2, np.float32)
  np.savez(tmp_path / "all.npz", **{"module.a": x, "module.b": x})
  np.savez(tmp_path / "some.npz", **{"module.a": x, "b": x})
  assert set(readers.read_checkpoint(tmp_path / "all.npz").weights) == {"a", "b"}
  assert set(readers.read_checkpoint(tmp_path / "some.npz").weights) == {"module.a", "b"}


def _tar(path):
  with tarfile.open(path, "w") as archive:
    member = tarfile.TarInfo("pickle")
    member.size = 3
    archive.addfile(member, io.BytesIO(b"abc"))


def _zip(path):
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("photo.jpg", b"abc")


@pytest.mark.parametrize(
  ("write", "message"),
  [
    (lambda p: None, "does not exist"),
    (lambda p: p.mkdir(), "is a directory and holds no TensorFlow checkpoint"),
    (lambda p: p.write_bytes(b""), "is empty"),
    (
      lambda p: p.write_bytes(b"\x1f\x8b" + bytes(99)),
      r"gzip-compressed: unpack it first \(tar -xzf",
    ),
    (lambda p: p.write_bytes(b"\n<!doctype html><html>"), "is a web page"),
    (lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
    (lambda p: p.write_bytes(bytes(range(100, 200))), "is no checkpoint that is known here"),
    (lambda p: p.write_bytes(b"PK\x03\x04" + bytes(50)), "zip file cut short"),
    (_zip, "zip file of something else"),
    (_tar, "is a tar file. PyTorch before 0.1.10"),
    (lambda p: p.write_bytes((1000).to_bytes(8, "little") + b'{"a": 1}'), "safetensors file that"),
  ],
)
def test_other_files_are_named_and_described(tmp_path, write, message):
  path = tmp_path / "weights.pth"
  write(path)
  with pytest.raises(readers.CheckpointFileError, match=message) as caught:
    readers.read_checkpoint(path)
  assert str(path) in str(caught.value)


def test_a_file_cut_short_is_an_error(tmp_path):
  for name, write in {
    "w.npz": lambda path: np.savez(path, **arrays()),
    "w.safetensors": lambda path: readers.write_safetensors(path, arrays(), {}),
  }.items():
    path = tmp_path / name
    write(path)
    path.write_bytes(path.read_bytes()[:-150])
    with pytest.raises(readers.CheckpointFileError, match=name):
      readers.read_checkpoint(path)


def test_without_pytorch_the_error_names_the_command(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  new, old = tmp_path / "new.pth", tmp_path / "old.bin"
  with zipfile.ZipFile(new, "w") as archive:
    archive.writestr("archive/data.pkl", pickle.dumps({}))
  old.write_bytes(pickle.dumps({}, protocol=2))
  for path in (new, old):
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '\.\[torch\]'") as caught:
      readers.read_checkpoint(path)
    assert str(path) in str(caught.value)


def test_without_tensorflow_the_error_names_the_command(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow", None)
  (tmp_path / "model.ckpt-7.index").write_bytes(b"x")
  (tmp_path / "model.ckpt-7.data-00000-of-00001").write_bytes(b"x")
  for path in ("model.ckpt-7", "model.ckpt-7.index", "model.ckpt-7.data-00000-of-00001", "."):
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '\.\[tf\]'") as caught:
      readers.read_checkpoint(tmp_path / path)
    assert "model.ckpt-7 is a TensorFlow checkpoint" in str(caught.value)


def test_a_directory_of_several_tensorflow_checkpoints_asks_which(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow", None)
  for step in (7, 8):
    (tmp_path / f"model.ckpt-{step}.index").write_bytes(b"x")
  with pytest.raises(readers.CheckpointFileError, match=r"several .*ckpt-7.index, .*ckpt-8"):
    readers.read_checkpoint(tmp_path)
  (tmp_path / "checkpoint").write_text('model_checkpoint_path: "/elsewhere/model.ckpt-8"\n')
  with pytest.raises(ModuleNotFoundError, match="ckpt-8 is"):
    readers.read_checkpoint(tmp_path)


def test_averages_of_tensorflow_are_taken_only_when_asked_for(tmp_path):
  a, b, average = np.zeros(2), np.ones(3), np.full(2, 5.0)
  both = {"moat/a": a, "moat/b": b, "moat/a/ExponentialMovingAverage": average}
  pick = lambda x, which: readers._pick_tensorflow(x, tmp_path, which)  # noqa: E731
  with pytest.raises(readers.CheckpointFileError, match="--average or --no-average"):
    pick(both, None)
  assert_same(pick(both, True)[0], {"moat/a": average, "moat/b": b})
  assert_same(pick(both, False)[0], {"moat/a": a, "moat/b": b})
  assert_same(pick({"a": a}, None)[0], {"a": a})
  alone = {"a/ExponentialMovingAverage": average}
  assert pick(alone, None)[1] == "ExponentialMovingAverage"
  with pytest.raises(readers.CheckpointFileError, match="no running averages"):
    pick({"a": a}, True)


def branch(tree, average=None):
  return readers._pick_branch(tree, "file.pth", average)


@pytest.mark.parametrize("name", ["model", "state_dict", "module"])
def test_nestings(name):
  x, ema = np.zeros(2), np.ones(2)
  assert branch({"a": x})[1] == ""
  found, where = branch({name: {"module.a": x}, "epoch": 3, "optimizer": {"state": {}}})
  assert where == name and list(found) == ["a"]
  assert branch({name: {"a": x}, "state_dict_ema": None})[1] == name
  assert branch({"state_dict": {"model": {"a": x}}})[1] == "state_dict.model"
  for average in ("model_ema", "state_dict_ema"):
    both = {name: {"a": x}, average: {"a": ema}}
    with pytest.raises(readers.CheckpointFileError, match=f"{name}.*{average}.*--average"):
      branch(both)
    assert branch(both, True)[0]["a"][0] == 1 and branch(both, False)[0]["a"][0] == 0
    assert branch({average: {"a": ema}})[1] == average
    with pytest.raises(readers.CheckpointFileError, match="alone"):
      branch({average: {"a": ema}}, False)
  with pytest.raises(readers.CheckpointFileError, match="no running average; it holds: "):
    branch({name: {"a": x}}, True)
  with pytest.raises(readers.CheckpointFileError, match="no running average"):
    branch({"a": x}, True)
  with pytest.raises(readers.CheckpointFileError, match=r"no weights that are known.*epoch"):
    branch({"epoch": 3})


class _Options(dict):
  """Like the options that published files hold: a class that the reader does not have."""


def _ran():
  raise AssertionError("code of the file was run")


class _Hostile:
  def __reduce__(self):
    return (_ran, ())


@needs_torch
@pytest.mark.parametrize("as_zip", [True, False])
def test_pytorch_files(tmp_path, as_zip):
  import torch

  state = {name: torch.from_numpy(np.array(value)) for name, value in arrays().items()}
  state["brain"] = torch.tensor([1.5, -2.25], dtype=torch.bfloat16)
  state["parameter"] = torch.nn.Parameter(torch.ones(3))
  tree = {"model": state, "epoch": 3, "state_dict_ema": None, "max_accuracy": np.float64(81.2)}
  if as_zip:  # The old format is opened with a list of known names.
    tree |= {"config": _Options(lr=0.1), "hostile": _Hostile()}
  path = tmp_path / "w.pth"
  torch.save(tree, path, _use_new_zipfile_serialization=as_zip)
  file = readers.read_checkpoint(path)
  assert (file.kind, file.branch) == ("PyTorch", "model")
  brain, ones = np.array([1.5, -2.25], np.float32), np.ones(3, np.float32)
  assert_same(file.weights, {**arrays(), "brain": brain, "parameter": ones})


@needs_torch
def test_hostile_pytorch_files_of_the_old_format_are_refused(tmp_path):
  import torch

  path = tmp_path / "w.pth"
  torch.save({"a": _Hostile()}, path, _use_new_zipfile_serialization=False)
  with pytest.raises(readers.CheckpointFileError, match=r"weights_only=True.*_ran"):
    readers.read_checkpoint(path)
