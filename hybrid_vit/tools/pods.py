r"""Whole published trainings on pods of TPUs, by their compiler: what fits, how long it takes.

    python -m hybrid_vit.tools.pods                                   every recipe, both pods
    python -m hybrid_vit.tools.pods MOAT SMT --topologies v5e:16x16

Each phase's real step is compiled for all chips of a topology, without a chip; hours are the
compiler's time of a step times the recipe's steps. Where a step does not fit, the recipe's own
lines are changed, the mildest first (recomputing blocks, accumulation, parameters in parts), and
the table says which. With --scan equal blocks are loops, which compile sooner; the estimates are a
fourth to a half higher then. Rows of an earlier call stay, so that long compilations may be done
one by one. libtpu is needed (pip install 'jax[tpu]'), and JAX_PLATFORMS=cpu where a TPU of another
kind is here. Writes OUT.json and OUT.md.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from hybrid_vit import programs, sharding, topology_plan, tpu_topology
from hybrid_vit.build import Run
from hybrid_vit.config import Config, as_flags, load_config, set_fields
from hybrid_vit.config_files import find_config
from hybrid_vit.run_plan import examine
from hybrid_vit.standard_streams import run_tool
from hybrid_vit.tools.benchmark_results import earlier_rows, head_of, write_results

# The largest published training of each system: its configuration, and lines set beside it.
RECIPES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
  "SMT": ("smt:smt_l_22k", {}),
  "CvT": ("cvt:cvt_w24_22k", {}),
  "FocalNet": ("focalnet:focalnet_xlarge_fl4_22k", {}),
  "L2ViT": ("l2vit:l2vit_base_22k", {}),
  "RevCol": ("revcol:revcol_xlarge_22k", {}),
  "CLIP with Quality Captions": ("clip_quality_captions:datacompdr1b", {}),
  "EfficientTrain++": ("convnext:convnext_large_22k", {"curriculum": "efficienttrain++"}),
  "MOAT": ("moat:moat_4_22k", {}),
}
TOPOLOGIES = ("v5e:16x16", "v4:8x8x8")
_KEY = ("system", "topology")
_FIRST = (
  "system", "recipe", "topology", "chips", "lines", "fits", "peak_gib", "of_gib", "ms_a_step",
  "images_per_second_a_chip", "mfu", "sent_mib_a_step", "links_ms_a_step", "steps", "hours",
  "chip_hours",
)  # fmt: skip


def configuration(recipe: str, lines: Mapping[str, Any]) -> ConfigDict:
  """A recipe's configuration with lines set: "moat:moat_4_22k", {"remat": True}."""
  name, _, argument = recipe.partition(":")
  values = load_config(find_config(name), argument or None)
  set_fields(values, lines)
  return values


def row_of(system: str, topology: str, scan_blocks: bool) -> dict[str, Any]:
  """One row, with the lines that make it fit.

  Args:
    system: of `RECIPES`.
    topology: of TPUs.
    scan_blocks: compile equal blocks as loops.

  Raises:
    ValueError: the recipe cannot run on so many chips, whatever its memory.
    tpu_topology.TopologyError: see `tpu_topology.topology_devices`.
  """
  recipe, lines = RECIPES[system]
  devices = tpu_topology.topology_devices(topology)
  base = {**lines, "scan_blocks": True} if scan_blocks else dict(lines)
  run = _examined(recipe, base, len(devices))
  row = _row(system, base, topology, run, _steps(run, topology, devices))
  for changes in topology_plan.fitting_changes(run, len(devices)):
    if row["fits"]:
      break
    changed = {**base, **changes}
    try:
      other = _examined(recipe, changed, len(devices))
    except ValueError as error:
      print(f"  {as_flags(changes)}: {error}", flush=True)
      continue
    if _may_fit(other, topology, devices):
      row = _row(system, changed, topology, other, _steps(other, topology, devices))
  return row


def _may_fit(run: Run, topology: str, devices: Sequence[Any]) -> bool:
  mesh = sharding.make_mesh(run.mesh_axes, devices)
  steps = programs.distinct_steps(run)
  return all(topology_plan.may_fit(run, topology, mesh, *step)[0] for step in steps)


def _examined(recipe: str, lines: Mapping[str, Any], devices: int) -> Run:
  plan = examine(Config(configuration(recipe, lines)), devices)
  if plan.problems or plan.run is None:
    raise ValueError(f"{recipe} on {devices} devices: {'; '.join(plan.problems)}")
  return plan.run


def _steps(run: Run, topology: str, devices: Sequence[Any]) -> list[topology_plan.StepPlan]:
  """The distinct steps, up to the first one that does not fit."""
  mesh = sharding.make_mesh(run.mesh_axes, devices)
  found = []
  for phase, canvas in programs.distinct_steps(run):
    step = topology_plan.plan_step(run, topology, mesh, phase, canvas)
    print(topology_plan.describe(step), flush=True)
    found.append(step)
    if not step.compilation.fits:
      break
  return found


def _row(
  system: str,
  lines: Mapping[str, Any],
  topology: str,
  run: Run,
  found: Sequence[topology_plan.StepPlan],
) -> dict[str, Any]:
  chip, recipe = found[0].chip, RECIPES[system][0]
  chips = tpu_topology.device_count(topology)
  fits = all(step.compilation.fits for step in found)
  row = {
    "system": system, "recipe": f"configs/{recipe.replace(':', '.py:')}", "topology": topology,
    "chips": chips, "fits": fits,
    "lines": as_flags(lines) or "as published",
    "peak_gib": max(step.compilation.peak_bytes for step in found) / 2**30,
    "of_gib": chip.hbm_bytes / 2**30,
  }  # fmt: skip
  if not fits:
    return row
  seconds = links = sent = images = used = 0.0
  for index, phase in enumerate(run.curriculum.phases):
    step = next(step for step in found if _same_step(run, step.phase, index))
    seconds += phase.steps * step.seconds
    links += phase.steps * step.link_seconds
    sent += phase.steps * step.sent_bytes
    images += phase.steps * phase.batch_size
    used += phase.steps * step.seconds * (step.model_flops_utilization or 0.0)
  steps = run.curriculum.total_steps
  return row | {
    "steps": steps, "ms_a_step": 1e3 * seconds / steps, "mfu": used / seconds,
    "images_per_second_a_chip": images / seconds / chips,
    "sent_mib_a_step": sent / steps / 2**20, "links_ms_a_step": 1e3 * links / steps,
    "hours": seconds / 3600, "chip_hours": chips * seconds / 3600,
  }  # fmt: skip


def _same_step(run: Run, phase: int, other: int) -> bool:
  return (run.tasks[phase], run.canvas_batches(phase)) == (
    run.tasks[other],
    run.canvas_batches(other),
  )


def main(arguments: Sequence[str] | None = None) -> int:
  """The command; returns its exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m hybrid_vit.tools.pods",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("systems", nargs="*", help=f"of {', '.join(RECIPES)}; all without")
  parser.add_argument("--topologies", nargs="+", default=list(TOPOLOGIES))
  parser.add_argument("--scan", action="store_true", help="with --config.scan_blocks=True")
  parser.add_argument("--out", type=Path, default=Path("docs/results/pods"))
  given = list(sys.argv[1:] if arguments is None else arguments)
  options = parser.parse_args(given)
  for system in options.systems:
    if system not in RECIPES:
      parser.error(f"no system is named {system!r}; there are {', '.join(RECIPES)}")
  rows = earlier_rows(options.out)
  for system in options.systems or RECIPES:
    for topology in options.topologies:
      print(f"{system} on {topology}", flush=True)
      try:
        row = row_of(system, topology, options.scan)
      except (tpu_topology.TopologyError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
      rows = [r for r in rows if any(r[name] != row[name] for name in _KEY)]
      rows.append(row | {"date": datetime.date.today().isoformat()})
      order = list(RECIPES)
      rows.sort(key=lambda r: order.index(r["system"]))
      # Each row says itself whether its blocks were scanned, and of which day it is.
      compiled_for = " and ".join(dict.fromkeys(r["topology"] for r in rows))
      write_results(options.out, head_of("pods", [], compiled_for, 0), rows, _FIRST)
  return 0


if __name__ == "__main__":
  run_tool(main)
