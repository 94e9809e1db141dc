"""What a stored network looked at in a photo: one map of each method, by its name.

"grad_cam" is for every classifier of the registry, "pca" for every network; "attention" and
"rollout" are of networks whose softmax attention sees a whole map, "modulators" of FocalNet.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_vit import saliency
from hybrid_vit.class_prediction import ACTIVATIONS, Texts
from hybrid_vit.endpoint_splits import SplitNetwork, map_and_gradient, split_network
from hybrid_vit.intermediates import BLOCK, attention_weights, evaluation_form, modulators
from hybrid_vit.tasks.pictures import normalized
from hybrid_vit.weights.stored import StoredNetwork, class_names

# Each with its name for people.
METHODS: Mapping[str, str] = {
  "grad_cam": "Grad-CAM",
  "attention": "Attention",
  "rollout": "Attention rollout",
  "modulators": "Modulators",
  "pca": "PCA of features",
}
# Methods that read an endpoint of one's choice.
OF_ENDPOINTS = ("grad_cam", "pca")

# Of the map whose components are shown, unless another is asked for: coarser ones have few cells.
_COARSEST_STRIDE = 16


@dataclasses.dataclass(frozen=True)
class HeatMap:
  """One map of one photo.

  Attributes:
    method: one of `METHODS`.
    values: float32 `[h, w]`, none below 0; or `[h, w, 3]`, colours in [0, 1].
    title: for people, in a few letters.
    source: the layer it is of.
  """

  method: str
  values: np.ndarray
  title: str
  source: str


class HeatMapper:
  """Heat maps by one network; what is compiled is kept."""

  def __init__(self, network: StoredNetwork):
    """Takes the network; nothing is traced yet."""
    self.network = network
    self._model = evaluation_form(network.model)
    self._programs: dict[Any, Any] = {}

  @functools.cached_property
  def methods(self) -> tuple[str, ...]:
    """Those that this network has, without those that need texts."""
    reasons = {method: self._reason_against(method) for method in METHODS}
    return tuple(method for method, reason in reasons.items() if not reason)

  @property
  def endpoints(self) -> tuple[str, ...]:
    """Names of the network's maps, in the order in which they are computed."""
    return tuple(self._split.endpoints)

  def default_endpoint(self, method: str) -> str:
    """The map of which `method` is where none is named.

    Grad-CAM: the last one that the classes are read from. PCA: the coarsest of the pyramid whose
    stride is at most 16, else the finest.
    """
    if method == "grad_cam":
      return self._split.last_read()
    features = self.network.model.features
    fine = [f.name for f in features if f.stride <= _COARSEST_STRIDE]
    return fine[-1] if fine else features[0].name

  def check(self, method: str, texts: Texts | None = None) -> None:
    """A method must be one that this network has.

    Raises:
      ValueError: it is not; the message says why, and what there is.
    """
    if method not in METHODS:
      raise ValueError(f"no method is named {method!r}; there are: {', '.join(METHODS)}")
    if method == "grad_cam" and texts is not None:
      return
    if reason := self._reason_against(method):
      raise ValueError(
        f"{method}: {self.network.name} {reason}; of it there are: {', '.join(self.methods)}"
      )

  def maps(
    self,
    method: str,
    images: Sequence[np.ndarray],
    *,
    target: int | None = None,
    endpoint: str | None = None,
    texts: Texts | None = None,
  ) -> list[HeatMap]:
    """Maps of pictures as the network expects them; of "pca" all share one basis and one scale.

    Args:
      method: one of `METHODS`.
      images: each uint8 `[S, S, 3]`, see `photos.prepare`.
      target: the class of Grad-CAM; None for the likeliest of each picture.
      endpoint: the map of `OF_ENDPOINTS`; None for `default_endpoint`.
      texts: classes of an image tower, whose scores are cosines of the embeddings.

    Raises:
      ValueError: a method that this network has not, or an unknown or unread endpoint.
    """
    self.check(method, texts)
    if method in OF_ENDPOINTS:
      name = endpoint or self.default_endpoint(method)
      self._split.map_shape(name)
      if method == "grad_cam":
        return [self._grad_cam(image, target, name, texts) for image in images]
      program = self._program((method, name), lambda v, x: self._split.forward(v, x)[name])
      features = [np.asarray(program(image)[0], np.float32) for image in images]
      found = saliency.principal_components(features) if features else []
      return [_heat_map(method, values, name) for values in found]
    layer, see = {
      "attention": self._attention,
      "rollout": self._rollout,
      "modulators": self._modulators,
    }[method]()
    program = self._program((method,), see)
    return [_heat_map(method, np.asarray(program(image))[0], layer) for image in images]

  def _grad_cam(
    self, image: np.ndarray, target: int | None, endpoint: str, texts: Texts | None
  ) -> HeatMap:
    def see(variables: Any, x: Any, target: Any, embeddings: Any) -> tuple[Any, ...]:
      def scores(logits: Any) -> Any:
        if embeddings is None:
          return logits
        length = jnp.sqrt(jnp.square(logits).sum(-1, keepdims=True))
        return logits / jnp.maximum(length, 1e-12) @ embeddings.T

      def score(logits: Any) -> Any:
        found = scores(logits)
        chosen = jnp.where(target < 0, found.argmax(-1), target)
        return jnp.take_along_axis(found, chosen[:, None], axis=-1)[:, 0]

      logits, activations, gradient = map_and_gradient(self._split, endpoint, variables, x, score)
      return scores(logits), saliency.grad_cam(activations, gradient)

    names = class_names(self.network) if texts is None else texts.names
    program = self._program(("grad_cam", endpoint), see)
    asked = np.full(1, -1 if target is None else target, np.int32)
    scores, values = program(image, asked, None if texts is None else texts.embeddings)
    chosen = int(scores[0].argmax()) if target is None else target
    made = _heat_map("grad_cam", np.asarray(values[0]), endpoint)
    return dataclasses.replace(made, title=f"{made.title}: {names[chosen]}")

  def _attention(self) -> tuple[str, Any]:
    block = list(self._attending)[-1]

    def see(variables: Any, x: Any) -> Any:
      weights = attention_weights(self._model, variables, x)[block]
      before = self._before(block)
      row = saliency.received_attention(weights)
      if before and self._answers_by_token:
        row = saliency.token_attention(weights)
      return _folded(row, before)

    return block, see

  def _rollout(self) -> tuple[str, Any]:
    blocks = list(self._attending)

    def see(variables: Any, x: Any) -> Any:
      rolled = saliency.attention_rollout([*attention_weights(self._model, variables, x).values()])
      before = self._before(blocks[-1])
      row = rolled[:, 0] if before and self._answers_by_token else rolled.mean(1)
      return _folded(row, before)

    return f"{blocks[0]} to {blocks[-1]}", see

  def _modulators(self) -> tuple[str, Any]:
    block = list(self._modulated)[-1]
    return block, lambda v, x: saliency.magnitude(modulators(self._model, v, x)[block])

  @functools.cached_property
  def _split(self) -> SplitNetwork:
    return split_network(self._model, self.network.variables, self._shape)

  @property
  def _shape(self) -> tuple[int, int, int, int]:
    size = self.network.preprocessing.image_size
    return 1, size, size, 3

  @property
  def _answers_by_token(self) -> bool:
    return getattr(self._model, "pool", "token") == "token"

  @functools.cached_property
  def _attending(self) -> dict[str, Any]:
    """Shapes of the attention weights of blocks that attend over a whole map, by block."""
    found = self._shapes(attention_weights)
    return {block: x for block, x in found.items() if self._is_whole(block, x.shape)}

  @functools.cached_property
  def _modulated(self) -> dict[str, Any]:
    return self._shapes(modulators)

  def _shapes(self, look: Callable[..., Any]) -> dict[str, Any]:
    images = jax.ShapeDtypeStruct(self._shape, jnp.float32)
    order: list[str] = []

    def traced(variables: Any, images: Any) -> Any:
      found = look(self._model, variables, images)
      order[:] = found
      return found

    shapes: Any = jax.eval_shape(traced, self.network.variables, images)
    return {block: shapes[block] for block in order}

  def _before(self, block: str) -> int:
    """Tokens before those of the map."""
    rows, columns = self._split.endpoints[block].shape[1:3]
    return int(self._attending[block].shape[2]) - rows * columns

  def _is_whole(self, block: str, shape: tuple[int, ...]) -> bool:
    rows, columns = self._split.endpoints[block].shape[1:3]
    queries, keys = shape[2:]
    before = queries - rows * columns
    # A window larger than the map is filled up with cells that are none of it. Two tokens at most
    # stand before the map: the class's and the distillation's.
    return 0 <= before <= 2 and keys > before and math.isqrt(keys - before) ** 2 == keys - before

  def _reason_against(self, method: str) -> str:
    """Why this network has none, or nothing."""
    model, loss = type(self._model).__name__, self.network.loss
    if method == "grad_cam" and not self.network.num_classes:
      return "has no classifier here"
    if method == "grad_cam" and loss not in ACTIVATIONS:
      return "has outputs that are no classes (give texts, where the weights are of two towers)"
    if method == "attention" and not self._attending:
      return f"({model}) has no softmax attention over a whole map"
    if method == "rollout":
      blocks = [name for name in self.endpoints if BLOCK.fullmatch(name)]
      shapes = {x.shape[2:] for x in self._attending.values()}
      if list(self._attending) != blocks or len(shapes) != 1 or any(q != k for q, k in shapes):
        return f"({model}) does not attend over one whole map in every block"
    if method == "modulators" and not self._modulated:
      return f"({model}) has no focal modulation"
    return ""

  def _program(self, key: tuple[Any, ...], see: Callable[..., Any]) -> Callable[..., Any]:
    """`see(variables, normalised pictures, …)`, compiled once, as a function of `(image, …)`."""
    expected = self.network.preprocessing
    if key not in self._programs:

      @jax.jit
      def run(variables: Any, image: Any, *more: Any) -> Any:
        pictures = normalized(image[None], expected.mean, expected.std)
        return see(variables, pictures, *more)

      self._programs[key] = run
    return functools.partial(self._programs[key], self.on_device)

  @functools.cached_property
  def on_device(self) -> Any:
    """The network's variables."""
    return jax.device_put(self.network.variables)


def _heat_map(method: str, values: np.ndarray, source: str) -> HeatMap:
  return HeatMap(method, np.asarray(values, np.float32), METHODS[method], source)


def _folded(row: Any, before: int) -> Any:
  """Tokens `[B, before + n * n]` to the map of them `[B, n, n]`: prepared pictures are square."""
  cells = row[:, before:]
  side = math.isqrt(cells.shape[1])
  return cells.reshape(len(row), side, side)
