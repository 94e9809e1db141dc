import hashlib
import io
import json
import sys
import tarfile
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors

from hybrid_vit.weights import branches, readers
from tests.weights.test_torch_file import FILES


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
    (lambda p: p.mkdir(), "is a directory and holds no checkpoint that is known here; it is empty"),
    (lambda p: p.write_bytes(b"\x89HDF\r\n" + bytes(50)), r"is a file of Keras: in Keras, numpy"),
    (lambda p: np.save(p.open("wb"), np.zeros(3)), r"is one array and not a checkpoint: numpy"),
    (lambda p: p.write_bytes(b"GGUF" + bytes(50)), "is a GGUF file"),
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
  return branches.pick(tree, average)


@pytest.mark.parametrize("name", ["model", "state_dict", "module", "network"])
def test_nestings(name):
  x, ema = np.zeros(2), np.ones(2)
  assert branch({"a": x})[1] == ""
  found, where = branch({name: {"module.a": x}, "epoch": 3, "optimizer": {"state": {}}})
  assert where == name and list(found) == ["a"]
  assert branch({name: {"a": x}, "state_dict_ema": None})[1] == name
  assert branch({"state_dict": {"model": {"a": x}}})[1] == "state_dict.model"
  for average in ("model_ema", "state_dict_ema"):
    both = {name: {"a": x}, average: {"a": ema}}
    with pytest.raises(branches.BranchError, match=f"{name}.*{average}.*--average"):
      branch(both)
    assert branch(both, True)[0]["a"][0] == 1 and branch(both, False)[0]["a"][0] == 0
    assert branch({average: {"a": ema}})[1] == average
    with pytest.raises(branches.BranchError, match="alone"):
      branch({average: {"a": ema}}, False)
  with pytest.raises(branches.BranchError, match=rf"one set of weights \({name}\), and no"):
    branch({name: {"a": x}}, True)
  with pytest.raises(branches.BranchError, match="no running average"):
    branch({"a": x}, True)
  with pytest.raises(branches.BranchError, match=r"no weights that are known.*epoch"):
    branch({"epoch": 3})


X = np.zeros(2)


@pytest.mark.parametrize(
  "wrapped",
  [
    "module.{}",
    "_orig_mod.{}",
    "module._orig_mod.{}",
    "_orig_mod.module.{}",
    "model._orig_mod.module.{}",
    "module.module.{}",
    "net.{}",
    "network.module.{}",
    "_fsdp_wrapped_module.{}",
  ],
)
def test_what_wraps_every_name_comes_off(wrapped):
  tree = {wrapped.format(name): X for name in ("stem.weight", "module_list.0.bias")}
  assert set(branch(tree)[0]) == {"stem.weight", "module_list.0.bias"}
  found = branch({"model": {**tree, "n_averaged": np.array(3)}}, True)
  assert set(found[0]) == {"stem.weight", "module_list.0.bias"} and found[1] == "model"


def test_what_wraps_a_part_comes_off_where_no_network_has_such_names():
  tree = {"a.weight": X, "blocks.0._orig_mod.a.weight": X}
  tree["blocks.1._checkpoint_wrapped_module._orig_mod.b"] = X
  assert set(branch(tree)[0]) == {"a.weight", "blocks.0.a.weight", "blocks.1.b"}
  # A part that is called so is not one.
  tree = {"stem.module.weight": X, "module.weight": X}
  assert set(branch(tree)[0]) == set(tree)
  with pytest.raises(branches.BranchError, match="differ only by wrappers"):
    branch({"a": X, "_orig_mod.a": X})


def test_weights_and_average_side_by_side_in_one_mapping():
  tree = {"ema_model.a": X + 1, "online_model.a": X, "initted": np.array(True), "step": np.array(3)}
  with pytest.raises(branches.BranchError, match=r"\(online_model\).*\(ema_model\).*--average"):
    branch(tree)
  assert branch(tree, True)[0]["a"][0] == 1 and branch(tree, False)[0]["a"][0] == 0
  lightning = {"state_dict": {"model.a": X, "model_ema.a": X + 1}}
  assert branch(lightning, True) == ({"a": pytest.approx(X + 1)}, "state_dict.model_ema")


def test_unknown_places_of_weights_are_told():
  tree = {"student": {"a": X, "b": X}, "epoch": 3}
  with pytest.raises(branches.BranchError, match=r"student \(2 tensors\).*torch.load\(FILE\)"):
    branch(tree)


def shards(directory, ending=".safetensors", **changed):
  weights = arrays()
  names = {f"model-{i}-of-3{ending}": [name] for i, name in enumerate(weights)}
  for file, inside in names.items():
    readers.write_safetensors(directory / file, {n: weights[n] for n in inside}, {})
  places = {name: file for file, inside in names.items() for name in inside} | changed
  index = directory / "model.safetensors.index.json"
  index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
  return index


def test_a_checkpoint_in_several_files(tmp_path):
  index = shards(tmp_path)
  for path in (index, tmp_path):
    file = readers.read_checkpoint(path)
    assert file.kind == "safetensors"
    assert_same(file.weights, arrays())
    assert set(file.sha256) == {p.name for p in tmp_path.iterdir()}


def test_a_missing_part_of_several_is_named(tmp_path):
  index = shards(tmp_path)
  (tmp_path / "model-1-of-3.safetensors").unlink()
  with pytest.raises(readers.CheckpointFileError, match=r"names model-1-of-3\.safetensors"):
    readers.read_checkpoint(index)
  for changed, message in (
    ({"more": "model-0-of-3.safetensors"}, "no tensor more, which"),
    ({"more": "../model-0-of-3.safetensors"}, r"names \.\./model"),
  ):
    with pytest.raises(readers.CheckpointFileError, match=message):
      readers.read_checkpoint(shards(tmp_path, **changed))
  index.write_text("[]")
  with pytest.raises(readers.CheckpointFileError, match="no index of a checkpoint"):
    readers.read_checkpoint(index)


def write_some(path):
  readers.write_safetensors(path, {"a": np.full(2, float(len(path.name)), np.float32)}, {})


@pytest.mark.parametrize(
  ("names", "read"),
  [
    (("model.safetensors", "pytorch_model.bin", "config.json"), "model.safetensors"),
    (("open_clip_model.safetensors", "open_clip_config.json"), "open_clip_model.safetensors"),
    (("pytorch_model.bin", "training_args.bin"), "pytorch_model.bin"),
    (("weights.safetensors", "README.md"), "weights.safetensors"),
  ],
)
def test_directories_of_other_libraries(tmp_path, names, read):
  for name in names:
    write_some(tmp_path / name)
  file = readers.read_checkpoint(tmp_path)
  assert list(file.sha256) == [read] and file.weights["a"][0] == len(read)


@pytest.mark.parametrize(
  ("names", "message"),
  [
    (("a.pth", "b.pth"), r"several files of weights, name one: a\.pth, b\.pth"),
    (("saved_model.pb", "assets/x"), r"is a TensorFlow SavedModel: in TensorFlow, .*tf\.saved"),
    (("_CHECKPOINT_METADATA", "manifest.ocdbt"), "Orbax or Flax, of another program"),
    (("100/_METADATA", "100/d/0"), "Orbax or Flax, of another program"),
    (("zero_to_fp32.py", "latest"), "DeepSpeed: python zero_to_fp32.py"),
    ((".metadata", "__0_0.distcp"), "distributed checkpoint of PyTorch: python -m torch"),
    (("data.pkl", "data/0", "version"), "a PyTorch file, unpacked"),
    (("metadata.json", "weights/x"), "this package's own weights, which need no import"),
    (("config.json", "checkpoints/5/state/x"), "this package's own weights"),
    (("photo.jpg", "notes.txt"), "no checkpoint that is known here; it holds: notes.txt, photo"),
  ],
)
def test_other_directories_are_told_with_what_to_do(tmp_path, names, message):
  for name in names:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
  with pytest.raises(readers.CheckpointFileError, match=message) as caught:
    readers.read_checkpoint(tmp_path)
  assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_variables_named_by_a_programs_objects_are_told():
  with pytest.raises(readers.CheckpointFileError, match=r"by the program's objects.*savez"):
    readers._pick_tensorflow({"v/.ATTRIBUTES/VARIABLE_VALUE": X}, "x", None)


def test_other_zips_are_told(tmp_path):
  for member, message in (
    ("model.weights.h5", "a file of Keras"),
    ("archive/constants.pkl", "a TorchScript program"),
  ):
    path = tmp_path / "w.zip"
    with zipfile.ZipFile(path, "w") as archive:
      archive.writestr(member, b"x")
      archive.writestr("archive/data.pkl", b"x") if "pkl" in member else None
    with pytest.raises(readers.CheckpointFileError, match=message):
      readers.read_checkpoint(path)


def test_damage_that_shows_when_the_numbers_are_read_is_told(tmp_path):
  """The header of a member of a .pth, and of its directory: what `zipfile` finds late."""
  good = (FILES / "new.pth").read_bytes()
  member = good.find(b"PK\x03\x04", good.find(b"data/0") - 200)
  name = good.rfind(b"data/0")
  for place, value in ((member, 0), (name, 0xFF)):
    bad = bytearray(good)
    bad[place] = value
    (tmp_path / "w.pth").write_bytes(bad)
    with pytest.raises(readers.CheckpointFileError, match=r"w.pth is a "):
      readers.read_checkpoint(tmp_path / "w.pth")


def test_what_a_killed_writer_left_goes_with_the_next_call(tmp_path):
  left = tmp_path / "w.safetensors.writing"
  left.mkdir()
  (left / "w.safetensors.Xy12.tmp").write_bytes(b"half")
  readers.write_safetensors(tmp_path / "w.safetensors", {"x": np.arange(3)}, {"by": "us"})
  assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]
  with pytest.raises(safetensors.SafetensorError, match="Unknown dtype"):
    readers.write_safetensors(tmp_path / "w.safetensors", {"x": np.array(["no"])}, {})
  assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]
  assert readers.read_checkpoint(tmp_path / "w.safetensors").weights["x"].tolist() == [0, 1, 2]
