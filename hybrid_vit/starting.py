"""What a training begins with: its own checkpoint, another run's, other weights, or new ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from hybrid_vit import hub, programs, sharding
from hybrid_vit.build import Run
from hybrid_vit.checkpoints import (
  Checkpointer,
  Restored,
  abstract_like,
  load_weights,
  restore_from,
)
from hybrid_vit.config import differences
from hybrid_vit.data.classes import CLASS_NAMES, check_same_classes
from hybrid_vit.data.evaluation import EvaluationSet
from hybrid_vit.paths import as_path
from hybrid_vit.train_state import TrainState
from hybrid_vit.weights.architectures import clip_with
from hybrid_vit.weights.dense_checkpoints import WHOLE_MODELS, has_decoder, import_as_large
from hybrid_vit.weights.families import import_checkpoint
from hybrid_vit.weights.head_rows import carry_head, head_rows
from hybrid_vit.weights.readers import read_checkpoint
from hybrid_vit.weights.transfer import transfer


@dataclasses.dataclass(frozen=True)
class Start:
  """A training's first state.

  Attributes:
    state: on the devices.
    step: its finished steps.
    sums: of the log's window, as they were.
    messages: where it comes from, for people.
  """

  state: TrainState
  step: int
  sums: Mapping[str, Sequence[float]]
  messages: tuple[str, ...]


def begin(
  run: Run, mesh: Mesh, checkpointer: Checkpointer, workdir: epath.Path, *, begin_anew: bool
) -> Start:
  """The newest checkpoint of the work directory, else what the settings name, else a new state.

  Raises:
    CheckpointError: there are checkpoints, and none can be used.
    ValueError: other classes, or weights of another network.
  """
  abstract, layout = programs.abstract_state(run, mesh)

  def target(step: int) -> Any:
    # At the border of two phases the one that has ended was saved.
    phase = run.curriculum.phase_of(max(step - 1, 0))
    return abstract_like(*programs.abstract_state(run, mesh, phase))

  summary = describe(run, abstract, mesh)
  restored = checkpointer.restore(target, begin_anew=begin_anew)
  settings, place = run.settings, str(workdir / "checkpoints")
  if restored is None and settings.resume_from is not None:
    restored, place = restore_from(settings.resume_from, target), settings.resume_from
  if restored is not None:
    _check_restored(run, restored, place)
    changes = tuple(
      f"not as it was when that was saved: {change}"
      for change in differences(restored.run_config, run.config)
    )
    changes = (*changes, *_other_teacher(run, restored))
    messages = (f"restored step {restored.step} from {place}", *changes, summary)
    return Start(restored.state, restored.step, restored.sums, messages)
  make = jax.jit(lambda key: programs.new_state(run, key), out_shardings=layout)
  state = make(jax.random.key(settings.seed))
  messages = (summary,)
  if settings.init_from is not None:
    state, message = _start_from(run, state, settings.init_from, layout)
    messages = (message, summary)
  return Start(state, 0, {}, messages)


def check_classes(run: Run, sets: Sequence[EvaluationSet]) -> None:
  """Training data and evaluation sets must have the same classes, in the same order.

  Raises:
    ValueError: they have not; the message shows both.
  """
  for item in sets:
    _compare(run.metadata, item.info, f"the training data and evaluation set {item.name!r}")
    # A source may say several of them; the weights are of one kind.
    own = next((names for names in reversed(CLASS_NAMES) if names in run.metadata), "class_names")
    width, found = run.metadata.get("num_classes"), item.info.get(own)
    if width and found and width != len(found):
      raise ValueError(
        f"evaluation set {item.name!r} has {len(found)} classes, the network {width}"
      )


def _compare(expected: Mapping[str, Any], found: Mapping[str, Any], what: str) -> None:
  """Classes of whichever kind both speak of."""
  for names in CLASS_NAMES:
    if expected.get(names) and found.get(names):
      check_same_classes(tuple(expected[names]), tuple(found[names]), what)


def _check_restored(run: Run, restored: Restored, place: str) -> None:
  _compare(restored.info, run.metadata, f"the checkpoint in {place} and the training data")


def _other_teacher(run: Run, restored: Restored) -> tuple[str, ...]:
  """A word on a teacher whose weights are no longer those that the run learned from."""
  before, now = restored.info.get("teacher"), run.metadata.get("teacher")
  if not before or not now or before["fingerprint"] == now["fingerprint"]:
    return ()
  return (f"not as it was when that was saved: the weights of the teacher {now['path']}",)


def _start_from(run: Run, state: TrainState, directory: str, layout: Any) -> tuple[TrainState, str]:
  """A new state whose variables (and their average) are those of other weights."""
  weights, metadata = _initial_weights(run, directory)
  new_head, mapping = run.settings.reinitialize_head, run.settings.carry_head
  carried = ""
  if mapping is not None:
    fresh = multihost_utils.process_allgather(state.params.get("head", {}), tiled=True)
    widths = [t["kernel"].shape[-1] if "kernel" in t else 0 for t in (_head(weights), fresh)]
    old, new = (tuple(m.get("class_names") or ()) for m in (metadata, run.metadata))
    rows = head_rows(mapping, old, new, *widths)
    weights, new_head = carry_head(weights, rows, fresh), False
    carried = f"\n  head: {(rows >= 0).sum()} of {len(rows)} classes carried over by {mapping}"
  elif not new_head:
    _compare(
      metadata,
      run.metadata,
      f"the weights in {directory} (their head is kept; --config.reinitialize_head=True begins it "
      "anew) and the training data",
    )
  variables, report = transfer(
    weights, jax.eval_shape(lambda s: s.variables, state), reinitialize_head=new_head
  )
  fresh = state.variables
  # What begins anew comes as a shape, and keeps the new state's values.
  chosen = jax.tree.map(
    lambda leaf, new, place: (
      new if isinstance(leaf, jax.ShapeDtypeStruct) else sharding.put_tree(np.asarray(leaf), place)
    ),
    variables,
    fresh,
    {"params": layout.params, "batch_stats": layout.batch_stats},
  )
  ema = None
  if state.ema is not None:
    # Copies: the state is donated, and one buffer cannot be given away twice.
    ema = jax.tree.map(jnp.copy, chosen)
  state = state.replace(params=chosen["params"], batch_stats=chosen["batch_stats"], ema=ema)
  return state, f"starting from {directory}{carried}\n{report}"


def _head(weights: Mapping[str, Any]) -> Mapping[str, Any]:
  return weights["params"].get("head", {})


def _initial_weights(run: Run, place: str) -> tuple[dict[str, Any], dict[str, Any]]:
  """What `config.init_from` names: a directory that this package wrote, or an authors' file.

  Raises:
    ValueError: a repository of the hub that cannot be fetched; see `hub.fetch`.
  """
  place = _of_the_hub(place)
  path = as_path(place)
  if not path.is_file():
    return load_weights(place)
  # Read as the registry's network; what another size or window needs, the transfer sees to.
  network = run.network
  if text := run.metadata.get("text_tower"):
    network = clip_with(network, text) or network
  weights, model = read_checkpoint(str(path)).weights, getattr(run.task, "model", None)
  if isinstance(model, WHOLE_MODELS) and has_decoder(weights, model, network):
    size = run.preprocessing.image_size
    whole, classes = import_as_large(weights, model, network, image_size=size)
    return whole.variables, {"num_classes": classes}
  imported = import_checkpoint(weights, network)
  return imported.variables, {"num_classes": imported.num_classes}


def _of_the_hub(place: str) -> str:
  """An address of the hub as the path of what was fetched; each process fetches for itself."""
  say = print if jax.process_index() == 0 else lambda _: None
  try:
    return hub.local(place, say)
  except ModuleNotFoundError as error:
    raise ValueError(str(error)) from error


def describe(run: Run, state: TrainState, mesh: Mesh) -> str:
  """Network, length, rate and devices, in lines for people."""
  parameters = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state.params))
  curriculum = run.curriculum
  steps = np.linspace(0, curriculum.total_steps - 1, 200).round()
  peak = max(float(run.schedule(int(step))) for step in steps)
  axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
  classes = run.metadata.get("num_classes")
  trained = ""
  if run.frozen is not None:
    still = sum(
      int(np.prod(leaf.shape))
      for leaf, frozen in zip(jax.tree.leaves(state.params), jax.tree.leaves(run.frozen))
      if frozen
    )
    trained = f", of which {parameters - still:,} are trained"
  groups = run.config.get("batch_norm_groups") or 1
  return (
    f"{run.network}: {parameters:,} parameters{trained}"
    + (f", {classes} classes" if classes else "")
    + f"\n{curriculum.total_steps:,} steps "
    f"({curriculum.total_examples / run.examples_per_epoch:.1f} epochs of "
    f"{run.examples_per_epoch:,} examples), peak learning rate {peak:.3g}\n{curriculum}\n"
    f"{mesh.size} {mesh.devices.flat[0].platform} device(s) ({axes}), {jax.process_count()} "
    "process(es); batch norm statistics are those of the global batch"
    + (f" in {groups} groups" if groups > 1 else "")
  )
