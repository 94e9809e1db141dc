"""hybrid_vit: hybrid convolution-attention vision backbones in JAX and Flax."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from hybrid_vit.models.registry import create_model, list_models

__all__ = ["create_model", "list_models"]


def __getattr__(name: str) -> Any:
  # JAX and the networks are loaded when first asked for, so that `import hybrid_vit` stays light.
  if name in __all__:
    from hybrid_vit.models import registry

    return getattr(registry, name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
