"""The same pictures read by PyTorch's DataLoader through timm's transforms, as calls to time.

Each call is an epoch of so many pictures by worker processes that stay. Bytes come from the very
sources that ours come from, so that only the way from bytes to batches differs: Pillow decodes, and
timm's transforms and collation make uint8 batches as its loader hands them to a device ("uint8"),
or normalised float32 ones as it makes without one ("float32").
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from hybrid_vit.data.sources import Source, create_source
from hybrid_vit.tools.process_figures import cpu_seconds
from hybrid_vit.tools.torch_process import PeerError, serve, served

# What timm's `create_transform` is told, by our string of the same transform.
TRANSFORMS: dict[str, dict[str, Any]] = {
  "decode|random_resized_crop(224)|flip_lr": {"is_training": True, "color_jitter": None},
  "decode|resize_center_crop(224)": {"is_training": False, "crop_pct": 0.875},
}


@dataclasses.dataclass
class Pictures:
  """A source as DataLoader wants it; each worker opens it for itself."""

  source: str
  split: str
  data_dir: str | None
  transform: Callable[[Any], Any]
  opened: Source | None = None

  def __getitem__(self, index: int) -> tuple[Any, int]:
    from PIL import Image

    if self.opened is None:
      self.opened = create_source(self.source, self.split, self.data_dir)
    example = self.opened[index]
    picture = Image.open(io.BytesIO(example["image"])).convert("RGB")
    return self.transform(picture), int(example["label"])


@contextlib.contextmanager
def calls(
  source: str,
  split: str,
  data_dir: str | None,
  transform: str,
  *,
  pictures: int,
  batch_size: int,
  workers: int,
) -> Iterator[tuple[dict[str, Callable[[], str]], dict[str, str]]]:
  """One call of each form, by its name: an epoch, batch by batch; returns its CPU seconds.

  Args:
    source: see `hybrid_vit.data.sources`; of pictures with labels.
    split: see there.
    data_dir: see there.
    transform: one of `TRANSFORMS`.
    pictures: of an epoch, whole batches, shuffled; drawn several times where there are fewer.
    batch_size: of how many.
    workers: processes that read.

  Yields:
    (the calls; versions of the libraries).

  Raises:
    PeerError: timm or torch is not installed, there is no such transform there, or it failed.
  """
  if transform not in TRANSFORMS:
    known = "; ".join(TRANSFORMS)
    raise PeerError(f"timm has nothing beside {transform!r} here; it has: {known}")
  told = {"source": source, "split": split, "data_dir": data_dir, "transform": transform,
          "pictures": pictures, "batch_size": batch_size, "workers": workers}  # fmt: skip
  with served(__name__, "timm", [json.dumps(told)]) as found:
    yield found


def _serve(
  source: str,
  split: str,
  data_dir: str | None,
  transform: str,
  pictures: int,
  batch_size: int,
  workers: int,
) -> None:
  import timm
  import torch
  from timm.data.loader import fast_collate

  def made() -> dict[str, Callable[[], Any]]:
    torch.manual_seed(0)
    count = len(create_source(source, split, data_dir))
    return {
      f"timm, {name}": _epoch(
        torch.utils.data.DataLoader(
          Pictures(source, split, data_dir, _transform(transform, name == "uint8")),
          batch_size,
          sampler=_Shuffled(count, pictures),
          num_workers=workers,
          collate_fn=fast_collate if name == "uint8" else None,
          persistent_workers=True,
          # Forked ones would share what JAX has begun.
          multiprocessing_context="forkserver",
        )
      )
      for name in ("uint8", "float32")
    }

  serve({"torch": torch.__version__, "timm": timm.__version__}, made)


def _transform(text: str, as_bytes: bool) -> Callable[[Any], Any]:
  from timm.data import create_transform

  return create_transform(224, interpolation="bicubic", use_prefetcher=as_bytes, **TRANSFORMS[text])


class _Shuffled:
  """So many numbers below `count`, each epoch anew, all of them before one comes again."""

  def __init__(self, count: int, pictures: int):
    self._count, self._pictures = count, pictures

  def __len__(self) -> int:
    return self._pictures

  def __iter__(self) -> Iterator[int]:
    import torch

    turns = iter(lambda: torch.randperm(self._count).tolist(), None)
    return itertools.islice(itertools.chain.from_iterable(turns), self._pictures)


def _epoch(loader: Any) -> Callable[[], float]:
  def run() -> float:
    # Those of the first call begin with it; it does not count.
    workers = [worker.pid for worker in multiprocessing.active_children()]
    begin = cpu_seconds([os.getpid(), *workers])
    for _ in loader:
      pass
    return cpu_seconds([os.getpid(), *workers]) - begin

  return run


if __name__ == "__main__":
  _serve(**json.loads(sys.argv[1]))
