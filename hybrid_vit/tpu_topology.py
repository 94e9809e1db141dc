"""Compiling for TPUs that are not there: memory, arithmetic and the compiler's own cycles.

libtpu, which `pip install "jax[tpu]"` brings, compiles for any topology on a machine without a
chip. What it says of a program is its own model, no measurement: right about memory and about what
is bound by it, blind to contention, and silent about some instructions (sorts above all), which
`Cycles.unknown` lists. The process needs JAX_PLATFORMS=cpu, or JAX looks for the chips.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

# What libtpu is told a worker has; a topology may have more chips than one.
_ACCELERATORS = {"v4": "v4-8", "v5e": "v5litepod-4", "v5p": "v5p-8", "v6e": "v6e-4"}

# Chips of two cores, which programs use as one device.
_MEGACORE = ("v4", "v5p")

# Instructions that take time and that the compiler may not estimate.
_SILENT = ("sort", "custom-call", "scatter", "gather", "convolution", "dot", "all-gather",
           "all-reduce", "all-to-all", "reduce-scatter", "collective-permute")  # fmt: skip

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (?:\(.*?\)|\S+) ([\w\-]+)\(")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NAME = re.compile(r'op_name="([^"]*)"')
_FUSED = re.compile(r"\bcalls=%?([\w.\-]+)")
_GROUPS = re.compile(r"(?:feature|batch)_group_count=\d")
_CALLED = re.compile(
  r"\b(?:condition|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONSTANT = re.compile(r"s32\[\]\S* constant\((\d+)\)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# Kinds of work, see `Cycles.by_kind`.
KINDS = (
  "depthwise",
  "convolutions",
  "products",
  "norms",
  "attention",
  "copies",
  "update",
  "others",
)
_COPIES = ("copy", "transpose", "slice", "pad", "reshape", "concatenate")
# The compiler's two ways to refuse a program.
_TOO_LARGE = (
  re.compile(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm"),
  re.compile(r"required for HLO temporaries \(([\d.]+)([KMG])\) exceeds available HBM"),
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True)
class Chip:
  """What one device of a topology, a chip, is.

  Attributes:
    hbm_bytes: that programs may use, as the compiler says when it refuses one; the maker's figures
      are a little more.
    clock: cycles a second, by which the compiler's largest products come to the maker's peak.
    peak_flops: dense bfloat16 operations a second; it and the next two are the maker's.
    bandwidth: bytes of memory a second.
    link_bytes: bytes a second that all links to other chips together send.
  """

  hbm_bytes: int
  clock: float
  peak_flops: float
  bandwidth: float
  link_bytes: float


# By the first part of a topology's name.
CHIPS: Mapping[str, Chip] = {
  "v4": Chip(int(30.75 * 2**30), 1.05e9, 275e12, 1228e9, 300e9),
  "v5e": Chip(int(15.75 * 2**30), 1.5e9, 197e12, 819e9, 200e9),
  "v5p": Chip(int(95.74 * 2**30), 1.75e9, 459e12, 2765e9, 600e9),
  "v6e": Chip(int(31.25 * 2**30), 1.75e9, 918e12, 1640e9, 448e9),
}


class TopologyError(RuntimeError):
  """TPUs cannot be compiled for here; the message says what to do."""


class LibtpuMissingError(TopologyError):
  """Their compiler is not installed."""


@dataclasses.dataclass(frozen=True)
class Cycles:
  """The compiler's estimate of a program on one chip.

  Attributes:
    total: cycles, loops by their rounds; copies and collectives that overlap count, so that it is
      an upper view of what is estimated.
    by_name: the same by operation, as JAX names it ("jit(step)/jvp(ConvNeXt)/stage1_block1/...").
    unknown: how many instructions of each kind had no estimate, loops by their rounds; where they
      are many, the total says little.
    open_loops: loops whose rounds depend on the data; each counts as one round.
    by_kind: cycles by what is done, of `KINDS`. What is fused with a convolution or a product
      counts as that one. Of what is left "norms" and "attention" (softmax, biases) are fusions that
      end in a module of such a name, "copies" change places alone, "update" is outside of the
      network and its loss; "others" are activations, residuals and sums above all.
  """

  total: int
  by_name: Mapping[str, int]
  unknown: Mapping[str, int]
  open_loops: int
  by_kind: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Compilation:
  """What the compiler says of a program on one chip.

  Attributes:
    seconds: that compiling took.
    fits: whether the chip's memory is enough; if not, `peak_bytes` is what was asked for and
      everything else is 0 or empty.
    peak_bytes: of memory, arguments and results included, as the chip would hold them.
    argument_bytes: of all arguments.
    temporary_bytes: besides arguments and results.
    flops: floating-point operations; loops count one round.
    accessed_bytes: of memory read and written; likewise.
    cycles: see `Cycles`.
    text: the optimised program.
  """

  seconds: float
  fits: bool
  peak_bytes: int
  argument_bytes: int = 0
  temporary_bytes: int = 0
  flops: float = 0.0
  accessed_bytes: float = 0.0
  cycles: Cycles = Cycles(0, {}, {}, 0)
  text: str = ""


def topology_devices(name: str) -> Sequence[Any]:
  """The chips of a topology such as "v5e:2x2", for a mesh or a sharding.

  Raises:
    LibtpuMissingError: libtpu is not installed.
    TopologyError: it does not know the topology.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise LibtpuMissingError(
      "compiling for TPUs needs libtpu, which is not installed here: pip install 'jax[tpu]'"
    )
  generation = name.partition(":")[0]
  # Without these libtpu asks a cloud's metadata server, for minutes.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  # Its lock is for chips, which nobody opens here; compilations may go side by side.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  if generation in _ACCELERATORS:
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", _ACCELERATORS[generation])
  try:
    options = {"chip_config_name": "megacore"} if generation in _MEGACORE else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
  except Exception as error:
    # libtpu raises errors of many classes here.
    raise TopologyError(f"no topology {name!r}, such as v5e:2x2 or v6e:2x4: {error}") from error


def device_count(topology: str) -> int:
  """Devices of a topology by its name alone, such as "v5e:16x16".

  Raises:
    TopologyError: another form of name, or a kind that is not known.
  """
  chip_of(topology)
  _, _, sizes = topology.partition(":")
  if not re.fullmatch(r"\d+(x\d+){1,2}", sizes):
    raise TopologyError(f"{topology!r}: a name such as v5e:2x2 or v4:2x2x4 was expected")
  return math.prod(map(int, sizes.split("x")))


def chip_of(topology: str) -> Chip:
  """What a device of a topology is.

  Raises:
    TopologyError: a kind that is not known.
  """
  generation = topology.partition(":")[0]
  if generation not in CHIPS:
    raise TopologyError(f"no chip {generation!r} is known; there are: {', '.join(CHIPS)}")
  return CHIPS[generation]


def compile_for(function: Callable[..., Any], *arguments: Any, device: Any) -> Compilation:
  """Compiles a function for one chip.

  Args:
    function: of arrays.
    *arguments: trees of arrays or of `jax.ShapeDtypeStruct`; only shapes and types matter.
    device: one of `topology_devices`.
  """
  mesh = jax.sharding.Mesh(np.array([device]), ("data",))
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  shapes = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), arguments
  )
  # Operations choose their forms by the mesh, not by this process's devices.
  with jax.set_mesh(mesh):
    lowered = jax.jit(function).lower(*shapes)
  return examine(lowered.compile)


def examine(compile_program: Callable[[], Any]) -> Compilation:
  """What the compiler says of the program that `compile_program` gives; too large a one included.

  Raises:
    Exception: whatever compiling raises but for a lack of memory.
  """
  begin = time.monotonic()
  try:
    compiled = compile_program()
  except jax.errors.JaxRuntimeError as error:
    for pattern in _TOO_LARGE:
      if used := pattern.search(str(error)):
        asked = int(float(used[1]) * _UNITS[used[2]])
        return Compilation(time.monotonic() - begin, False, asked)
    raise
  memory, text = compiled.memory_analysis(), compiled.as_text() or ""
  costs = compiled.cost_analysis() or {}
  held = (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
    - memory.alias_size_in_bytes
  )
  return Compilation(
    time.monotonic() - begin,
    True,
    held,
    memory.argument_size_in_bytes,
    memory.temp_size_in_bytes,
    float(costs.get("flops", 0.0)),
    float(costs.get("bytes accessed", 0.0)),
    estimated_cycles(text),
    text,
  )


@dataclasses.dataclass
class _Computation:
  """One computation of a program: what its instructions say."""

  cycles: list[tuple[str, str, int]] = dataclasses.field(default_factory=list)
  contraction: str = ""
  silent: list[str] = dataclasses.field(default_factory=list)
  loops: list[tuple[str, str, int | None]] = dataclasses.field(default_factory=list)
  branches: list[list[str]] = dataclasses.field(default_factory=list)
  calls: list[str] = dataclasses.field(default_factory=list)
  constants: list[int] = dataclasses.field(default_factory=list)
  counts_up: bool = False


def estimated_cycles(text: str) -> Cycles:
  """Sums the compiler's estimates over a program's text, `compiled.as_text()`.

  A loop that counts to a constant is taken so many times; of a conditional the dearest branch.
  """
  computations, entry = _parse(text)
  total: collections.Counter[str] = collections.Counter()
  kinds: collections.Counter[str] = collections.Counter()
  unknown: collections.Counter[str] = collections.Counter()
  open_loops = 0

  def weight(name: str) -> int:
    own = computations[name]
    inner = [weight(body) * (rounds or 1) for _, body, rounds in _loops(own, computations)]
    inner += [max(map(weight, names)) for names in own.branches]
    inner += [weight(called) for called in own.calls]
    return sum(cycles for _, _, cycles in own.cycles) + sum(inner)

  def add(name: str, times: int) -> None:
    nonlocal open_loops
    own = computations[name]
    for label, kind, cycles in own.cycles:
      total[label] += times * cycles
      kinds[kind] += times * cycles
    for kind in own.silent:
      unknown[kind] += times
    for _, body, rounds in _loops(own, computations):
      open_loops += rounds is None
      add(body, times * (1 if rounds is None else rounds))
    for names in own.branches:
      add(max(names, key=weight), times)
    for called in own.calls:
      add(called, times)

  if entry is not None:
    add(entry, 1)
  return Cycles(sum(total.values()), dict(total), dict(unknown), open_loops, dict(kinds))


def loop_rounds(text: str) -> dict[str, int | None]:
  """How often the body of each loop runs, loops around it included.

  Args:
    text: of a compiled program.

  Returns:
    By the body's name; None where the rounds depend on data.
  """
  computations, entry = _parse(text)
  found: dict[str, int | None] = {}

  def walk(name: str, times: int | None) -> None:
    own = computations[name]
    for _, body, rounds in _loops(own, computations):
      found[body] = None if times is None or rounds is None else times * rounds
      walk(body, found[body])
    for called in [*own.calls, *(name for names in own.branches for name in names)]:
      walk(called, times)

  if entry is not None:
    walk(entry, 1)
  return found


def _parse(text: str) -> tuple[dict[str, _Computation], str | None]:
  computations: dict[str, _Computation] = {}
  current, entry = _Computation(), None
  # Without a gradient nothing is outside of the network.
  trains = "jvp(" in text
  for line in text.splitlines():
    header = _COMPUTATION.match(line)
    if header and not line.startswith("HloModule"):
      current = computations.setdefault(header[2], _Computation())
      entry = header[2] if header[1] else entry
      continue
    found = _INSTRUCTION.match(line)
    if not found:
      continue
    kind, named = found[1], _NAME.search(line)
    constant = _CONSTANT.search(line)
    if kind == "constant" and constant:
      current.constants.append(int(constant[1]))
    elif kind == "compare" and "direction=LT" in line:
      current.counts_up = True
    elif kind == "while":
      parts = dict(re.findall(r"\b(condition|body)=%?([\w.\-]+)", line))
      trips = _TRIPS.search(line)
      rounds = int(trips[1]) if trips else None
      current.loops.append((parts["condition"], parts["body"], rounds))
    elif kind == "conditional":
      listed = _BRANCHES.search(line)
      names = [n.strip().lstrip("%") for n in listed[1].split(",")] if listed else []
      current.branches.append(names or _CALLED.findall(line))
    elif kind == "call":
      current.calls += _CALLED.findall(line)
    label = named[1] if named else kind
    contraction = _contraction(kind, label, line)
    if fused := _FUSED.search(line):
      contraction = computations[fused[1]].contraction if fused[1] in computations else ""
    current.contraction = _dearer(current.contraction, contraction)
    cycles = _CYCLES.search(line)
    if cycles:
      own = contraction or _kind_of(kind, label, trains)
      current.cycles.append((label, own, int(cycles[1])))
    elif kind in _SILENT:
      current.silent.append(kind)
  return computations, entry


def _contraction(instruction: str, label: str, line: str) -> str:
  """Which of the first `KINDS` an instruction is, products being convolutions to this compiler."""
  if instruction not in ("convolution", "dot"):
    return ""
  if _GROUPS.search(line):
    return "depthwise"
  # Attention's products of a batch of heads have windows, too; their names tell them apart.
  return "convolutions" if "conv_general_dilated" in label else "products"


def _dearer(one: str, other: str) -> str:
  return min((one, other), key=lambda kind: KINDS.index(kind) if kind else len(KINDS))


def _kind_of(instruction: str, label: str, trains: bool) -> str:
  """Which of the last `KINDS` an instruction without a contraction is."""
  modules, _, operation = label.rpartition("/")
  if instruction in _COPIES or operation in _COPIES or label == instruction:
    return "copies"
  if trains and "jvp(" not in label:
    return "update"
  if "norm" in modules:
    return "norms"
  return "attention" if "attention" in modules or "attn" in modules else "others"


def _loops(
  own: _Computation, computations: Mapping[str, _Computation]
) -> list[tuple[str, str, int | None]]:
  """Loops with their rounds: the constant that the condition compares with, if it is one alone."""
  found: list[tuple[str, str, int | None]] = []
  for condition, body, rounds in own.loops:
    head = computations[condition]
    if rounds is None and head.counts_up and len(head.constants) == 1:
      rounds = head.constants[0]
    found.append((condition, body, rounds))
  return found


def cycles_by_module(cycles: Cycles, depth: int) -> dict[str, int]:
  """Cycles by the first parts of operations' names, the dearest first.

  Args:
    cycles: of a program.
    depth: how many parts after "jit(...)".
  """
  sums: collections.Counter[str] = collections.Counter()
  for name, value in cycles.by_name.items():
    parts = name.split("/")
    sums["/".join(parts[1 : 1 + depth]) or name] += value
  return dict(sums.most_common())


def gibibytes(size: int) -> float:
  """For people: to a hundredth."""
  return math.floor(100 * size / 2**30 + 0.5) / 100
