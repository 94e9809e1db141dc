"""`--mode=dry_run --topology=v5e:16x16`: a run's own steps by the compiler of TPUs, without a TPU.

Of each step (each phase's, and each canvas's) the memory of a device by kind against what it has,
the collectives, and what the compiler's own cycles make of it: the time of a step, examples a
second, the part of the peak that is used, the dearest layers. An estimate, no measurement; see
`tpu_topology` for what it is blind to.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping

from jax.sharding import Mesh

from hybrid_vit import programs, sharding, tpu_topology
from hybrid_vit.build import Run
from hybrid_vit.collectives import Collective, collectives_of
from hybrid_vit.tpu_topology import Chip, Compilation, Cycles

# Layers of a table, and how many parts of a module's name tell them apart.
_DEAREST, _DEPTH = 10, 3
# Of a chip's memory, what a step compiled in a hurry may ask for.
_MAY_FIT = 1.1
_BACKWARD = re.compile(r"transpose\(jvp\(([^()]*)\)\)")
_FORWARD = re.compile(r"(?:jvp|checkpoint)\(([^()]*)\)")
# Parts of an operation's name that are no module's.
_NO_MODULE = re.compile(
  r"^(?:while|body|cond|closed_call|checkpoint|rematted_computation|remat\d*|"
  r"custom_[jv]{2}p_call(?:_jaxpr)?|shard_map|(?:pjit|jit|vmap|jvp|transpose)\(.*|branch_\d+_fun)$"
)


@dataclasses.dataclass(frozen=True)
class StepPlan:
  """What the compiler says of one step.

  Attributes:
    phase: index of the phase.
    picture: size of the batch's pictures, "" where there are none.
    rows: examples of one device in a step.
    chip: what a device is.
    held: bytes of what a device is given, by kind.
    compilation: see there.
    collectives: of the program.
    sent_bytes: by each device to others; in a loop, by its rounds (once where the data say).
    flops_per_example: see `programs.Program`; None where the canvas is not the phase's first.
  """

  phase: int
  picture: str
  rows: float
  chip: Chip
  held: Mapping[str, int]
  compilation: Compilation
  collectives: tuple[Collective, ...] = ()
  sent_bytes: float = 0.0
  flops_per_example: float | None = None

  @property
  def seconds(self) -> float:
    """Of a step, by the compiler's cycles."""
    return self.compilation.cycles.total / self.chip.clock

  @property
  def link_seconds(self) -> float:
    """Least time of what is sent; most of it goes on beside the arithmetic."""
    return self.sent_bytes / self.chip.link_bytes

  @property
  def examples_per_second(self) -> float:
    """Of a device."""
    return self.rows / self.seconds

  @property
  def model_flops_utilization(self) -> float | None:
    """Part of the peak (MFU): arithmetic of the network alone, three forward passes."""
    if self.flops_per_example is None:
      return None
    return self.flops_per_example * self.examples_per_second / self.chip.peak_flops


def may_fit(run: Run, topology: str, mesh: Mesh, phase: int, canvas: int = 0) -> tuple[bool, int]:
  """Whether a step is worth `plan_step`, and the bytes it asks for; a third of its time or less.

  XLA's least optimisation plans a chip's memory within a few hundredths of the whole one's, mostly
  above it: a step that asks for up to a tenth more than there is may fit all the same.
  Arguments as of `plan_step`.
  """
  options = programs.level_options("O0")
  asked = tpu_topology.examine(
    lambda: programs.compile_step(run, phase, mesh, canvas=canvas, options=options)
  ).peak_bytes
  return asked <= _MAY_FIT * tpu_topology.chip_of(topology).hbm_bytes, asked


def plan_step(run: Run, topology: str, mesh: Mesh, phase: int, canvas: int = 0) -> StepPlan:
  """Compiles one step; minutes of a large network.

  Args:
    run: of a configuration.
    topology: its name.
    mesh: of all its devices.
    phase: see `programs.compile_step`.
    canvas: likewise.
  """
  state, layout = programs.abstract_state(run, mesh, phase)
  batch = run.canvas_batches(phase)[canvas]
  held = programs.state_bytes(state, layout)
  split = sharding.batch_sharding(mesh)
  held["batch"] = sum(sharding.shard_bytes(leaf, split) for leaf in batch.values())
  held["constants"] = programs.constants_bytes(run.tasks[phase], mesh)
  found = tpu_topology.examine(lambda: programs.compile_step(run, phase, mesh, canvas=canvas))
  collected = tuple(collectives_of(found.text))
  # An all-reduce sends all of it twice; a reduce-scatter's result is one part of what is sent.
  times = {"all-reduce": 2, "reduce-scatter": mesh.shape["fsdp"]}
  picture = batch["image"].shape[1:3] if "image" in batch else ()
  return StepPlan(
    phase,
    " x ".join(map(str, picture)),
    run.curriculum.phases[phase].batch_size / mesh.size,
    tpu_topology.chip_of(topology),
    {name: size for name, size in held.items() if size},
    found,
    collected,
    sum(times.get(item.kind, 1) * item.bytes * (item.rounds or 1) for item in collected),
    programs.flops_per_example(run, phase) if canvas == 0 else None,
  )


def fitting_changes(run: Run, devices: int) -> list[dict[str, object]]:
  """Changes of a configuration, by field, that may make a step fit; the mildest first."""
  axes = run.mesh_axes
  remat: dict[str, object] = {} if run.config.get("remat") else {"remat": True}
  least = min(phase.batch_size for phase in run.curriculum.phases)
  parts = [run.settings.accumulation * factor for factor in (2, 4, 8)]
  parts = [p for p in parts if least % (p * devices) == 0 and all(t.separable for t in run.tasks)]
  # Fewer parts are gathered from fewer chips, in less time and in far less of the compiler's.
  split: list[dict[str, object]] = [{}]
  if axes.get("fsdp", 1) == 1 and axes.get("tensor", 1) == 1 and devices > 1:
    split = [{"mesh.data": -1, "mesh.fsdp": min(devices, n)} for n in (4, 16)]
  found: list[dict[str, object]] = [remat]
  found += [{"accumulation_steps": p} for p in parts]
  for fsdp in split:
    found += [fsdp, {**remat, **fsdp}]
  found += [{**remat, **split[-1], "accumulation_steps": p} for p in parts]
  return [change for k, change in enumerate(found) if change and change not in found[:k]]


def describe(plan: StepPlan) -> str:
  """For people."""
  found, chip = plan.compilation, plan.chip
  size = f", pictures of {plan.picture}" if plan.picture else ""
  lines = [
    f"phase {plan.phase + 1}{size}: {plan.rows:g} examples a device, compiled in "
    f"{found.seconds:.0f} s"
  ]
  figures = dict(plan.held)
  figures["temporaries"] = found.temporary_bytes
  width = max(map(len, [*figures, "peak"]))
  if found.fits:
    lines += [f"  {name:<{width}}  {_gibibytes(size)}" for name, size in figures.items()]
  lines.append(
    f"  {'peak':<{width}}  {_gibibytes(found.peak_bytes)} of {chip.hbm_bytes / 2**30:.2f} GiB: "
    + ("fits" if found.fits else "does not fit")
  )
  if not found.fits:
    return "\n".join(lines)
  lines += [f"  {item}" for item in plan.collectives] or ["  no collectives"]
  traffic = found.accessed_bytes / chip.bandwidth
  lines.append(
    f"  step {1e3 * plan.seconds:.1f} ms by the compiler's {found.cycles.total / 1e6:.1f} M cycles "
    f"at {chip.clock / 1e9:g} GHz: {plan.examples_per_second:,.0f} examples/s a device"
  )
  if (used := plan.model_flops_utilization) is not None:
    lines.append(f"  {100 * used:.1f} % of the peak of {chip.peak_flops / 1e12:g} TFLOP/s")
  lines.append(
    f"  memory traffic {found.accessed_bytes / 1e9:.1f} GB, {1e3 * traffic:.1f} ms at "
    f"{chip.bandwidth / 1e9:g} GB/s; links at least {1e3 * plan.link_seconds:.1f} ms, most of it "
    "meanwhile"
  )
  lines += _dearest(found.cycles)
  if found.cycles.unknown:
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(found.cycles.unknown.items()))
    lines.append(f"  without an estimate: {listed}")
  if found.cycles.open_loops:
    lines.append(f"  {found.cycles.open_loops} loops whose rounds depend on data, counted once")
  return "\n".join(lines)


def _dearest(cycles: Cycles) -> list[str]:
  layers = cycles_by_layer(cycles)
  ordered = sorted(layers.items(), key=lambda item: -sum(item[1]))[:_DEAREST]
  if not ordered:
    return []
  width = max(len(name) for name, _ in ordered)
  lines = [f"  {'dearest layers, % of the cycles':<{width + 2}}  forward  backward"]
  for name, parts in ordered:
    forward, backward = (100 * part / max(cycles.total, 1) for part in parts)
    lines.append(f"    {name:<{width}}  {forward:>7.1f}  {backward:>8.1f}")
  return lines


def cycles_by_layer(cycles: Cycles, depth: int = _DEPTH) -> dict[str, tuple[int, int]]:
  """Cycles of the forward and of the backward pass by module.

  Recomputation is of the backward pass. What stands in neither ("optimizer and rest": the update,
  augmentation, copies that the compiler adds) counts as forward.

  Args:
    cycles: of a step.
    depth: how many parts of a module's name.
  """
  sums: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
  for name, value in cycles.by_name.items():
    layer, backward = layer_of(name, depth)
    sums[layer][backward] += value
  return {name: (forward, backward) for name, (forward, backward) in sums.items()}


def layer_of(name: str, depth: int = _DEPTH) -> tuple[str, bool]:
  """The module of an operation, and whether it is of the backward pass.

  "jit(step)/transpose(jvp(ConvNeXt))/stage1_block1/norm/sub" is stage1_block1/norm, backward.
  """
  backward = _BACKWARD.search(name)
  found = backward or _FORWARD.search(name)
  if found is None:
    return "optimizer and rest", False
  parts = name[found.end() :].split("/")[1:-1]
  modules = [part for part in parts if part and not _NO_MODULE.match(part)]
  recomputed = "rematted_computation" in parts
  return "/".join(modules[:depth]) or "loss and rest", bool(backward) or recomputed


def _gibibytes(size: int) -> str:
  return f"{size / 2**30:>8.3f} GiB"
