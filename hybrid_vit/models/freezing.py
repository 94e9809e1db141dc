"""Parts of a network that stand still in training: their batch norms use what they have learnt."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn

from hybrid_vit.models.layers import BatchNorm


@contextlib.contextmanager
def running_statistics(is_frozen: Callable[[str], bool]) -> Iterator[None]:
  """Within it, frozen batch norms normalise as in evaluation and keep their running figures.

  Args:
    is_frozen: of a module's path, "stage1_block0/norm".
  """

  def intercept(
    call: Callable[..., Any], arguments: Any, keywords: Any, context: nn.module.InterceptorContext
  ) -> Any:
    module = context.module
    if (
      isinstance(module, BatchNorm)
      and context.method_name == "__call__"
      and is_frozen("/".join(module.path))
    ):
      # What else is given, a kernel or an activation, belongs to evaluation as well.
      return call(*arguments[:1], **{**keywords, "train": False})
    return call(*arguments, **keywords)

  with nn.intercept_methods(intercept):
    yield
