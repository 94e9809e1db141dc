r"""Speed of whole networks, inference and training steps, beside PyTorch or by a TPU's compiler.

    python -m hybrid_vit.tools.benchmark networks moat_0 convnext_tiny --batch 8 \
      --out=docs/results/speed/cpu
    python -m hybrid_vit.tools.benchmark networks convnext_tiny swin_tiny --against=timm
    python -m hybrid_vit.tools.benchmark networks convnext_tiny --modes training --batch 64 \
      --dtypes bfloat16 --topology=v5e:2x2 --out=docs/results/speed/v5e
    python -m hybrid_vit.tools.benchmark networks convnext_tiny --argument "depths=(1, 1, 2, 1)"

A training step is the one that `hybrid_vit.main` compiles: cross entropy, AdamW, the network's own
drop path; on Linux with huge pages, as there. What is compared is called in turn, round by round:
milliseconds are medians, and so are ratios, each taken within its round. With --against the same
network (or what stands beside it, as the table says) trains and predicts in PyTorch: as it is, in
channels_last, and compiled where a C++ compiler is at hand; the ratio is to the fastest of these.
With --topology nothing is run: the figures are the compiler's estimates, of one chip (libtpu is
needed: pip install 'jax[tpu]').
Writes OUT.json, OUT.md and OUT.png, in which rows of an earlier call stay, but those of the same
network, mode, size, batch and type.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_vit import programs, recipes, sharding, topology_plan, tpu_topology
from hybrid_vit.build import DataFacts, Run, build
from hybrid_vit.config import Config
from hybrid_vit.literals import named_literal
from hybrid_vit.models.registry import closest_hint, list_models
from hybrid_vit.plots import plot_bars
from hybrid_vit.settings import XLA_OPTIMIZATION_LEVELS
from hybrid_vit.standard_streams import run_tool
from hybrid_vit.tools import torch_networks
from hybrid_vit.tools.benchmark_results import earlier_rows, head_of, seconds_in_turn, write_results
from hybrid_vit.tools.summarize import count_multiply_adds

MODES = ("inference", "training")
DTYPES = ("float32", "bfloat16")
OURS = "hybrid_vit"
# What each form of ours sets in the configuration, by its name.
Forms = Mapping[str, Mapping[str, Any]]
PLAIN: Forms = {OURS: {}}
_CLASSES = 1000
_FIRST = ("network", "mode", "size", "batch", "dtype", "form")


@dataclasses.dataclass(frozen=True)
class Setting:
  """What one row, or one row of each form, is about.

  Attributes:
    network: name in the registry.
    mode: one of `MODES`.
    size: side of the pictures.
    batch: pictures at once.
    dtype: of the computation; parameters are float32.
    arguments: of the network, other than the registry's, by their names.
  """

  network: str
  mode: str
  size: int
  batch: int
  dtype: str
  arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def key(self) -> dict[str, Any]:
    """The columns that say what a row is of, but for the form."""
    columns = dataclasses.asdict(self)
    arguments = [f"{name}={value!r}" for name, value in columns.pop("arguments").items()]
    columns["network"] = ", ".join([self.network, *arguments])
    return columns

  def row(self, form: str) -> dict[str, Any]:
    """The columns that say what a row is of."""
    return {**self.key(), "form": form}


def run_of(setting: Setting, **fields: Any) -> Run:
  """A training of the network: cross entropy, AdamW, 1,000 classes; with fields set besides."""
  config = recipes.imagenet(setting.network, batch_size=setting.batch, num_classes=_CLASSES)
  if setting.arguments:
    config.model.arguments = dict(setting.arguments)
  config.precision = setting.dtype
  config.update(fields)
  config.data.image_size = setting.size
  config.total_steps = 1000
  config.optimizer = {
    "name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.05,
    "schedule": {"name": "constant"},
  }  # fmt: skip
  return build(Config(config), DataFacts({}, 1_281_167, _CLASSES))


def random_batch(run: Run) -> dict[str, np.ndarray]:
  """Noise and classes by chance, of the shapes of a training batch."""
  rng = np.random.default_rng(0)
  made: dict[str, np.ndarray] = {}
  for name, leaf in run.batches[0].items():
    high = 256 if leaf.dtype == np.uint8 else _CLASSES if name == "label" else 1
    made[name] = rng.integers(0, high, leaf.shape).astype(leaf.dtype)
  return made


def forms_of(mode: str, scan: bool, levels: Sequence[str]) -> Forms:
  """The plain form of ours, and those that are asked for.

  Args:
    mode: of `MODES`; the levels are those of training steps.
    scan: with equal blocks scanned, too.
    levels: of XLA's optimisation, each a form.
  """
  forms: dict[str, Mapping[str, Any]] = dict(PLAIN)
  if scan:
    forms[f"{OURS}, blocks scanned"] = {"scan_blocks": True}
  if mode == "training":
    forms |= {f"{OURS}, {level}": {"xla_optimization_level": level} for level in levels}
  return forms


def measure(
  setting: Setting,
  rounds: int,
  peer: str | None = None,
  forms: Forms = PLAIN,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
  """Rows of one setting: ours, and each form of the peer's; and versions of its libraries.

  Args:
    setting: of what.
    rounds: all forms take turns so many times, after a call of each that does not count.
    peer: "timm" or "transformers"; None for ours alone.
    forms: of ours, see `forms_of`.
  """
  ours = {name: _compiled(run_of(setting, **fields), setting) for name, fields in forms.items()}
  with contextlib.ExitStack() as stack:
    runs: dict[str, Callable[[], Any]] = {name: call for name, (call, _) in ours.items()}
    versions: dict[str, str] = {}
    if peer is not None:
      calls = torch_networks.calls(
        peer, setting.network, setting.size, setting.batch, setting.dtype,
        setting.mode == "training",
      )  # fmt: skip
      theirs, versions = stack.enter_context(calls)
      runs |= theirs
    seconds = seconds_in_turn(runs, rounds, settle=True)
  others = [name for name in runs if name not in ours]
  fastest = min(others, key=lambda name: statistics.median(seconds[name]), default=None)
  rows = []
  for name, own in seconds.items():
    middle = statistics.median(own)
    row = setting.row(name) | {
      "ms": round(1e3 * middle, 2), "images_per_second": round(setting.batch / middle, 2),
    }  # fmt: skip
    if fastest is not None:
      ratios = [b / a for a, b in zip(own, seconds[fastest])]
      row |= {"speed_ratio": round(statistics.median(ratios), 3), "ratio_to": fastest}
    rows.append(row | (ours[name][1](setting.batch / middle) if name in ours else {}))
  return rows, versions


def _compiled(
  run: Run, setting: Setting
) -> tuple[Callable[[], Any], Callable[[float], dict[str, Any]]]:
  """One call that waits for its result; and what else is known, by pictures a second."""
  mesh = sharding.make_mesh({}, jax.devices()[:1])
  batch = sharding.put_tree(
    random_batch(run), jax.tree.map(lambda _: sharding.batch_sharding(mesh), dict(run.batches[0]))
  )
  begin = time.perf_counter()
  if setting.mode == "training":
    compiled = programs.compile_step(run, 0, mesh)
    seconds = time.perf_counter() - begin
    _, layout = programs.abstract_state(run, mesh)
    made = jax.jit(functools.partial(programs.new_state, run), out_shardings=layout)
    held = [made(jax.random.key(0))]

    def call() -> None:
      # The state is given away and comes back.
      held[0], report = compiled(held[0], batch)
      jax.block_until_ready((held[0], report))

  else:
    variables = jax.jit(run.task.init)(jax.random.key(0), batch)
    begin = time.perf_counter()
    compiled = jax.jit(run.task.predict).lower(variables, {"image": batch["image"]}).compile()
    seconds = time.perf_counter() - begin

    def call() -> None:
      jax.block_until_ready(compiled(variables, {"image": batch["image"]}))

  memory = compiled.memory_analysis()
  peak_bytes = (
    memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
  ) - memory.alias_size_in_bytes
  flops, most = _flops(run, setting), programs.peak_flops(mesh)

  def facts(rate: float) -> dict[str, Any]:
    found = {
      "compile_seconds": round(seconds, 1), "gflop_per_image": round(flops / 1e9, 2),
      "memory_mib": round(peak_bytes / 2**20, 1),
    }  # fmt: skip
    return found if most is None else {**found, "mfu": round(flops * rate / most, 4)}

  return call, facts


def _flops(run: Run, setting: Setting) -> float:
  """Of a picture, by the usual convention: a training step is three forward passes."""
  if setting.mode == "training":
    return programs.flops_per_example(run, 0)
  image = jax.ShapeDtypeStruct((1, setting.size, setting.size, 3), jnp.float32)
  variables = jax.eval_shape(run.task.init, jax.random.key(0), run.batches[0])
  return 2.0 * count_multiply_adds(run.task.predict, variables, {"image": image})


def estimate(setting: Setting, topology: str, forms: Forms = PLAIN) -> list[dict[str, Any]]:
  """A row of each form (see `forms_of`) by a TPU's compiler, of one chip.

  Raises:
    tpu_topology.TopologyError: see `tpu_topology.topology_devices`.
  """
  chip = tpu_topology.chip_of(topology)
  device = tpu_topology.topology_devices(topology)[0]
  return [
    _estimated(run_of(setting, **fields), setting, topology, chip, device, name)
    for name, fields in forms.items()
  ]


def _estimated(
  run: Run, setting: Setting, topology: str, chip: Any, device: jax.Device, form: str
) -> dict[str, Any]:
  if setting.mode == "training":
    mesh = sharding.make_mesh({}, [device])
    said = topology_plan.plan_step(run, topology, mesh, 0).compilation
  else:
    variables = jax.eval_shape(run.task.init, jax.random.key(0), run.batches[0])
    image = {"image": run.batches[0]["image"]}
    said = tpu_topology.compile_for(run.task.predict, variables, image, device=device)
  row = setting.row(f"{form}, {topology.partition(':')[0]} estimated") | {
    "compile_seconds": round(said.seconds, 1), "fits": said.fits,
    "memory_mib": round(said.peak_bytes / 2**20, 1),
  }  # fmt: skip
  if said.fits and said.cycles.total:
    flops, seconds = _flops(run, setting), said.cycles.total / chip.clock
    rate = setting.batch / seconds
    row |= {
      "ms": round(1e3 * seconds, 2), "images_per_second": round(rate, 1),
      "gflop_per_image": round(flops / 1e9, 2), "mfu": round(flops * rate / chip.peak_flops, 4),
      "traffic_mb_per_image": round(said.accessed_bytes / 1e6 / setting.batch, 1),
      "mcycles": round(said.cycles.total / 1e6, 2),
    }  # fmt: skip
    shares = {kind: said.cycles.by_kind.get(kind, 0) for kind in tpu_topology.KINDS}
    row |= {f"{kind}_%": round(100 * part / said.cycles.total, 1) for kind, part in shares.items()}
  return row


def settings_of(options: argparse.Namespace) -> Iterator[Setting]:
  """Networks, modes, sizes, batches and types, all of each with all of the others."""
  parts = (options.networks, options.modes, options.size, options.batch, options.dtypes)
  for network, mode, size, batch, dtype in itertools.product(*parts):
    yield Setting(network, mode, size, batch, dtype, dict(options.argument))


def draw(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
  """Pictures a second of each row, a panel for each mode."""
  panels: dict[str, dict[str, dict[str, float]]] = {}
  stand_ins = {
    row["network"]: name
    for row in rows
    if (name := row["form"].rpartition(", ")[0]) in torch_networks.stand_ins()
  }
  for row in rows:
    if "images_per_second" in row:
      label = f"{row['network']}, {row['batch']} x {row['size']}, {row['dtype']}"
      form = row["form"]
      # What stands in is said beside our name: its forms have the peer's colours.
      if other := stand_ins.get(row["network"]):
        label, form = f"{label}\n(timm: {other})", form.replace(other, "timm")
      bars = panels.setdefault(f"{row['mode']}, images a second", {}).setdefault(label, {})
      bars[form] = row["images_per_second"]
  if panels:
    plot_bars(panels, path.with_name(path.name + ".png"), title)


def main(arguments: Sequence[str] | None = None) -> int:
  """The command; returns its exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m hybrid_vit.tools.benchmark networks",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("networks", nargs="+", help="names in the registry")
  parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
  parser.add_argument("--size", type=int, nargs="+", default=[224])
  parser.add_argument("--batch", type=int, nargs="+", default=[8])
  parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--against", choices=torch_networks.PEERS, help="needs .[torch] and it")
  parser.add_argument("--scan", action="store_true", help="equal blocks scanned, too")
  parser.add_argument(
    "--levels", nargs="+", choices=XLA_OPTIMIZATION_LEVELS, default=[],
    help="training steps compiled at these levels of XLA's optimisation, too",
  )  # fmt: skip
  parser.add_argument(
    "--argument", type=named_literal, action="append", default=[], metavar="NAME=VALUE",
    help="attribute of the networks that is not the registry's; may be repeated",
  )  # fmt: skip
  parser.add_argument("--topology", help="of TPUs to compile for, e.g. v5e:2x2")
  parser.add_argument("--out", type=Path, help="of the files, without an ending")
  given = list(sys.argv[1:] if arguments is None else arguments)
  options = parser.parse_args(given)
  known = list_models()
  for name in options.networks:
    if name not in known:
      parser.error(f"no network is named {name!r}{closest_hint(name, known)}")
  if options.topology and options.against:
    parser.error("--topology runs nothing that --against could be beside")
  if options.argument and options.against:
    parser.error("--argument makes a network that nobody else has: --against does not go with it")
  rows = [] if options.out is None else earlier_rows(options.out)
  head = head_of("benchmark networks", given, options.topology, options.rounds)
  # Rows of other days and machines stand beside these.
  made: dict[str, Any] = {name: head[name] for name in ("date", "device") if name in head}
  try:
    for setting in settings_of(options):
      forms = forms_of(setting.mode, options.scan, options.levels)
      if options.topology:
        found = estimate(setting, options.topology, forms)
      else:
        found, versions = measure(setting, options.rounds, options.against, forms)
        head |= versions
      for row in found:
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
      same = setting.key().items()
      rows = [row for row in rows if not same <= row.items()]
      rows += [{**row, **made} for row in found]
      if options.out is not None:
        # Also what an interrupted call leaves is whole.
        write_results(options.out, head, rows, _FIRST)
  except (tpu_topology.TopologyError, torch_networks.PeerError, ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  if options.out is not None:
    draw(options.out, rows, "estimated by the compiler" if options.topology else "measured")
  return 0


if __name__ == "__main__":
  run_tool(main)
