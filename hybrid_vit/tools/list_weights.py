"""Where the files of the authors' weights are, with licence and mirrors.

python -m hybrid_vit.tools.list_weights 'cvt_*'

Nothing is downloaded: get a file, then give it to `hybrid_vit.tools.import_weights`. With
`--docs=docs/weights.md` the table of that page is written anew.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hybrid_vit.standard_streams import run_tool
from hybrid_vit.tables import markdown_table, replace_marked
from hybrid_vit.weights.official_files import OfficialFile, official_files

_SOURCE = "python -m hybrid_vit.tools.list_weights --docs=docs/weights.md"


def markdown(files: Sequence[OfficialFile]) -> str:
  """The files as a Markdown table."""
  head = ("architecture", "file", "obtainable", "licence", "mirror", "notes")
  lines = []
  for file in files:
    notes = [file.notes] if file.notes else []
    notes += [f"SHA-256 {file.sha256}"] if file.sha256 else []
    # Plain links are one word each; the source is said where a reader would doubt.
    said = "" if file.obtainable == "linked" else f" ({file.source})"
    lines.append(
      (
        file.architecture,
        f"[{file.file}]({file.address})",
        file.obtainable + said,
        file.licence,
        file.mirror,
        "; ".join(notes),
      )
    )
  return markdown_table(head, lines, texts=range(len(head)))


def with_table(page: str) -> str:
  """The page with its table written anew.

  Raises:
    ValueError: the page has no place for it.
  """
  return replace_marked(page, _SOURCE, markdown(official_files()))


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; 0, or 1 where no architecture matches."""
  parser = argparse.ArgumentParser(prog="list_weights", description=__doc__.splitlines()[0])
  parser.add_argument("pattern", nargs="?", default="*", help="name or pattern of architectures")
  parser.add_argument("--docs", type=Path, help="page whose table is to be written anew")
  args = parser.parse_args(argv)
  if args.docs is not None:
    args.docs.write_text(with_table(args.docs.read_text(encoding="utf-8")), encoding="utf-8")
    return 0
  files = official_files(args.pattern)
  for file in files:
    print(f"{file.architecture}: {file.file}")
    for field in ("address", "sha256", "licence", "obtainable", "source", "mirror", "notes"):
      if value := getattr(file, field):
        print(f"  {field}: {value}")
  if not files:
    print(f"error: no file is known for {args.pattern!r}", file=sys.stderr)
  return 0 if files else 1


if __name__ == "__main__":
  run_tool(main)
