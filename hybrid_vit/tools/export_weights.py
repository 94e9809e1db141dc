"""Weights of ours → a .safetensors file under the authors' names, as their strict loaders take it.

python -m hybrid_vit.tools.export_weights --from=DIR --to=FILE.safetensors --layout=official
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hybrid_vit import checkpoints
from hybrid_vit.models.clip_systems import CLIP_MODELS
from hybrid_vit.weights import families, readers
from hybrid_vit.weights.stored import StoredNetwork, network_of
from hybrid_vit.weights.stored_clip import StoredClip, clip_of, merged
from hybrid_vit.weights.transfer import is_clip, without_text


def export_weights(
  directory: str | Path,
  file: str | Path,
  layout: str = "official",
  architecture: str | None = None,
  *,
  merge: bool = False,
) -> list[str]:
  """Writes the weights in `directory` to `file`, whole or not at all.

  Args:
    directory: an export, a checkpoint or a work directory; see `checkpoints.load_weights`.
    file: where to; ends in ".safetensors".
    layout: one of the architecture's: "official", "timm", "transformers", "open_clip".
    architecture: name in the registry, or of a CLIP; None for what the weights' metadata says.
      Weights of two towers give both, unless this is the image tower's name.
    merge: merge branches first, where the network has any (MCi, the convolutional text tower).

  Returns:
    The names in the file.

  Raises:
    ValueError: another ending, an unknown architecture or layout, or weights that say nothing of
      their network.
    CheckpointError: no weights in `directory`.
  """
  file = Path(file).expanduser()
  if file.suffix != ".safetensors":
    raise ValueError(f"--to={file} does not end in .safetensors, the one format that is written")
  network = _stored(directory, architecture)
  model, variables = network.model, network.variables
  if merge:
    model, variables = merged(model, variables)
  exported = families.export_checkpoint(variables, network.name, model, layout)
  about = {"format": "pt", "architecture": network.name, "layout": layout}
  readers.write_safetensors(file, exported, about)
  return list(exported)


def _stored(directory: str | Path, architecture: str | None) -> StoredNetwork | StoredClip:
  weights, metadata = checkpoints.load_weights(directory)
  asked_for_both = architecture is None or architecture in CLIP_MODELS
  if asked_for_both and (is_clip(weights) or architecture is not None):
    return clip_of(directory, weights, metadata, architecture)
  return network_of(directory, without_text(weights), metadata, architecture)


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; 0, or 1 after an error."""
  parser = argparse.ArgumentParser(prog="export_weights", description=__doc__.splitlines()[0])
  parser.add_argument("--from", dest="source", required=True, help="directory of the weights")
  parser.add_argument("--to", required=True, help="FILE.safetensors to write")
  parser.add_argument("--layout", default="official", help="official, timm, open_clip, …")
  parser.add_argument("--arch", help="network; default: as the weights say")
  parser.add_argument("--merge", action="store_true", help="merge the branches of MCi first")
  args = parser.parse_args(argv)
  try:
    names = export_weights(args.source, args.to, args.layout, args.arch, merge=args.merge)
  except (ValueError, OSError, checkpoints.CheckpointError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  print(f"{len(names)} tensors, layout {args.layout}, written to {args.to}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
