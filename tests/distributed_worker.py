"""One of several processes: trains, asserts where arrays live, restores what they saved together.

python -m tests.distributed_worker DIRECTORY     (JAX_COORDINATOR_ADDRESS and the like are set)
"""

import functools
import json
import sys
from pathlib import Path

import jax
import numpy as np

from hybrid_vit import sharding
from hybrid_vit.checkpoints import Checkpointer, abstract_like, export
from hybrid_vit.train_state import create_state, make_train_step
from tests import small

STEPS = 4
# Fully sharded over both processes; and a tensor axis whose ends lie in different ones.
MESHES = {
  "fsdp": ({"data": 2, "fsdp": 4}, sharding.DEFAULT_RULES),
  "tensor": ({"tensor": 8}, (("hidden/kernel", (None, "tensor")), (".*", "fsdp"))),
}


def training(axes, rules):
  """(mesh, layout, new state, compiled step)."""
  mesh, task = sharding.make_mesh(axes), small.make_task(label_smoothing=0.1)
  optimizer = small.adamw(task)
  make = functools.partial(
    create_state, task=task, optimizer=optimizer, batch=small.make_batch(), ema=True
  )
  layout = sharding.state_shardings(jax.eval_shape(make, jax.random.key(0)), rules, mesh)
  step = jax.jit(
    make_train_step(task, optimizer, small.schedule, ema_decay=0.9),
    in_shardings=(layout, sharding.batch_sharding(mesh)),
    out_shardings=(layout, sharding.replicated(mesh)),
    donate_argnums=0,
  )
  return mesh, layout, jax.jit(make, out_shardings=layout)(jax.random.key(0)), step


def train(axes, rules):
  """(layout, last state, loss of each step); a process gives its own rows only."""
  mesh, layout, state, step = training(axes, rules)
  rows = sharding.batch_sharding(mesh)
  part, parts = sharding.batch_part(rows)
  losses = []
  for seed in range(STEPS):
    whole = small.make_batch(16, seed=seed)
    own = {key: value.reshape(parts, -1, *value.shape[1:])[part] for key, value in whole.items()}
    state, report = step(state, sharding.put_batch(own, rows))
    losses.append(float(report["metrics"]["loss"][0]) / 16)
  for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(layout)):
    assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), (leaf.sharding, wanted)
  return layout, state, losses


def main(directory: Path) -> None:
  """Writes losses.json and a checkpoint; asserts the rest."""
  sharding.initialize_distributed()
  assert jax.process_count() == 2 and jax.device_count() == 8
  found = {}
  for name, (axes, rules) in MESHES.items():
    layout, state, found[name] = train(axes, rules)
    kernel = state.params["hidden"]["kernel"]  # [128, 64]
    shapes = {shard.data.shape for shard in kernel.addressable_shards}
    assert shapes == {(32, 64) if name == "fsdp" else (128, 8)}, shapes
    if name == "fsdp":
      continue
    # Process 1 is not asked whether a state is saved; both are asked whether it is whole.
    checkpointer = Checkpointer(directory, keep=3, every_minutes=0.0001)
    assert checkpointer.should_save(1, ask_clock=True)
    for step in (3, 4):
      checkpointer.save(state, step, {"loss": [1.5, 16.0]})
    assert checkpointer.save_best(state.evaluation_variables, 4, 0.5, True)
    assert not checkpointer.save_best(state.evaluation_variables, 5, 0.4, True)
    checkpointer.wait()
    if jax.process_index() == 0:
      manifest = directory / "checkpoints" / "4" / "state" / "manifest.ocdbt"
      manifest.write_bytes(manifest.read_bytes()[:10])
    checkpointer.close()
    checkpointer = Checkpointer(directory)
    restored = checkpointer.restore(abstract_like(state, layout))
    checkpointer.close()
    assert restored.step == 3 and restored.sums == {"loss": [1.5, 16.0]}, restored.step
    again = restored.state.params["hidden"]["kernel"]
    for one, other in zip(kernel.addressable_shards, again.addressable_shards):
      np.testing.assert_array_equal(one.data, other.data)
    export(directory / "export", state.evaluation_variables, {"name": "conv"})
  if jax.process_index() == 0:
    (directory / "losses.json").write_text(json.dumps(found))


if __name__ == "__main__":
  main(Path(sys.argv[1]))
