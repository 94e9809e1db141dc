"""The pictures nearest to a text, or to a picture, among those of `hybrid_vit.tools.embed`.

python -m hybrid_vit.tools.search --embeddings=embeddings.npz "a red circle" --sheet=sheet.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hybrid_vit import checkpoints
from hybrid_vit.embeddings import Embeddings
from hybrid_vit.photos import read_photos
from hybrid_vit.plots import plot_sheet, printable
from hybrid_vit.standard_streams import run_tool
from hybrid_vit.weights.stored_clip import StoredClip, load_clip


def search(
  model: StoredClip, embeddings: Embeddings, query: str, count: int = 12
) -> list[tuple[Path, float]]:
  """Pictures and cosines, the nearest first.

  Args:
    model: of the weights that the embeddings were made by.
    embeddings: to look through.
    query: a text; or the file of a picture, where there is one of that name.
    count: of pictures, at most.

  Raises:
    ValueError: embeddings of other weights, or a file that is no picture.
  """
  if model.fingerprint != embeddings.fingerprint:
    raise ValueError(
      "these embeddings were made by other weights (their fingerprint is "
      f"{embeddings.fingerprint[:12]}, that of {model.name} {model.fingerprint[:12]}): run "
      "hybrid_vit.tools.embed again, or give the weights that made them"
    )
  file = _file(query)
  if file is None:
    found = model.encode_text(query)
  else:
    images, unread = read_photos([file], model.preprocessing)
    if unread:
      raise ValueError(f"{file} cannot be read: {unread[file]}")
    found = model.encode_image(list(images.values()))
  return embeddings.nearest(found[0], count)


def _file(query: str) -> Path | None:
  path = Path(query).expanduser()
  try:
    return path if path.is_file() else None
  except OSError:  # A text may be longer than a name can be.
    return None


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; 0, or 1 after an error."""
  parser = argparse.ArgumentParser(prog="search", description=__doc__.splitlines()[0])
  parser.add_argument("query", help="a text, or the file of a picture")
  parser.add_argument("--embeddings", default="embeddings.npz", help="what embed wrote")
  parser.add_argument("--weights", help="default: where they lay when the embeddings were made")
  parser.add_argument("--count", type=int, default=12, help="of pictures")
  parser.add_argument("--sheet", help="PNG of the pictures found")
  args = parser.parse_args(argv)
  try:
    if args.count < 1:
      raise ValueError(f"--count={args.count}; at least 1 was expected")
    embeddings = Embeddings.load(Path(args.embeddings).expanduser())
    model = load_clip(args.weights or embeddings.weights)
    found = search(model, embeddings, args.query, args.count)
    for path, cosine in found:
      print(f"  {cosine:.4f}  {printable(path)}")
    if args.sheet:
      images, gone = read_photos([path for path, _ in found], model.preprocessing)
      for path, reason in gone.items():
        print(f"not drawn, {printable(path)}: {printable(reason)}", file=sys.stderr)
      if not images:
        raise ValueError("none of the pictures found can be read any more: no sheet is drawn")
      titles = [f"{cosine:.3f}  {path.name}" for path, cosine in found if path in images]
      plot_sheet(list(images.values()), titles, args.query, args.sheet)
      print(f"drawn in {args.sheet}")
  except (ValueError, OSError, ImportError, checkpoints.CheckpointError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  return 0


if __name__ == "__main__":
  run_tool(main)
