import jax
import jax.numpy as jnp
import pytest

from hybrid_vit.data.loader import train_batches
from hybrid_vit.data.sources import create_source
from hybrid_vit.ops.depthwise_conv import FORMS
from hybrid_vit.tools import benchmark
from tests.data.pictures import write_folder


def test_forms_take_turns_and_the_median_counts(monkeypatch):
  order, clock = [], [0.0]
  durations = {"a": iter([9, 1, 5, 3]), "b": iter([9, 2, 2, 8])}  # the first calls are not timed

  def run(name):
    order.append(name)
    clock[0] += next(durations[name])

  monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])
  runs = {name: lambda name=name: run(name) for name in durations}
  assert benchmark.interleaved_medians(runs, 3) == {"a": 3, "b": 2}
  assert order == ["a", "b"] * 4


def test_a_slow_form_shows_as_slow():
  def slow(x):
    return jax.lax.fori_loop(0, 50, lambda _, y: jnp.sin(y), x)

  case = benchmark.Case("sine", {"fast": jnp.sin, "slow": slow}, (jnp.ones((300, 300)),))
  fast, slow_row = benchmark.time_case(case, 3)
  assert (fast.form, fast.forward_ratio, fast.both_ratio) == ("fast", 1.0, 1.0)
  assert slow_row.forward_ratio > 3 and slow_row.both_ratio > 3
  assert slow_row.forward == pytest.approx(fast.forward * slow_row.forward_ratio)


def test_command_for_an_operation(capsys):
  assert benchmark.main(["depthwise_conv", "--rounds=1", "--cases=1"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 2 + len(FORMS) and f"on {jax.default_backend()}" in lines[0]
  assert [line.split(" ms")[0].split()[-5] for line in lines[2:]] == list(FORMS)


def test_command_for_data(tmp_path, capsys):
  write_folder(tmp_path, {"train/cat": 3, "val/cat": 1})
  arguments = [f"--source=folder:{tmp_path}", "--transform=decode|resize(8)"]
  assert benchmark.main(["data", *arguments, "--pictures=7", "--rounds=1", "--threads=2"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[2].split()[0] == "pil" and lines[2].split()[-1] == "1.00"
  assert lines[3].split()[0] == "opencv" and int(lines[3].split()[1]) > 0
  assert benchmark.main(["data", "--source=folder:/not/there"]) == 1
  assert "looked for at /not/there" in capsys.readouterr().err


def test_data_is_timed_on_the_way_that_training_takes(tmp_path, monkeypatch):
  write_folder(tmp_path, {"train/cat": 3, "val/cat": 1})
  calls, batches = [], []

  def watched(source, readings, **options):
    calls.append((readings[0].batch_size, readings[0].steps, options))
    for batch in train_batches(source, readings, **options):
      batches.append(batch)
      yield batch

  monkeypatch.setattr(benchmark, "train_batches", watched)
  rates = benchmark.pictures_per_second(
    create_source(f"folder:{tmp_path}", "train"),
    "decode|resize(8)",
    ["pil"],
    pictures=7,
    batch_size=2,
    threads=1,
    rounds=2,
  )
  # A round to warm up and two that count, each of whole batches and nothing beyond them.
  assert calls == [(2, 4, {"seed": 0, "num_threads": 1})] * 3 and len(batches) == 12
  assert {batch["image"].shape for batch in batches} == {(2, 8, 8, 3)}
  assert rates["pil"] > 0


def test_names_are_registered_once():
  with pytest.raises(ValueError, match="registered already"):
    benchmark.register_operation("depthwise_conv")(lambda: iter(()))


def test_tokenizers_side_by_side(capsys):
  pytest.importorskip("tokenizers")
  assert benchmark.main(["tokenizer", "--captions=20", "--rounds=1"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert [line[:9] for line in lines[1:4]] == ["new words", "new words", "20,000 wo"]
  assert all(float(line.split()[-1]) > 0 for line in lines[1:4])
  few = benchmark.made_captions(50, 1, ["ab"], 3)
  assert len({word for caption in few for word in caption.split()}) <= 3
  assert few != benchmark.made_captions(50, 2, ["ab"], 3)
