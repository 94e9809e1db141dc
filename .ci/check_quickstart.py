"""Checks what the quickstart left in its work directory: accuracy, pictures, a checkpoint."""

import sys
from pathlib import Path

from hybrid_vit.reporting import read_metrics

LEAST_TOP1 = 0.98

workdir = Path(sys.argv[1])
evaluations = [
  line for line in read_metrics(workdir / "metrics.jsonl") if line["kind"] == "eval/validation"
]
if not evaluations:
  sys.exit("metrics.jsonl has no line of kind eval/validation")
top1 = evaluations[-1]["top1"]
print(f"top-1 on the held-out part: {top1:.2%} (at least {LEAST_TOP1:.0%} is asked for)")
if not top1 >= LEAST_TOP1:
  sys.exit("the accuracy is too low")
for pattern in ("*curves*.png", "*predictions*.png", "checkpoints/*/*", "tensorboard/*"):
  found = sorted(workdir.glob(pattern))
  if not found:
    sys.exit(f"nothing in the work directory matches {pattern}")
  print(f"{pattern}: {', '.join(str(path.relative_to(workdir)) for path in found)}")
