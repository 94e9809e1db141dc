"""Fine-tuning shown on real photos: pretraining on seven classes of CIFAR-10, then the other three.

python docs/results/finetuning/run.py --data=cifar10_jpeg.zip --out=/tmp/finetuning

The zip holds train/<class>/*.jpg and test/<class>/*.jpg. The three classes have 200, 60 and 20
photos to learn from, so that balance matters, and 150 each to be measured on.
"""

import argparse
import csv
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from matplotlib.figure import Figure

NEW = {"cat": 200, "horse": 60, "truck": 20}
OLD_PHOTOS, MEASURED = 400, 150
# As CIFAR's pictures are: 32 pixels, the whole of them.
COMMON = (
  "--config.data.image_size=32",
  "--config.data.crop_ratio=1.0",
  "--config.sinks=()",
  "--config.log_every_steps=20",
)


def arguments() -> str:
  """The network's, as a literal that the command line takes."""
  return "--config.model.arguments=" + repr(
    {
      "stem_widths": (16, 16),
      "depths": (1, 1, 2),
      "widths": (32, 64, 96),
      "block_types": ("mbconv", "mbconv", "moat"),
      "strides": (1, 2, 2),
      "window_sizes": (None, None, None),
      "position_sizes": (None, None, 8),
      "head_size": 16,
      "batch_norm_momentum": 0.9,
    }
  )


def lay_out(archive: Path, out: Path) -> None:
  """Two folders of photos: old/ with seven classes, new/ with three."""
  with zipfile.ZipFile(archive) as file:
    names = sorted(name for name in file.namelist() if name.endswith(".jpg"))
    taken: dict[tuple[str, str], int] = {}
    for name in names:
      part, label = name.split("/")[-3:-1]
      most = MEASURED if part == "test" else NEW.get(label, OLD_PHOTOS)
      if taken.get((part, label), 0) < most:
        taken[part, label] = taken.get((part, label), 0) + 1
        to = out / ("new" if label in NEW else "old") / part / label / name.split("/")[-1]
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(file.read(name))


def command(*parts: str) -> float:
  """Runs one of the package's commands; seconds."""
  begin = time.monotonic()
  print("+", *parts, flush=True)
  subprocess.run([sys.executable, "-m", *parts], check=True)
  return time.monotonic() - begin


def draw(rows: list[dict[str, str]], png: Path) -> None:
  """Top-1 and the recall of each class, run by run."""
  figure = Figure(figsize=(8.6, 3.8), dpi=120, layout="constrained")
  axes = figure.add_subplot()
  keys = ["top1", *(key for key in rows[0] if key.startswith("recall"))]
  for number, key in enumerate(keys):
    places = [i + 0.2 * (number - 1.5) for i in range(len(rows))]
    label = key if key == "top1" else f"{key} ({NEW[key.split()[1]]} photos)"
    bars = axes.bar(places, [100 * float(row[key]) for row in rows], 0.19, label=label)
    axes.bar_label(bars, fmt="%.0f", fontsize=7)
  axes.set_xticks(range(len(rows)), [row["run"].replace(", ", ",\n") for row in rows], fontsize=8)
  axes.set_ylabel("per cent of 450 photos (recall: of 150)")
  axes.set_ylim(0, 105)
  axes.legend(fontsize=8, frameon=False, ncols=4)
  figure.savefig(png, metadata={"Software": None})


def main() -> None:
  """Everything; writes table.csv, table.png and probe.csv beside this file."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--data", type=Path, required=True)
  parser.add_argument("--out", type=Path, required=True)
  args = parser.parse_args()
  out, here = args.out, Path(__file__).parent
  if not (out / "new").exists():
    lay_out(args.data, out)
  train = "hybrid_vit.main"
  recipe = "--config=configs/finetune.py:tiny_moat_0,decay=1.0,lr=2e-3"
  command(
    train,
    f"{recipe},data=folder:{out / 'old'},epochs=8",
    f"--workdir={out / 'pretrained'}",
    arguments(),
    *COMMON,
  )
  new, init = f"data=folder:{out / 'new'}", f"init={out / 'pretrained'}"
  base = "--config=configs/finetune.py:tiny_moat_0,batch_size=32,epochs=20,patience=8,"
  runs = {
    "from scratch": f"{new},decay=1.0,lr=1e-3",
    "fine-tuned": f"{new},{init},lr=1e-3",
    "fine-tuned, balanced sampling": f"{new},{init},lr=1e-3,balance=1.0",
    "fine-tuned, weighted loss": f"{new},{init},lr=1e-3,weights=balanced",
    "linear probe, balanced sampling": f"{new},{init},probe=linear,balance=1.0",
  }
  rows = []
  for name, keys in runs.items():
    workdir = out / name.replace(", ", "_").replace(" ", "_")
    seconds = command(train, base + keys, f"--workdir={workdir}", arguments(), *COMMON)
    report = out / "reports" / workdir.name
    where, data = f"--weights={workdir}", f"--data=folder:{out / 'new'}"
    command("hybrid_vit.tools.report", where, data, f"--output={report}")
    about = json.loads((workdir / "export" / "metadata.json").read_text())
    recalls = {
      row["class"]: float(row["recall"]) for row in csv.DictReader((report / "classes.csv").open())
    }
    top1 = about["results"]["validation/top1"]
    rows.append(
      {
        "run": name,
        "top1": f"{top1:.4f}",
        **{f"recall {key}": f"{value:.4f}" for key, value in recalls.items()},
        "weights": about["weights"],
        "seconds": f"{seconds:.0f}",
      }
    )
    with (here / "table.csv").open("w", newline="") as file:
      writer = csv.DictWriter(file, list(rows[0]))
      writer.writeheader()
      writer.writerows(rows)
  draw(rows, here / "table.png")
  command(
    "hybrid_vit.tools.probe",
    f"--weights={out / 'pretrained'}",
    f"--data=folder:{out / 'new'}",
    "--shots=1,5,20",
    f"--output={here / 'probe.csv'}",
  )


if __name__ == "__main__":
  main()
