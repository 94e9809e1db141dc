"""Measures objects and panoptic segments in one of several processes; each writes the figures."""

import json
import sys
from pathlib import Path
from typing import Any

import jax

from hybrid_vit import sharding
from hybrid_vit.build import DataFacts, build
from hybrid_vit.config import Config
from hybrid_vit.data.scenes import open_scenes
from tests import dense, detection, masks

PICTURES = 11


def figures(mesh: jax.sharding.Mesh | None) -> dict[str, float]:
  """Measures, and sums of what was found, of a Mask R-CNN with weights of noise."""
  evaluator, variables = _evaluator(detection.config("mask_rcnn"), mesh)
  answers = evaluator.answers(variables)
  found = [picture.found for picture in answers.pictures]
  return {
    **evaluator.measure(answers),
    "found": float(sum(len(objects.scores) for objects in found)),
    "scores": float(sum(objects.scores.sum() for objects in found)),
    "boxes": float(sum(objects.boxes.sum() for objects in found)),
  }


def panoptic_figures(mesh: jax.sharding.Mesh | None) -> dict[str, float]:
  """Measures, and sums of the counts behind them, of a Mask2Former with weights of noise."""
  values = masks.config()
  values.task.inference.update(object_threshold=0.0, overlap_threshold=0.0)
  evaluator, variables = _evaluator(values, mesh)
  counts = evaluator.counts(variables)
  return {
    **evaluator.run(variables),
    **{f"counts_{i}": float(value) for i, value in enumerate(counts.sums.sum(0))},
    "agreeing": float(counts.matrix.trace()),
    "scores": float(sum(picture.found.scores.sum() for picture in counts.pictures)),
  }


def _evaluator(values: Any, mesh: jax.sharding.Mesh | None) -> tuple[Any, Any]:
  """What measures a run's task on a few scenes, and variables of noise."""
  source = open_scenes("scenes:size=32,count=64", "train")
  run = build(Config(values), DataFacts(source.info, len(source), example=lambda: source[0]))
  variables = dense.drawn(run.task, run.batches[0])
  if mesh is not None:
    where = jax.tree.map(lambda _: sharding.replicated(mesh), variables)
    variables = sharding.put_tree(variables, where)
  split = f"validation[:{PICTURES}]"
  data = dense.evaluation_set(run.task, "scenes:size=32", 8, mesh, split=split)
  (evaluator,) = run.task.evaluators([data])
  return evaluator, variables


def main(path: Path) -> None:
  """Writes <process>.json."""
  sharding.initialize_distributed()
  mesh = sharding.make_mesh({"data": -1})
  found = {"objects": figures(mesh), "panoptic": panoptic_figures(mesh)}
  (path / f"{jax.process_index()}.json").write_text(json.dumps([jax.process_count(), found]))


if __name__ == "__main__":
  main(Path(sys.argv[1]))
