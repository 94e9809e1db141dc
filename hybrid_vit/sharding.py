"""Where arrays live: the mesh, the rules from parameter names to PartitionSpecs, start-up.

Two lines of a configuration say all of it:

    config.mesh = dict(data=-1, fsdp=8, tensor=1)
    config.sharding_rules = (("(query|key|value)/kernel", (None, "tensor")), (".*", "fsdp"))

The batch is split over `data` and `fsdp` together. A rule's layout is "fsdp" (the largest dimension
that the axis divides is split, small arrays are kept whole), "replicated", or an explicit tuple of
axis names. Every parameter must be covered, every rule must match something.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
DEFAULT_RULES: tuple[tuple[str, Any], ...] = ((".*", "fsdp"),)

# The name of gathered parameters for `jax.checkpoint`.
GATHERED = "gathered parameters"

# Arrays below this size are kept whole: gathering them would cost more than they weigh.
MIN_SHARDED_SIZE = 1024


def batch_ways(mesh: Mesh | AbstractMesh) -> int:
  """Into how many parts a batch is split."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def mesh_shape(axis_sizes: Mapping[str, int], num_devices: int) -> tuple[int, int, int]:
  """Sizes of the axes `AXES` for so many devices; one axis may be -1, "all that is left".

  Raises:
    ValueError: an unknown axis, two -1, or sizes whose product is not the number of devices.
  """
  unknown = set(axis_sizes) - set(AXES)
  if unknown:
    raise ValueError(f"unknown mesh axis {sorted(unknown)[0]!r}; the axes are {', '.join(AXES)}")
  sizes = [int(axis_sizes.get(axis, 1)) for axis in AXES]
  asked = dict(zip(AXES, sizes))
  free = [i for i, size in enumerate(sizes) if size == -1]
  if len(free) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise ValueError(f"mesh sizes {asked}: positive numbers and at most one -1")
  fixed = math.prod(size for size in sizes if size != -1)
  if free:
    sizes[free[0]] = num_devices // fixed
  if math.prod(sizes) != num_devices:
    raise ValueError(
      f"mesh {asked} needs a multiple of {fixed} devices, and {num_devices} are "
      "here: change config.mesh, or the number of devices"
      if free
      else f"mesh {asked} needs {fixed} devices, and {num_devices} are here: "
      "change config.mesh, or write -1 for one axis"
    )
  return sizes[0], sizes[1], sizes[2]


def make_mesh(axis_sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh with the axes `AXES` over all devices (of all processes), see `arrange`."""
  devices = list(devices) if devices is not None else jax.devices()
  shape = mesh_shape(axis_sizes, len(devices))
  # Auto: Linen's convolutions cannot say their output's sharding, as explicit axes would ask.
  return Mesh(arrange(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange(shape: tuple[int, int, int], devices: Sequence[Any]) -> np.ndarray:
  """Devices in the mesh's places: [data, fsdp, tensor].

  Devices of one slice (a TPU slice, a node of GPUs) are near one another; between slices lies a
  slower network. See `across_slices` for which axis crosses it.

  Raises:
    ValueError: slices of unequal sizes, or see `across_slices`.
  """
  slices: dict[int, list[Any]] = {}
  for device in devices:
    slices.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
  # As `jax.make_mesh` decides it: on these the axes need not follow the wires.
  split = devices[0].device_kind in ("TPU v5 lite", "TPU v5e")
  if len(slices) == 1:
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=split)
  counts = {index: len(members) for index, members in sorted(slices.items())}
  if len(set(counts.values())) > 1:
    raise ValueError(
      f"slices (nodes) of unequal numbers of devices: {counts}; give each of them the same number"
    )
  outer = across_slices(shape, len(slices))
  inner = tuple(size // crossed for size, crossed in zip(shape, outer))
  return mesh_utils.create_hybrid_device_mesh(
    inner, outer, devices, allow_split_physical_axes=split
  )


def across_slices(shape: tuple[int, int, int], slices: int) -> tuple[int, int, int]:
  """How many slices each axis of a mesh spans.

  `data` crosses them first: it sends one sum of gradients a step. `fsdp` gathers parameters layer
  by layer and `tensor` waits in each layer, so these cross only where `data` is too small.

  Raises:
    ValueError: the axes cannot be divided among so many slices.
  """
  best = None
  for data in _divisors(slices):
    for fsdp in _divisors(slices // data):
      crossed = (data, fsdp, slices // data // fsdp)
      if all(size % c == 0 for size, c in zip(shape, crossed)) and (best is None or crossed > best):
        best = crossed
  if best is None:
    axes = ", ".join(f"{axis} {size}" for axis, size in zip(AXES, shape))
    raise ValueError(
      f"mesh ({axes}) cannot be laid over {slices} slices (nodes) of {math.prod(shape) // slices} "
      f"devices: make the axis data a multiple of {slices} (config.mesh.data)"
    )
  return best


def _divisors(number: int) -> list[int]:
  return [d for d in range(1, number + 1) if number % d == 0]


def gathered(parameters: Any, layout: Any) -> Any:
  """Parameters in parts over `fsdp`, whole for their use; their gradients are in parts again.

  Said to the compiler, which by itself is free to gather activations along the batch instead, and
  does. Other axes stay as they are.

  Args:
    parameters: tree of arrays.
    layout: a NamedSharding for each of them.
  """

  def one(value: jax.Array, parts: NamedSharding) -> jax.Array:
    whole = without_fsdp(parts)
    return value if whole == parts else checkpoint_name(_gather(value, parts, whole), GATHERED)

  return jax.tree.map(one, parameters, layout)


def without_fsdp(sharding: NamedSharding) -> NamedSharding:
  """The same with what is split over `fsdp` whole."""

  def rest(axes: Any) -> Any:
    kept = tuple(a for a in ((axes,) if isinstance(axes, str) else axes or ()) if a != "fsdp")
    return kept if len(kept) > 1 else kept[0] if kept else None

  axes = [rest(entry) for entry in sharding.spec]
  while axes and axes[-1] is None:
    axes.pop()
  return NamedSharding(sharding.mesh, PartitionSpec(*axes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(value: jax.Array, parts: NamedSharding, whole: NamedSharding) -> jax.Array:
  return jax.lax.with_sharding_constraint(value, whole)


def _gather_forward(value: jax.Array, parts: NamedSharding, whole: NamedSharding) -> Any:
  return _gather(value, parts, whole), None


def _gather_backward(
  parts: NamedSharding, whole: NamedSharding, kept: None, gradient: jax.Array
) -> tuple[jax.Array]:
  return (jax.lax.with_sharding_constraint(gradient, parts),)


_gather.defvjp(_gather_forward, _gather_backward)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Leading axis over `data` and `fsdp`, the rest whole."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def path_name(path: Sequence[Any]) -> str:
  """ "stage1/block0/conv/kernel" for a key path of `jax.tree_util`."""
  return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def leaf_names(tree: Any) -> list[str]:
  """Path of every leaf, in the order of `jax.tree.leaves`."""
  return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def largest_divisible_spec(shape: Sequence[int], axis: str, axis_size: int) -> PartitionSpec:
  """Splits the largest dimension that `axis` divides; small or indivisible arrays stay whole."""
  if axis_size > 1 and math.prod(shape) >= MIN_SHARDED_SIZE:
    divisible = [i for i, size in enumerate(shape) if size % axis_size == 0]
    if divisible:
      chosen = max(divisible, key=lambda i: (shape[i], i))
      return PartitionSpec(*(axis if i == chosen else None for i in range(len(shape))))
  return PartitionSpec()


def state_shardings(
  state: Any, rules: Sequence[tuple[str, Any]], mesh: Mesh, *, params_key: str = "params"
) -> Any:
  """A NamedSharding for every leaf of a state.

  The rules are matched (`re.search`, first match wins) against the leaf's path. Optimizer state and
  EMA carry the parameters' paths within their own, so that they land beside their parameters.

  Args:
    state: tree of arrays or `jax.ShapeDtypeStruct`.
    rules: pairs (regex, layout), see the head of this file.
    mesh: the mesh.
    params_key: the branch of `state` whose every leaf must be covered by the rules.

  Raises:
    ValueError: a parameter no rule covers, a rule that matches none, an axis that does not exist
      or does not divide the dimension it is put on.
  """
  used: set[str] = set()

  def sharding(path: Sequence[Any], leaf: Any) -> NamedSharding:
    name = path_name(path)
    # Typed PRNG keys and scalars are tiny: every device holds them.
    if not leaf.shape:
      return replicated(mesh)
    for regex, layout in rules:
      if re.search(regex, name):
        used.add(regex)
        return NamedSharding(mesh, _layout_spec(name, leaf.shape, layout, mesh))
    if name.split("/")[0] == params_key:
      raise ValueError(
        f'no sharding rule covers parameter {name!r}: end config.sharding_rules with (".*", ...)'
      )
    return replicated(mesh)

  result = jax.tree_util.tree_map_with_path(sharding, state)
  for regex, _ in rules:
    if regex not in used and regex != ".*":
      raise ValueError(f"sharding rule {regex!r} matches no parameter: remove or correct it")
  return result


def _layout_spec(name: str, shape: Sequence[int], layout: Any, mesh: Mesh) -> PartitionSpec:
  if layout == "replicated":
    return PartitionSpec()
  if layout == "fsdp":
    return largest_divisible_spec(shape, "fsdp", mesh.shape["fsdp"])
  if isinstance(layout, str):
    raise ValueError(
      f"sharding layout {layout!r}: 'fsdp', 'replicated' or a tuple of axis names was expected"
    )
  if len(layout) > len(shape):
    raise ValueError(f"sharding layout {layout!r} is longer than the shape {shape} of {name!r}")
  for dimension, axes in enumerate(layout):
    for axis in (axes,) if isinstance(axes, str) else (axes or ()):
      if axis not in mesh.shape:
        raise ValueError(f"sharding layout {layout!r} of {name!r}: axes are {', '.join(AXES)}")
      if shape[dimension] % mesh.shape[axis]:
        raise ValueError(
          f"{name!r} has shape {tuple(shape)}: dimension {dimension} cannot be split over "
          f"{mesh.shape[axis]} devices of axis {axis!r}; choose another dimension or 'fsdp'"
        )
  return PartitionSpec(*(tuple(a) if isinstance(a, list) else a for a in layout))


def shard_bytes(leaf: Any, sharding: NamedSharding) -> int:
  """Bytes of a leaf that one device holds."""
  dtype = leaf.dtype
  if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
    return 8
  return int(math.prod(sharding.shard_shape(tuple(leaf.shape)))) * np.dtype(dtype).itemsize


@functools.lru_cache(maxsize=8)
def batch_part(sharding: NamedSharding) -> tuple[int, int]:
  """(p, n): the devices of this process hold part p of the n equal parts of a batch's rows.

  Not simply process p of n: processes whose devices differ in `tensor` only hold the same rows.

  Raises:
    ValueError: the processes' rows overlap in part.
  """
  shards = math.prod(sharding.mesh.shape[axis] for axis in BATCH_AXES)
  held: dict[int, set[int]] = {}
  indices: Mapping[Any, Any] = sharding.devices_indices_map((shards,))
  for device, (rows,) in indices.items():
    held.setdefault(device.process_index, set()).add(rows.start or 0)
  parts = sorted({tuple(sorted(rows)) for rows in held.values()})
  if sum(map(len, parts)) != shards or len({len(part) for part in parts}) > 1:
    raise ValueError(
      f"mesh {dict(sharding.mesh.shape)} gives the processes parts of a batch that overlap: choose "
      "a tensor axis that divides the devices of a process, or is a multiple of them"
    )
  return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def check_batch_size(batch_size: int, mesh: Mesh | AbstractMesh) -> None:
  """Raises ValueError where the devices of a mesh do not divide a batch."""
  shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
  if batch_size % shards:
    raise ValueError(
      f"a batch of {batch_size} cannot be split over {shards} devices (data x fsdp): change the "
      "batch_size or config.mesh"
    )


def put_batch(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
  """This process's rows of a batch (those of `batch_part`) → one global array per key.

  Raises:
    ValueError: the devices do not divide the batch.
  """
  _, parts = batch_part(sharding)

  def put(rows: np.ndarray) -> jax.Array:
    shape = (len(rows) * parts, *rows.shape[1:])
    check_batch_size(shape[0], sharding.mesh)
    return jax.make_array_from_process_local_data(sharding, rows, shape)

  return {key: put(np.asarray(value)) for key, value in batch.items()}


def put_tree(tree: Any, shardings: Any) -> Any:
  """A tree of host arrays, whole on every process → global arrays.

  Each device is given its own part. (`jax.device_put` onto devices of several processes first
  compares the arrays of all processes, which gathers every leaf as often as there are processes.)

  Args:
    tree: NumPy arrays.
    shardings: a NamedSharding for each leaf.

  Raises:
    ValueError: the tree holds arrays that lie on devices, or a sharding does not divide a shape.
  """

  def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(leaf, jax.Array):
      raise ValueError("put_tree takes NumPy arrays: jax.device_get them first")
    array = np.asarray(leaf)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

  return jax.tree.map(put, tree, shardings)


def initialize_distributed() -> None:
  """Joins the processes of a pod, of a SLURM job, or of a hand-made group.

  TPU pods and SLURM, MPI and GKE jobs are recognised by JAX itself. Elsewhere one process per
  host is told by the environment: `JAX_COORDINATOR_ADDRESS` (host:port), `JAX_NUM_PROCESSES` and
  `JAX_PROCESS_ID`.

  Raises:
    ValueError: the environment names a coordinator but not the number or the process.
  """
  address = os.environ.get("JAX_COORDINATOR_ADDRESS")
  number, process = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
  if address and (number is None) != (process is None):
    raise ValueError(
      "JAX_COORDINATOR_ADDRESS is set: set JAX_NUM_PROCESSES and JAX_PROCESS_ID too, or neither "
      "(on a cluster that JAX recognises)"
    )
  if address and number is not None and process is not None:
    jax.distributed.initialize(
      coordinator_address=address, num_processes=int(number), process_id=int(process)
    )
  else:
    jax.distributed.initialize()
