"""`--mode=evaluate`: what weights of any origin are worth, prepared as they expect it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from hybrid_vit import sharding
from hybrid_vit.build import (
  DataFacts,
  Run,
  build,
  preprocessing_of,
  read_evaluation,
)
from hybrid_vit.checkpoints import CheckpointError, load_weights
from hybrid_vit.config import Config, ConfigError
from hybrid_vit.data.classes import class_facts
from hybrid_vit.data.evaluation import describe_preparation, open_evaluation
from hybrid_vit.data.pipeline import open_source, readable_example
from hybrid_vit.fingerprints import first_nonfinite
from hybrid_vit.models.registry import Preprocessing, as_preprocessing
from hybrid_vit.reporting import figures
from hybrid_vit.starting import check_classes
from hybrid_vit.tasks.base import Evaluator, WritingEvaluator
from hybrid_vit.weights.transfer import transfer


def evaluate(config: Config, workdir: Any = None) -> dict[str, float]:
  """Evaluates the weights of `workdir`, else of `config.init_from`, by their own preprocessing.

  Every field of the configuration is read, as in a training, so that none can be misspelt. What
  evaluators write beside their measures goes into `workdir`.

  Returns:
    Measures, "<set>/<measure>".

  Raises:
    CheckpointError: no weights there, or weights that are not numbers.
    ConfigError: nothing to evaluate on.
  """
  directory = workdir or config.get("init_from")
  if directory is None:
    raise ValueError("--mode=evaluate needs weights: give --workdir or --config.init_from")
  weights, metadata = load_weights(directory)
  bad = first_nonfinite(weights)
  if bad is not None:
    raise CheckpointError(f"the weights in {directory} hold NaN or infinity, first in {bad!r}")
  preprocessing, said_by = weights_preprocessing(config, metadata)
  facts = _facts(config, weights, metadata, preprocessing)
  run = build(config, facts, preprocessing=preprocessing, training=False)
  config.assert_all_read()
  if not run.evaluation:
    raise ConfigError("`config.evaluation.sets` is empty: there is nothing to evaluate on")
  mesh = sharding.make_mesh(run.mesh_axes)
  sets = open_evaluation(run.evaluation, run.evaluation_fields, mesh)
  check_classes(run, sets)
  variables, report = place(run, weights, mesh)
  show = print if jax.process_index() == 0 else lambda *_: None
  step = metadata.get("step")
  show(f"weights from {directory}" + (f", step {step}" if step is not None else ""))
  show(report)
  show(describe_preparation(preprocessing, said_by, run.evaluation))
  evaluators = run.task.evaluators(sets)
  if workdir is None and any(isinstance(one, WritingEvaluator) for one in evaluators):
    show("no --workdir: figures alone, no files (--workdir may be any directory of weights)")
  return evaluate_all(evaluators, variables, show, workdir)


def weights_preprocessing(config: Config, metadata: Mapping[str, Any]) -> tuple[Preprocessing, str]:
  """What some weights expect of a picture, and who says so.

  Their own metadata goes first; where they have none, it is `preprocessing_of(config)`.
  """
  said, own = preprocessing_of(config), metadata.get("preprocessing")
  if own:
    return as_preprocessing(own), "as the weights' metadata says"
  return said, f"by the registry's entry of {config.model.name} and config.data"


def _facts(
  config: Config,
  weights: Mapping[str, Any],
  metadata: Mapping[str, Any],
  preprocessing: Preprocessing,
) -> DataFacts:
  """What the weights know of the data that they were trained on: its classes, or their number."""
  bias = weights["params"].get("head", {}).get("bias")

  def example() -> Mapping[str, Any]:
    return readable_example(open_source(read_evaluation(config, preprocessing)[0]))

  return DataFacts(
    info=class_facts(metadata),
    num_classes=metadata.get("num_classes") if bias is None else int(bias.shape[0]),
    example=example,
  )


def place(run: Run, weights: Mapping[str, Any], mesh: Any) -> tuple[Any, Any]:
  """Weights as the run's variables on the devices of a mesh, and the report of the transfer."""
  batch = run.batches[-1]
  target = jax.eval_shape(lambda key: run.task.init(key, batch), jax.random.key(0))
  variables, report = transfer(weights, target)
  layout = sharding.state_shardings(variables, (), mesh, params_key="")
  put = lambda leaf, where: sharding.put_tree(np.asarray(leaf), where)  # noqa: E731
  return jax.tree.map(put, variables, layout), report


def evaluate_all(
  evaluators: Sequence[Evaluator],
  variables: Any,
  show: Callable[[str], None],
  directory: Any = None,
) -> dict[str, float]:
  """Measures of variables on every set, "<set>/<measure>"; see `run_and_write`."""
  results: dict[str, float] = {}
  for evaluator in evaluators:
    values = run_and_write(evaluator, variables, show, directory)
    results.update({f"{evaluator.name}/{key}": value for key, value in values.items()})
    show(f"{evaluator.name}: {figures(values)}")
  return results


def run_and_write(
  evaluator: Evaluator, variables: Any, show: Callable[[str], None], directory: Any = None
) -> dict[str, float]:
  """An evaluator's measures; what else it can tell of its answers is written into `directory`.

  Files that cannot be written cost no figures: it is said.

  Args:
    evaluator: of one set.
    variables: of the network.
    show: tells people.
    directory: where to; None to write nothing.
  """
  if directory is None or not isinstance(evaluator, WritingEvaluator):
    return evaluator.run(variables)
  answers = evaluator.answers(variables)
  if jax.process_index() == 0:
    try:
      names = evaluator.write(answers, directory)
      show(f"{evaluator.name}: written to {directory}: {', '.join(names)}")
    except (OSError, ValueError) as error:
      show(f"{evaluator.name}: what was found could not be written to {directory}: {error}")
  return evaluator.measure(answers)
