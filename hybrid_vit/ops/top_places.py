"""The places of the largest numbers of each row, found on the device that holds the row.

`lax.top_k` is the reference. XLA for CPUs and GPUs has a fast kernel for it, before which it
gathers the rows of all devices, and of which each device computes all answers; `top_places` tells
the partitioner that rows are independent. For TPUs XLA writes sorts, which stay where the rows are:
there it is `lax.top_k`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec


def top_places(x: jax.Array, count: int) -> jax.Array:
  """Where the largest numbers of each row are.

  Args:
    x: `[..., N]`, of numbers without NaN; it gets no gradient.
    count: K, at most N.

  Returns:
    int32 `[..., K]`, by falling number; of equal ones the first come first.

  Raises:
    ValueError: more are asked for than there are.
  """
  if not 0 <= count <= x.shape[-1]:
    raise ValueError(f"top_places: {count} of {x.shape[-1]} numbers; 0 to all were expected")
  return _by_rows(count)(lax.stop_gradient(x))


def reference_top_places(x: jax.Array, count: int) -> jax.Array:
  """`top_places` by `lax.top_k` alone."""
  return lax.top_k(lax.stop_gradient(x), count)[1]


@functools.cache
def _by_rows(count: int) -> Callable[[jax.Array], jax.Array]:
  def local(x: jax.Array) -> jax.Array:
    return lax.top_k(x, count)[1]

  partitioned = custom_partitioning(local)

  def partition(mesh: Any, arguments: Any, result: Any) -> Any:
    del result
    rows = _whole_rows(mesh, arguments[0])
    return mesh, local, rows, (rows,)

  def infer(mesh: Any, arguments: Any, result: Any) -> Any:
    del result
    return _whole_rows(mesh, arguments[0])

  partitioned.def_partition(
    partition=partition,
    infer_sharding_from_operands=infer,
    sharding_rule="... n -> ... k",
    need_replication_factors=("n",),
  )

  @custom_vmap
  def places(x: jax.Array) -> jax.Array:
    return lax.platform_dependent(x, tpu=local, default=partitioned)

  @places.def_vmap
  def batched(axis_size: int, in_batched: Any, x: jax.Array) -> tuple[jax.Array, bool]:
    # The axis of the map becomes the first, which is what vmap gives here.
    del axis_size, in_batched
    return places(x), True

  return places


def _whole_rows(mesh: Any, argument: Any) -> NamedSharding:
  """The sharding of an operand but for its last axis."""
  spec = tuple(argument.sharding.spec)
  rank = len(argument.shape)
  return NamedSharding(mesh, PartitionSpec(*(spec + (None,) * rank)[: rank - 1], None))
