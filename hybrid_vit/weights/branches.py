"""Where in a training's checkpoint the weights lie, and what wrapped their names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from hybrid_vit.weights.torch_file import StandIn, is_tensor, to_array

# Where training code keeps the weights, and where their running average.
_WEIGHTS = (
  "model", "state_dict", "model_state_dict", "module", "net", "network", "params", "online_model",
)  # fmt: skip
_AVERAGES = (
  "model_ema", "state_dict_ema", "ema_state_dict", "model_ema_state_dict", "ema", "ema_model",
  "params_ema",
)  # fmt: skip
# What compiling, sharding and saving memory put into names, wherever they wrap.
_INSIDE = re.compile(
  r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# What may stand before every name of a network.
_BEFORE = ("module", "model", "net", "network")
# Counters that `AveragedModel` and other averages keep among the tensors.
_COUNTERS = ("n_averaged", "num_updates", "initted", "step", "decay")


class BranchError(ValueError):
  """No weights, or two sets where one was expected; the message lacks only the file's name."""


def pick(tree: Any, average: bool | None) -> tuple[dict[str, np.ndarray], str]:
  """The arrays of one branch of what a file holds, and the branch's name.

  Args:
    tree: mappings, with arrays or tensors at their ends.
    average: whether to take the running average of the weights; None: the only branch there is.

  Raises:
    BranchError: there are none, or both while `average` is None, or not the one asked for, or
      tensors that cannot be read.
  """
  branch: list[str] = []
  is_average = False
  tree = _contents(tree)
  while not _is_flat(tree):
    plain = [name for name in _WEIGHTS if _has_tensors(tree, name)]
    averages = [name for name in _AVERAGES if _has_tensors(tree, name)]
    if not plain and not averages:
      raise BranchError(_nothing(tree))
    if plain and averages and average is None:
      raise BranchError(
        f"holds the weights ({plain[0]}) and their running average ({averages[0]}): say "
        "which, by --average or --no-average"
      )
    if average is False and not plain:
      raise BranchError(f"holds the running average ({averages[0]}) alone")
    name = averages[0] if averages and (average or not plain) else plain[0]
    is_average |= name in _AVERAGES
    branch.append(name)
    tree = _contents(tree[name])
  if _counts(tree):
    if average is False and not is_average:
      raise BranchError("holds the running average (n_averaged is among its names) alone")
    tree = {name: value for name, value in tree.items() if str(name) not in _COUNTERS}
    is_average = True
  if average and not is_average:
    where = f" ({'.'.join(branch)})" if branch else ""
    raise BranchError(f"holds one set of weights{where}, and no running average")
  return _arrays(unwrapped(tree)), ".".join(branch)


def unwrapped(tree: Mapping[str, Any]) -> dict[str, Any]:
  """The same under the names that they had before compiling, sharding and averaging wrapped them.

  "module.", "model." and the like come off the front where every name has them.
  """
  found = {_INSIDE.sub("", str(name)): value for name, value in tree.items()}
  if len(found) < len(tree):
    raise BranchError("holds names that differ only by wrappers such as _orig_mod")
  while True:
    first = {name.partition(".")[0] for name, value in found.items() if is_tensor(value)}
    if len(first) != 1 or not first <= set(_BEFORE) or first & set(found):
      return found
    prefix = f"{first.pop()}."
    found = {name.removeprefix(prefix): v for name, v in found.items() if name.startswith(prefix)}


def _contents(value: Any) -> Any:
  """A mapping as it is, an object by what it holds: a whole module as its `state_dict()` would."""
  if isinstance(value, StandIn) and "_modules" in value.state:
    return dict(_module(value, ""))
  if isinstance(value, StandIn) and not value and value.state:
    return value.state
  if _is_flat(value):
    return _split(value)
  return value


def _module(module: StandIn, prefix: str) -> list[tuple[str, Any]]:
  found: list[tuple[str, Any]] = []
  hidden = module.state.get("_non_persistent_buffers_set") or ()
  for kind in ("_parameters", "_buffers"):
    tensors = module.state.get(kind)
    if isinstance(tensors, Mapping):
      found += [
        (f"{prefix}{name}", value)
        for name, value in tensors.items()
        if value is not None and not (kind == "_buffers" and name in hidden)
      ]
  for name, child in (module.state.get("_modules") or {}).items():
    if isinstance(child, StandIn):
      found += _module(child, f"{prefix}{name}.")
  return found


def _split(tree: Mapping[Any, Any]) -> Mapping[Any, Any]:
  """Weights and averages that lie side by side in one mapping, apart."""
  tensors = [str(name) for name, value in tree.items() if is_tensor(value)]
  tops = {name.partition(".")[0] for name in tensors if "." in name}
  rest = [name for name in tensors if "." not in name]
  if not tops & set(_AVERAGES) or tops - {*_WEIGHTS, *_AVERAGES} or set(rest) - set(_COUNTERS):
    return tree
  return {
    top: {n.partition(".")[2]: v for n, v in tree.items() if str(n).startswith(f"{top}.")}
    for top in sorted(tops)
  }


def _counts(tree: Any) -> bool:
  """Whether it is the state of an average, `torch.optim.swa_utils.AveragedModel`'s."""
  return isinstance(tree, Mapping) and is_tensor(tree.get("n_averaged"))


def _is_flat(tree: Any) -> bool:
  return (
    isinstance(tree, Mapping)
    and any(is_tensor(value) for value in tree.values())
    and not any(_has_tensors(tree, name) for name in (*_WEIGHTS, *_AVERAGES))
  )


def _has_tensors(tree: Any, name: str) -> bool:
  branch = _contents(tree.get(name)) if isinstance(tree, Mapping) else None
  if not isinstance(branch, Mapping):
    return False
  return any(is_tensor(v) for v in branch.values()) or any(
    _has_tensors(branch, inner) for inner in (*_WEIGHTS, *_AVERAGES)
  )


def _nothing(tree: Any) -> str:
  """What there is where no weights were found."""
  if not isinstance(tree, Mapping):
    return f"holds no weights that are known here; it holds: {_name(tree)}"
  if isinstance(tree, StandIn) and not tree:
    return (
      f"holds an object of {tree.qualified_name} and no weights that are known here: where that "
      "class is at hand, save torch.save(model.state_dict(), FILE)"
    )
  inner = [k for k, v in tree.items() if isinstance(v, Mapping) and any(map(is_tensor, v.values()))]
  if inner:
    counted = ", ".join(f"{k} ({sum(map(is_tensor, tree[k].values()))} tensors)" for k in inner[:8])
    return (
      f"holds its weights in no place that is known here; tensors lie in: {counted}. Save the one "
      f"that is meant alone: torch.save(torch.load(FILE)[{inner[0]!r}], NEW_FILE)"
    )
  names = ", ".join(map(str, list(tree)[:8]))
  return f"holds no weights that are known here; it holds: {names}"


def _name(value: Any) -> str:
  return type(value).__name__


def _arrays(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
  arrays = {}
  for name, value in tree.items():
    if is_tensor(value):
      try:
        arrays[name] = to_array(value)
      except (ValueError, TypeError) as error:
        raise BranchError(f"holds {name}, which cannot be read: {error}") from error
    elif isinstance(value, StandIn) and value.qualified_name.startswith("torch._utils._rebuild"):
      kind = value.qualified_name.removeprefix("torch._utils._rebuild_")
      raise BranchError(
        f"holds {name} as {kind}, a sparse, quantised or empty tensor: save it as a plain one "
        "(.to_dense(), .dequantize())"
      )
  return arrays
