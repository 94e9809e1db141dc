r"""Writes pictures of a data set as PNG files, to look at or to try commands on.

    python -m hybrid_vit.tools.write_pictures --source=scenes:size=64 --count=300 pictures

A source whose examples have one class each becomes a folder that `folder:pictures` reads, with a
folder of each class within that of the part, `pictures/train/red_circle/000012.png`; with --flat
the files lie side by side, which other sources need. Pictures are as they are stored, before any
transform.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hybrid_vit.data.errors import CorruptExampleError
from hybrid_vit.data.sources import Source, create_source
from hybrid_vit.data.splits import parse_split
from hybrid_vit.data.transforms import parse_transform
from hybrid_vit.standard_streams import run_tool


def write_pictures(source: Source, directory: Path, count: int, *, part: str | None) -> int:
  """The first pictures of a source, as PNG files.

  Args:
    source: to read.
    directory: where; made where it is missing.
    count: at most.
    part: a folder of this name with one of each class in it; None for files side by side.

  Returns:
    How many were written.

  Raises:
    ValueError: classes are asked for of a source that has none, or whose names make the same
      folder.
    FileExistsError: there is something in the directory already.
  """
  folders = None if part is None else [directory / part / name for name in _folders(source)]
  if directory.exists() and any(directory.iterdir()):
    raise FileExistsError(f"{directory} is not empty: name a new directory")
  decode = parse_transform("decode", "pil")
  written = 0
  for index in range(min(count, len(source))):
    example = source[index]
    try:
      image = decode({"image": example["image"]}, np.random.default_rng(0))["image"]
    except CorruptExampleError as error:
      print(f"left out {source.describe(index)}: {error}", file=sys.stderr)
      continue
    folder = directory if folders is None else folders[int(example["label"])]
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(folder / f"{index:06}.png")
    written += 1
  return written


def _folders(source: Source) -> list[str]:
  names: Sequence[str] = source.info.get("class_names") or ()
  if not names or "label" not in source[0]:
    raise ValueError(
      "examples of this source have no class each: with --flat their files lie side by side"
    )
  folders = [re.sub(r"[^\w.-]+", "_", name) for name in names]
  if len(set(folders)) < len(folders):
    raise ValueError("names of classes make the same folder: --flat writes files side by side")
  return folders


def main(arguments: Sequence[str] | None = None) -> int:
  """The command; returns its exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m hybrid_vit.tools.write_pictures",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("directory", type=Path, help="to be made")
  parser.add_argument("--source", required=True, help="as config.data.source")
  parser.add_argument("--split", default="train", help="as config.data.split")
  parser.add_argument("--data_dir", help="as config.data.data_dir")
  parser.add_argument("--count", type=int, default=100, help="of pictures, at most")
  parser.add_argument("--flat", action="store_true", help="no folders of classes")
  options = parser.parse_args(arguments)
  if options.count < 1:
    parser.error(f"--count={options.count}: at least 1 was expected")
  directory = options.directory.expanduser()
  try:
    source: Any = create_source(options.source, options.split, options.data_dir)
    part = None if options.flat else parse_split(options.split)[0]
    number = write_pictures(source, directory, options.count, part=part)
  except (OSError, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  print(f"{directory}: {number:,} pictures of {options.source}")
  return 0


if __name__ == "__main__":
  run_tool(main)
