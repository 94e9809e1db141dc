"""Writes `tests/golden/torch/*`: files as PyTorch saves them, for the reader that has no PyTorch.

    pip install torch
    python -m tests.make_torch_files

The numbers are those of `state()` in tests/weights/test_torch_file.py.
"""

import argparse
import collections
import functools
import pathlib

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel

from tests.weights.test_torch_file import FILES, state


class Options(dict):
  """Like the options that published files hold: a class that the reader does not have."""


class Block(torch.nn.Module):
  """A module with all that modules keep: parameters, buffers of both kinds, modules in modules."""

  def __init__(self):
    super().__init__()
    numbers = {name: torch.from_numpy(np.array(value)) for name, value in state().items()}
    self.stem = torch.nn.Conv2d(3, 4, 2, bias=False)
    self.stem.weight.data = numbers["stem.weight"]
    self.norms = torch.nn.ModuleList([torch.nn.BatchNorm1d(5)])
    self.register_buffer("mask", torch.zeros(7), persistent=False)
    self.register_buffer("halved", numbers["halved"])


def beside():
  """What lies beside the tensors in the files of trainings."""
  return {
    "epoch": 3,
    "args": argparse.Namespace(
      lr=0.1, path=pathlib.PurePosixPath("/data"), device=torch.device("cpu")
    ),
    "config": Options(lr=0.1, inner=Options(steps=[1, 2])),
    "history": collections.deque([1.0, 2.0], maxlen=9),
    "schedule": functools.partial(max, 3, key=abs),
    "counts": collections.Counter("aab"),
    "nested": collections.defaultdict(list, {"a": [1]}),
    "best": np.float64(81.2),
    "curve": np.arange(3),
    "names": np.array(["a", None], object),
    "kinds": {torch.float32, torch.int8},
    "size": torch.Size([1, 2]),
    "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"params": [0]}]},
    "state_dict_ema": None,
  }


def main() -> None:
  """Writes all of them."""
  FILES.mkdir(parents=True, exist_ok=True)
  tensors = {name: torch.from_numpy(np.array(value)) for name, value in state().items()}
  whole = torch.arange(12, dtype=torch.float32).reshape(3, 4)
  tensors |= {
    "brain": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
    "eight": torch.tensor([1.5, -2.0]).to(torch.float8_e5m2),
    "parameter": torch.nn.Parameter(torch.ones(3)),
    "view": whole[1:, ::2].T,
    "shared": whole[0],
    "wide": torch.ones(1, 2).expand(3, 2),
    "empty": torch.zeros(0, 3),
  }
  for as_zip, name in ((True, "new"), (False, "old")):
    save = functools.partial(torch.save, _use_new_zipfile_serialization=as_zip)
    # The old format has no way to say where 8-bit floats lie.
    kept = {k: v for k, v in tensors.items() if as_zip or k != "eight"}
    save({"model": kept, **beside()}, FILES / f"{name}.pth")
    save(Block(), FILES / f"module_{name}.pth")
  averaged = AveragedModel(torch.nn.DataParallel(Block()))
  torch.save(averaged.state_dict(), FILES / "averaged.pth")
  torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), FILES / "script.pt")
  sparse = {"a": torch.ones(2), "rare": torch.eye(2).to_sparse()}
  torch.save(sparse, FILES / "sparse.pth")


if __name__ == "__main__":
  main()
