"""A network cut at one of its endpoints: what is behind that map as a function of the map.

Networks give their endpoints beside the logits and take none, so the cut is made in what JAX has
traced of them, and no network knows of it. A map of tokens is an endpoint without the class token
that goes along with it; the cut is then made where the tokens are whole, and the tokens beside the
map stay as they are.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend import core

from hybrid_vit.models.registry import closest_hint

# What leads from whole tokens to a map: each a linear function of one array.
_VIEWS = ("slice", "reshape", "squeeze")

_ORIGIN = core.DebugInfo("split_network", "a part of a network", None, None)


@dataclasses.dataclass(frozen=True)
class SplitNetwork:
  """A network in evaluation, traced for one shape of pictures.

  Attributes:
    endpoints: names and shapes of the maps `[B, h, w, C]`, in the order in which they are computed.
    program: all arrays of variables and the pictures → what `outputs` names.
    outputs: "logits", where there are some, and the names of `endpoints`.
  """

  endpoints: Mapping[str, jax.ShapeDtypeStruct]
  program: core.ClosedJaxpr
  outputs: tuple[str, ...]

  def map_shape(self, name: str) -> jax.ShapeDtypeStruct:
    """The shape of an endpoint's map.

    Raises:
      ValueError: no such map; the message gives the closest, and all.
    """
    if name not in self.endpoints:
      raise ValueError(
        f"no map is named {name!r}{closest_hint(name, list(self.endpoints))}; there are: "
        f"{', '.join(self.endpoints)}"
      )
    return self.endpoints[name]

  def forward(self, variables: Any, images: jax.Array) -> dict[str, jax.Array]:
    """ "logits" `[B, K]` and every map."""
    values = self._run(self._wanted, jax.tree.leaves((variables, images)), {})
    return dict(zip(self.outputs, values))

  def behind(
    self, name: str, variables: Any, images: jax.Array, change: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """(logits where `change` is added to a map, the map without it).

    The logits are a function of `change`, which has the map's shape; its gradient is that with
    respect to the map, other ways from the pictures to the logits held as they are.

    Args:
      name: of the endpoint.
      variables: of the network.
      images: float `[B, H, W, 3]`, normalised.
      change: see above.

    Raises:
      ValueError: no such map, no logits, or logits that do not depend on the map.
    """
    cut = self._cut(name)
    if cut is None:
      raise ValueError(f"the logits do not depend on the endpoint {name!r}")
    source, views = cut
    leaves = jax.tree.leaves((variables, images))
    (whole,) = self._run((source,), leaves, {})

    def view(x: jax.Array) -> jax.Array:
      return _evaluate(views, [self._output(name)], {source: x})[0]

    (added,) = jax.linear_transpose(view, whole)(change)
    (logits,) = self._run((self._output("logits"),), leaves, {source: whole + added})
    return logits, view(whole)

  @functools.cached_property
  def read(self) -> tuple[str, ...]:
    """Names of the maps on which the logits depend."""
    return tuple(name for name in self.endpoints if self._cut(name) is not None)

  def last_read(self) -> str:
    """Name of the last map on which the logits depend.

    It is the one that is pooled; where a class token answers instead, the map that its last
    attention reads.

    Raises:
      ValueError: there are no logits.
    """
    for name in reversed(list(self.endpoints)):
      if self._cut(name) is not None:
        return name
    raise ValueError("the logits depend on no map")

  @property
  def _jaxpr(self) -> Any:
    return self.program.jaxpr

  @property
  def _wanted(self) -> tuple[Any, ...]:
    return tuple(self._jaxpr.outvars)

  def _output(self, name: str) -> Any:
    return self._jaxpr.outvars[self.outputs.index(name)]

  def _run(self, wanted: Sequence[Any], leaves: Sequence[Any], given: Mapping[Any, Any]) -> Any:
    values = dict(zip(self._jaxpr.constvars, self.program.consts))
    values |= zip(self._jaxpr.invars, leaves)
    return _evaluate(self._jaxpr.eqns, wanted, {**values, **given})

  @functools.cached_property
  def _cuts(self) -> dict[str, Any]:
    return {}

  def _cut(self, name: str) -> tuple[Any, tuple[Any, ...]] | None:
    """(the variable at which a map is cut, what leads from it to the map); None if it is not read.

    Raises:
      ValueError: no such map, or no logits.
    """
    self.map_shape(name)
    if "logits" not in self.outputs:
      raise ValueError("a network without a classifier has no logits")
    if name not in self._cuts:
      self._cuts[name] = self._find_cut(name)
    return self._cuts[name]

  def _find_cut(self, name: str) -> tuple[Any, tuple[Any, ...]] | None:
    logits, variable = self._output("logits"), self._output(name)
    made_by = {v: eqn for eqn in self._jaxpr.eqns for v in eqn.outvars}
    needed = _needed(self._jaxpr.eqns, [logits], ())
    read = {v for eqn in needed for v in eqn.invars if not isinstance(v, core.Literal)}
    views: list[Any] = []
    while variable not in read:
      eqn = made_by.get(variable)
      if eqn is None or eqn.primitive.name not in _VIEWS:
        return None
      views.insert(0, eqn)
      (variable,) = eqn.invars
    if views and not self._reaches(variable, views, name):
      return None
    return variable, tuple(views)

  def _reaches(self, source: Any, views: Sequence[Any], name: str) -> bool:
    """Whether logits depend on a part of an array: where that is NaN, they are."""
    aval, shape = source.aval, self.endpoints[name]

    def poisoned() -> jax.Array:
      def view(x: jax.Array) -> jax.Array:
        return _evaluate(views, [self._output(name)], {source: x})[0]

      whole = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
      (value,) = jax.linear_transpose(view, whole)(jnp.full(shape.shape, jnp.nan, shape.dtype))
      # Of nothing else a value matters.
      leaves = [jnp.zeros(v.aval.shape, v.aval.dtype) for v in self._jaxpr.invars]
      return self._run((self._output("logits"),), leaves, {source: value})[0]

    return bool(jnp.isnan(jax.jit(poisoned)()).any())


def split_network(model: nn.Module, variables: Any, shape: Sequence[int]) -> SplitNetwork:
  """Traces a network for pictures of `shape` `[B, H, W, 3]`; of `variables` only shapes matter."""
  names: list[str] = []

  def forward(variables: Any, images: jax.Array) -> list[jax.Array]:
    logits, endpoints = model.apply(variables, images, train=False)
    maps = {name: x for name, x in endpoints.items() if x.ndim == 4}
    names[:] = [*([] if logits is None else ["logits"]), *maps]
    return [*([] if logits is None else [logits]), *maps.values()]

  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
  images = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
  program: Any = jax.make_jaxpr(forward)(shapes, images)
  avals = dict(zip(names, program.out_avals))
  maps = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in avals.items() if n != "logits"}
  return SplitNetwork(maps, program, tuple(names))


def _needed(eqns: Sequence[Any], wanted: Sequence[Any], given: Any) -> list[Any]:
  """The equations that lead to `wanted`, without those that lead to what is given."""
  missing, kept = {v for v in wanted if v not in given}, []
  for eqn in reversed(eqns):
    if any(v in missing for v in eqn.outvars):
      kept.append(eqn)
      missing |= {v for v in eqn.invars if not isinstance(v, core.Literal) and v not in given}
  return kept[::-1]


def _evaluate(
  eqns: Sequence[Any], wanted: Sequence[Any], given: Mapping[Any, Any]
) -> list[jax.Array]:
  """Runs the equations between `given` and `wanted`."""
  kept = [
    eqn.replace(outvars=[core.DropVar(v.aval) if v in given else v for v in eqn.outvars])
    for eqn in _needed(eqns, wanted, given)
  ]
  part = core.Jaxpr([], list(given), list(wanted), kept, debug_info=_ORIGIN)
  return list(core.jaxpr_as_fun(core.ClosedJaxpr(part, []))(*given.values()))


Score = Callable[[jax.Array], jax.Array]


def map_and_gradient(
  network: SplitNetwork, name: str, variables: Any, images: jax.Array, score: Score
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(logits `[B, K]`, a map `[B, h, w, C]`, the gradient of scores with respect to it).

  Args:
    network: traced for the shape of `images`.
    name: of the map.
    variables: of the network.
    images: float `[B, H, W, 3]`, normalised.
    score: logits `[B, K]` → `[B]`, what of them is differentiated, each picture by itself.

  Raises:
    ValueError: see `SplitNetwork.behind`.
  """
  shape = network.map_shape(name)

  def scored(change: jax.Array) -> tuple[jax.Array, Any]:
    logits, activations = network.behind(name, variables, images, change)
    return score(logits).sum(), (logits, activations)

  gradient, (logits, activations) = jax.grad(scored, has_aux=True)(
    jnp.zeros(shape.shape, shape.dtype)
  )
  return logits, activations, gradient
