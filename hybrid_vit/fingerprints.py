"""A number for each array by which a changed one shows, however it lies on devices.

The fingerprint is a sum modulo 2^32 of the array's words, each hashed with its place: it does not
depend on the order of the summation, and any single changed word shows. It is computed where the
array is: in NumPy for what lies in this machine's memory, by a small program for each shape and
layout on accelerators.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_vit.sharding import leaf_names

# Of MurmurHash3's finalizer, and of the place.
_FIRST, _SECOND, _PLACE = 0x85EBCA6B, 0xC2B2AE35, 0x9E3779B1
# Words at a time on the host: they and their hashes stay in the cache of a core.
_CHUNK = 1 << 16


@jax.jit
def fingerprint(leaf: jax.Array) -> jax.Array:
  """uint32 fingerprint of an array or typed key, on its own devices (of all processes)."""
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  if leaf.dtype == jnp.bool_:
    leaf = leaf.astype(jnp.uint8)
  unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[leaf.dtype.itemsize]
  words = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
  place = jnp.zeros(words.shape, jnp.uint32)
  for axis, size in enumerate(words.shape):
    place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
  # Not a linear function of the words: in a plain weighted sum two flipped signs cancel. Each step
  # can be undone, so that one changed word always shows.
  mixed = words ^ (place * jnp.uint32(_PLACE))
  mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(_FIRST)
  mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(_SECOND)
  return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def host_fingerprint(leaf: np.ndarray) -> int:
  """The same number for an array in this machine's memory."""
  unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}[leaf.dtype.itemsize]
  words = np.ascontiguousarray(leaf).reshape(-1).view(unsigned)
  places = np.arange(min(_CHUNK, len(words)), dtype=np.uint32) * np.uint32(_PLACE)
  total = 0
  for start in range(0, len(words), _CHUNK):
    part = words[start : start + _CHUNK].astype(np.uint32)
    part ^= places[: len(part)] + np.uint32(start * _PLACE & 0xFFFFFFFF)
    part ^= part >> np.uint32(16)
    part *= np.uint32(_FIRST)
    part ^= part >> np.uint32(13)
    part *= np.uint32(_SECOND)
    part ^= part >> np.uint32(16)
    total += int(part.sum(dtype=np.uint32))
  return total & 0xFFFFFFFF


def fingerprints(tree: Any) -> dict[str, int]:
  """Fingerprint of every leaf, by its path; with several processes all of them call this."""
  values = jax.device_get([_fingerprint_of(leaf) for leaf in jax.tree.leaves(tree)])
  return {name: int(value) for name, value in zip(leaf_names(tree), values)}


def digest(tree: Any) -> str:
  """Of all leaves together: 64 hexadecimal digits."""
  leaves = json.dumps(fingerprints(tree), sort_keys=True)
  return hashlib.sha256(leaves.encode()).hexdigest()


def first_difference(tree: Any, expected: Mapping[str, int]) -> str | None:
  """Path of the first leaf whose fingerprint is not the expected one, or that is not there."""
  found = fingerprints(tree)
  return next((name for name, value in expected.items() if found.get(name) != value), None)


def first_nonfinite(tree: Any) -> str | None:
  """Path of the first leaf of floats that holds a NaN or an infinity; None where none does."""
  for name, leaf in zip(leaf_names(tree), jax.tree.leaves(tree)):
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
      finite = np.isfinite(leaf).all() if isinstance(leaf, np.ndarray) else _all_finite(leaf)
      if not bool(finite):
        return name
  return None


@jax.jit
def _all_finite(leaf: jax.Array) -> jax.Array:
  return jnp.isfinite(leaf).all()


def _fingerprint_of(leaf: Any) -> Any:
  if isinstance(leaf, np.ndarray | np.generic):
    return host_fingerprint(np.asarray(leaf))
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  if not leaf.is_fully_addressable or any(d.platform != "cpu" for d in leaf.devices()):
    return fingerprint(leaf)
  shards = leaf.addressable_shards
  if leaf.is_fully_replicated:
    return host_fingerprint(np.asarray(shards[0].data))
  # Not `np.asarray(leaf)`, which would keep a copy beside the array for as long as that lives.
  whole = np.empty(leaf.shape, leaf.dtype)
  for shard in shards:
    if shard.replica_id == 0:
      whole[shard.index] = np.asarray(shard.data)
  return host_fingerprint(whole)
