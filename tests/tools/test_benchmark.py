import jax
import jax.numpy as jnp
import pytest

from hybrid_vit.ops.depthwise_conv import FORMS
from hybrid_vit.tools import benchmark


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
  # GPUs alone have the kernels of "triton"; elsewhere they would be timed interpreted.
  expected = [form for form in FORMS if form != "triton" or jax.default_backend() == "gpu"]
  assert len(expected) >= 2
  assert len(lines) == 2 + len(expected) and f"on {jax.default_backend()}" in lines[0]
  assert [line.split(" ms")[0].split()[-5] for line in lines[2:]] == expected


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
