"""The benchmark of networks: rows, files, what it refuses; PyTorch and TPUs are stood in for."""

import contextlib
import json

import jax
import pytest

from hybrid_vit.data.ahead import available_cores
from hybrid_vit.tools import benchmark, benchmark_networks, benchmark_results, torch_networks
from hybrid_vit.tools.benchmark_networks import Setting
from hybrid_vit.tpu_topology import Compilation, Cycles

SETTING = Setting("tiny_moat_0", "training", 32, 2, "float32")


@pytest.fixture
def tiny(monkeypatch):
  """A network that compiles in no time in the place of the registry's."""
  build = benchmark_networks.run_of

  def tiny_run(setting, **fields):
    recipe = benchmark_networks.recipes.imagenet

    def imagenet(*args, **kwargs):
      config = recipe(*args, **kwargs)
      config.model.arguments = {
        "stem_widths": (8, 8), "depths": (1, 1), "widths": (16, 32),
        "block_types": ("mbconv", "moat"), "strides": (2, 2), "window_sizes": (None, None),
        "position_sizes": (None, 4), "head_size": 16,
      }  # fmt: skip
      return config

    with monkeypatch.context() as patch:
      patch.setattr(benchmark_networks.recipes, "imagenet", imagenet)
      run = build(setting, **fields)
    assert run.tasks[0].model.scan_blocks is fields.get("scan_blocks", False)
    assert run.settings.xla_optimization_level == fields.get("xla_optimization_level")
    return run

  monkeypatch.setattr(benchmark_networks, "run_of", tiny_run)


def test_rows_beside_a_peer_and_their_files(tiny, monkeypatch, tmp_path):
  asked = []

  @contextlib.contextmanager
  def calls(peer, network, size, batch, dtype, training):
    asked.append((peer, network, size, batch, dtype, training))
    yield {"timm, eager": lambda: None, "timm, channels_last": lambda: None}, {"timm": "9.9"}

  monkeypatch.setattr(torch_networks, "calls", calls)
  out = tmp_path / "speed" / "cpu"
  command = ["networks", "tiny_moat_0", "--size=32", "--batch=2", "--rounds=2", "--against=timm",
             "--scan"]  # fmt: skip
  assert benchmark.main([*command, f"--out={out}"]) == 0
  assert asked == [("timm", "tiny_moat_0", 32, 2, "float32", t) for t in (False, True)]
  stored = json.loads(out.with_suffix(".json").read_text())
  assert (
    stored["rounds"] == 2
    and stored["timm"] == "9.9"
    and "benchmark networks tiny_moat_0" in stored["command"]
  )
  rows = stored["rows"]
  # Which processor is said of each, since rows of others may stand beside them.
  cores = f"{available_cores()} cores)"
  assert all(row["device"] == stored["device"] and cores in row["device"] for row in rows)
  assert [(r["mode"], r["form"]) for r in rows] == [
    (mode, form)
    for mode in ("inference", "training")
    for form in ("hybrid_vit", "hybrid_vit, blocks scanned", "timm, eager", "timm, channels_last")
  ]
  ours = rows[0]
  assert ours["images_per_second"] == pytest.approx(2e3 / ours["ms"], rel=0.05)
  assert ours["compile_seconds"] > 0 and ours["memory_mib"] > 0
  # What does nothing is faster than we are.
  assert ours["ratio_to"] in ("timm, eager", "timm, channels_last") and ours["speed_ratio"] < 0.5
  assert rows[4]["gflop_per_image"] == pytest.approx(3 * ours["gflop_per_image"], rel=0.2)
  assert rows[1]["compile_seconds"] > 0 and rows[1]["ratio_to"] == ours["ratio_to"]
  assert "| tiny_moat_0 | training |" in out.with_suffix(".md").read_text()
  assert out.with_suffix(".png").stat().st_size > 5000
  # Rows of another setting stay, those of the same one are taken anew.
  again = ["networks", "tiny_moat_0", "--size=32", "--rounds=1", "--modes=inference"]
  assert benchmark.main([*again, "--batch=2", f"--out={out}"]) == 0
  kept = json.loads(out.with_suffix(".json").read_text())["rows"]
  assert [(r["mode"], r["form"]) for r in kept] == [
    *[(r["mode"], r["form"]) for r in rows[4:]],
    ("inference", "hybrid_vit"),
  ]


def test_a_training_step_is_the_loops_own_and_goes_on(tiny):
  run = benchmark_networks.run_of(SETTING)
  call, facts = benchmark_networks._compiled(run, SETTING)
  for _ in range(3):
    call()  # the state was given away and came back
  assert facts(10.0)["memory_mib"] > 0 and "mfu" not in facts(10.0)
  batch = benchmark_networks.random_batch(run)
  assert {k: v.shape for k, v in batch.items()} == {k: v.shape for k, v in run.batches[0].items()}
  assert batch["image"].max() > 200 and batch["label"].max() > 1


@pytest.mark.parametrize("mode", benchmark_networks.MODES)
def test_estimates_are_of_one_chip(tiny, monkeypatch, mode):
  said = Compilation(
    9.0, True, 2**30, 0, 0, 1e12, 4e9, Cycles(3_000_000, {}, {}, 0, {"norms": 750_000}), ""
  )
  topology = benchmark_networks.tpu_topology
  monkeypatch.setattr(topology, "topology_devices", lambda name: jax.devices())
  monkeypatch.setattr(topology, "compile_for", lambda *arguments, device: said)
  monkeypatch.setattr(topology, "examine", lambda compile_program: said)
  setting = Setting("tiny_moat_0", mode, 32, 2, "bfloat16")
  (row,) = benchmark_networks.estimate(setting, "v5e:2x2")
  assert row["ms"] == 2.0 and row["images_per_second"] == 1000.0 and row["memory_mib"] == 1024
  assert row["norms_%"] == 25 and row["copies_%"] == 0
  assert row["traffic_mb_per_image"] == 2000 and row["form"] == "hybrid_vit, v5e estimated"
  forms = benchmark_networks.forms_of(mode, True, ["O0"])
  several = benchmark_networks.estimate(setting, "v5e:2x2", forms)
  names = ["blocks scanned", *(["O0"] if mode == "training" else [])]
  assert several == [
    row,
    *({**row, "form": f"hybrid_vit, {name}, v5e estimated"} for name in names),
  ]
  assert row["mfu"] == round(1e9 * row["gflop_per_image"] * 1000 / 197e12, 4)


def test_the_chart_has_a_stand_in_in_the_peer_s_colours(monkeypatch, tmp_path):
  drawn = []
  monkeypatch.setattr(benchmark_networks, "plot_bars", lambda panels, *rest: drawn.append(panels))
  own = {"mode": "training", "batch": 8, "size": 224, "dtype": "float32", "images_per_second": 1.0}
  rows = [
    {**own, "network": name, "form": form}
    for name, form in (
      ("moat_0", "hybrid_vit"), ("moat_0", "coatnet_0_rw_224, eager"), ("mci0", "timm, eager"),
    )
  ]  # fmt: skip
  benchmark_networks.draw(tmp_path / "a", rows, "")
  (panel,) = drawn[0].values()
  assert {label: set(bars) for label, bars in panel.items()} == {
    "moat_0, 8 x 224, float32\n(timm: coatnet_0_rw_224)": {"hybrid_vit", "timm, eager"},
    "mci0, 8 x 224, float32": {"timm, eager"},
  }


def test_what_cannot_be_is_named(monkeypatch, capsys):
  with pytest.raises(SystemExit):
    benchmark.main(["networks", "moat_00"])
  assert "did you mean 'moat_0" in capsys.readouterr().err
  with pytest.raises(SystemExit):
    benchmark.main(["networks", "moat_0", "--topology=v5e:2x2", "--against=timm"])
  assert "runs nothing" in capsys.readouterr().err
  with pytest.raises(torch_networks.PeerError, match="timm has nothing beside l2vit_tiny; it has"):
    torch_networks.calls("timm", "l2vit_tiny", 32, 1, "float32", False).__enter__()
  monkeypatch.setattr(torch_networks.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(torch_networks.PeerError, match="pip install torch"):
    torch_networks.calls("timm", "moat_0", 32, 1, "float32", False).__enter__()


def test_calls_take_turns_and_the_first_does_not_count(monkeypatch):
  clock, order = [0.0], []

  def run(name, seconds):
    order.append(name)
    # A first call compiles.
    clock[0] += seconds if order.count(name) > 1 else 50.0

  monkeypatch.setattr(benchmark_results.time, "perf_counter", lambda: clock[0])
  runs = {"slow": lambda: run("slow", 9.0), "fast": lambda: run("fast", 1.0)}
  seconds = benchmark_results.seconds_in_turn(runs, 3, long=5.0)
  assert seconds == {"slow": [9.0] * 3, "fast": [1.0] * 3}
  assert order == ["slow", "fast", "slow", "fast", "fast", "fast"]


FAKE_TORCH = """
import contextlib
__version__ = "1.2.3"
contiguous_format, channels_last, bfloat16 = "contiguous", "last", "bfloat16"
set_num_threads = manual_seed = lambda n: None
compile = lambda model: model
autocast = lambda *arguments, **fields: contextlib.nullcontext()
inference_mode = contextlib.nullcontext
class Tensor:
  def to(self, **fields):
    return self
randn = randint = lambda *shape: Tensor()
"""
FAKE_TIMM = """
import pathlib
__version__ = "4.5.6"
class Model:
  def __init__(self, fields):
    self.fields = fields
  def to(self, memory_format):
    self.layout = memory_format
    return self
  def eval(self):
    print("a line of its own")
  def __call__(self, images):
    with pathlib.Path(__file__).with_name("called").open("a") as file:
      print(self.fields, self.layout, file=file)
    if pathlib.Path(__file__).with_name("broken").exists():
      raise SystemExit(3)
create_model = lambda name, **fields: Model({"name": name, **fields})
"""


def test_pytorch_waits_in_a_process_of_its_own(tmp_path, monkeypatch):
  (tmp_path / "torch.py").write_text(FAKE_TORCH)
  (tmp_path / "timm.py").write_text(FAKE_TIMM)
  monkeypatch.setenv("PYTHONPATH", str(tmp_path))
  monkeypatch.syspath_prepend(tmp_path)
  with torch_networks.calls("timm", "swin_tiny", 32, 2, "float32", False) as (forms, versions):
    assert versions == {"torch": "1.2.3", "timm": "4.5.6"}
    name = "swin_tiny_patch4_window7_224"
    assert list(forms)[:2] == ["timm, eager", "timm, channels_last"]
    forms["timm, channels_last"]()
    forms["timm, eager"]()
    lines = (tmp_path / "called").read_text().splitlines()
    assert [line.split()[-1] for line in lines] == ["last", "contiguous"]
    assert f"'name': '{name}'" in lines[0] and "'drop_path_rate': 0.2" in lines[0]
    (tmp_path / "broken").touch()
    with pytest.raises(torch_networks.PeerError, match="timm's process ended with status 3"):
      forms["timm, eager"]()


def test_a_network_with_arguments_is_a_row_of_its_own(tmp_path, capsys):
  out = tmp_path / "cpu"
  command = ["networks", "tiny_moat_0", "--size=96", "--batch=1", "--rounds=1", f"--out={out}",
             "--modes=inference"]  # fmt: skip
  given = [
    "depths=(1, 1)", "widths=(16, 32)", "block_types=('mbconv', 'moat')", "strides=(2, 2)",
    "window_sizes=(None, None)", "position_sizes=(None, 12)", "head_size=16",
  ]  # fmt: skip
  stems = ("stem_widths=(32, 64)", "stem_widths=(32, 64)", "stem_widths=(32,)")
  said = [[f"--argument={argument}" for argument in [*given, stem]] for stem in stems]
  for arguments in said:
    assert benchmark.main([*command, *arguments]) == 0
  rows = json.loads(out.with_suffix(".json").read_text())["rows"]
  # The second call replaced the row of the first.
  assert [row["network"] for row in rows] == [
    ", ".join(["tiny_moat_0", *given, stem]) for stem in stems[1:]
  ]
  assert rows[0]["gflop_per_image"] > rows[1]["gflop_per_image"]
  capsys.readouterr()
  for broken in ("depths=(1, 1", "depths=f()"):
    with pytest.raises(SystemExit):
      benchmark.main([*command, f"--argument={broken}"])
    error = capsys.readouterr().err
    assert repr(broken.partition("=")[2]) in error and "such as 0.1, (1, 1, 2, 1)" in error
  with pytest.raises(SystemExit):
    benchmark.main([*command, *said[0], "--against=timm"])
  assert "--against does not go with it" in capsys.readouterr().err
