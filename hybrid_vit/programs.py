"""The compiled steps of a run: one for each shape of its phases, made ahead of time.

Training, the dry run, the benchmark and the tests all compile a step here.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hybrid_vit import sharding
from hybrid_vit.build import Run
from hybrid_vit.settings import XLA_OPTIMIZATION_LEVELS
from hybrid_vit.table_resizing import resize_tables
from hybrid_vit.tasks.base import constants_of
from hybrid_vit.tools.summarize import count_multiply_adds
from hybrid_vit.train_state import TrainState, create_state, make_train_step

# Dense bfloat16 operations a second of one device, by the names that JAX gives them: the makers'
# figures, without sparsity.
PEAK_FLOPS = {
  "TPU v3": 61.5e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "NVIDIA A100": 312e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
}


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled step.

  Attributes:
    compiled: `(state, batch) → (state, report)`; the state is donated. The task's constants are
      an argument of the program and are given here already, on the devices.
    seconds: that compiling took; 0 where it is another phase's.
    flops_per_example: of a training step by the usual convention, three times the forward pass;
      None where the devices' peak is not known, so that nobody needs it.
  """

  compiled: Any
  seconds: float
  flops_per_example: float | None


def new_state(run: Run, key: jax.Array, phase: int = 0) -> TrainState:
  """The state of step 0, with the tables of positions of a phase; pure."""
  return create_state(
    key, run.tasks[phase], run.optimizer, run.batches[phase], ema=run.settings.ema_decay is not None
  )


def state_shapes(run: Run, phase: int = 0) -> TrainState:
  """Shapes of the state within a phase."""
  return jax.eval_shape(lambda key: new_state(run, key, phase), jax.random.key(0))


def abstract_state(run: Run, mesh: Mesh, phase: int = 0) -> tuple[TrainState, Any]:
  """Shapes of the state within a phase, and where its leaves live."""
  shapes = state_shapes(run, phase)
  return shapes, sharding.state_shardings(shapes, run.sharding_rules, mesh)


def enter_phase(run: Run, phase: int, mesh: Mesh, state: TrainState) -> TrainState:
  """The state with the tables of positions of a phase, resized where they are another one's."""
  if _one_network(run):
    return state
  return _resized(state, *abstract_state(run, mesh, phase))


def evaluation_variables(run: Run, mesh: Mesh, state: TrainState) -> Any:
  """The state's, as the network of evaluation (the last phase's) takes them, in any phase.

  What lies in parts over `fsdp` is whole on each device: gathered once for all batches, not within
  each of them.
  """
  variables = state.evaluation_variables
  if not _one_network(run):
    shapes, layout = abstract_state(run, mesh, len(run.curriculum.phases) - 1)
    variables = _resized(variables, shapes.evaluation_variables, layout.evaluation_variables)
  if mesh.shape["fsdp"] == 1:
    return variables
  whole = jax.tree.map(lambda leaf: sharding.without_fsdp(leaf.sharding), variables)
  return jax.jit(_same, out_shardings=whole)(variables)


def _same(tree: Any) -> Any:
  """One function for all evaluations, so that the gathering is compiled for the first one alone."""
  return tree


def _one_network(run: Run) -> bool:
  return all(task.model == run.task.model for task in run.tasks)


def _resized(tree: Any, shapes: Any, layout: Any) -> Any:
  """A tree on devices with other tables; all other leaves stay the very arrays that they are."""
  leaves, structure = jax.tree.flatten(tree)
  wanted, places = jax.tree.leaves(shapes), jax.tree.leaves(layout)
  names = sharding.leaf_names(tree)
  changed = [k for k, leaf in enumerate(leaves) if leaf.shape != wanted[k].shape]
  if not changed:
    return tree
  resize = _resizing(tuple((names[k], wanted[k].shape, places[k]) for k in changed))
  for k, leaf in zip(changed, resize([leaves[k] for k in changed])):
    leaves[k] = leaf
  return jax.tree.unflatten(structure, leaves)


@functools.lru_cache(maxsize=32)
def _resizing(wanted: tuple[tuple[str, tuple[int, ...], Any], ...]) -> Any:
  """`(leaves) → leaves`, compiled once for the tables (name, shape, sharding) of a phase."""

  def resize(leaves: list[jax.Array]) -> list[jax.Array]:
    # The names, whose last part says which table it is, are the keys here.
    tables = {name: leaf for (name, _, _), leaf in zip(wanted, leaves)}
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape, _ in wanted}
    found = resize_tables(tables, shapes)
    return [found[name] for name, _, _ in wanted]

  return jax.jit(resize, out_shardings=[place for _, _, place in wanted])


def jitted_step(run: Run, phase: int, mesh: Mesh, layout: Any) -> Any:
  """The step of a phase under `jax.jit`, with everything where it belongs; not yet traced.

  Trace it within `jax.set_mesh(mesh)`: what a loss does around the devices it does around these.
  """
  settings, in_parts = run.settings, mesh.shape["fsdp"] > 1
  step = make_train_step(
    run.tasks[phase],
    run.optimizer,
    run.schedule,
    accumulation_steps=settings.accumulation,
    ema_decay=settings.ema_decay,
    frozen=run.frozen,
    skip_bad_steps=settings.skip_bad_steps,
    gather=functools.partial(sharding.gathered, layout=layout.params) if in_parts else None,
  )
  constants = constants_layout(run.tasks[phase], mesh)

  def with_whole_constants(state: TrainState, batch: Any, parts: Any) -> Any:
    return step(state, batch, sharding.gathered(parts, constants))

  return jax.jit(
    with_whole_constants if constants else step,
    in_shardings=(layout, sharding.batch_sharding(mesh), *((constants,) if constants else ())),
    out_shardings=(layout, sharding.replicated(mesh)),
    donate_argnums=0,
  )


def constants_layout(task: Any, mesh: Mesh) -> Any:
  """Where the leaves of a task's constants live: split over `fsdp` as far as they can be."""
  return sharding.state_shardings(constants_of(task), ((".*", "fsdp"),), mesh, params_key="")


def constants_bytes(task: Any, mesh: Any) -> int:
  """Bytes of a task's constants on one device; 0 where it has none."""
  leaves = jax.tree.leaves(constants_of(task))
  if not leaves:
    return 0
  return sum(map(sharding.shard_bytes, leaves, jax.tree.leaves(constants_layout(task, mesh))))


def state_bytes(state: TrainState, layout: Any) -> dict[str, int]:
  """Bytes that one device holds of each branch of a state."""
  result = {}
  for name in ("params", "batch_stats", "opt_state", "ema"):
    leaves, places = jax.tree.leaves(getattr(state, name)), jax.tree.leaves(getattr(layout, name))
    result[name] = sum(sharding.shard_bytes(leaf, place) for leaf, place in zip(leaves, places))
  return result


def distinct_steps(run: Run) -> Iterator[tuple[int, int]]:
  """(phase, canvas) of each step that is another program."""
  seen: list[Any] = []
  for phase, task in enumerate(run.tasks):
    for canvas, batch in enumerate(run.canvas_batches(phase)):
      if (task, batch) not in seen:
        seen.append((task, batch))
        yield phase, canvas


def compile_step(
  run: Run,
  phase: int,
  mesh: Mesh,
  *,
  canvas: int = 0,
  options: Mapping[str, Any] | None = None,
) -> Any:
  """The compiled step of a phase, from shapes alone.

  Args:
    run: of which.
    phase: index into `run.curriculum.phases`.
    mesh: to compile for.
    canvas: which shape of its batches.
    options: XLA's, for a compilation that is only looked at, beside the level that the run says.
  """
  shapes, layout = abstract_state(run, mesh, phase)
  batch = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding.batch_sharding(mesh)
    ),
    run.canvas_batches(phase)[canvas],
  )
  constants = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), constants_of(run.tasks[phase])
  )
  given = (shapes, batch, *((constants,) if constants else ()))
  with jax.set_mesh(mesh):
    lowered = jitted_step(run, phase, mesh, layout).lower(*given)
  chosen = {**level_options(run.settings.xla_optimization_level), **(options or {})}
  return lowered.compile(compiler_options=chosen or None)


def level_options(level: str | None) -> dict[str, Any]:
  """XLA's options of one of `XLA_OPTIMIZATION_LEVELS`; none of None."""
  return {} if level is None else {"optimization_level": XLA_OPTIMIZATION_LEVELS[level]}


def compile_phases(run: Run, mesh: Mesh, start_step: int) -> dict[int, Program]:
  """A program for each phase that is not over at `start_step`; phases alike share one."""
  programs: dict[int, Program] = {}
  # Phases share one teacher: what is on the devices already is not put there again.
  placed: dict[int, Any] = {}
  for phase in range(run.curriculum.phase_of(start_step), len(run.curriculum.phases)):
    twin = next(
      (
        k
        for k in programs
        if run.canvas_batches(k) == run.canvas_batches(phase) and run.tasks[k] == run.tasks[phase]
      ),
      None,
    )
    if twin is not None:
      programs[phase] = dataclasses.replace(programs[twin], seconds=0.0)
      continue
    begin = time.monotonic()
    compiled = _compile_canvases(run, phase, mesh)
    seconds = time.monotonic() - begin
    flops = None if peak_flops(mesh) is None else flops_per_example(run, phase)
    constants = constants_of(run.tasks[phase])
    if constants:
      if id(constants) not in placed:
        layout = constants_layout(run.tasks[phase], mesh)
        placed[id(constants)] = sharding.put_tree(constants, layout)
      compiled = functools.partial(_called_with, compiled, placed[id(constants)])
    programs[phase] = Program(compiled, seconds, flops)
  return programs


def _compile_canvases(run: Run, phase: int, mesh: Mesh) -> Any:
  """The step of a phase; where its batches have several shapes, that of each."""
  shapes = [_shapes_of(batch) for batch in run.canvas_batches(phase)]
  compiled = [compile_step(run, phase, mesh, canvas=canvas) for canvas in range(len(shapes))]
  if len(compiled) == 1:
    return compiled[0]
  return functools.partial(_called_by_shape, dict(zip(shapes, compiled)))


def _shapes_of(batch: Mapping[str, Any]) -> tuple[tuple[str, tuple[int, ...]], ...]:
  return tuple(sorted((name, tuple(leaf.shape)) for name, leaf in batch.items()))


def _called_by_shape(steps: Mapping[Any, Any], state: Any, batch: Any, *constants: Any) -> Any:
  return steps[_shapes_of(batch)](state, batch, *constants)


def _called_with(compiled: Any, constants: Any, state: Any, batch: Any) -> Any:
  return compiled(state, batch, constants)


def peak_flops(mesh: Mesh) -> float | None:
  """Operations a second of all devices of a mesh together; None where it is not known."""
  kind = mesh.devices.flat[0].device_kind
  # "NVIDIA H100 80GB HBM3" begins with its name; the longest that fits is meant.
  names = [name for name in PEAK_FLOPS if kind == name or kind.startswith(f"{name} ")]
  return PEAK_FLOPS[max(names, key=len)] * mesh.size if names else None


def flops_per_example(run: Run, phase: int) -> float:
  """Of a training step of a phase, see `Program`; its first canvas's."""
  task = run.tasks[phase]
  size = run.curriculum.phases[phase].batch_size
  rows = size // run.settings.accumulation
  batch = {
    k: jax.ShapeDtypeStruct((rows, *v.shape[1:]), v.dtype) for k, v in run.batches[phase].items()
  }
  key = jax.eval_shape(lambda: jax.random.key(0))
  variables = jax.eval_shape(task.init, key, batch)
  # Of what the step makes of the pictures: it may shrink them.
  shown = jax.eval_shape(task.augment, batch, key, jax.ShapeDtypeStruct((), jnp.int32))
  return 3 * 2 * count_multiply_adds(task.loss, variables, shown, key) / rows
