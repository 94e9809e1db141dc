"""Weights of ours → a .safetensors file under the authors' names, as their strict loaders take it.

python -m hybrid_vit.tools.export_weights --from=DIR --to=FILE.safetensors --layout=official
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybrid_vit import checkpoints
from hybrid_vit.models.clip_systems import CLIP_MODELS
from hybrid_vit.standard_streams import run_tool
from hybrid_vit.stored_tasks import stored_task
from hybrid_vit.weights import families, readers
from hybrid_vit.weights.dense_checkpoints import export_dense
from hybrid_vit.weights.stored import StoredNetwork, network_of
from hybrid_vit.weights.stored_clip import StoredClip, clip_of, merged
from hybrid_vit.weights.transfer import is_clip, is_dense, without_text


def export_weights(
  directory: str | Path,
  file: str | Path,
  layout: str | None = None,
  architecture: str | None = None,
  *,
  merge: bool = False,
) -> tuple[list[str], str]:
  """Writes the weights in `directory` to `file`, whole or not at all.

  Args:
    directory: an export, a checkpoint or a work directory; see `checkpoints.load_weights`.
    file: where to; ends in ".safetensors".
    layout: one of the architecture's: "official", "timm", "transformers", "open_clip"; of a
      backbone with its decoder "mmseg", "transformers", "deeplab2"; of detectors "mmdetection",
      "openmmlab", "torchvision", "detectron2"; of DINO "official", "detrex". None for "official";
      with a decoder for the one that an import was read by, else the first of these.
    architecture: name in the registry, or of a CLIP; None for what the weights' metadata says.
      Weights of two towers give both, unless this is the image tower's name.
    merge: merge branches first, where the network has any (MCi, the convolutional text tower).

  Returns:
    (the names in the file, the layout).

  Raises:
    ValueError: another ending, an unknown architecture or layout, or weights that say nothing of
      their network.
    CheckpointError: no weights in `directory`.
  """
  file = Path(file).expanduser()
  if file.suffix != ".safetensors":
    raise ValueError(f"--to={file} does not end in .safetensors, the one format that is written")
  weights, metadata = checkpoints.load_weights(directory)
  if is_dense(weights):
    stored = stored_task(directory, weights, metadata)
    if merge or architecture not in (None, stored.network):
      what = "--merge" if merge else f"--arch={architecture}"
      raise ValueError(f"{what}: {directory} holds a {stored.network} under a decoder")
    layout = layout or (metadata.get("source") or {}).get("layout")
    exported, layout = export_dense(weights, stored.task.model, stored.network, layout)
    name = stored.network
  else:
    network = _stored(directory, weights, metadata, architecture)
    model, variables, name = network.model, network.variables, network.name
    if merge:
      model, variables = merged(model, variables)
    layout = layout or "official"
    exported = families.export_checkpoint(variables, name, model, layout)
  about = {"format": "pt", "architecture": name, "layout": layout}
  readers.write_safetensors(file, exported, about)
  return list(exported), layout


def _stored(
  directory: str | Path,
  weights: dict[str, Any],
  metadata: dict[str, Any],
  architecture: str | None,
) -> StoredNetwork | StoredClip:
  asked_for_both = architecture is None or architecture in CLIP_MODELS
  if asked_for_both and (is_clip(weights) or architecture is not None):
    return clip_of(directory, weights, metadata, architecture)
  return network_of(directory, without_text(weights), metadata, architecture)


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; 0, or 1 after an error."""
  parser = argparse.ArgumentParser(prog="export_weights", description=__doc__.splitlines()[0])
  parser.add_argument("--from", dest="source", required=True, help="directory of the weights")
  parser.add_argument("--to", required=True, help="FILE.safetensors to write")
  parser.add_argument(
    "--layout", help="official (the default), timm, open_clip, mmseg, mmdetection, …"
  )
  parser.add_argument("--arch", help="network; default: as the weights say")
  parser.add_argument("--merge", action="store_true", help="merge the branches of MCi first")
  args = parser.parse_args(argv)
  try:
    names, layout = export_weights(args.source, args.to, args.layout, args.arch, merge=args.merge)
  except (ValueError, OSError, checkpoints.CheckpointError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  print(f"{len(names)} tensors, layout {layout}, written to {args.to}")
  return 0


if __name__ == "__main__":
  run_tool(main)
