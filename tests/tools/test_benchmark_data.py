"""Pictures a second: the way that is timed, rows beside timm, which is stood in for, and memory."""

import functools
import json
import mmap
import os
import time

import numpy as np
import pytest

from hybrid_vit.data.loader import train_batches
from hybrid_vit.data.sources import create_source
from hybrid_vit.tools import (
  benchmark,
  benchmark_data,
  memory_drift,
  process_figures,
  torch_loading,
  torch_process,
)
from tests.data.pictures import write_folder

STANDARD = "decode|random_resized_crop(224)|flip_lr"


def test_command(tmp_path, capsys):
  write_folder(tmp_path, {"train/cat": 3, "val/cat": 1})
  arguments = [f"--source=folder:{tmp_path}", "--transform=decode|resize(8)"]
  command = ["data", *arguments, "--pictures=7", "--rounds=1", "--workers=2"]
  assert benchmark.main(command) == 0
  lines = capsys.readouterr().out.splitlines()
  assert [line.split("  form ")[1].split()[0] for line in lines] == ["pil", "opencv"]
  assert "speed_ratio 1.0  per_core_ratio 1.0  ratio_to pil" in lines[0]
  assert all("workers 2  form" in line and "batch 64" in line for line in lines)
  assert benchmark.main(["data", "--source=folder:/not/there"]) == 1
  assert "looked for at /not/there" in capsys.readouterr().err


@pytest.mark.parametrize("by", benchmark_data.WORKERS)
def test_what_is_timed_is_the_way_of_a_training(tmp_path, monkeypatch, by):
  write_folder(tmp_path, {"train/cat": 3, "val/cat": 1})
  calls, batches = [], []

  def watched(source, readings, **options):
    found = train_batches(source, readings, **options)
    calls.append((readings[0].batch_size, readings[0].steps, options[f"num_{by}"]))

    class Watched:
      def __iter__(self):
        return self

      def __next__(self):
        batches.append(next(found))
        return batches[-1]

      def close(self):
        found.close()

    return Watched()

  monkeypatch.setattr(benchmark_data, "train_batches", watched)
  opens = functools.partial(create_source, f"folder:{tmp_path}", "train")
  call = benchmark_data.reader(
    opens, "decode|resize(8)", "pil", pictures=7, batch_size=2, workers=1, by=by
  )
  seconds, cpu = call()
  # Whole batches and nothing beyond them; of processes a first one, which does not count.
  steps = 4 if by == "threads" else 5
  assert calls == [(2, steps, 1)] and len(batches) == steps
  assert {batch["image"].shape for batch in batches} == {(2, 8, 8, 3)}
  assert seconds > 0 and cpu >= 0


FAKE_TORCH = """
import types
__version__ = "1.2.3"
manual_seed = lambda n: None
class Numbers(list):
  def tolist(self):
    return list(self)
randperm = lambda n: Numbers(range(n))
class DataLoader:
  def __init__(self, dataset, batch_size, **settings):
    self.dataset, self.batch_size, self.settings = dataset, batch_size, settings
    assert settings["num_workers"] == 3 and settings["multiprocessing_context"] == "forkserver"
    assert settings["persistent_workers"]
  def __iter__(self):
    rows = [self.dataset[i] for i in self.settings["sampler"]]
    print("a line of its own", len(rows))
    (self.settings["collate_fn"] or (lambda rows: rows))(rows)
    yield rows
utils = types.SimpleNamespace(data=types.SimpleNamespace(DataLoader=DataLoader))
"""
FAKE_TIMM = """
import json, pathlib
from . import data
__version__ = "4.5.6"
"""
FAKE_DATA = """
import pathlib
LOG = pathlib.Path(__file__).parent.parent.parent / "log"
def create_transform(size, **settings):
  with LOG.open("a") as file:
    print(size, sorted(settings.items()), file=file)
  return lambda picture: picture.size
"""
FAKE_LOADER = """
from . import LOG
def fast_collate(rows):
  with LOG.open("a") as file:
    print("collated", rows, file=file)
"""


@pytest.fixture
def fakes(tmp_path, monkeypatch):
  (tmp_path / "fakes/timm/data").mkdir(parents=True)
  for name, text in {
    "torch.py": FAKE_TORCH, "timm/__init__.py": FAKE_TIMM, "timm/data/__init__.py": FAKE_DATA,
    "timm/data/loader.py": FAKE_LOADER,
  }.items():  # fmt: skip
    (tmp_path / "fakes" / name).write_text(text)
  monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "fakes"), os.getcwd()]))
  monkeypatch.syspath_prepend(tmp_path / "fakes")
  return tmp_path / "fakes" / "log"


def test_rows_beside_timm_and_their_files(tmp_path, fakes, capsys):
  write_folder(tmp_path, {"train/cat": 3, "val/cat": 1})
  out = tmp_path / "speed" / "data"
  command = [f"--source=folder:{tmp_path}", "--against=timm", f"--transform={STANDARD}"]
  command += ["--workers=3", "--batch_size=2", "--pictures=4", "--rounds=1", f"--out={out}"]
  assert benchmark_data.main(command) == 0, capsys.readouterr().err
  stored = json.loads(out.with_suffix(".json").read_text())
  assert (stored["torch"], stored["timm"], stored["rounds"]) == ("1.2.3", "4.5.6", 1)
  assert [row["form"] for row in stored["rows"]] == [
    "pil",
    "opencv",
    "timm, uint8",
    "timm, float32",
  ]
  assert {row["ratio_to"] for row in stored["rows"]} == {"timm, uint8"}
  assert {(r["source"], r["transform"], r["workers"]) for r in stored["rows"]} == {
    ("folder", STANDARD, 3)
  }
  lines = fakes.read_text().splitlines()
  # What timm is told, and whole epochs of pictures: one that does not count, one that does.
  assert lines[0].startswith("224 [('color_jitter', None), ('interpolation', 'bicubic')")
  assert "('is_training', True), ('use_prefetcher', True)" in lines[0]
  assert "('use_prefetcher', False)" in lines[1]
  assert [line.count("(") for line in lines if line.startswith("collated")] == [8, 8]
  assert "| source | transform | batch | workers | form |" in out.with_suffix(".md").read_text()


def test_what_timm_has_nothing_beside(capsys):
  assert benchmark.main(["data", "--source=digits", "--against=timm", "--transform=resize(8)"]) == 1
  assert "timm has nothing beside 'resize(8)' here; it has: decode|" in capsys.readouterr().err
  for text, told in torch_loading.TRANSFORMS.items():
    assert text.startswith("decode|") and "is_training" in told


def test_a_library_that_is_missing_says_how_to_install_it(capsys, monkeypatch):
  monkeypatch.setattr(torch_process.importlib.util, "find_spec", lambda name: None)
  command = ["data", "--source=digits", "--against=timm", f"--transform={STANDARD}"]
  assert benchmark.main([*command, "--pictures=1"]) == 1
  assert "--against=timm needs torch: pip install torch" in capsys.readouterr().err


def test_memory_that_grows_shows(tmp_path, capsys, monkeypatch):
  times = np.linspace(0, 2, 50)
  slope, error = memory_drift.fitted_slope(times, 100 + 7 * times + np.sin(40 * times))
  assert slope == pytest.approx(7, abs=3 * error) and 0 < error < 1
  command = [f"--source=folder:{tmp_path}", "--transform=decode|resize(8)", "--batch_size=2"]
  # The first fifth, in which buffers fill, does not count.
  points = [(t, 10 * t, 100.0 if t < 20 else 300 + 7 * t / 3600) for t in range(101)]
  out, told = tmp_path / "memory", {}
  with monkeypatch.context() as patch:
    patch.setattr(memory_drift, "measure", lambda *given, **more: told.update(more) or points)
    assert memory_drift.main([*command, "--minutes=30", f"--out={out}"]) == 0
  assert told["seconds"] == 1800 and told["batch_size"] == 2
  (row,) = json.loads(out.with_suffix(".json").read_text())["rows"]
  assert (row["mib_per_hour"], row["standard_error"], row["pictures"]) == (7.0, 0.0, 1000)
  assert (row["first_mib"], row["least_mib"], row["source"]) == (300.0, 300.0, "folder")
  write_folder(tmp_path, {"train/cat": 3, "val/cat": 1})
  found = memory_drift.measure(
    f"folder:{tmp_path}", "train", None, "decode|resize(8)", "pil",
    batch_size=2, threads=1, seconds=0.05, every=0.0,
  )  # fmt: skip
  assert [read for _, read, _ in found] == list(range(2, 2 * len(found) + 1, 2))
  assert found[-1][0] >= 0.05 and all(10 < mib < 10_000 for _, _, mib in found)
  assert memory_drift.main([*command, "--minutes=0"]) == 1
  assert "three late ones at least" in capsys.readouterr().err


def test_figures_of_this_process():
  begin, own = process_figures.cpu_seconds([os.getpid()]), time.process_time()
  while time.process_time() - own < 0.1:
    pass
  assert 0.05 < process_figures.cpu_seconds([os.getpid()]) - begin < 1
  before = process_figures.resident_mib([os.getpid()])
  held = np.ones(2**26, np.uint8)
  assert 50 < process_figures.resident_mib([os.getpid()]) - before < 80, held.shape


def test_memory_does_not_move_with_those_who_read_the_same_files(tmp_path):
  path = tmp_path / "library"
  path.write_bytes(bytes(2**26))
  before = process_figures.resident_mib([os.getpid()])
  with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
    assert sum(mapped[:: mmap.PAGESIZE]) == 0
    assert abs(process_figures.resident_mib([os.getpid()]) - before) < 10
