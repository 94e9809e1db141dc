"""The dry run: its figures by hand, everything wrong found, the communication of a real step."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit import dry_run, recipes, run_plan
from hybrid_vit.collectives import Collective, collectives_of
from hybrid_vit.config import Config, load_config

CONFIGS = Path(__file__).parent.parent / "configs"
MINI = {
  "stem_widths": (8, 8),
  "depths": (1, 1),
  "widths": (16, 32),
  "block_types": ("mbconv", "moat"),
  "strides": (2, 2),
  "window_sizes": (None, None),
  "position_sizes": (None, 4),
  "head_size": 16,
}


def config(**changes):
  """The local try with a mini network; changes by path, "data.batch_size"."""
  values = recipes.run_locally(load_config(CONFIGS / "moat.py"), MINI)
  with values.unlocked():
    for path, value in changes.items():
      *groups, name = path.split("__")
      group = values
      for part in groups:
        group = group[part]
      group[name] = value
  return Config(values)


def examine(devices=8, **changes):
  return dry_run.examine(config(**changes), devices)


@pytest.fixture(scope="module")
def plain():
  return examine()


def test_state_of_each_device(plain):
  assert plain.problems == []
  parameters = sum(p.size for p in jax.tree.leaves(plain.state.params))
  assert plain.state_bytes["params"] == 4 * parameters
  # Two moments and the step's number; an EMA is not kept.
  assert plain.state_bytes["opt_state"] == 2 * 4 * parameters + 2 * 4
  assert plain.state_bytes["ema"] == 0
  statistics = sum(s.size for s in jax.tree.leaves(plain.state.batch_stats))
  assert plain.state_bytes["batch_stats"] == 4 * statistics


def test_sharding_and_ema_change_it(plain):
  split = examine(mesh__fsdp=4, ema_decay=0.99)
  assert split.problems == [] and dict(split.mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1}
  assert 0.25 < split.state_bytes["params"] / plain.state_bytes["params"] < 0.5
  held = split.state_bytes["params"] + split.state_bytes["batch_stats"]
  assert split.state_bytes["ema"] == held


def test_multiply_adds_and_length(plain):
  twice = examine(data__image_size=64, data__transform="decode|resize(64)")
  assert plain.evaluation_shapes == {"image": (32, 32, 3)}
  assert twice.evaluation_shapes == {"image": (64, 64, 3)}
  assert 3.5 < twice.multiply_adds / plain.multiply_adds < 5
  # Four epochs of 1,437 pictures in batches of 64.
  assert plain.run.examples_per_epoch == 1437 and plain.run.curriculum.total_steps == 90


def test_activations_of_a_devices_rows(plain):
  assert plain.rows == 8
  whole = examine(devices=1)
  assert whole.rows == 64
  # What does not depend on the rows (transposed kernels, keys) is little.
  assert 6 < whole.activation_bytes / plain.activation_bytes <= 8
  parts = examine(devices=1, accumulation_steps=8)
  assert parts.rows == 8 and parts.activation_bytes == plain.activation_bytes


def test_recomputation_keeps_less(plain):
  assert examine(remat=True).activation_bytes < 0.5 * plain.activation_bytes


def test_activations_by_hand():
  class Task:
    def augment(self, batch, key, step):
      return batch

    def loss(self, variables, batch, key):
      hidden = jnp.sin(batch["image"] @ variables["params"]["kernel"])
      return jnp.sum(hidden), {}

  variables = {"params": {"kernel": jax.ShapeDtypeStruct((5, 7), np.float32)}}
  batch = {"image": jax.ShapeDtypeStruct((3, 5), np.float32)}
  # The cosine [3, 7]; the images are given and the kernel's product is not needed again.
  assert run_plan.activation_bytes(Task(), variables, batch) == 3 * 7 * 4


def test_grouped_batch_norms_do_not_trouble_few_rows():
  assert examine(batch_norm_groups=8, devices=16).problems == []


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"data__batch_size": 60}, "batch_size 60 does not fall on the 8 devices.*e.g. 64"),
    ({"accumulation_steps": 7}, "batch_size 64 does not fall into .*accumulation_steps 7"),
    ({"mesh__fsdp": 3}, r"config.mesh: .*needs a multiple of 3 devices, and 8"),
    ({"data__batch_sise": 3}, "`config.data.batch_sise` is not read.*`config.data.batch_size`"),
    ({"sharding_rules": (("quarry", "fsdp"), (".*", "fsdp"))}, "'quarry' matches no parameter"),
    ({"sharding_rules": (("kernel", "fsdp"),)}, "no sharding rule covers parameter"),
    (
      {"optimizer__weight_decay_rules": (("nothing", 0.0), (".*", 1.0))},
      "config.optimizer: .*rule 'nothing' matches no parameter",
    ),
    ({"optimizer__schedule__warmup_epochs": 9}, "warm-up of 202 steps leaves nothing"),
    ({"model__name": "moat_9"}, "no model is named 'moat_9'; did you mean"),
    ({"model__arguments__width": 3}, "no argument 'width'; did you mean 'widths'"),
    ({"model__num_classes": 11}, "is 11 and the training data has 10 classes"),
    (
      {"model__arguments__pad_windows": False, "model__arguments__window_sizes": (None, 3)},
      "the network on image 32x32x3: .*window of 3x3 does not divide a map of 4x4",
    ),
    ({"data__transform": "decode|resise(32)"}, "unknown transform 'resise'; did you mean resize"),
    ({"checkpoint__best_metric": "val/top1"}, "'val/top1'; there are: validation/top1"),
    ({"task__label_smoothing": 1.5}, "label_smoothing is 1.5"),
    ({"batch_norm_groups": 7}, "7 groups do not divide a batch of 64"),
  ],
)
def test_what_is_wrong_is_named(changes, message):
  problems = examine(**changes).problems
  assert any(re.search(message, problem) for problem in problems), problems


def test_all_that_is_wrong_comes_at_once():
  problems = examine(data__batch_size=60, checkpoint__best_metric="x").problems
  assert len(problems) == 2 and "'x'" in problems[0] and "batch_size 60" in problems[1]


def test_data_that_is_not_here_is_no_problem(tmp_path):
  plan = examine(data__source=f"folder:{tmp_path / 'none'}", model__num_classes=None)
  assert plan.problems == []
  assert any("is not here" in note for note in plan.notes)
  assert any("number of classes: 1000" in note for note in plan.notes)
  known = examine(data__source="tfds:imagenet2012", data__data_dir=str(tmp_path))
  assert known.run.examples_per_epoch == 1_281_167
  assert known.run.curriculum.total_steps == round(4 * 1_281_167 / 64)


def test_devices_are_those_of_the_mesh_or_eight():
  assert dry_run.examine(config(mesh={"data": 2, "fsdp": 2})).devices == 4
  assert dry_run.examine(config(mesh={"data": -1, "fsdp": 4})).devices == 8
  assert dry_run.examine(config(mesh={"data": -1, "fsdp": 16})).devices == 16


def test_smaller_meshes_keep_their_axes():
  assert dry_run.reduced_mesh((4, 2, 1), 8) == (4, 2, 1)
  assert dry_run.reduced_mesh((32, 8, 1), 8) == (2, 4, 1)
  assert dry_run.reduced_mesh((1, 7, 3), 8) == (1, 1, 3)


def test_collectives_are_read_from_hlo():
  text = """
%inner.1 (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %all-reduce.8 = f32[4]{0} all-reduce(%x), channel_id=4, to_apply=%add
}

%open.1 (p: (s32[], f32[4])) -> pred[] {
  ROOT %lt.2 = pred[] compare(%i, %n), direction=LT
}

%cond.1 (p: (s32[], f32[4,8])) -> pred[] {
  %constant.7 = s32[] constant(7)
  ROOT %lt.1 = pred[] compare(%i, %constant.7), direction=LT
}

%body.1 (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %while.5 = (s32[], f32[4]) while(%t), condition=%open.1, body=%inner.1, TRIPS
  %all-reduce.9 = f32[4,8]{1,0} all-reduce(%x), channel_id=3, to_apply=%add
}

ENTRY %main (a: f32[2]) -> f32[2] {
  %all-reduce.1 = (f32[10]{0}, bf16[3,2]{1,0}) all-reduce(%a, %b), channel_id=1, to_apply=%add
  %all-gather-start.2 = (f32[5]{0}, f32[20]{0}) all-gather-start(%c), channel_id=2
  %all-gather-done.2 = f32[20]{0} all-gather-done(%all-gather-start.2)
  %fusion.3 = f32[9]{0} fusion(%all-reduce.1), kind=kLoop, calls=%fused
  %while.4 = (s32[], f32[4,8]) while(%t), condition=%cond.1, body=%body.1
}
"""
  known = text.replace("TRIPS", 'backend_config={"known_trip_count":{"n":"3"}}')
  assert collectives_of(known) == [
    Collective("all-reduce", True, 1, 128, 7),
    Collective("all-reduce", True, 1, 16, 21),
    Collective("all-gather", False, 1, 80),
    Collective("all-reduce", False, 1, 52),
  ]
  assert Collective("all-reduce", True, 1, 16, None) in collectives_of(text)


@pytest.mark.slow
def test_the_whole_command_compiles_a_step_and_counts_its_gradients():
  """On 8 devices that hold all parameters, at least every gradient is reduced once."""
  command = [sys.executable, "-m", "hybrid_vit.main", "--mode=dry_run"]
  command += [f"--config={CONFIGS / 'moat.py'}:runlocal"]
  done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
  assert done.returncode == 0, done.stdout + done.stderr
  assert "8 simulated CPU devices (data 8, fsdp 1, tensor 1)" in done.stdout
  assert done.stdout.rstrip().endswith("nothing wrong found")
  line = next(part for part in done.stdout.splitlines() if " all-reduce " in part)
  total = next(part for part in done.stdout.splitlines() if part.startswith("  total"))
  parameters = int(total.split()[1].replace(",", ""))
  assert float(line.split()[2]) >= 4 * parameters / 2**20 - 0.01
  assert "all-gather" not in done.stdout

  wrong = subprocess.run(
    [*command, "--config.data.batch_size=60", "--devices=7"],
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert wrong.returncode == 1
  assert "1. config.data.batch_size 60 does not fall on the 7 devices" in wrong.stdout
