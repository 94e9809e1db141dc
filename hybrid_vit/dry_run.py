"""`--mode=dry_run`: what a run would be, without an accelerator and without its data.

Parameters, multiply-adds, memory of each device and the communication of one step, then everything
that is wrong with the configuration. Nothing is trained and no weights are made: shapes are traced
(`run_plan`), and one step is compiled for simulated devices; or with a topology every step by the
compiler of TPUs (`topology_plan`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hybrid_vit import build, programs, sharding, topology_plan, tpu_topology
from hybrid_vit.collectives import Collective, collectives_of
from hybrid_vit.config import Config, ConfigError, as_flags, set_fields
from hybrid_vit.run_plan import Plan, examine, with_groups
from hybrid_vit.tools.summarize import count_parameters, parameters_by_module

# More simulated devices than that make compilation slow and show nothing new.
MAX_SIMULATED = 8
# A network of more blocks is compiled with one in each stage: XLA for CPUs takes seconds for each.
MAX_COMPILED_BLOCKS = 14


def main(
  config: Config,
  devices: int | None = None,
  *,
  topology: str | None = None,
  try_to_fit: bool = False,
) -> int:
  """Prints the whole of it.

  Args:
    config: of the run.
    devices: how many there will be; None for those of the topology, else for the product of
      `config.mesh`, or `DEFAULT_DEVICES` where it has a -1.
    topology: TPUs whose compiler is asked, such as "v5e:16x16"; None for simulated CPU devices.
    try_to_fit: compile what may make a step fit that does not.

  Returns:
    Exit status: 1 where anything is wrong.
  """
  _simulate_devices()
  chips = None
  if topology is not None:
    try:
      chips = tpu_topology.topology_devices(topology)
    except tpu_topology.LibtpuMissingError as error:
      print(f"note: {error}; simulated CPU devices stand in\n")
    planned = tpu_topology.device_count(topology) if chips is None else len(chips)
    if devices not in (None, planned):
      raise ConfigError(f"--devices={devices}, and {topology} has {planned}")
    devices = planned
  plan = examine(config, devices)
  print(describe(plan), flush=True)
  if plan.state is not None and plan.layout is not None and not plan.problems:
    with plan.checking("compiling one step"):
      if topology is not None and chips is not None:
        _on_topology(plan, topology, chips, try_to_fit)
      else:
        print(_communication(plan))
  if not plan.problems:
    print("\nnothing wrong found")
    return 0
  print("\nwrong, the first thing first:")
  for number, problem in enumerate(plan.problems, start=1):
    print(f"  {number}. {problem}")
  return 1


def describe(plan: Plan) -> str:
  """The tables, for people."""
  lines = []
  if plan.state is not None:
    lines.append(f"{plan.config.model.name}: parameters by module")
    modules = parameters_by_module(plan.state.params)
    width = max(map(len, modules))
    lines += [f"  {name:<{width}}  {count:>13,}" for name, count in modules.items()]
    lines.append(f"  {'total':<{width}}  {count_parameters(plan.state.params):>13,}")
  if plan.multiply_adds is not None:
    shapes = ", ".join(
      f"{name} {' x '.join(map(str, shape))}" for name, shape in plan.evaluation_shapes.items()
    )
    lines.append(f"\nforward pass of one example ({shapes}): {plan.multiply_adds:,} multiply-adds")
  run = plan.run
  if run is not None and run.curriculum is not None and run.schedule is not None:
    steps = run.curriculum.total_steps
    peak = max(float(run.schedule(step)) for step in np.linspace(0, steps - 1, 200).round())
    lines.append(f"{steps:,} steps, peak learning rate {peak:.3g}\n{run.curriculum}")
  if plan.mesh is not None and plan.state_bytes:
    axes = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.shape.items())
    lines.append(f"\nmemory of each of {plan.devices} devices ({axes})")
    figures = dict(plan.state_bytes)
    figures["gradients"] = figures["params"]
    if plan.activation_bytes is not None:
      figures[f"activations of {plan.rows} rows"] = plan.activation_bytes
    width = max(map(len, figures))
    lines += [f"  {name:<{width}}  {_mebibytes(size)}" for name, size in figures.items()]
    lines.append(f"  {'total':<{width}}  {_mebibytes(sum(figures.values()))}")
    lines.append(
      "  (activations: residuals of the backward pass as traced; a compiler keeps fewer, and\n"
      "  needs room for the largest operation and, under fsdp, for gathered parameters besides)"
    )
  lines += [f"note: {note}" for note in plan.notes]
  return "\n".join(lines)


def _mebibytes(size: int) -> str:
  return f"{size / 2**20:>12,.2f} MiB"


def _on_topology(plan: Plan, topology: str, chips: Sequence[Any], try_to_fit: bool) -> None:
  """Compiles every step of the run for TPUs and prints what their compiler says."""
  assert plan.run is not None
  mesh = sharding.make_mesh(plan.run.mesh_axes, chips)
  axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
  print(f"\n{topology}, {len(chips)} devices ({axes}), by the compiler of TPUs", flush=True)
  for phase, canvas in programs.distinct_steps(plan.run):
    found = topology_plan.plan_step(plan.run, topology, mesh, phase, canvas)
    print(topology_plan.describe(found), flush=True)
    if found.compilation.fits:
      continue
    asked, limit = found.compilation.peak_bytes / 2**30, found.chip.hbm_bytes / 2**30
    plan.problems.append(
      f"phase {phase + 1} needs {asked:.2f} GiB of a device's {limit:.2f} GiB"
      + ("" if try_to_fit else "; --try_to_fit compiles what may help")
    )
    if try_to_fit:
      _try_to_fit(plan, topology, chips, phase, canvas)


def _try_to_fit(plan: Plan, topology: str, chips: Sequence[Any], phase: int, canvas: int) -> None:
  """Compiles a step with one change after the other, until it fits."""
  assert plan.run is not None
  for changes in topology_plan.fitting_changes(plan.run, len(chips)):
    values = ConfigDict(plan.run.config)
    set_fields(values, changes)
    said = as_flags(changes)
    other = examine(Config(values), len(chips))
    if other.problems or other.run is None:
      print(f"  {said}: {'; '.join(other.problems)}", flush=True)
      continue
    mesh = sharding.make_mesh(other.run.mesh_axes, chips)
    fits, asked = topology_plan.may_fit(other.run, topology, mesh, phase, canvas)
    if fits:
      # What was compiled in a hurry is compiled as a run would.
      found = topology_plan.plan_step(other.run, topology, mesh, phase, canvas).compilation
      fits, asked = found.fits, found.peak_bytes
    verdict = "fits" if fits else "does not fit"
    print(f"  {said}: {asked / 2**30:.2f} GiB, {verdict}", flush=True)
    if fits:
      return


def _simulate_devices() -> None:
  """Makes this process see `MAX_SIMULATED` CPU devices, unless JAX has begun already."""
  with contextlib.suppress(RuntimeError):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", MAX_SIMULATED)


def reduced_mesh(shape: tuple[int, int, int], limit: int) -> tuple[int, int, int]:
  """A mesh of at most `limit` devices that keeps an axis of more than one device so if it can.

  The largest axis is divided by its smallest prime factor until it fits.
  """
  sizes = list(shape)
  while math.prod(sizes) > limit:
    axis = max(range(len(sizes)), key=lambda i: sizes[i])
    divisor = next(d for d in range(2, sizes[axis] + 1) if sizes[axis] % d == 0)
    sizes[axis] //= divisor
  return sizes[0], sizes[1], sizes[2]


def _communication(plan: Plan) -> str:
  """Compiles one step for simulated devices and lists its collectives."""
  assert plan.mesh is not None and plan.run is not None
  wanted = tuple(plan.mesh.shape[axis] for axis in sharding.AXES)
  devices = jax.devices("cpu")
  shape = reduced_mesh((wanted[0], wanted[1], wanted[2]), min(MAX_SIMULATED, len(devices)))
  if math.prod(shape) == 1:
    return "\ncommunication of one step: none, there is one device" + (
      "" if plan.devices == 1 else " here to compile for"
    )
  mesh = sharding.make_mesh(dict(zip(sharding.AXES, shape)), devices[: math.prod(shape)])
  first = plan.run.tasks[0]
  task, cut = _compilable_task(with_groups(first, math.prod(wanted) // math.prod(shape)))
  begin = time.monotonic()
  try:
    found = compiled_collectives(plan, task, mesh)
  except ValueError as error:
    if shape == wanted and not cut:
      raise
    # What is wrong with a smaller stand-in is not wrong with the run: rules may name its blocks.
    return f"\ncommunication of one step: not compiled, a smaller stand-in is impossible ({error})"
  axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
  lines = [
    f"\ncommunication of one step, compiled in {time.monotonic() - begin:.0f} s for "
    f"{mesh.size} simulated CPU devices ({axes})"
  ]
  if shape != wanted:
    lines.append(f"  the mesh is a smaller one than that of the {plan.devices} devices asked for")
  if cut:
    lines.append(f"  {cut}")
  lines += [f"  {item}" for item in found] or ["  none"]
  lines.append(
    "  (bytes: of the results on one device. XLA for CPUs writes a reduce-scatter as an\n"
    "  all-reduce and computes bfloat16 in float32, so an accelerator may move half of this)"
  )
  return "\n".join(lines)


def _compilable_task(task: Any) -> tuple[Any, str]:
  """The task with a network that compiles in well under a minute, and what was cut off."""
  depths = getattr(task.model, "depths", None)
  if depths is None or sum(depths) <= MAX_COMPILED_BLOCKS:
    return task, ""
  ones = (1,) * len(depths)
  cut = f"cut to depths {ones} from {tuple(depths)}: further blocks add collectives of their own"
  return dataclasses.replace(task, model=task.model.clone(depths=ones)), cut


def compiled_collectives(plan: Plan, task: Any, mesh: Mesh) -> list[Collective]:
  """The collectives of the very step that is trained, of `task` on `mesh`, at the planned rows."""
  assert plan.run is not None and plan.mesh is not None
  settings, batch = plan.run.settings, plan.run.batches[0]
  planned = plan.run.curriculum.phases[0].batch_size
  ways = sharding.batch_ways(plan.mesh)
  rows = max(1, planned // (ways * settings.accumulation))
  size = rows * settings.accumulation * sharding.batch_ways(mesh)
  smaller = {k: jax.ShapeDtypeStruct((size, *v.shape[1:]), v.dtype) for k, v in batch.items()}
  params = jax.eval_shape(task.init, jax.random.key(0), smaller)["params"]
  optimizer = build.build_optimizer(
    plan.config,
    params,
    plan.run.curriculum,
    plan.run.curriculum,
    plan.run.examples_per_epoch,
  )
  stand_in = dataclasses.replace(
    plan.run, tasks=(task,), batches=(smaller,), params=params, **optimizer
  )
  # Communication is decided before the code of each operation is made, which takes the time.
  options: dict[str, str | bool] = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": True,
  }
  return collectives_of(programs.compile_step(stand_in, 0, mesh, options=options).as_text() or "")
