"""What every network has to hold, as checks that a family's tests call with a small network."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jax import flatten_util

from hybrid_vit.data.sources import create_source
from hybrid_vit.data.transforms import parse_transform
from hybrid_vit.models.registry import create_model, model_entry
from hybrid_vit.tools.summarize import count_multiply_adds

Make = Callable[..., nn.Module]


def images(*shape: int) -> np.ndarray:
  """Standard normal `[*shape, 3]`."""
  return np.random.default_rng(0).normal(size=(*shape, 3)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(0, 3))
def run(model: nn.Module, variables: Any, x: Any, train: bool = False, key: Any = None) -> Any:
  """(logits, endpoints); in training ((logits, endpoints), new variables)."""
  rngs = None if key is None else {"dropout": key}
  if train:
    return model.apply(variables, x, train=True, rngs=rngs, mutable=["batch_stats"])
  return model.apply(variables, x, train=False)


def initialize(model: Any, *inputs: Any, seed: int = 0) -> Any:
  """New variables of a network or task; its kind of key compiles in a fraction of the default's."""
  return jax.jit(model.init)(jax.random.key(seed, impl="rbg"), *inputs)


@functools.lru_cache(maxsize=2)
def initial(model: nn.Module, size: int) -> Any:
  """New variables for square pictures."""
  return initialize(model, images(1, size, size))


@functools.lru_cache(maxsize=4)
def drawn_variables(model: nn.Module, size: tuple[int, int] = (32, 32)) -> Any:
  """Variables whose every number is drawn, so that nothing hides behind zeros and ones.

  Kernels have variance 1 / fan_in, so that activations keep their scale.
  """
  rng = np.random.default_rng(1)

  def draw(x: np.ndarray) -> np.ndarray:
    noise = rng.normal(size=x.shape).astype(np.float32)
    drawn = noise / np.sqrt(np.prod(x.shape[:-1])) if x.ndim > 1 else x + 0.1 * noise
    return drawn.astype(np.float32)

  def vectors(key: jax.Array, x: jax.Array) -> Any:
    # The initial kernels are not read: XLA leaves them out.
    return jax.tree.map(lambda v: v if v.ndim < 2 else jnp.zeros(v.shape), model.init(key, x))

  start = jax.jit(vectors)(jax.random.key(0, impl="rbg"), images(1, *size))
  return jax.device_put(jax.tree.map(draw, jax.device_get(start)))


class Traced(NamedTuple):
  """What a network's program says of it without being run."""

  logits: Any
  endpoints: Any
  variables: Any
  multiply_adds: int


@functools.cache
def traced(model: nn.Module, size: tuple[int, int]) -> Traced:
  """Shapes and count of a network with one picture; equal networks are traced once."""
  shapes: Any = None

  def forward(key: jax.Array, x: jax.Array) -> Any:
    nonlocal shapes
    out = model.init_with_output(key, x)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), out)
    return out

  x = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
  # Making variables takes no multiply-adds.
  count = count_multiply_adds(forward, jax.random.key(0), x)
  (logits, endpoints), variables = shapes
  return Traced(logits, endpoints, variables, count)


def multiply_adds(name: str) -> int:
  """Of a registered network at its own input size."""
  size = model_entry(name).preprocessing.image_size
  return traced(create_model(name), (size, size)).multiply_adds


def check_entry(name: str, size: tuple[int, int] = (224, 224)) -> None:
  """A registered network by its shapes: exact parameters, float32 leaves, pyramid, endpoints."""
  entry = model_entry(name)
  model = create_model(name)
  logits, endpoints, variables, _ = traced(model, size)
  count = sum(p.size for p in jax.tree.leaves(variables["params"]))
  assert count == entry.published.parameters, (name, count, entry.published.parameters)
  assert logits.shape == (1, model.num_classes) and logits.dtype == jnp.float32
  assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(variables))
  assert model.features and "pre_logits" in endpoints and "stem" in endpoints
  for feature in model.features:
    rows, columns = (-(-n // feature.stride) for n in size)
    expected = (1, rows, columns, feature.channels)
    assert endpoints[feature.name].shape == expected, (name, feature, endpoints[feature.name])


def check_gradients(
  model: nn.Module, size: tuple[int, int] = (64, 64), dead: Iterable[str] = ()
) -> None:
  """Every parameter gets a gradient, but those whose path ends in one of `dead` (each has some)."""
  variables, x = drawn_variables(model, size), images(2, *size)

  @jax.jit
  def gradient(params):
    def loss(params):
      logits, _ = model.apply({**variables, "params": params}, x, train=False)
      return jnp.sum(logits * jnp.cos(jnp.arange(float(logits.size))).reshape(logits.shape))

    return jax.grad(loss)(params)

  dead = tuple(dead)
  found = traverse_util.flatten_dict(jax.device_get(gradient(variables["params"])), sep="/")
  scale = max(float(np.abs(g).max()) for g in found.values())
  unused = set(dead)
  for path, g in found.items():
    largest = float(np.abs(g).max())
    assert np.isfinite(largest), path
    if path.endswith(dead) and dead:
      unused -= {suffix for suffix in dead if path.endswith(suffix)}
      assert largest < 1e-4 * scale, path
    else:
      assert largest > 1e-8 * scale, path
  assert not unused, f"no parameter ends in {unused}"


def check_bfloat16(make: Make, size: tuple[int, int] = (32, 32), tolerance: float = 0.1) -> None:
  """Parameters, statistics and logits stay float32, the rest is bfloat16 and near to float32."""
  exact_model, model = make(), make(dtype=jnp.bfloat16)
  variables, x, key = drawn_variables(exact_model, size), images(2, *size), jax.random.key(0)
  (logits, endpoints), new = jax.device_get(run(model, variables, x, True, key))
  assert logits.dtype == jnp.float32
  assert all(v.dtype == jnp.bfloat16 for k, v in endpoints.items() if k != "pre_logits")
  assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(new))
  assert all(np.isfinite(v.astype(np.float32)).all() for v in endpoints.values())
  (exact, _), _ = jax.device_get(run(exact_model, variables, x, True, key))
  assert np.abs(logits - exact).max() < tolerance * np.abs(exact).max()


def check_remat(make: Make, size: tuple[int, int] = (32, 32)) -> None:
  """Recomputing blocks changes no answer and no parameter's name, and stores less."""
  x, key = images(2, *size), jax.random.key(3)
  variables = drawn_variables(make(), size)
  answers, stored = [], []
  for remat in (False, True):
    model = make(remat=remat)
    if remat:
      shapes = jax.eval_shape(model.init, key, x)
      assert jax.tree.structure(shapes) == jax.tree.structure(variables)
    answers.append(run(model, variables, x, True, key))

    def forward(params, model=model):
      return model.apply({**variables, "params": params}, x)[0]

    _, pull = jax.eval_shape(lambda p, f=forward: jax.vjp(f, p), variables["params"])
    stored.append(sum(leaf.size for leaf in jax.tree.leaves(pull)))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), *answers)
  assert stored[1] < 0.7 * stored[0], stored


def check_drop_path(make: Make, size: tuple[int, int] = (32, 32)) -> None:
  """A function of the key, off in evaluation, and an error without a key."""
  model = make(drop_path_rate=0.9)
  variables, x = drawn_variables(make(), size), images(2, *size)
  one, again, other = (
    np.asarray(run(model, variables, x, True, jax.random.key(k))[0][0]) for k in (0, 0, 1)
  )
  np.testing.assert_array_equal(one, again)
  assert np.abs(one - other).max() > 1e-3 * np.abs(one).max()
  # Evaluation is one program, word for word.
  with_rate, without = (run.lower(m, variables, x).as_text() for m in (model, make()))
  assert with_rate == without
  try:
    jax.eval_shape(
      functools.partial(model.apply, train=True, mutable=["batch_stats"]), variables, x
    )
  except Exception as error:
    assert "dropout" in str(error)
  else:
    raise AssertionError("drop path drew without a key")


def check_sizes(model: nn.Module, sizes: Iterable[tuple[int, int]]) -> None:
  """Odd and non-square inputs: finite logits, and a pyramid of the declared strides."""
  for size in sizes:
    logits, endpoints = run(model, drawn_variables(model), images(1, *size))
    assert np.isfinite(logits).all()
    for f in model.features:
      expected = (1, -(-size[0] // f.stride), -(-size[1] // f.stride), f.channels)
      assert endpoints[f.name].shape == expected, (size, f, endpoints[f.name].shape)


@functools.lru_cache(maxsize=2)
def digits(size: int) -> tuple[np.ndarray, np.ndarray]:
  """32 pictures of digits `[32, size, size, 3]` in [-1, 1], and their labels."""
  source, rng = create_source("digits", "train"), np.random.default_rng(0)
  transform = parse_transform(f"decode|resize({size}, 'bilinear')")
  batch = [transform(source[int(i)], rng) for i in rng.permutation(len(source))[:32]]
  return (np.stack([row["image"] for row in batch]).astype(np.float32) - 127.5) / 127.5, np.array(
    [row["label"] for row in batch], np.int32
  )


def check_trains(model: nn.Module, size: int = 32, steps: int = 12, rate: float = 2e-3) -> None:
  """A few steps on real pictures: the loss falls below its start and stays finite."""
  x, labels = digits(size)
  # The type of the computation changes no parameter.
  variables = initial(model.clone(dtype=jnp.float32), size)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))
  # One vector of all parameters: the same steps as leaf by leaf, in a tenth of the operations.
  vector, leaves = flatten_util.ravel_pytree(variables["params"])

  @jax.jit
  def step(vector, stats, state, key):
    def loss(params):
      (logits, _), new = model.apply(
        {"params": params, "batch_stats": stats},
        x,
        train=True,
        rngs={"dropout": key},
        mutable=["batch_stats"],
      )
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      return losses.mean(), new.get("batch_stats", {})

    (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(leaves(vector))
    gradient = flatten_util.ravel_pytree(gradient)[0]
    updates, state = optimizer.update(gradient, state, vector)
    return vector + updates, stats, state, value

  stats, state, losses = variables.get("batch_stats", {}), optimizer.init(vector), []
  for i in range(steps):
    vector, stats, state, value = step(vector, stats, state, jax.random.key(i))
    losses.append(float(value))
  assert np.isfinite(losses).all(), losses
  assert min(losses[-3:]) < 0.8 * losses[0], losses


def check_round_trip(model: nn.Module, layout: Any, size: tuple[int, int] = (32, 32)) -> None:
  """Export then import is the identity, leaf by leaf, and every name is used exactly once."""
  from hybrid_vit.weights import convert

  shapes = jax.eval_shape(model.init, jax.random.key(0), images(1, *size))
  rng = np.random.default_rng(0)
  variables = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
  key_map = layout.key_map(model)
  exported = convert.export_weights(variables, key_map)
  leaves = traverse_util.flatten_dict(dict(variables), sep="/")
  names = [name for path in leaves for name in key_map(path).names]
  assert len(exported) == len(names), "two variables have one official name"
  back, report = convert.import_weights(exported, variables, key_map)
  assert not report.initialised and not report.unused
  jax.tree.map(np.testing.assert_array_equal, back, variables)
