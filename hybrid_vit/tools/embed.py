"""Embeddings of all pictures of a folder, for `hybrid_vit.tools.search`.

python -m hybrid_vit.tools.embed --weights=DIR /path/photos --out=embeddings.npz

DIR holds weights of an image and a text tower (an import, or a training of the task "contrastive").
Pictures that cannot be read are named, counted and left out, and the command then returns 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hybrid_vit import checkpoints
from hybrid_vit.embeddings import embed
from hybrid_vit.plots import printable
from hybrid_vit.standard_streams import run_tool
from hybrid_vit.weights.stored_clip import load_clip


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; 0, 2 where pictures were left out, or 1 after an error."""
  parser = argparse.ArgumentParser(prog="embed", description=__doc__.splitlines()[0])
  parser.add_argument("folder", help="of pictures; its folders are looked through, too")
  parser.add_argument("--weights", required=True, help="directory of the weights")
  parser.add_argument("--out", default="embeddings.npz", help="the file to write")
  args = parser.parse_args(argv)
  try:
    model = load_clip(args.weights)
    where = str(Path(args.weights).resolve()) if Path(args.weights).exists() else args.weights
    made, skipped = embed(model, Path(args.folder).expanduser(), where)
    made.save(Path(args.out).expanduser())
  except (ValueError, OSError, checkpoints.CheckpointError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  for photo, reason in skipped.items():
    print(f"left out {printable(photo)}: {printable(reason)}", file=sys.stderr)
  count, width = made.vectors.shape
  print(f"{model.name}: {count} pictures, {width} numbers each, {len(skipped)} left out")
  print(f"written to {args.out}")
  return 2 if skipped else 0


if __name__ == "__main__":
  run_tool(main)
