r"""Memory of one training step on a chip of a TPU, by its compiler, without a TPU.

    python -m hybrid_vit.tools.tpu_memory mask_rcnn dino --backbone=focalnet_tiny_srf --rows=2 \
      --topology=v5e:2x2 --out=docs/results/detection/tpu_memory

compiles one step of each network (any detector, or mask2former as the task mask_segmentation) over
all chips of the topology: bfloat16 with float32 parameters, AdamW, each chip so many pictures. A
row that the compiler refuses says how much it asked for. Rows of an earlier call stay in the table,
so that long compilations may be done one by one. Minutes each; libtpu is needed (pip install
'jax[tpu]'), and JAX_PLATFORMS=cpu where a TPU of another kind is here. `--mode=dry_run --topology=`
of `hybrid_vit.main` does the same of any recipe.
"""

from __future__ import annotations

import argparse
import csv
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from hybrid_vit import sharding, tpu_topology
from hybrid_vit.box_inference import BoxInferenceSettings
from hybrid_vit.heads.detectors import create_detector, detector_names
from hybrid_vit.models.dense import dense_arguments
from hybrid_vit.models.registry import Preprocessing, create_model
from hybrid_vit.standard_streams import run_tool
from hybrid_vit.tables import write_table
from hybrid_vit.tasks.detection import Detection
from hybrid_vit.tasks.mask_classification import SemanticSettings
from hybrid_vit.tasks.registry import Context, create_task
from hybrid_vit.train_state import create_state, make_train_step

_MASK2FORMER = "mask2former"
_CLASSES, _OBJECTS, _MASK_SIZE = 80, 100, 56
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FIELDS = (
  "network", "backbone", "canvas", "rows", "remat", "topology", "fits", "peak_gib", "of_gib",
  "arguments_gib", "temporary_gib", "tflop", "traffic_gb", "estimated_gcycles", "seconds",
)  # fmt: skip
# What a row is replaced by.
_KEY = FIELDS[:6]


def network_names() -> list[str]:
  """What may be compiled."""
  return [*detector_names(), _MASK2FORMER]


def step_of(
  name: str, backbone_name: str, canvas: tuple[int, int], rows: int, *, remat: bool
) -> tuple[Any, Any, dict[str, jax.ShapeDtypeStruct]]:
  """One training step from shapes alone.

  Args:
    name: of `network_names`.
    backbone_name: of the registry.
    canvas: (height, width) of the padded pictures.
    rows: pictures in the batch.
    remat: recompute the blocks of the backbone, and the layers of a head that can.

  Returns:
    The step `(state, batch) → (state, report)`, and the shapes of both arguments.
  """
  backbone = create_model(
    backbone_name, 0, dtype=jnp.bfloat16, remat=remat,
    **dense_arguments(backbone_name, max(canvas)),
  )  # fmt: skip
  task, batch = _task(name, backbone, canvas, rows, remat)
  optimizer = optax.adamw(1e-4, weight_decay=0.05)
  state = jax.eval_shape(
    functools.partial(create_state, task=task, optimizer=optimizer, ema=False, batch=batch),
    jax.random.key(0),
  )
  return make_train_step(task, optimizer, optax.constant_schedule(1e-4)), state, batch


def compile_step(
  topology: str, name: str, backbone: str, canvas: tuple[int, int], rows: int, *, remat: bool
) -> tpu_topology.Compilation:
  """The step on all chips of a topology, the batch split over them and the state on each whole.

  Args:
    topology: see `tpu_topology.topology_devices`.
    name: see `step_of`, and so are the others.
    backbone: likewise.
    canvas: likewise.
    rows: of each chip.
    remat: likewise.
  """
  devices = tpu_topology.topology_devices(topology)
  mesh = sharding.make_mesh({"data": -1}, devices)
  step, state, batch = step_of(name, backbone, canvas, rows * len(devices), remat=remat)
  whole = NamedSharding(mesh, PartitionSpec())
  split = NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES))
  jitted = jax.jit(
    step, in_shardings=(whole, split), out_shardings=(whole, whole), donate_argnums=0
  )
  with jax.set_mesh(mesh):
    return tpu_topology.examine(lambda: jitted.lower(state, batch).compile())


def _task(
  name: str, backbone: Any, canvas: tuple[int, int], rows: int, remat: bool
) -> tuple[Any, dict[str, jax.ShapeDtypeStruct]]:
  def shape(*dimensions: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, *dimensions), dtype)

  batch = {"image": shape(*canvas, 3, dtype=jnp.uint8)}
  if name == _MASK2FORMER:
    settings = SemanticSettings(head={"name": name, "remat": remat}, max_objects=_OBJECTS)
    context = Context(
      info={}, num_classes=_CLASSES, make_network=lambda classes: backbone,
      preprocessing=Preprocessing(max(canvas), 1.0, "bilinear", _MEAN, _STD),
    )  # fmt: skip
    batch["map"] = shape(*canvas, dtype=jnp.int32)
    return create_task("mask_segmentation", settings, context), batch
  masks = "mask" in name
  arguments: dict[str, Any] = {"head": {"remat": remat}} if name == "dino" else {}
  detector = create_detector(name, backbone, _CLASSES, masks=masks, **arguments)
  batch["boxes"] = shape(_OBJECTS, 4)
  batch["box_labels"] = shape(_OBJECTS, dtype=jnp.int32)
  batch["true_size"] = shape(2)
  if masks:
    batch["masks"] = shape(_OBJECTS, _MASK_SIZE, _MASK_SIZE, dtype=jnp.uint8)
  size = _MASK_SIZE if masks else 0
  task = Detection(detector, _MEAN, _STD, _CLASSES, (), _OBJECTS, size, BoxInferenceSettings())
  return task, batch


def main(arguments: Sequence[str] | None = None) -> int:
  """The command; returns its exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m hybrid_vit.tools.tpu_memory",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("networks", nargs="+", choices=network_names())
  parser.add_argument("--backbone", default="focalnet_tiny_srf")
  parser.add_argument("--canvas", type=int, nargs=2, default=(800, 1344), help="height, width")
  parser.add_argument("--rows", type=int, nargs="+", default=[2], help="pictures of a chip")
  parser.add_argument("--remat", action="store_true", help="recompute blocks and layers")
  parser.add_argument("--topology", default="v5e:2x2")
  parser.add_argument("--modules", type=int, help="also print cycles by so many parts of names")
  parser.add_argument("--out", type=Path, help="table to write, without an ending")
  options = parser.parse_args(arguments)
  canvas = (options.canvas[0], options.canvas[1])
  try:
    for name in options.networks:
      for rows in options.rows:
        found = compile_step(
          options.topology, name, options.backbone, canvas, rows, remat=options.remat
        )
        row = table_row(found, name, options.backbone, canvas, rows, options.remat,
                        options.topology)  # fmt: skip
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        if options.modules:
          for label, cycles in tpu_topology.cycles_by_module(found.cycles, options.modules).items():
            print(f"  {cycles / 1e6:10.2f} M  {label}")
        if options.out is not None:
          merge_rows(options.out, [row])
  except (tpu_topology.TopologyError, ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  return 0


def table_row(
  found: tpu_topology.Compilation,
  name: str,
  backbone: str,
  canvas: tuple[int, int],
  rows: int,
  remat: bool,
  topology: str,
) -> dict[str, Any]:
  """A line of the table, by `FIELDS`."""
  gib = tpu_topology.gibibytes
  row: dict[str, Any] = {
    "network": name, "backbone": backbone, "canvas": f"{canvas[0]}x{canvas[1]}", "rows": rows,
    "remat": remat, "topology": topology, "fits": found.fits, "peak_gib": gib(found.peak_bytes),
    "of_gib": gib(tpu_topology.chip_of(topology).hbm_bytes),
  }  # fmt: skip
  if found.fits:
    row["arguments_gib"] = gib(found.argument_bytes)
    row["temporary_gib"] = gib(found.temporary_bytes)
    row["tflop"] = round(found.flops / 1e12, 2)
    row["traffic_gb"] = round(found.accessed_bytes / 1e9, 1)
    row["estimated_gcycles"] = round(found.cycles.total / 1e9, 3)
  row["seconds"] = round(found.seconds)
  return row


def merge_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
  """Writes a table anew with the rows that it had, but for those that these replace."""
  known: list[Mapping[str, Any]] = []
  stored = path.with_name(path.name + ".csv")
  if stored.exists():
    with stored.open(newline="", encoding="utf-8") as file:
      known = list(csv.DictReader(file))
  key = lambda row: tuple(str(row[name]) for name in _KEY)  # noqa: E731
  new = {key(row) for row in rows}
  write_table(path, [*(row for row in known if key(row) not in new), *rows], FIELDS)


if __name__ == "__main__":
  run_tool(main)
