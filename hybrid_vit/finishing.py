"""What a finished training leaves: an export, pictures, and a word on what to do next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from hybrid_vit import programs
from hybrid_vit.build import Run
from hybrid_vit.checkpoints import export
from hybrid_vit.plots import plot_curves
from hybrid_vit.tasks.base import Evaluator, Variables
from hybrid_vit.train_state import TrainState


def finish(
  run: Run,
  mesh: Mesh,
  workdir: epath.Path,
  evaluators: list[Evaluator],
  state: TrainState,
  results: Mapping[str, float],
  reporter: Any,
  weights: str | None = None,
) -> None:
  """Exports the weights, draws the pictures, says what to do next; every process calls it.

  Args:
    run: what was trained.
    mesh: on which.
    workdir: where to.
    evaluators: of its sets.
    state: its evaluation variables are exported.
    results: their measures.
    reporter: tells people.
    weights: what the weights are; None for those of the last step.
  """
  metadata = {
    **run.metadata,
    "step": int(state.step),
    "results": dict(results),
    "weights": weights
    or "trained here" + (", averaged over steps" if state.ema is not None else ""),
  }
  export(workdir / "export", state.evaluation_variables, metadata)
  variables = programs.evaluation_variables(run, mesh, state)
  # Drawing comes last, so that nothing which cannot be drawn costs more than the drawing.
  drawn = [
    f"predictions{'' if number == 0 else '_' + evaluator.name}.png"
    for number, evaluator in enumerate(evaluators)
    if _drawn(evaluator, number, variables, workdir, reporter)
  ]
  if jax.process_index():
    return
  if (workdir / "metrics.jsonl").exists():
    try:
      plot_curves(workdir / "metrics.jsonl", workdir / "curves.png")
      drawn.insert(0, "curves.png")
    except (ValueError, OSError) as error:
      reporter.message(f"curves.png could not be drawn: {error}")
  board = ", tensorboard/ " if "tensorboard" in run.settings.sinks else ""
  hint = f" (tensorboard --logdir {workdir})" if board else ""
  reporter.message(
    f"done. In {workdir}:\n"
    f"  {', '.join(drawn):<29} to look at\n"
    f"  {'metrics.jsonl' + board:<29} every figure{hint}\n"
    "  checkpoints/                  whole states\n"
    "  export/                       the weights alone\n"
    + (
      "  best/                         the best weights by " + str(run.settings.best_metric) + "\n"
    )
    * (run.settings.best_metric is not None)
    + "Next:\n"
    f"  evaluate them:    add --mode=evaluate --workdir={workdir} to the command\n"
    f"  fine-tune them:   {_fine_tuning(run, workdir)}"
  )


# Sources of one's own pictures, by the task.
_SOURCES = {
  "segmentation": "maps",
  "depth": "depth",
  "detection": "coco",
  "panoptic_segmentation": "coco_panoptic",
  "instance_segmentation": "coco",
  "mask_segmentation": "maps",
}
# What configs/finetune_panoptic.py calls these tasks.
_KINDS = {
  "panoptic_segmentation": "panoptic",
  "instance_segmentation": "instance",
  "mask_segmentation": "semantic",
}


def _fine_tuning(run: Run, workdir: epath.Path) -> str:
  """What to call; what only the configuration trained by can build again keeps it."""
  source = _SOURCES.get(str(run.metadata.get("task")), "folder")
  detector = run.metadata.get("task_settings", {}).get("detector") or {}
  # A detector with settings of its own is only in the configuration, as is a network with such.
  if run.metadata["arguments"] or set(detector) > {"name"}:
    return (
      f"add --config.init_from={workdir} --config.reinitialize_head=True "
      f"--config.data.source={source}:/path/to/pictures and a new --workdir to the command"
    )
  recipe = f"finetune.py:{run.network}"
  if source != "folder":
    recipe = f"finetune_{run.metadata['task']}.py:arch={run.network}"
  if detector:
    masks = "" if run.metadata["task_settings"].get("mask_size", 1) else ",masks=False"
    recipe += f",detector={detector['name']}{masks}"
  if run.metadata.get("task") in _KINDS:
    recipe = f"finetune_panoptic.py:arch={run.network},kind={_KINDS[run.metadata['task']]}"
  return (
    f"python -m hybrid_vit.main --config=configs/{recipe},init={workdir},"
    f"data={source}:/path/to/pictures"
  )


def _drawn(
  evaluator: Evaluator, number: int, variables: Variables, workdir: epath.Path, reporter: Any
) -> bool:
  """Whether a picture of the first sets' predictions was written."""
  name = f"predictions{'' if number == 0 else '_' + evaluator.name}.png"
  try:
    return evaluator.draw(variables, workdir / name)
  except (ValueError, OSError) as error:
    reporter.message(f"{name} could not be drawn: {error}")
    return False
