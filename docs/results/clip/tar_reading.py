"""Pairs a second on one core from WebDataset tars: by index here, and by the package webdataset.

python docs/results/clip/tar_reading.py --images=folder_of_pictures
pip install webdataset    # for the comparison; the project itself does not need it

Both readers take the same tars, of those pictures as they are and made-up captions, and the same
function decodes, crops and tokenizes. They take turns on one core, and what counts is the time that
this process had it, whatever else the machine does; the ratio is the median of the rounds' ratios.
Tars are in the system's file cache.
"""

import argparse
import io
import itertools
import os
import tarfile
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from hybrid_vit.data.loader import Reading, train_batches
from hybrid_vit.data.sources import create_source
from hybrid_vit.data.spec import Field
from hybrid_vit.data.transforms import parse_transform
from hybrid_vit.tables import write_table

HERE = Path(__file__).parent
TRANSFORM = "decode|random_resized_crop(224)|flip_lr|captions|tokenize(77)"
WORDS = ("a", "photo", "of", "two", "small", "red", "dogs", "asleep", "under", "the", "old", "tree")
BATCH = 64


def main() -> None:
  """Writes tar_reading.csv and tar_reading.md."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--images", required=True, type=Path)
  parser.add_argument("--tars", type=int, default=4)
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--seconds", type=float, default=4.0, help="of each reader in each round")
  args = parser.parse_args()
  os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
  cv2.setNumThreads(1)
  rows = []
  for side in (None, 256):
    with tempfile.TemporaryDirectory() as folder:
      paths, size = write_tars(Path(folder), args.images, args.tars, side)
      name = f"{'as they are' if side is None else f'short side {side}'}, {size / 1024:.0f} KB"
      for work, readers in kinds_of_work(paths).items():
        rates = {reader: [] for reader in readers}
        for _ in range(args.rounds + 1):
          for reader, pairs in readers.items():
            rates[reader].append(rate(pairs(), args.seconds))
        row = {"pictures": name, "work": work}
        row |= {f"{r}, pairs/s": round(float(np.median(v[1:]))) for r, v in rates.items()}
        if len(rates) == 2:
          here, package = (np.array(found[1:]) for found in rates.values())
          row["ratio"] = round(float(np.median(here / package)), 2)
        rows.append(row)
        print(row, flush=True)
  write_table(HERE / "tar_reading", rows)


def write_tars(folder: Path, images: Path, count: int, side: int | None) -> tuple[list[str], float]:
  """Tars of all the pictures each, shrunk to a short side, and the mean size of a picture."""
  files = sorted(p for p in images.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
  if not files:
    raise SystemExit(f"{images} holds no .jpg or .jpeg")
  pictures = [file.read_bytes() if side is None else shrunk(file, side) for file in files]
  rng = np.random.default_rng(0)
  paths = []
  for k in range(count):
    paths.append(str(folder / f"{k:05d}.tar"))
    with tarfile.open(paths[-1], "w") as tar:
      for i, picture in enumerate(pictures):
        caption = " ".join(rng.choice(WORDS, int(rng.integers(6, 16))))
        for ending, data in (("jpg", picture), ("txt", caption.encode())):
          member = tarfile.TarInfo(f"{k:03d}{i:06d}.{ending}")
          member.size = len(data)
          tar.addfile(member, io.BytesIO(data))
  return paths, float(np.mean([len(picture) for picture in pictures]))


def shrunk(file: Path, side: int) -> bytes:
  """A JPEG of that short side, as tools that collect pairs store them."""
  with Image.open(file) as image:
    factor = side / min(image.size)
    size = tuple(round(factor * length) for length in image.size)
    buffer = io.BytesIO()
    image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
  return buffer.getvalue()


def kinds_of_work(paths):
  """What is timed → the readers: functions that give an endless iterator of numbers of pairs."""
  source = create_source(f"tar:{Path(paths[0]).parent}", "train")
  transform = parse_transform(TRANSFORM)
  fields = {
    "image": Field("image", "uint8", (224, 224, 3)),
    "text": Field("text", "int32", (1, 77)),
  }

  def here_alone():
    for index in itertools.cycle(np.random.default_rng(0).permutation(len(source))):
      source[int(index)]
      yield 1

  def here():
    batches = train_batches(source, [Reading(BATCH, transform, fields)], seed=0, num_threads=1)
    try:
      for _ in batches:
        yield BATCH
    finally:
      batches.close()

  alone, whole = {"hybrid_vit": here_alone}, {"hybrid_vit": here}
  try:
    import webdataset
  except ImportError:
    print("webdataset is not installed: no comparison")
    return {"reading": alone, TRANSFORM: whole}
  rng = np.random.default_rng(0)

  def example(sample):
    return {"image": sample["jpg"], "captions": {"caption": [sample["txt"].decode()]}}

  def arrays(sample):
    found = transform(example(sample), rng)
    return found["image"], found["text"]

  def stream():
    # Its usual shuffle, of tars and in a buffer; the order here is a permutation of all pairs.
    return webdataset.WebDataset(paths, shardshuffle=100).repeat().shuffle(1000)

  alone["webdataset"] = lambda: (1 for _ in stream().map(example))
  whole["webdataset"] = lambda: (BATCH for _ in stream().map(arrays).batched(BATCH))
  return {"reading": alone, TRANSFORM: whole}


def rate(pairs, seconds):
  """Pairs a second of this process's time, all threads together, after the first few."""
  for _ in range(2):
    next(pairs)
  begin, count = time.process_time(), 0
  while (passed := time.process_time() - begin) < seconds:
    count += next(pairs)
  pairs.close()
  return count / passed


if __name__ == "__main__":
  main()
