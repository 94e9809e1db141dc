"""What the features of some weights are worth on one's own pictures, without training the network.

python -m hybrid_vit.tools.probe --weights=DIR --data=folder:/path

Nearest neighbours as DINO measures them, and a linear probe on few examples of each class, with
several draws of them. The training part is what is known, the validation part what is asked.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_vit import checkpoints
from hybrid_vit.data.errors import MissingDataError
from hybrid_vit.data.sources import create_source
from hybrid_vit.inference import Answers, answer
from hybrid_vit.probing import knn_votes, linear_probe, shots, top1
from hybrid_vit.standard_streams import run_tool
from hybrid_vit.weights.stored import load_network


def probe(
  known: Answers,
  asked: Answers,
  *,
  num_classes: int,
  k: Sequence[int] = (20,),
  temperature: float = 0.07,
  n_shots: Sequence[int] = (1, 5, 10),
  seeds: int = 5,
  l2: float = 1e-2,
) -> list[dict[str, Any]]:
  """Rows of a table: "probe", "top1" and "spread" (sample standard deviation over the draws).

  Args:
    known: answers to the training part.
    asked: answers to the part that is measured.
    num_classes: of the data.
    k: neighbours, each a row.
    temperature: see `knn_votes`.
    n_shots: examples of each class, each a row.
    seeds: draws of them.
    l2: see `linear_probe`.

  Raises:
    ValueError: settings out of range, or a class with fewer examples than shots.
  """
  rows: list[dict[str, Any]] = []
  for neighbours in k:
    votes = knn_votes(
      known.features,
      known.labels,
      asked.features,
      num_classes=num_classes,
      k=neighbours,
      temperature=temperature,
    )
    rows.append({"probe": f"{neighbours}-NN", "top1": top1(votes, asked.labels), "spread": None})
  for n in n_shots:
    found = []
    for seed in range(seeds):
      chosen = shots(known.labels, n, seed)
      kernel, bias = linear_probe(
        known.features[chosen], known.labels[chosen], num_classes=num_classes, l2=l2
      )
      found.append(top1(asked.features @ kernel + bias, asked.labels))
    spread = float(np.std(found, ddof=1)) if len(found) > 1 else None
    rows.append({"probe": f"{n}-shot linear", "top1": float(np.mean(found)), "spread": spread})
  return rows


def _numbers(text: str) -> tuple[int, ...]:
  try:
    found = tuple(int(part) for part in text.split(",") if part.strip())
  except ValueError:
    found = (0,)
  if any(n < 1 for n in found):
    raise argparse.ArgumentTypeError(f"{text!r}: whole numbers from 1 were expected, e.g. 1,5,10")
  return found


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; 0, or 1 after an error."""
  parser = argparse.ArgumentParser(prog="probe", description=__doc__.splitlines()[0])
  parser.add_argument("--weights", required=True, help="directory of the weights")
  parser.add_argument("--arch", help="network; default: as the weights say")
  parser.add_argument("--data", required=True, help="source, e.g. folder:/path")
  parser.add_argument("--known", default="train", help="split whose classes are known")
  parser.add_argument("--asked", default="validation", help="split that is measured")
  parser.add_argument("--k", type=_numbers, default=(10, 20), help="neighbours, e.g. 10,20")
  parser.add_argument("--temperature", type=float, default=0.07, help="of the neighbours' votes")
  parser.add_argument("--shots", type=_numbers, default=(1, 5, 10), help="e.g. 1,5,10")
  parser.add_argument("--seeds", type=int, default=5, help="draws of the few examples")
  parser.add_argument("--l2", type=float, default=1e-2, help="of the linear probe")
  parser.add_argument("--batch_size", type=int, default=32)
  parser.add_argument("--output", help="a CSV to write")
  args = parser.parse_args(argv)
  try:
    if args.seeds < 1 or args.batch_size < 1 or args.l2 < 0:
      raise ValueError("--seeds and --batch_size must be at least 1, --l2 not negative")
    network = load_network(args.weights, args.arch)
    sources = [create_source(args.data, split) for split in (args.known, args.asked)]
    known, asked = (answer(network, s, batch_size=args.batch_size) for s in sources)
    classes = len(sources[0].info.get("class_names", ())) or int(known.labels.max()) + 1
    rows = probe(
      known,
      asked,
      num_classes=classes,
      k=args.k,
      temperature=args.temperature,
      n_shots=args.shots,
      seeds=args.seeds,
      l2=args.l2,
    )
    if args.output:
      _write(Path(args.output), rows)
  except (ValueError, OSError, MissingDataError, checkpoints.CheckpointError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  print(
    f"{network.name}, weights from {args.weights}: {known.features.shape[1]} features; "
    f"{len(known.labels)} pictures of {classes} classes known, {len(asked.labels)} asked"
  )
  for name in (*known.unreadable, *asked.unreadable):
    print(f"left out, not readable: {name}", file=sys.stderr)
  for row in rows:
    spread = "" if row["spread"] is None else f" ± {row['spread']:.2%} over {args.seeds} draws"
    print(f"  {row['probe']:<18} top-1 {row['top1']:7.2%}{spread}")
  return 0


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("w", newline="") as file:
    writer = csv.DictWriter(file, ["probe", "top1", "spread"])
    writer.writeheader()
    writer.writerows(rows)


if __name__ == "__main__":
  run_tool(main)
