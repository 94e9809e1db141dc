"""Measures maps of classes and of depth in one of several processes; each writes the figures."""

import json
import sys
from pathlib import Path

import jax

from hybrid_vit import sharding
from tests import dense


def figures(path: Path, mesh: jax.sharding.Mesh | None) -> dict[str, dict[str, float]]:
  """Measures of weights of noise on both folders below `path`."""
  found = {}
  for name in ("segmentation", "depth"):
    task = dense.make_task(name)
    variables = dense.drawn(task, dense.make_batch(name))
    if mesh is not None:
      where = jax.tree.map(lambda _: sharding.replicated(mesh), variables)
      variables = sharding.put_tree(variables, where)
    data = dense.evaluation_set(task, dense.source_of(path / name, name), 8, mesh)
    (evaluator,) = task.evaluators([data])
    found[name] = evaluator.run(variables)
  return found


def main(path: Path) -> None:
  """Writes <process>.json."""
  sharding.initialize_distributed()
  found = figures(path, sharding.make_mesh({"data": -1}))
  (path / f"{jax.process_index()}.json").write_text(json.dumps([jax.process_count(), found]))


if __name__ == "__main__":
  main(Path(sys.argv[1]))
