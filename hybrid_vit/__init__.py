"""hybrid_vit: hybrid convolution-attention vision backbones in JAX and Flax."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  __version__: str
  from hybrid_vit.models.clip_systems import create_clip
  from hybrid_vit.models.registry import create_model, list_models
  from hybrid_vit.stored_tasks import load_task
  from hybrid_vit.weights.stored import load_network
  from hybrid_vit.weights.stored_clip import load_clip

__all__ = [
  "__version__",
  "create_clip",
  "create_model",
  "list_models",
  "load_clip",
  "load_network",
  "load_task",
]

_PLACES = {
  "create_clip": "hybrid_vit.models.clip_systems",
  "create_model": "hybrid_vit.models.registry",
  "list_models": "hybrid_vit.models.registry",
  "load_clip": "hybrid_vit.weights.stored_clip",
  "load_network": "hybrid_vit.weights.stored",
  "load_task": "hybrid_vit.stored_tasks",
}


def __getattr__(name: str) -> Any:
  # JAX and the networks are loaded when first asked for, so that `import hybrid_vit` stays light.
  if name == "__version__":
    # setup.cfg's, as it was installed.
    from importlib import metadata

    try:
      return metadata.version("hybrid_vit")
    except metadata.PackageNotFoundError as error:
      raise AttributeError("hybrid_vit has no __version__: it is not installed") from error
  if name in _PLACES:
    return getattr(importlib.import_module(_PLACES[name]), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
