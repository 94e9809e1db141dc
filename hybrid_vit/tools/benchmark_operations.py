r"""Times of detection's operations, each form beside torchvision, PyTorch or scipy, or by a TPU's
compiler.

    python -m hybrid_vit.tools.benchmark_operations --out=docs/results/operations/cpu
    python -m hybrid_vit.tools.benchmark_operations --topology=v5e:2x2 \
      --out=docs/results/operations/v5e

What is compared is measured in turn, round by round: milliseconds are medians, and so are ratios,
each taken within its round, so that a machine that slows down meanwhile slows both. Ratios are to
the other library where it is installed (pip install torch torchvision), else to our default form.
With --topology nothing is run and features are bfloat16: memory, traffic and estimated cycles are
the compiler's (libtpu is needed: pip install 'jax[tpu]'). Writes OUT.json and OUT.md.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_vit import tpu_topology
from hybrid_vit.standard_streams import run_tool
from hybrid_vit.tools.benchmark_results import head_of, seconds_in_turn, write_results
from hybrid_vit.tools.operation_cases import FULL, SMALL, OperationCase, all_cases

_WAYS = ("forward", "with gradient")
# Seconds of a call from which on it is not repeated.
_LONG = 5.0
_FIRST = ("operation", "sizes", "way", "form", "default")


def with_gradient(form: Callable[..., Any], arguments: Sequence[int]) -> Callable[..., Any]:
  """A form that gives the gradients of the sum of its squares."""

  def loss(*given: Any) -> jax.Array:
    return jnp.sum(jnp.square(form(*given).astype(jnp.float32)))

  return jax.grad(loss, argnums=tuple(arguments))


def measure(case: OperationCase, rounds: int, forms: Sequence[str] | None = None) -> list[Any]:
  """Rows of one case: "operation", "sizes", "way", "form", "default", "ms", "ratio", "ratio_to".

  Args:
    case: what to time.
    rounds: all forms take turns so many times, after a call of each that does not count.
    forms: names of ours to time; None for all.
  """
  found = []
  for way in _WAYS[: 2 if case.gradients else 1]:
    runs: dict[str, Callable[[], Any]] = {}
    for name, make in case.theirs.items():
      options = {"backward": True} if way == _WAYS[1] else {}
      runs[name] = make(*case.arguments, **options)
    given = jax.device_put(case.arguments)
    for name, form in case.forms.items():
      if forms is None or name in forms:
        function = form if way == _WAYS[0] else with_gradient(form, case.gradients)
        compiled = jax.jit(function).lower(*given).compile()
        runs[name] = functools.partial(_blocking, compiled, given)
    reference = next(iter(case.theirs), case.default)
    seconds = seconds_in_turn(runs, rounds, long=_LONG)
    for name, own in seconds.items():
      row = _row(case, way, name)
      row["ms"] = round(1e3 * statistics.median(own), 3)
      if reference in seconds:
        ratios = [a / b for a, b in zip(own, seconds[reference])]
        row |= {"ratio": round(statistics.median(ratios), 3), "ratio_to": reference}
      found.append(row)
  return found


def estimate(case: OperationCase, topology: str, forms: Sequence[str] | None = None) -> list[Any]:
  """Rows of one case by a TPU's compiler, features in bfloat16 as a training has them there.

  "mcycles" is what it estimates, in millions, without what "not_estimated" lists; loops whose
  rounds depend on the data ("open_loops") count one.

  Raises:
    tpu_topology.TopologyError: see `tpu_topology.topology_devices`.
  """
  device = tpu_topology.topology_devices(topology)[0]
  arguments = [
    jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if i in case.typed else x.dtype)
    for i, x in enumerate(case.arguments)
  ]
  found = []
  for way in _WAYS[: 2 if case.gradients else 1]:
    for name, form in case.forms.items():
      if forms is not None and name not in forms:
        continue
      function = form if way == _WAYS[0] else with_gradient(form, case.gradients)
      said = tpu_topology.compile_for(function, *arguments, device=device)
      row = _row(case, way, name)
      row["default"] = ""  # of CPUs
      row["memory_mib"] = round(said.peak_bytes / 2**20, 1)
      row["fits"] = said.fits
      row["gflop"] = round(said.flops / 1e9, 3)
      row["traffic_mb"] = round(said.accessed_bytes / 1e6, 1)
      row["mcycles"] = round(said.cycles.total / 1e6, 3)
      row["open_loops"] = said.cycles.open_loops
      row["not_estimated"] = ", ".join(f"{n} {k}" for k, n in said.cycles.unknown.items())
      found.append(row)
  return found


def _row(case: OperationCase, way: str, form: str) -> dict[str, Any]:
  default = "yes" if form == case.default else ""
  return {"operation": case.operation, "sizes": case.label, "way": way, "form": form,
          "default": default}  # fmt: skip


def _blocking(compiled: Callable[..., Any], given: Sequence[Any]) -> None:
  jax.block_until_ready(compiled(*given))


def _rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
  for case in all_cases(SMALL if options.small else FULL):
    if options.operations and case.operation not in options.operations:
      continue
    if options.topology:
      yield from estimate(case, options.topology, options.forms)
    else:
      yield from measure(case, options.rounds, options.forms)


def main(arguments: Sequence[str] | None = None) -> int:
  """The command; returns its exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m hybrid_vit.tools.benchmark_operations",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--operations", nargs="+", help="only these")
  parser.add_argument("--forms", nargs="+", help="only these of ours")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--small", action="store_true", help="tiny sizes, for a try")
  parser.add_argument("--topology", help="of TPUs to compile for, e.g. v5e:2x2")
  parser.add_argument("--out", type=Path, help="of both files, without an ending")
  given = list(sys.argv[1:] if arguments is None else arguments)
  options = parser.parse_args(given)
  known = {case.operation for case in all_cases(SMALL)}
  if unknown := set(options.operations or ()) - known:
    parser.error(f"unknown operation {min(unknown)!r}; known: {', '.join(sorted(known))}")
  rows: list[dict[str, Any]] = []
  try:
    for row in _rows(options):
      print("  ".join(f"{key} {value}" for key, value in row.items() if value != ""), flush=True)
      rows.append(row)
      if options.out is not None:
        # Also what an interrupted call leaves is whole.
        head = head_of("benchmark_operations", given, options.topology, options.rounds)
        write_results(options.out, head, rows, _FIRST)
  except tpu_topology.TopologyError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  return 0


if __name__ == "__main__":
  run_tool(main)
