"""A step by the compiler of TPUs: its figures by hand, layers told apart, what may make it fit."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit import dry_run, programs, run_plan, sharding, topology_plan, tpu_topology
from hybrid_vit.config import ConfigError
from hybrid_vit.settings import XLA_OPTIMIZATION_LEVELS
from hybrid_vit.tpu_topology import Compilation, Cycles
from tests.test_dry_run import config

GIB = 2**30
# What a program's text has of a layer forward and backward, recomputed, and of the update.
CYCLES = Cycles(
  1000,
  {
    "jit(step)/jvp(MOAT)/stage1_block0/norm/sub": 100,
    "jit(step)/jvp(MOAT)/stage1_block0/norm/jit(_var)/mul": 50,
    "jit(step)/transpose(jvp(MOAT))/stage1_block0/norm/mul": 200,
    "jit(step)/while/body/transpose(jvp(MOAT))/checkpoint/rematted_computation/stem/conv/dot": 150,
    "jit(step)/jvp(loss)/sub": 40,
    "jit(step)/add": 460,
  },
  {"all-reduce": 2},
  1,
)


@pytest.fixture(scope="module")
def plan():
  return run_plan.examine(config(), 4)


@pytest.fixture(scope="module")
def mesh(plan):
  return sharding.make_mesh(plan.run.mesh_axes, jax.devices()[:4])


def stand_in(monkeypatch, compilation):
  """No compiler of TPUs: what it would say is given."""
  monkeypatch.setattr(topology_plan.tpu_topology, "examine", lambda compile_program: compilation)


@pytest.mark.parametrize(
  ("name", "layer"),
  [
    ("jit(step)/jvp(MOAT)/stage1_block0/attention/query/dot_general",
     ("stage1_block0/attention/query", False)),
    ("jit(step)/transpose(jvp(MOAT))/head/dot_general", ("head", True)),
    ("jit(step)/jvp(DenseModel)/backbone/stage1/block0/norm/x/mul",
     ("backbone/stage1/block0", False)),
    ("jit(step)/jvp(MOAT)/checkpoint/rematted_computation/stem/conv/mul", ("stem/conv", True)),
    ("jit(step)/jvp(MOAT)/stem/pjit(gelu)/mul", ("stem", False)),
    ("jit(step)/jvp()/reduce_sum", ("loss and rest", False)),
    ("jit(step)/mul", ("optimizer and rest", False)),
    ("copy-done", ("optimizer and rest", False)),
  ],
)  # fmt: skip
def test_layers_by_the_names_of_operations(name, layer):
  assert topology_plan.layer_of(name) == layer


def test_cycles_of_layers_add_up():
  found = topology_plan.cycles_by_layer(CYCLES)
  assert found == {
    "stage1_block0/norm": (150, 200), "stem/conv": (0, 150), "loss and rest": (40, 0),
    "optimizer and rest": (460, 0),
  }  # fmt: skip
  assert sum(map(sum, found.values())) == CYCLES.total


def test_figures_by_hand(plan, mesh, monkeypatch):
  said = Compilation(12.0, True, 3 * GIB, GIB, 2 * GIB, 1e12, 8.19e9, CYCLES, "")
  stand_in(monkeypatch, said)
  step = topology_plan.plan_step(plan.run, "v5e:2x2", mesh, 0)
  batch = plan.run.curriculum.phases[0].batch_size
  assert step.rows == batch / 4 and step.picture == "32 x 32"
  assert step.held["params"] == plan.state_bytes["params"]
  assert step.held["opt_state"] == plan.state_bytes["opt_state"] and "ema" not in step.held
  # Pictures of a byte a channel, and what else a row has: its class, its index, whether replaced.
  assert step.held["batch"] >= batch * 32 * 32 * 3 // 4
  assert step.seconds == 1000 / 1.5e9
  assert np.isclose(step.examples_per_second, step.rows / step.seconds)
  used = programs.flops_per_example(plan.run, 0) * step.examples_per_second / 197e12
  assert np.isclose(step.model_flops_utilization, used)
  text = topology_plan.describe(step)
  assert "3.000 GiB of 15.75 GiB: fits" in text and "10.0 ms at 819 GB/s" in text
  assert "stage1_block0/norm" in text and "2 all-reduce" in text and "counted once" in text
  lines = text.splitlines()
  assert next(line for line in lines if "stage1_block0/norm" in line).split()[1:] == [
    "15.0",
    "20.0",
  ]


def test_what_is_sent(plan, monkeypatch):
  text = "\n".join(
    (
      "ENTRY %main (p: f32[8]) -> f32[8] {",
      "  %a.1 = f32[1024]{0} all-reduce(%p), replica_groups={{0,1,2,3}}",
      "  %a.2 = bf16[256]{0} all-gather(%q), dimensions={0}",
      "  %a.3 = f32[64]{0} reduce-scatter(%r), dimensions={0}",
      "}",
    )
  )
  stand_in(monkeypatch, Compilation(1.0, True, GIB, 0, 0, 0.0, 0.0, CYCLES, text))
  halves = sharding.make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:4])
  step = topology_plan.plan_step(plan.run, "v6e:2x2", halves, 0)
  assert step.sent_bytes == 2 * 4096 + 512 + 2 * 256
  assert step.link_seconds == step.sent_bytes / tpu_topology.CHIPS["v6e"].link_bytes


def test_what_may_make_it_fit(plan):
  changes = topology_plan.fitting_changes(plan.run, 4)
  assert changes[0] == {"remat": True}
  assert {"accumulation_steps": 2} in changes
  assert {"mesh.data": -1, "mesh.fsdp": 4} in changes
  parts = [c["mesh.fsdp"] for c in topology_plan.fitting_changes(plan.run, 16) if "mesh.fsdp" in c]
  assert parts == sorted(parts) and set(parts) == {4, 16}
  assert all(changes) and len({str(change) for change in changes}) == len(changes)
  # 64 pictures: not 16 parts on 8 devices, and nothing that is there already.
  recomputing = run_plan.examine(config(remat=True, mesh__fsdp=2), 4).run
  changes = topology_plan.fitting_changes(recomputing, 4)
  assert changes and all(set(change) == {"accumulation_steps"} for change in changes)


def steps_fit(monkeypatch, compile_step):
  """A topology of four chips, for which a step compiles to 9 GiB where `compile_step` is true."""
  chips = jax.devices()[:4]
  monkeypatch.setattr(dry_run.tpu_topology, "topology_devices", lambda name: chips)
  monkeypatch.setattr(topology_plan.programs, "compile_step", compile_step)
  fits = Compilation(1.0, True, 9 * GIB, GIB, 8 * GIB, 1e12, 1e9, CYCLES, "")
  refused = Compilation(1.0, False, 20 * GIB)
  monkeypatch.setattr(
    topology_plan.tpu_topology, "examine", lambda compiled: fits if compiled() else refused
  )


def test_a_step_that_does_not_fit_is_a_problem_and_is_made_to(monkeypatch, capsys):
  steps_fit(monkeypatch, lambda run, *a, **k: run.config.get("remat", False))
  assert dry_run.main(config(), topology="v5e:2x2", try_to_fit=True) == 1
  out = capsys.readouterr().out
  assert "20.000 GiB of 15.75 GiB: does not fit" in out
  assert "--config.remat=True: 9.00 GiB, fits" in out
  assert "1. phase 1 needs 20.00 GiB of a device's 15.75 GiB\n" in out
  assert dry_run.main(config(remat=True), topology="v5e:2x2") == 0
  with pytest.raises(ConfigError, match="--devices=8, and v5e:2x2 has 4"):
    dry_run.main(config(), 8, topology="v5e:2x2")


def test_what_may_help_is_compiled_in_a_hurry_and_what_fits_as_a_run_would(monkeypatch, capsys):
  asked = []

  def compile_step(run, *args, options=None, **kwargs):
    form = (run.config.get("remat", False), run.settings.accumulation)
    asked.append((*form, bool(options)))
    # By the hurried compilation recomputation fits, as a run is compiled two parts do.
    return form[1] > 1 or (form[0] and bool(options))

  steps_fit(monkeypatch, compile_step)
  assert dry_run.main(config(), topology="v5e:2x2", try_to_fit=True) == 1
  out = capsys.readouterr().out
  assert "--config.remat=True: 20.00 GiB, does not fit" in out
  assert "--config.accumulation_steps=2: 9.00 GiB, fits" in out
  assert asked == [
    (False, 1, False), (True, 1, True), (True, 1, False), (False, 2, True), (False, 2, False),
  ]  # fmt: skip


def test_a_step_that_hardly_does_not_fit_in_a_hurry_may_fit(plan, mesh, monkeypatch):
  for asked, may in ((9, True), (17, True), (18, False)):
    stand_in(monkeypatch, Compilation(1.0, asked < 15, asked * GIB))
    assert topology_plan.may_fit(plan.run, "v5e:2x2", mesh, 0) == (may, asked * GIB)


def test_a_run_says_how_much_is_optimised(monkeypatch):
  for level in XLA_OPTIMIZATION_LEVELS:
    # As jaxlib takes them.
    options = programs.level_options(level)
    assert jax.jit(lambda x: 2 * x).lower(1.0).compile(compiler_options=options)(3.0) == 6.0
  given = []
  monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self, **k: given.append(k))
  mesh = sharding.make_mesh({}, jax.devices()[:1])
  for values in ({}, {"xla_optimization_level": "O1"}):
    programs.compile_step(run_plan.examine(config(**values), 1).run, 0, mesh)
  assert given == [{"compiler_options": None}, {"compiler_options": {"optimization_level": 19}}]
  plan = run_plan.examine(config(xla_optimization_level="fast"), 1)
  assert "'fast', which is not one of O0, O1, O2, O3" in "".join(plan.problems)


def test_without_libtpu_simulated_devices_stand_in(monkeypatch, capsys):
  monkeypatch.setattr(tpu_topology.importlib.util, "find_spec", lambda name: None)
  monkeypatch.setattr(dry_run, "_communication", lambda plan: f"{plan.devices} simulated")
  assert dry_run.main(config(), topology="v5e:2x4") == 0
  out = capsys.readouterr().out
  assert "pip install 'jax[tpu]'" in out and "8 simulated" in out
  assert tpu_topology.device_count("v5e:16x16") == 256
  assert tpu_topology.device_count("v4:2x2x4") == 16
  for name, message in (("v5e:3", "v5e:2x2"), ("a100:8", "no chip 'a100' is known")):
    with pytest.raises(tpu_topology.TopologyError, match=message):
      dry_run.main(config(), topology=name)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_step_is_compiled_for_a_tpu(plan):
  devices = tpu_topology.topology_devices("v5e:2x2")
  mesh = sharding.make_mesh(plan.run.mesh_axes, devices)
  step = topology_plan.plan_step(plan.run, "v5e:2x2", mesh, 0)
  assert step.compilation.fits and step.compilation.cycles.total > 10_000
  assert any(item.kind == "all-reduce" for item in step.collectives)
  layers = topology_plan.cycles_by_layer(step.compilation.cycles)
  assert min(layers["stem/conv_0"]) > 0
  # Depthwise convolutions are those of a TPU, though this process has none.
  assert "shift_add" not in step.compilation.text
  assert jnp.isfinite(step.model_flops_utilization)
