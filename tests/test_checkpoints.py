import functools
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit import checkpoints, sharding
from hybrid_vit.checkpoints import Checkpointer, CheckpointError, export, load_weights
from hybrid_vit.train_state import create_state
from tests import small


@functools.cache
def layout_and_state(fsdp=1, width=64):
  """(shardings, state) on a mesh of eight devices, or on one where `fsdp` is 1."""
  mesh = sharding.make_mesh({"fsdp": fsdp, "data": -1}, jax.devices()[: 8 if fsdp > 1 else 1])
  task = small.make_task(width=width)
  make = functools.partial(
    create_state, task=task, optimizer=small.adamw(task), batch=small.make_batch(), ema=True
  )
  abstract = jax.eval_shape(make, jax.random.key(0))
  layout = sharding.state_shardings(abstract, sharding.DEFAULT_RULES, mesh)
  return layout, jax.jit(make, out_shardings=layout)(jax.random.key(0))


def target(**arguments):
  layout, state = layout_and_state(**arguments)
  return checkpoints.abstract_like(state, layout)


def at(step, state=None):
  """A state of that step whose floats all differ from those of other steps."""
  state = layout_and_state()[1] if state is None else state
  move = lambda x: x + step if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
  return jax.tree.map(move, state.replace(rng=None)).replace(
    rng=state.rng, step=jax.device_put(jnp.int32(step), state.step.sharding)
  )


def save(workdir, *steps, **options):
  checkpointer = Checkpointer(workdir, run_config={"seed": 3, "sizes": (1, 2)}, **options)
  for step in steps:
    assert checkpointer.save(at(step), step)
  checkpointer.close()


def restore(workdir, **arguments):
  checkpointer = Checkpointer(workdir)
  found = checkpointer.restore(target(**arguments))
  checkpointer.close()
  return found


def assert_equal(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  np.testing.assert_array_equal(*(jax.random.key_data(s.rng) for s in (found, expected)))
  bare = [jax.device_get(s.replace(rng=None)) for s in (found, expected)]
  jax.tree.map(np.testing.assert_array_equal, *bare)


def damage(checkpoint, how):
  """Changes the largest data file of a checkpoint's state."""
  path = max((p for p in (checkpoint / "state").rglob("*") if "d" in p.parts), key=_size)
  content = bytearray(path.read_bytes())
  if how == "flip":
    content[len(content) // 2] ^= 1
  else:
    del content[len(content) // 2 :]
  path.write_bytes(content)


def _size(path):
  return path.stat().st_size if path.is_file() else 0


@pytest.mark.parametrize("fsdp", [1, 4])
def test_a_state_comes_back_whole_on_any_mesh(tmp_path, fsdp):
  save(tmp_path, 5)
  found = restore(tmp_path, fsdp=fsdp)
  assert found.step == 5
  assert found.run_config == {"seed": 3, "sizes": [1, 2]}
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
def test_a_broken_checkpoint_is_passed_over_and_said(tmp_path, how, caplog):
  save(tmp_path, 1, 2)
  if how == "empty":
    (tmp_path / "checkpoints" / "7").mkdir()
  else:
    damage(tmp_path / "checkpoints" / "2", how)
  with caplog.at_level(logging.WARNING):
    found = restore(tmp_path)
  broken = "7" if how == "empty" else "2"
  assert found.step == (2 if how == "empty" else 1)
  assert f"checkpoints/{broken} is broken and passed over" in caplog.text
  assert (tmp_path / "checkpoints" / f"{broken}.broken").is_dir()
  # Its step can be saved, and break, again.
  save(tmp_path, int(broken))
  damage(tmp_path / "checkpoints" / broken, "truncate")
  assert restore(tmp_path).step == found.step
  assert (tmp_path / "checkpoints" / f"{broken}.broken1").is_dir()


def test_an_error_where_no_checkpoint_is_whole(tmp_path):
  save(tmp_path, 1)
  damage(tmp_path / "checkpoints" / "1", "flip")
  with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read \(1: .*fingerprint"):
    restore(tmp_path)


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
  checkpointer = Checkpointer(tmp_path, keep=2)
  for step, value in enumerate([0.2, 0.9, float("nan"), 0.9, 0.5], start=1):
    checkpointer.save(at(step), step)
    assert checkpointer.save_best(at(step), step, value) == (step < 3)
  checkpointer.close()
  assert restore(tmp_path).step == 5
  assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "5"]
  assert [p.name for p in (tmp_path / "best").iterdir()] == ["2"]
  # A later run knows how good the best one is.
  checkpointer = Checkpointer(tmp_path)
  assert not checkpointer.save_best(at(6), 6, 0.8)
  assert checkpointer.save_best(at(6), 6, 0.95)
  checkpointer.close()


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


def test_fingerprints_see_every_change():
  x = jnp.arange(24.0).reshape(4, 6)
  seen = {int(checkpoints.fingerprint(x))}
  for changed in (x.at[2, 3].add(1e-5), x[::-1], x.T.reshape(4, 6), -x, x.at[0, 0].set(-0.0)):
    seen.add(int(checkpoints.fingerprint(changed)))
  assert len(seen) == 6
  _, spread = layout_and_state(4)
  assert checkpoints.fingerprints(spread) == checkpoints.fingerprints(layout_and_state()[1])


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
  text["fingerprints"]["params/head/bias"] += 1
  (tmp_path / "export" / "metadata.json").write_text(json.dumps(text))
  with pytest.raises(CheckpointError, match="'params/head/bias' is not what was saved"):
    load_weights(tmp_path)


def test_weights_of_a_run_that_exported_nothing(tmp_path):
  with pytest.raises(CheckpointError, match=r"no weights in .*looked for an export"):
    load_weights(tmp_path)
  save(tmp_path, 1, 2)
  weights, metadata = load_weights(tmp_path)
  assert metadata["step"] == 2
  jax.tree.map(np.testing.assert_array_equal, weights, jax.device_get(dict(at(2).ema)))
  damage(tmp_path / "checkpoints" / "2", "truncate")
  assert load_weights(tmp_path)[1]["step"] == 1
