"""Checks what local tries of dense tasks left: a figure, pictures, an export."""

import sys
from pathlib import Path

from hybrid_vit.reporting import read_metrics

# The last evaluation's measure, the bound, and whether it is the least or the most.
BOUNDS = {
  "segmenter": ("mean_iou", 0.5, "least"),
  "depth": ("rmse", 0.95, "most"),
  "detector": ("box_ap50", 0.8, "least"),
}

workdir = Path(sys.argv[1])
measure, bound, kind = BOUNDS[workdir.name]
evaluations = [
  line for line in read_metrics(workdir / "metrics.jsonl") if line["kind"] == "eval/validation"
]
if not evaluations:
  sys.exit("metrics.jsonl has no line of kind eval/validation")
value = evaluations[-1][measure]
print(f"{measure} on held-out scenes: {value:.4f} (at {kind} {bound:g} is asked for)")
if not (value >= bound if kind == "least" else value <= bound):
  sys.exit(f"{measure} is not what it should be")
for pattern in ("curves.png", "predictions.png", "export/metadata.json", "checkpoints/*/*"):
  if not sorted(workdir.glob(pattern)):
    sys.exit(f"nothing in the work directory matches {pattern}")
