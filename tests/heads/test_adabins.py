"""AdaBins against a second computation in NumPy, and what has to hold of its bins."""

import jax
import numpy as np
import pytest

from hybrid_vit.heads.adabins import AdaBins
from hybrid_vit.heads.dense_model import create_dense_model
from hybrid_vit.models.registry import create_model
from tests.heads.depth_checks import assert_gradient
from tests.heads.pyramids import levels, noise
from tests.models import contract

_SMALL = {
  "num_bins": 6, "decoder_channels": 8, "channels": 8, "patch_size": 4, "num_layers": 2,
  "num_heads": 2, "mlp_channels": 12, "num_queries": 5, "num_positions": 40,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _exact():
  with jax.default_matmul_precision("float32"):
    yield


@pytest.mark.parametrize("queries", ["patches", "tokens"])
def test_as_numpy_computes(queries):
  features = levels((3, 5), strides=(4, 8))
  maps = noise(features, (28, 36))
  head = AdaBins(features, min_depth=0.5, max_depth=8.0, queries=queries, **_SMALL)
  variables = _spread(contract.initialize(head, maps, seed=1))
  depth, centres = jax.jit(lambda v, x: head.apply(v, x, with_bins=True))(variables, maps)
  assert depth.shape == (2, 14, 18, 1)
  for i in range(2):
    expected, bins = _numpy(variables, *(maps[f.name][i] for f in features), queries)
    np.testing.assert_allclose(centres[i], bins, rtol=1e-5)
    np.testing.assert_allclose(depth[i, ..., 0], expected, rtol=1e-5)


def test_odd_maps_bins_and_gradient():
  features = levels((4, 6, 8, 10))
  maps = noise(features, (57, 75))
  head = AdaBins(features, min_depth=0.1, max_depth=3.0, **{**_SMALL, "patch_size": 8})
  # Batch norm takes a convolution's bias away again, softmax a key's and what all bins share.
  may_vanish = ("conv0/bias", "conv1/bias", "positions", "bottleneck/bias")
  depth = assert_gradient(head, maps, may_vanish)
  assert depth.shape == (2, 30, 38, 1)
  assert (depth >= 0.1).all()
  assert (depth <= 3.0).all()
  variables = _spread(contract.initialize(head, maps))
  twice = {name: np.concatenate([x[:1], x[:1]]) for name, x in maps.items()}
  depth, centres = jax.jit(lambda x: head.apply(variables, x, with_bins=True))(twice)
  np.testing.assert_allclose(depth[0], depth[1], rtol=1e-6)
  np.testing.assert_allclose(centres[0], centres[1], rtol=1e-6)
  assert centres.shape == (2, 6)
  assert (np.diff(centres) > 0).all()
  # The centres lie half a width from the edges, and the widths are the whole range.
  edges = np.zeros((2, 7))
  edges[:, 0] = 0.1
  for k in range(6):
    edges[:, k + 1] = 2 * centres[:, k] - edges[:, k]
  np.testing.assert_allclose(edges[:, -1], 3.0, rtol=1e-5)


def test_a_model_tells_its_bins():
  backbone = create_model("convnext_tiny", num_classes=0, depths=(1, 1, 1, 1), widths=(4, 6, 8, 8))
  head = {"name": "adabins", **_SMALL, "queries": "tokens", "num_positions": 64}
  model = create_dense_model(backbone, 1, head=head)
  images = np.zeros((1, 64, 64, 3), np.float32)
  answer, found = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), images)[0])
  assert answer.shape == (1, 32, 32, 1)
  assert found["bin_centers"].shape == (1, 6)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"num_queries": 128}, "has 16 patches of 4 x 4; 128 queries need 129: take queries='tokens'"),
    ({"num_positions": 8}, "has 16 patches of 4 x 4; 1 to num_positions=8 were expected"),
    ({"patch_size": 32, "queries": "tokens"}, "has 0 patches of 32 x 32; 1 to"),
    ({"min_depth": 10.0}, "depths from 10 to 10 m; 0 <= min_depth < max_depth"),
    ({"queries": "pixels"}, "queries is 'pixels'; one of"),
    ({"stride": 3}, "stride is 3; the finest map's, 4, over a power of 2"),
    ({"stride": 8}, "stride is 8; the finest map's, 4"),
    ({"num_heads": 3}, "3 heads do not divide 8 channels"),
    ({"num_outputs": 2}, "num_outputs is 2"),
  ],
)
def test_bad_arguments_are_told(arguments, message):
  features = levels((3, 5), strides=(4, 8))
  maps = noise(features, (32, 32))
  head = AdaBins(features, **{**_SMALL, **arguments})
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: head.init(jax.random.key(0), maps))


def _spread(variables):
  """Parameters and statistics far from where they begin, so that each one shows."""
  rng = np.random.default_rng(3)
  leaves, tree = jax.tree.flatten(variables)
  return jax.tree.unflatten(
    tree, [np.asarray(x + 0.3 * np.abs(rng.standard_normal(x.shape)), np.float32) for x in leaves]
  )


def _numpy(variables, finest, coarsest, queries):
  """(depth `[h, w]`, centres) of one picture's two maps, float64, by loops."""
  p, stats = variables["params"], variables["batch_stats"]
  eight = lambda x: np.asarray(x, np.float64)  # noqa: E731

  def dense(x, q):
    return x @ eight(q["kernel"]) + eight(q["bias"])

  def conv(x, q, stride=1):
    kernel = eight(q["kernel"])
    size, pad = kernel.shape[0], 0 if stride > 1 else kernel.shape[0] // 2
    x = np.pad(x, ((pad, pad), (pad, pad), (0, 0)))
    rows, columns = ((n - size) // stride + 1 for n in x.shape[:2])
    y = np.empty((rows, columns, kernel.shape[-1]))
    for i in range(rows):
      for j in range(columns):
        part = x[i * stride : i * stride + size, j * stride : j * stride + size]
        y[i, j] = np.tensordot(part, kernel, 3)
    return y + eight(q["bias"])

  def norm(x, q, mean, variance):
    return (x - mean) / np.sqrt(variance + 1e-5) * eight(q["scale"]) + eight(q["bias"])

  def layer_norm(x, q):
    return norm(x, q, x.mean(-1, keepdims=True), x.var(-1, keepdims=True))

  def leaky(x):
    return np.where(x > 0, x, 0.01 * x)

  def enlarge(x, rows, columns):
    y = np.empty((rows, columns, x.shape[-1]))
    for i in range(rows):
      for j in range(columns):
        a, b = i * (x.shape[0] - 1) / (rows - 1), j * (x.shape[1] - 1) / (columns - 1)
        i0, j0 = min(int(a), x.shape[0] - 2), min(int(b), x.shape[1] - 2)
        a, b = a - i0, b - j0
        y[i, j] = (1 - a) * ((1 - b) * x[i0, j0] + b * x[i0, j0 + 1])
        y[i, j] += a * ((1 - b) * x[i0 + 1, j0] + b * x[i0 + 1, j0 + 1])
    return y

  def block(x, k):
    for j in range(2):
      name = f"up{k}_norm{j}"
      x = conv(x, p[f"up{k}_conv{j}"])
      x = leaky(norm(x, p[name], eight(stats[name]["mean"]), eight(stats[name]["var"])))
    return x

  def layer(x, q):
    query, key, value = np.split(dense(x, q["qkv"]), 3, axis=-1)
    y = np.empty_like(x)
    size = x.shape[-1] // _SMALL["num_heads"]
    for h in range(_SMALL["num_heads"]):
      part = slice(h * size, (h + 1) * size)
      scores = query[:, part] @ key[:, part].T / np.sqrt(size)
      scores = np.exp(scores - scores.max(-1, keepdims=True))
      y[:, part] = scores / scores.sum(-1, keepdims=True) @ value[:, part]
    x = layer_norm(x + dense(y, q["proj"]), q["attention_norm"])
    y = dense(np.maximum(dense(x, q["fc1"]), 0), q["fc2"])
    return layer_norm(x + y, q["mlp_norm"])

  x = dense(eight(coarsest), p["bottleneck"])
  x = block(np.concatenate([enlarge(x, *finest.shape[:2]), finest], -1), 0)
  x = block(enlarge(x, 2 * x.shape[0], 2 * x.shape[1]), 1)
  x = conv(x, p["decoded"])
  tokens = conv(x, p["patches"], stride=_SMALL["patch_size"]).reshape(-1, _SMALL["channels"])
  tokens = tokens + eight(p["positions"])[: len(tokens)]
  if queries == "tokens":
    tokens = np.concatenate([eight(p["query_tokens"]), tokens])
  for k in range(_SMALL["num_layers"]):
    tokens = layer(tokens, p[f"layer{k}"])
  y = dense(
    leaky(dense(leaky(dense(tokens[0], p["regressor0"])), p["regressor1"])), p["regressor2"]
  )
  widths = np.maximum(y, 0) + 0.1
  edges = 0.5 + np.concatenate([[0.0], np.cumsum(widths / widths.sum())]) * 7.5
  centres = (edges[1:] + edges[:-1]) / 2
  maps = conv(x, p["attention_conv"]) @ tokens[1 : 1 + _SMALL["num_queries"]].T
  scores = dense(maps, p["bins"])
  chances = np.exp(scores - scores.max(-1, keepdims=True))
  return (chances * centres).sum(-1) / chances.sum(-1), centres
