"""Two processes with four devices each, joined by jax.distributed, against one device."""

import json
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from hybrid_vit import sharding
from hybrid_vit.checkpoints import Checkpointer, abstract_like, load_weights
from hybrid_vit.reporting import read_metrics
from tests import command, dense, dense_worker, detection_worker, distributed_worker
from tests.tasks import test_image_text_evaluation

pytestmark = pytest.mark.slow


def free_port():
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


def run_two(cache, *arguments):
  """Runs a module in two processes; returns what each printed."""
  address = f"127.0.0.1:{free_port()}"
  processes = [
    subprocess.Popen(
      [sys.executable, "-m", *map(str, arguments)],
      cwd=command.ROOT,
      env=command.environment(
        cache,
        4,
        JAX_COORDINATOR_ADDRESS=address,
        JAX_NUM_PROCESSES="2",
        JAX_PROCESS_ID=str(process),
      ),
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for process in range(2)
  ]
  try:
    return [command.finish(process) for process in processes]
  finally:
    for process in processes:
      process.kill()


def test_two_processes_are_one_device(compilation_cache, tmp_path):
  run_two(compilation_cache, "tests.distributed_worker", tmp_path)
  found = json.loads((tmp_path / "losses.json").read_text())
  devices = jax.devices
  try:
    jax.devices = lambda: devices()[:1]
    _, state, expected = distributed_worker.train({}, sharding.DEFAULT_RULES)
    layout = jax.tree.map(lambda leaf: leaf.sharding, state)
  finally:
    jax.devices = devices
  for name in distributed_worker.MESHES:
    np.testing.assert_allclose(found[name], expected, rtol=1e-5, err_msg=name)
  # What eight devices of two processes saved, one device of one process restores.
  checkpointer = Checkpointer(tmp_path)
  restored = checkpointer.restore(abstract_like(state, layout))
  checkpointer.close()
  assert restored.step == 3 and int(restored.state.step) == distributed_worker.STEPS
  bare = [jax.device_get(s.replace(rng=None)) for s in (restored.state, state)]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *bare)
  for place in (tmp_path, tmp_path / "best" / "4"):  # the export, and what was best
    weights, _ = load_weights(place)
    np.testing.assert_array_equal(
      weights["params"]["head"]["kernel"], restored.state.ema["params"]["head"]["kernel"]
    )


def test_two_towers_are_measured_alike_in_two_processes(compilation_cache, tmp_path):
  run_two(compilation_cache, "tests.image_text_worker", tmp_path)
  alone = test_image_text_evaluation.both_kinds(None)
  for process in range(2):
    count, found = json.loads((tmp_path / f"{process}.json").read_text())
    assert count == 2
    assert found == [pytest.approx(values) for values in alone]


def test_maps_are_measured_alike_in_two_processes(compilation_cache, tmp_path):
  """Eleven pictures of all sizes, which two processes do not share evenly, count once each."""
  for task in ("segmentation", "depth"):
    dense.write_folder(tmp_path / task, task, count=11)
  run_two(compilation_cache, "tests.dense_worker", tmp_path)
  alone = dense_worker.figures(tmp_path, None)
  for process in range(2):
    count, found = json.loads((tmp_path / f"{process}.json").read_text())
    assert count == 2
    for task, expected in alone.items():
      assert found[task]["examples"] == 11
      assert found[task] == pytest.approx(expected, rel=2e-3), task


def test_objects_and_segments_are_measured_alike_in_two_processes(compilation_cache, tmp_path):
  run_two(compilation_cache, "tests.detection_worker", tmp_path)
  alone = {
    "objects": detection_worker.figures(None), "panoptic": detection_worker.panoptic_figures(None),
  }  # fmt: skip
  assert all(found["examples"] == detection_worker.PICTURES for found in alone.values())
  # Something is there that could differ: segments found wrongly, and missed ones.
  assert alone["objects"]["found"] > 11 and alone["panoptic"]["agreeing"] > 0
  assert alone["panoptic"]["counts_2"] > 11 and alone["panoptic"]["counts_3"] > 11
  for process in range(2):
    count, found = json.loads((tmp_path / f"{process}.json").read_text())
    assert count == 2
    for name, expected in alone.items():
      assert found[name] == pytest.approx(expected, rel=2e-3), name


def test_the_command_in_two_processes(unbroken, tiny_config, compilation_cache, tmp_path):
  arguments = (
    f"--config={tiny_config}",
    f"--workdir={tmp_path / 'run'}",
    "--config.mesh.fsdp=4",
    "--config.total_epochs=2",
  )
  first, second = run_two(compilation_cache, "hybrid_vit.main", "--distributed", *arguments)
  assert "8 cpu device(s) (data 2, fsdp 4, tensor 1), 2 process(es)" in first
  assert "step" not in second  # process 0 alone reports
  found, expected = (read_metrics(w / "metrics.jsonl") for w in (tmp_path / "run", unbroken[0]))
  assert [(line["step"], line["kind"]) for line in found] == [
    (line["step"], line["kind"]) for line in expected
  ]
  for one, other in zip(found, expected):
    assert one["loss"] == pytest.approx(other["loss"], rel=5e-4), (one, other)
  assert [line.get("examples") for line in found] == [line.get("examples") for line in expected]
  assert load_weights(tmp_path / "run")[1]["num_classes"] == 10
