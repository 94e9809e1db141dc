import asyncio
import gc
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit import checkpoints, sharding, stored_trees
from hybrid_vit.checkpoints import Checkpointer, restore_from
from hybrid_vit.exports import export, load_weights
from hybrid_vit.stored_trees import CheckpointError
from tests.saved_states import (
  INFO,
  at,
  damage,
  everything_in,
  failures,
  restore,
  save,
  target,
  weights,
)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
  monkeypatch.setattr(stored_trees, "RETRY_SECONDS", (0.0, 0.0))


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


def assert_equal(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  np.testing.assert_array_equal(*(jax.random.key_data(s.rng) for s in (found, expected)))
  bare = [jax.device_get(s.replace(rng=None)) for s in (found, expected)]
  jax.tree.map(np.testing.assert_array_equal, *bare)


@pytest.mark.parametrize("fsdp", [1, 4])
def test_a_state_comes_back_whole_on_any_mesh(tmp_path, fsdp):
  save(tmp_path, 5)
  found = restore(tmp_path, fsdp=fsdp)
  assert found.step == 5
  assert found.run_config == {"seed": 3, "sizes": [1, 2]}
  assert found.sums == {"loss": [5.1, 16.0]}
  assert_equal(found.state, at(5))
  kernel = found.state.ema["params"]["hidden"]["kernel"]
  assert {s.data.shape for s in kernel.addressable_shards} == {(128 // fsdp, 64)}


def test_nothing_to_restore_is_no_error(tmp_path):
  assert restore(tmp_path) is None


def test_saving_does_not_wait_and_donated_memory_does_no_harm(tmp_path):
  step = jax.jit(
    lambda s: jax.tree.map(lambda x: x + 1, s.replace(rng=None)).replace(rng=s.rng),
    donate_argnums=0,
  )
  checkpointer = Checkpointer(tmp_path, keep=6)
  state = jax.tree.map(jnp.copy, at(0))
  for number in range(1, 7):
    state = step(state)
    checkpointer.save(state, number)
    state = step(state)  # while the files are being written
  checkpointer.wait()
  assert checkpointer.steps() == [6, 5, 4, 3, 2, 1]
  for number in range(1, 7):
    load_weights(tmp_path / "checkpoints" / str(number))  # raises where a fingerprint differs
  checkpointer.close()


@pytest.mark.parametrize("how", ["flip", "truncate", "empty"])
def test_a_broken_checkpoint_is_passed_over_and_said(copied, how, caplog):
  if how == "empty":
    (copied / "checkpoints" / "7").mkdir()
  else:
    damage(copied / "checkpoints" / "2", how)
  with caplog.at_level(logging.WARNING):
    found = restore(copied)
  broken = "7" if how == "empty" else "2"
  assert found.step == (2 if how == "empty" else 1)
  assert f"checkpoints/{broken} is broken and passed over" in caplog.text
  assert (copied / "checkpoints" / f"{broken}.broken").is_dir()
  if how == "truncate":
    # Its step can be saved, and break, again.
    save(copied, int(broken))
    damage(copied / "checkpoints" / broken, "truncate")
    assert restore(copied).step == found.step
    assert (copied / "checkpoints" / f"{broken}.broken1").is_dir()


def test_a_broken_state_prints_no_traces(copied, capfd):
  """Threads that read its other arrays find that nobody waits any more."""
  for path in (copied / "checkpoints" / "2" / "state").rglob("d/*"):
    path.write_bytes(b"")
  assert restore(copied).step == 1
  gc.collect()
  assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["metadata/metadata", "state/_METADATA", "state/manifest.ocdbt"])
@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
def test_damage_of_any_file_that_is_read_is_named_and_costs_one_state(copied, name, how, caplog):
  path = copied / "checkpoints" / "2" / name
  content = path.read_bytes()
  # In the JSON files a word that is read: some of their text nobody looks at.
  words = {"metadata/metadata": b'"name"', "state/_METADATA": b'"tree_metadata"'}
  middle = content.index(words[name]) + 2 if name in words else len(content) // 2
  if how == "remove":
    path.unlink()
  else:
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    path.write_bytes(flipped if how == "flip" else content[:middle])
  with pytest.raises(CheckpointError, match="checkpoints/2"):
    load_weights(copied / "checkpoints" / "2")
  with caplog.at_level(logging.WARNING):
    assert restore(copied).step == 1
  assert (copied / "checkpoints" / "2.broken").is_dir()


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("stale", "/data/run/state/_METADATA: .*stale handle"),
    ("newer", "/data/run/state/: .*EIO"),
    ("right", "no right to it"),
    ("wrapped", "/data/run/state/manifest.ocdbt: .*stale handle"),
    ("memory", "MemoryError: no memory"),
    ("unknown", "RuntimeError: something new"),
  ],
)
def test_what_cannot_be_read_is_no_verdict_on_the_data(saved, monkeypatch, name, message):
  before = everything_in(saved)
  tries = []

  def fail(*args, **kwargs):
    tries.append(args)
    raise failures()[name]

  with monkeypatch.context() as patch:
    patch.setattr(stored_trees.ocp.Checkpointer, "restore", fail)
    with pytest.raises(CheckpointError, match=f"checkpoints/2/state cannot be read: .*{message}"):
      restore(saved)
    assert len(tries) == 3  # and never of step 1
    with pytest.raises(CheckpointError, match=message):
      load_weights(saved)
  assert everything_in(saved) == before
  assert restore(saved).step == 2


def test_a_failure_in_passing_is_tried_again(saved, monkeypatch, caplog):
  restore_once, tries = stored_trees.ocp.Checkpointer.restore, []

  def fail_twice(self, *args, **kwargs):
    tries.append(args)
    if len(tries) < 3:
      raise failures()["stale"]
    return restore_once(self, *args, **kwargs)

  monkeypatch.setattr(stored_trees.ocp.Checkpointer, "restore", fail_twice)
  assert restore(saved).step == 2
  assert caplog.text.count("reading again in 0 s") == 2


def test_damaged_words_on_a_disk_that_fails_are_no_verdict(copied, monkeypatch):
  """A reader may take a lost file for a damaged one: all of them must be readable."""
  damage(copied / "checkpoints" / "2", "truncate")

  def fail(directory):
    raise failures()["stale"]

  monkeypatch.setattr(stored_trees, "_read_through", fail)
  with pytest.raises(CheckpointError, match="stale handle"):
    restore(copied)
  assert not list(copied.rglob("*.broken*"))


def test_of_arrays_that_cannot_be_written_the_first_one_alone_is_told(caplog):
  stored_trees.say_the_first_error_alone()
  loop = asyncio.new_event_loop()
  for text in ('RESOURCE_EXHAUSTED: Error writing "params/0" in OCDBT database', "of others"):
    loop.create_future().set_exception(ValueError(text))
    gc.collect()  # a future that nobody asked says so as it goes
  loop.close()
  assert [str(record.exc_info[1]) for record in caplog.records] == ["of others"]


@pytest.mark.parametrize("place", ["checkpoints", "checkpoints/2", "checkpoints/2/metadata"])
def test_a_directory_that_cannot_be_listed_or_read_is_not_empty(saved, monkeypatch, place):
  checkpointer = Checkpointer(saved, keep_best=False)
  path_type = type(checkpoints.as_path(saved))
  patched = "read_text" if place.endswith("metadata") else "iterdir"
  original = getattr(path_type, patched)

  def fail(self, *args, **kwargs):
    if str(self).startswith(str(saved / place)):
      raise failures()["stale"]
    return original(self, *args, **kwargs)

  with monkeypatch.context() as patch:
    patch.setattr(path_type, patched, fail)
    if place != "checkpoints/2":  # which is read without being listed
      with pytest.raises(CheckpointError, match="stale handle"):
        checkpointer.restore(target())
    with pytest.raises(CheckpointError, match="stale handle"):
      load_weights(saved if place == "checkpoints" else saved / "checkpoints" / "2")
  assert checkpointer.restore(target()).step == 2
  checkpointer.close()


def test_nothing_begins_anew_unasked_where_a_run_has_been(tmp_path):
  save(tmp_path, 1)
  damage(tmp_path / "checkpoints" / "1", "flip")
  expected = r"is not new: it holds checkpoints that were set aside \(1: .*fingerprint differs"
  with pytest.raises(CheckpointError, match=expected):
    restore(tmp_path)
  with pytest.raises(CheckpointError, match=r"checkpoints that were set aside\. Put back a copy"):
    restore(tmp_path)
  assert restore(tmp_path, begin_anew=True) is None
  shutil.rmtree(tmp_path / "checkpoints")
  (tmp_path / "metrics.jsonl").touch()
  assert restore(tmp_path) is None
  (tmp_path / "metrics.jsonl").write_text("{}\n")
  with pytest.raises(CheckpointError, match=r"holds the metrics of an earlier run \(metrics.jsonl"):
    restore(tmp_path)
  assert restore(tmp_path, begin_anew=True) is None


def test_a_run_that_ended_before_its_first_state_begins_anew_unasked(tmp_path):
  """As after any preemption: the same command goes on."""
  checkpointer = Checkpointer(tmp_path, keep_best=False)
  (tmp_path / "metrics.jsonl").write_text("{}\n")
  assert checkpointer.restore(target()) is None
  checkpointer.close()
  assert restore(tmp_path) is None
  save(tmp_path, 1)
  shutil.rmtree(tmp_path / "checkpoints")
  with pytest.raises(CheckpointError, match=r"holds the metrics of an earlier run \(metrics.jsonl"):
    restore(tmp_path)


def test_another_runs_state_is_taken_and_its_directory_left_alone(copied):
  damage(copied / "checkpoints" / "2", "flip")
  before = everything_in(copied)
  found = restore_from(copied, target())
  assert found.step == 1 and found.sums == {"loss": [1.1, 16.0]}
  assert_equal(found.state, at(1))
  assert_equal(restore_from(copied / "checkpoints" / "1", target()).state, at(1))
  with pytest.raises(CheckpointError, match="fingerprint differs"):
    restore_from(copied / "checkpoints" / "2", target())
  assert everything_in(copied) == before
  with pytest.raises(CheckpointError, match=r"no whole state in .*elsewhere"):
    restore_from(copied / "elsewhere", target())


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"width": 32}, r"'params/head/kernel' has shape \[64, 10\] in it and \[32, 10\] here"),
    ({"ema": None}, r"it has 'ema/.* besides"),
  ],
)
def test_a_checkpoint_of_another_network_is_an_error_and_stays(tmp_path, change, message):
  save(tmp_path, 1, 2)
  other = target(width=change.get("width", 64))
  if "ema" in change:
    other = other.replace(ema=None)
  checkpointer = Checkpointer(tmp_path)
  with pytest.raises(CheckpointError, match=message):
    checkpointer.restore(other)
  checkpointer.close()
  assert restore(tmp_path).step == 2


def test_the_newest_are_kept_and_the_best_beside_them(tmp_path):
  checkpointer = Checkpointer(tmp_path, keep=2, info=INFO)
  for step, value in enumerate([0.2, 0.9, float("nan"), 0.9, 0.5], start=1):
    checkpointer.save(at(step), step)
    assert checkpointer.save_best(weights(step), step, value, True) == (step < 3)
  assert checkpointer.steps() == [5, 4]
  checkpointer.close()
  assert restore(tmp_path).step == 5
  assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "5"]
  assert [p.name for p in (tmp_path / "best").iterdir()] == ["2"]
  assert load_weights(tmp_path)[1]["step"] == 5
  found, known = load_weights(tmp_path / "best")
  assert known["step"] == 2 and known["class_names"] == ["a", "b"]
  jax.tree.map(np.testing.assert_array_equal, found, jax.device_get(weights(2)))
  # A later run knows how good the best one is, and that it may come after the state restored.
  checkpointer = Checkpointer(tmp_path)
  assert not checkpointer.save_best(weights(1), 1, 0.8, True)
  assert checkpointer.save_best(weights(1), 1, 0.95, True)
  assert not checkpointer.save_best(weights(6), 6, float("inf"), True)
  checkpointer.close()
  assert sorted(p.name for p in (tmp_path / "best").iterdir()) == ["1", "2.earlier"]
  # No optimizer in it: it weighs what an export weighs.
  export(tmp_path / "export", weights(1), INFO)
  sizes = [sum(everything_in(tmp_path / name).values()) for name in ("best/1", "export")]
  assert sizes[0] == pytest.approx(sizes[1], rel=0.25)


def test_what_a_killed_run_had_not_come_to_delete_goes(tmp_path):
  """After the newest is whole: the older ones beyond those that are kept."""
  checkpointer = Checkpointer(tmp_path, keep=9)
  for step in range(1, 6):
    checkpointer.save(at(step), step)
  checkpointer.save_best(weights(2), 2, 0.2, True)
  checkpointer.close()
  # Between the renaming of the newer best state and the deletion of the older one.
  shutil.copytree(tmp_path / "best", tmp_path / "before")
  checkpointer = Checkpointer(tmp_path, keep=9)
  checkpointer.save_best(weights(4), 4, 0.4, True)
  checkpointer.close()
  (tmp_path / "before" / "2").rename(tmp_path / "best" / "2")
  damage(tmp_path / "checkpoints" / "5", "flip")
  checkpointer = Checkpointer(tmp_path, keep=2)
  assert checkpointer.steps() == [5, 4, 3, 2, 1]
  assert checkpointer.restore(target()).step == 4
  assert checkpointer.steps() == [4, 3]
  checkpointer.close()
  assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["3", "4", "5.broken"]
  assert [p.name for p in (tmp_path / "best").iterdir()] == ["4"]


def test_the_best_of_a_loss_is_the_lowest(tmp_path):
  checkpointer = Checkpointer(tmp_path)
  kept = [checkpointer.save_best(weights(1), step, value, False) for step, value in
          enumerate([3.0, 2.0, 2.5, float("nan"), 1.0])]  # fmt: skip
  checkpointer.close()
  assert kept == [True, True, False, False, True]
  checkpointer = Checkpointer(tmp_path)
  assert not checkpointer.save_best(weights(1), 7, 1.5, False)
  # Another measure, of the other direction, starts from nothing.
  assert checkpointer.save_best(weights(1), 8, 0.1, True)
  checkpointer.close()


def test_a_best_state_only_where_one_is_wanted(tmp_path):
  checkpointer = Checkpointer(tmp_path, keep_best=False)
  assert not checkpointer.save_best(weights(1), 1, 0.9, True)
  checkpointer.close()
  assert not (tmp_path / "best").exists()


def test_how_good_the_best_is_must_be_known(tmp_path, monkeypatch):
  checkpointer = Checkpointer(tmp_path)
  checkpointer.save_best(weights(1), 1, 0.9, True)
  checkpointer.close()

  def fail(path):
    raise failures()["stale"]

  with monkeypatch.context() as patch:
    patch.setattr(checkpoints, "read_metadata", fail)
    with pytest.raises(CheckpointError, match=r"best/1 cannot be read: .*stale handle"):
      Checkpointer(tmp_path)
  # Beginning anew, the run does not measure up to the best of another one, and keeps that.
  checkpointer = Checkpointer(tmp_path)
  with pytest.raises(CheckpointError, match=r"holds its best state \(step 1\)"):
    checkpointer.restore(target())
  assert checkpointer.restore(target(), begin_anew=True) is None
  assert checkpointer.save_best(weights(1), 1, 0.1, True)
  checkpointer.close()
  assert sorted(p.name for p in (tmp_path / "best").iterdir()) == ["1", "1.earlier"]


def test_when_to_save(tmp_path, monkeypatch):
  now = 1000.0
  monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now)
  checkpointer = Checkpointer(tmp_path, every_steps=4, every_minutes=2)
  due = lambda step, ask: checkpointer.should_save(step, ask_clock=ask)  # noqa: E731
  assert [step for step in range(1, 9) if due(step, True)] == [4, 8]
  now += 119
  assert not due(5, True)
  now += 2
  assert due(5, True) and not due(5, False)
  checkpointer.save(at(5), 5)
  assert not due(6, True)
  assert not checkpointer.save(at(5), 5)  # it is there already
  checkpointer.close()


def test_a_full_disk_is_told_as_such(tmp_path, monkeypatch):
  def fail(*args, **kwargs):
    raise ValueError(
      'RESOURCE_EXHAUSTED: Error writing local file "/data/x" [OS error 28: ENOSPC No space left]'
    )

  checkpointer = Checkpointer(tmp_path)
  with monkeypatch.context() as patch:
    patch.setattr(checkpoints.ocp.CheckpointManager, "save", fail)
    with pytest.raises(
      CheckpointError, match=r"step 1 cannot be saved .*/data/x: the disk is full"
    ):
      checkpointer.save(at(1), 1)
  assert checkpointer.save(at(1), 1)
  checkpointer.close()


def test_directories_are_listed_once(tmp_path, monkeypatch):
  checkpointer = Checkpointer(tmp_path, every_steps=1)
  checkpointer.save(at(1), 1)
  checkpointer.wait()

  def fail(*args, **kwargs):
    raise AssertionError("a directory is listed")

  monkeypatch.setattr(checkpoints, "steps_in", fail)
  monkeypatch.setattr(checkpoints, "names_in", fail)
  monkeypatch.setattr(checkpoints.ocp.CheckpointManager, "all_steps", fail)
  assert not checkpointer.save(at(1), 1)
  assert checkpointer.should_save(2, ask_clock=True) and checkpointer.steps() == [1]
  monkeypatch.undo()
  checkpointer.close()


def test_small_replicated_leaves_are_written_from_one_device(monkeypatch):
  mesh = sharding.make_mesh({"data": 4, "fsdp": 2})
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
  tree = {
    "small": jax.device_put(np.arange(8.0), sharding.replicated(mesh)),
    "large": jax.device_put(np.zeros(2**20, np.float32), sharding.replicated(mesh)),
    "split": jax.device_put(np.arange(8.0), rows),
    "key": jax.device_put(jax.random.key(0), sharding.replicated(mesh)),
  }
  found = stored_trees.unsliced(tree)
  assert all(len(found[name].devices()) == 1 for name in ("small", "key"))
  assert found["large"] is tree["large"] and found["split"] is tree["split"]
  np.testing.assert_array_equal(found["small"], tree["small"])
  # What one process has of a leaf is not all of it where there are several.
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  assert stored_trees.unsliced(tree) is tree
