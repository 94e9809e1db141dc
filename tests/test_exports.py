import json
import shutil

import jax
import numpy as np
import pytest

from hybrid_vit import checkpoints, exports, stored_trees
from hybrid_vit.checkpoints import Checkpointer
from hybrid_vit.exports import export, load_weights
from hybrid_vit.stored_trees import CheckpointError
from tests.saved_states import INFO, at, layout_and_state, save, size_of, weights


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A work directory with states of steps 1 and 2; not to be changed."""
  workdir = tmp_path_factory.mktemp("saved")
  save(workdir, 1, 2)
  return workdir


@pytest.fixture
def copied(saved, tmp_path):
  """The same, to be changed."""
  return shutil.copytree(saved, tmp_path / "copied")


def test_weights_are_exported_alone_and_whole(tmp_path):
  state = at(3, layout_and_state(4)[1])
  metadata = {"name": "conv", "num_classes": 10, "class_names": ("a", "b")}
  for _ in range(2):  # the second time it is replaced
    export(tmp_path / "export", state.evaluation_variables, metadata)
  assert [p.name for p in tmp_path.iterdir()] == ["export"]
  for place in (tmp_path / "export", tmp_path):
    weights, found = load_weights(place)
    assert found["class_names"] == ["a", "b"] and found["name"] == "conv"
    assert set(weights) == {"params", "batch_stats"}
    jax.tree.map(np.testing.assert_array_equal, weights, jax.device_get(dict(state.ema)))
  text = json.loads((tmp_path / "export" / "metadata.json").read_text())
  text["class_names"] = ["a", "c"]
  (tmp_path / "export" / "metadata.json").write_text(json.dumps(text))
  with pytest.raises(CheckpointError, match="checksum differs; who edits it by hand takes out"):
    load_weights(tmp_path)
  # As the message says; and exports of earlier versions have none.
  del text["checksum"]
  (tmp_path / "export" / "metadata.json").write_text(json.dumps(text))
  assert load_weights(tmp_path)[1]["class_names"] == ["a", "c"]
  text["fingerprints"]["params/head/bias"] += 1
  (tmp_path / "export" / "metadata.json").write_text(json.dumps(text))
  with pytest.raises(CheckpointError, match="'params/head/bias' is not what was saved"):
    load_weights(tmp_path)


def test_weights_of_a_run_that_exported_nothing(copied, tmp_path):
  with pytest.raises(CheckpointError, match=r"no weights in .*looked for an export"):
    load_weights(tmp_path / "nowhere")
  weights, metadata = load_weights(copied)
  assert metadata["step"] == 2
  jax.tree.map(np.testing.assert_array_equal, weights, jax.device_get(dict(at(2).ema)))
  # What it says is what an export says.
  assert {key: metadata[key] for key in INFO} == json.loads(json.dumps(INFO))
  assert metadata["results"] == {} and metadata["weights"] == "state of step 2, averaged over steps"
  manifest = copied / "checkpoints" / "2" / "state" / "manifest.ocdbt"
  manifest.write_bytes(manifest.read_bytes()[:10])
  assert load_weights(copied)[1]["step"] == 1


def test_weights_of_a_run_that_went_on_after_its_export(copied, caplog):
  export(copied / "export", weights(7), {**INFO, "step": 2})
  assert "weights" not in load_weights(copied)[1]
  text = json.loads((copied / "export" / "metadata.json").read_text())
  (copied / "export" / "metadata.json").write_text(
    json.dumps({**text, "step": 1, "checksum": None})
  )
  found, metadata = load_weights(copied)
  assert metadata["step"] == 2
  assert "export is of step 1 and passed over: the run went on to step 2" in caplog.text
  jax.tree.map(np.testing.assert_array_equal, found, jax.device_get(weights(2)))


@pytest.mark.parametrize("crash", ["before", "between", "after"])
def test_what_a_crash_leaves_of_an_export_does_no_harm(tmp_path, monkeypatch, crash):
  directory = tmp_path / "export"
  export(directory, weights(1), {"step": 1})
  # The crash: at the first renaming, at the second, or while the old one is deleted.
  path_type = type(checkpoints.as_path(directory))
  rename, rmtree, renamed = path_type.rename, path_type.rmtree, []

  def failing_rename(self, to):
    if self.name.startswith("export"):  # not what orbax renames within it
      if len(renamed) == ("before", "between", "after").index(crash):
        raise OSError("crash")
      renamed.append(to)
    return rename(self, to)

  def failing_rmtree(self, *args, **kwargs):
    if self.name.endswith(".old"):
      raise OSError("crash")
    return rmtree(self, *args, **kwargs)

  with monkeypatch.context() as patch:
    patch.setattr(path_type, "rename", failing_rename)
    patch.setattr(path_type, "rmtree", failing_rmtree)
    with pytest.raises(CheckpointError, match="export cannot be written: OSError: crash"):
      export(directory, weights(2), {"step": 2})
  assert len(list(tmp_path.iterdir())) == 2
  for place in (directory, tmp_path):
    assert load_weights(place)[1]["step"] == (2 if crash == "after" else 1)
  export(directory, weights(3), {"step": 3})
  assert [p.name for p in tmp_path.iterdir()] == ["export"]
  assert load_weights(directory)[1]["step"] == 3


@pytest.mark.parametrize("how", ["flip", "truncate"])
def test_damage_of_an_export_is_named(tmp_path, how):
  export(tmp_path / "export", weights(1), {"step": 1})
  files = [p for p in (tmp_path / "export" / "weights").rglob("*") if "d" in p.parts]
  path = max(files, key=size_of)
  content = bytearray(path.read_bytes())
  if how == "flip":
    content[len(content) // 2] ^= 1
  else:
    del content[len(content) // 2 :]
  path.write_bytes(content)
  with pytest.raises(stored_trees.DamagedError, match=f"^{tmp_path}/export"):
    load_weights(tmp_path)


def test_where_directories_cannot_be_renamed_the_metadata_is_the_last_file(tmp_path, monkeypatch):
  """As in an object store: until the metadata is there, nothing counts as an export."""
  monkeypatch.setattr(exports, "is_remote", lambda path: True)
  path_type = type(checkpoints.as_path(tmp_path))
  rename = path_type.rename

  def fail(self, *args, **kwargs):
    if isinstance(self, path_type) and not self.name.startswith("export"):
      return rename(self, *args, **kwargs)  # orbax's own
    raise AssertionError("not in an object store")

  monkeypatch.setattr(path_type, "rename", fail)
  directory = tmp_path / "export"
  for step in (1, 2):
    export(directory, weights(step), {"step": step})
    assert load_weights(directory)[1]["step"] == step
  with monkeypatch.context() as patch:
    patch.setattr(exports, "metadata_text", fail)
    with pytest.raises(AssertionError):
      export(directory, weights(3), {"step": 3})
  with pytest.raises(CheckpointError, match="no weights in"):
    load_weights(directory)


def test_an_object_store_never_becomes_a_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for use in (Checkpointer, load_weights, lambda d: export(d, weights(1), {})):
    with pytest.raises(Exception):  # noqa: B017 (what etils says where the store's back end lacks)
      use("gs://bucket-of-nobody/run")
  assert not list(tmp_path.iterdir())
