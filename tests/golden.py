"""Golden files: what the authors' own code answers under weights made by rule.

A pair `<family>/<name>.json` and `.npz` describes one run: the constructor's arguments, the input's
shape and seed, the names and shapes of the parameters, and the answers. No weights are stored:
`tensor` makes each from its name. Answers are whole arrays, or for a map `<name>_corner` (batch 0,
the first 4x4 positions, the first 8 channels) and `<name>_stats` (mean, standard deviation and
largest magnitude of the whole map).
"""

import json
import pathlib
import re
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

DIRECTORY = pathlib.Path(__file__).parent / "golden"


def names(family: str, pattern: str = "*") -> list[str]:
  """Names of a family's golden files."""
  return sorted(p.stem for p in (DIRECTORY / family).glob(pattern + ".json"))


def load(family: str, name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """(description, answers) of a golden file."""
  path = DIRECTORY / family / name
  with np.load(path.with_suffix(".npz")) as z:
    return json.loads(path.with_suffix(".json").read_text()), {k: z[k] for k in z.files}


def image(description: Mapping[str, Any]) -> np.ndarray:
  """The run's input, standard normal, float32."""
  shape, seed = description["input"]["shape"], description["input"]["seed"]
  return np.random.RandomState(seed).standard_normal(tuple(shape)).astype(np.float32)


def weights(description: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The run's parameters under the authors' names: the rule, then the file's own changes."""
  layout = description.get("layout", "torch")
  made = {k: tensor(k, s, layout) for k, s in description["parameters"].items()}
  for change in description.get("weight_transform", ()):
    for key, value in made.items():
      if re.search(change["pattern"], key):
        scaled = change.get("shift", 0.0) + change.get("scale", 1.0) * value
        made[key] = scaled.astype(value.dtype)
  return made


def tensor(key: str, shape, layout: str) -> np.ndarray:
  """The value of the parameter `key`: a function of its name, its shape and the layout alone.

  Kernels have variance 1 / fan_in, so that activations keep their scale. Layout "torch": (out, in,
  *kernel); "tf": (*kernel, in, out), depthwise (h, w, channels, 1).
  """
  shape = tuple(int(n) for n in shape)
  if key.endswith("num_batches_tracked"):
    return np.zeros(shape, np.int64)
  x = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
  last = key.replace("/", ".").split(".")[-1]
  if last in ("running_var", "moving_variance"):
    x = 0.5 + np.abs(x)
  elif last in ("running_mean", "moving_mean"):
    x = 0.1 * x
  elif len(shape) >= 2:
    if layout == "torch":
      fan_in = np.prod(shape[1:])
    else:
      fan_in = np.prod(shape[:-2] if "depthwise" in key else shape[:-1])
    x = x / np.sqrt(max(int(fan_in), 1))
  elif last in ("bias", "beta"):
    x = 0.1 * x
  else:
    x = 1.0 + 0.1 * x
  return x.astype(np.float32)


def deviations(
  expected: Mapping[str, np.ndarray], actual: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
  """Largest deviation of each layer, in standard deviations of the authors' whole output.

  Args:
    expected: answers of the golden file.
    actual: layer name to our array, channels last, in the order of computation.

  Raises:
    AssertionError: where an answer is not covered by `actual`, or shapes differ.
  """
  covered, out = set(), {}
  for layer, value in actual.items():
    value = np.asarray(value, np.float64)
    found = {}
    if layer in expected:
      covered.add(layer)
      assert value.shape == expected[layer].shape, (layer, value.shape, expected[layer].shape)
      found["whole"] = np.abs(value - expected[layer]).max() / expected[layer].std()
    if f"{layer}_stats" in expected:
      covered.update({f"{layer}_corner", f"{layer}_stats"})
      std = float(expected[f"{layer}_stats"][1])
      stats = np.array([value.mean(), value.std(), np.abs(value).max()])
      found["stats"] = np.abs(stats - expected[f"{layer}_stats"]).max() / std
      if f"{layer}_corner" in expected:
        corner = value[0, :4, :4, :8]
        assert corner.shape == expected[f"{layer}_corner"].shape, (layer, corner.shape)
        found["corner"] = np.abs(corner - expected[f"{layer}_corner"]).max() / std
    assert found, f"the golden file has no answer for {layer}"
    out[layer] = {k: float(v) for k, v in found.items()}
  missing = set(expected) - covered
  assert not missing, f"answers that nothing was compared with: {sorted(missing)}"
  return out


def assert_matches(
  expected: Mapping[str, np.ndarray], actual: Mapping[str, Any], tolerance: float = 1e-5
) -> None:
  """Compares layer by layer and names the first that deviates by more than `tolerance`."""
  found = deviations(expected, actual)
  for layer, parts in found.items():
    for part, deviation in parts.items():
      if not deviation <= tolerance:  # also catches NaN
        table = "\n".join(f"  {k}: {v}" for k, v in found.items())
        raise AssertionError(
          f"the first layer that deviates is {layer} ({part}): {deviation:.2e} of the output's "
          f"standard deviation, allowed {tolerance:.0e}\n{table}"
        )
