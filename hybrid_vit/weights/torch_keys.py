"""Layouts of PyTorch checkpoints: which tensor holds one of our leaves, and how it lies there."""

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np

from hybrid_vit.weights.convert import KeyMap, OfficialKey

# (pattern of a path without its leaf, replacement: the tensor's name, layout of the tensor).
Rule = tuple[str, str, Callable[[str, str], OfficialKey]]

# Counters of batch norm; every layout of a PyTorch network ignores them on import.
BATCH_NORM_COUNTER = r"num_batches_tracked$"

_NORM_LEAVES = {
  "scale": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
}


def norm(name: str, leaf: str) -> OfficialKey:
  """Layer norm or batch norm: our scale, bias, mean, var."""
  return OfficialKey(f"{name}.{_NORM_LEAVES[leaf]}")


def dense(name: str, leaf: str) -> OfficialKey:
  """Linear layer: (out, in) there, `[in, out]` here; the bias as it is."""
  if leaf == "kernel":
    return OfficialKey(f"{name}.weight", np.transpose, np.transpose)
  return OfficialKey(f"{name}.{leaf}")


def conv(name: str, leaf: str) -> OfficialKey:
  """Convolution, depthwise too: (out, in, h, w) there, `[h, w, in, out]` here."""
  if leaf == "kernel":
    return OfficialKey(f"{name}.weight", _to_hwio, _to_oihw)
  return OfficialKey(f"{name}.{leaf}")


def stacked(name: str, leaf: str) -> OfficialKey:
  """Query, key and value in one matrix of PyTorch's MultiheadAttention, and so here."""
  return dense(name, leaf).renamed(
    lambda _: f"{name}.in_proj_{'bias' if leaf == 'bias' else 'weight'}"
  )


def deconv(name: str, leaf: str) -> OfficialKey:
  """Transposed convolution: (in, out, h, w) there, `[h, w, in, out]` here."""
  if leaf == "kernel":
    return OfficialKey(
      f"{name}.weight",
      lambda x: np.transpose(x, (2, 3, 0, 1)),
      lambda x: np.transpose(x, (2, 3, 0, 1)),
    )
  return OfficialKey(f"{name}.{leaf}")


def pointwise(name: str, leaf: str) -> OfficialKey:
  """A 1x1 convolution there, (out, in, 1, 1), a matrix product here, `[in, out]`."""
  if leaf == "kernel":
    return OfficialKey(f"{name}.weight", lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])
  return OfficialKey(f"{name}.{leaf}")


def fused(factory: Callable[[str, str], OfficialKey], leaf: str, *names: str) -> OfficialKey:
  """One projection here whose outputs lie apart there, in the order of `names`."""
  keys = [factory(name, leaf) for name in names]
  return dataclasses.replace(keys[0], further=tuple(key.name for key in keys[1:]))


def same(name: str) -> OfficialKey:
  """A tensor with the same layout on both sides, under its whole name."""
  return OfficialKey(name)


def no_such_variable(network: str, path: str) -> ValueError:
  """What a key map raises for a path that its network does not have."""
  return ValueError(f"{network} has no variable {path!r}")


def by_rules(rules: Sequence[Rule], path: str, what: str) -> OfficialKey:
  """The key of a path, "lateral0/conv/kernel", by the first rule that matches.

  Args:
    rules: see `Rule`; the pattern has to match the whole path but its leaf.
    path: below the network.
    what: the network, named in the error.

  Raises:
    ValueError: no rule for it.
  """
  scope, _, leaf = path.rpartition("/")
  for pattern, replacement, factory in rules:
    match = re.fullmatch(pattern, scope)
    if match:
      return factory(match.expand(replacement), leaf)
  raise no_such_variable(what, path)


def with_backbone(head: KeyMap, backbone: KeyMap, prefix: str, what: str) -> KeyMap:
  """The key map of a whole network, {"params": {"backbone": …, "head": …}, …}.

  Args:
    head: from "params/…" of the head on, with the checkpoint's names.
    backbone: of the backbone alone, whose names stand behind `prefix`.
    prefix: "backbone." or the like.
    what: the network, named in the error of a path that it does not have.
  """

  def key_map(path: str) -> OfficialKey:
    collection, part, rest = path.split("/", 2)
    if part == "head":
      return head(f"{collection}/{rest}")
    if part != "backbone":
      raise no_such_variable(what, path)
    return backbone(f"{collection}/{rest}").below(prefix)

  return key_map


def renamed_below(prefix: str, rename: Callable[[str], str], name: str) -> str:
  """A name behind `prefix` in another spelling; others as they are."""
  return prefix + rename(name.removeprefix(prefix)) if name.startswith(prefix) else name


def pattern_below(pattern: str, prefix: str) -> str:
  """A pattern of names → of the same names behind a prefix."""
  return rf"(?:{pattern.replace('^', '^' + re.escape(prefix))})"


def block_of(scope: str) -> tuple[int, int] | None:
  """(stage, block) of "stage3_block0": (3, 0); None for another scope."""
  match = re.fullmatch(r"stage(\d+)_block(\d+)", scope)
  return (int(match[1]), int(match[2])) if match else None


def _to_hwio(x: np.ndarray) -> np.ndarray:
  return np.transpose(x, (2, 3, 1, 0))


def _to_oihw(x: np.ndarray) -> np.ndarray:
  return np.transpose(x, (3, 2, 0, 1))
