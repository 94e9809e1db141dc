"""Measures objects in one of several processes; each writes the figures."""

import json
import sys
from pathlib import Path

import jax

from hybrid_vit import sharding
from hybrid_vit.build import DataFacts, build
from hybrid_vit.config import Config
from hybrid_vit.data.scenes import open_scenes
from tests import dense, detection

PICTURES = 11


def figures(mesh: jax.sharding.Mesh | None) -> dict[str, float]:
  """Measures, and sums of what was found, of a Mask R-CNN with weights of noise."""
  source = open_scenes("scenes:size=32,count=64", "train")
  run = build(
    Config(detection.config("mask_rcnn")),
    DataFacts(source.info, len(source), example=lambda: source[0]),
  )
  variables = dense.drawn(run.task, run.batches[0])
  if mesh is not None:
    where = jax.tree.map(lambda _: sharding.replicated(mesh), variables)
    variables = sharding.put_tree(variables, where)
  split = f"validation[:{PICTURES}]"
  data = dense.evaluation_set(run.task, "scenes:size=32", 8, mesh, split=split)
  (evaluator,) = run.task.evaluators([data])
  answers = evaluator.answers(variables)
  found = [picture.found for picture in answers.pictures]
  return {
    **evaluator.measure(answers),
    "found": float(sum(len(objects.scores) for objects in found)),
    "scores": float(sum(objects.scores.sum() for objects in found)),
    "boxes": float(sum(objects.boxes.sum() for objects in found)),
  }


def main(path: Path) -> None:
  """Writes <process>.json."""
  sharding.initialize_distributed()
  found = figures(sharding.make_mesh({"data": -1}))
  (path / f"{jax.process_index()}.json").write_text(json.dumps([jax.process_count(), found]))


if __name__ == "__main__":
  main(Path(sys.argv[1]))
