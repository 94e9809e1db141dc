"""The command as its users call it: what a run leaves, how it stops, goes on and is evaluated."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from hybrid_vit.checkpoints import load_weights
from hybrid_vit.data.sources import create_source
from hybrid_vit.reporting import read_metrics
from tests import command
from tests.endurance import kills, runs

pytestmark = pytest.mark.slow


def test_an_unbroken_run_leaves_everything(unbroken, compilation_cache):
  workdir, output = unbroken
  lines = read_metrics(workdir / "metrics.jsonl")
  train = [line for line in lines if line["kind"] == "train"]
  evaluated = [line for line in lines if line["kind"] == "eval/validation"]
  assert [line["step"] for line in train] == list(range(2, command.STEPS + 1, 2))
  assert [line["step"] for line in evaluated] == [15, 30]
  assert all(line["examples"] == 360 for line in evaluated)
  assert train[-1]["loss"] < 0.95 * train[0]["loss"]
  # The compilation's time stands alone and is in no rate.
  timings = read_metrics(workdir / "timings.jsonl")
  assert [t["step"] for t in timings if "compile_seconds" in t] == [0]
  assert "compiled the step in" in output
  # What it says to do next is what the fine-tuning below does.
  assert f"add --config.init_from={workdir} --config.reinitialize_head=True" in output
  assert any(compilation_cache.iterdir())
  for name in ("config.json", "curves.png", "predictions.png", "tensorboard"):
    assert (workdir / name).exists(), name
  assert json.loads((workdir / "config.json").read_text())["data"]["batch_size"] == 96
  kept = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())
  assert kept == [24, 27, 30]
  best = max(evaluated, key=lambda line: line["top1"])["step"]
  assert [int(p.name) for p in (workdir / "best").iterdir()] == [best]
  weights, metadata = load_weights(workdir)
  assert metadata["name"] == "tiny_moat_0" and metadata["num_classes"] == 10
  assert metadata["results"]["validation/top1"] == evaluated[-1]["top1"]
  # The weights are the average over the steps, as evaluated.
  state, _ = load_weights(workdir / "checkpoints" / "30")
  np.testing.assert_array_equal(*(w["params"]["head"]["kernel"] for w in (weights, state)))


def last_step(workdir):
  try:
    return read_metrics(workdir / "metrics.jsonl")[-1]["step"]
  except (OSError, IndexError):
    return 0


def stop_after(process, workdir, step, number):
  """Sends the signal when a line of `step` or later is written."""
  deadline = time.monotonic() + 120
  while last_step(workdir) < step:
    assert process.poll() is None, process.communicate()[0]
    assert time.monotonic() < deadline
    time.sleep(0.005)
  os.kill(process.pid, number)


@pytest.fixture(scope="module")
def broken(tmp_path_factory, tiny_config, compilation_cache, unbroken):
  """(work directory, outputs): stopped by SIGTERM, then killed, then left to end."""
  workdir = tmp_path_factory.mktemp("runs") / "broken"
  arguments = (f"--config={tiny_config}", f"--workdir={workdir}")
  outputs = []
  for step, number, code in ((4, signal.SIGTERM, 143), (20, signal.SIGKILL, -9)):
    process = command.start(compilation_cache, *arguments)
    stop_after(process, workdir, step, number)
    outputs.append(command.finish(process, code))
  # What a kill in the middle of writing would leave.
  with (workdir / "metrics.jsonl").open("a") as file:
    file.write('{"step": 99, "kind": "tr')
  outputs.append(command.run(compilation_cache, *arguments))
  return workdir, outputs


def test_a_run_that_was_stopped_and_killed_leaves_the_same_bytes(broken, unbroken):
  (workdir, (stopped, killed, ended)), (whole, _) = broken, unbroken
  assert "told to stop: step" in stopped and "is saved" in stopped
  for output in (killed, ended):
    assert "restored step" in output and "not as it was" not in output
  assert (workdir / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
  states = [load_weights(w / "checkpoints" / "30")[1]["config"] for w in (workdir, whole)]
  assert states[0] == states[1]
  exports = [load_weights(w)[0] for w in (workdir, whole)]
  for name in ("kernel", "bias"):
    np.testing.assert_array_equal(*(e["params"]["head"][name] for e in exports))


def test_stopping_saves_the_very_step(broken):
  _, (stopped, killed, _) = broken
  saved = stopped.split("told to stop: step ")[1].split()[0]
  assert f"restored step {saved} " in killed


@pytest.mark.parametrize(("moment", "step"), [("saving", 9), ("keeping the best", 15)])
def test_a_run_killed_while_it_writes(
  moment, step, unbroken, tiny_config, compilation_cache, tmp_path
):
  when = kills.Moment(moment, step, 0.005, None)
  (row,) = kills.one(0, when, tiny_config, compilation_cache, tmp_path / "run", unbroken[0])
  assert row["different"] == row["lost_states"] == 0
  assert row["resumed"] == row["saved"] and 3 <= row["resumed"] < command.STEPS


def test_every_difference_to_an_unbroken_run_is_seen(unbroken, tmp_path):
  whole, copy = unbroken[0], tmp_path / "copy"
  shutil.copytree(whole, copy)
  assert runs.differences(copy, whole) == []
  torn = copy / "checkpoints" / "99.orbax-checkpoint-tmp"
  torn.mkdir()
  (copy / "metrics.jsonl").write_bytes((whole / "metrics.jsonl").read_bytes() + b"{}\n")
  found = runs.differences(copy, whole)
  assert any("metrics.jsonl differs" in line for line in found)
  assert any("checkpoints holds" in line for line in found)
  assert any("orbax-checkpoint-tmp was left" in line for line in found)
  torn.rmdir()
  shutil.rmtree(copy / "checkpoints" / "30" / "state")
  shutil.copytree(whole / "checkpoints" / "27" / "state", copy / "checkpoints" / "30" / "state")
  assert any("params/head/kernel differs" in line for line in runs.differences(copy, whole))


def test_a_finished_run_on_another_mesh_ends_at_once(unbroken, tiny_config, compilation_cache):
  """Restores the last state of one device onto eight, evaluates, and writes the same figures."""
  workdir, _ = unbroken
  before = read_metrics(workdir / "metrics.jsonl")
  output = command.run(
    compilation_cache,
    f"--config={tiny_config}",
    f"--workdir={workdir}",
    "--config.mesh.fsdp=4",
    "--config.mesh.data=2",
    devices=8,
  )
  assert "restored step 30" in output and "8 cpu device(s) (data 2, fsdp 4, tensor 1)" in output
  assert "not as it was when that was saved: config.mesh.fsdp: 1, now 4" in output
  assert "compiled the step" not in output
  after = read_metrics(workdir / "metrics.jsonl")
  assert [line["step"] for line in after] == [line["step"] for line in before]
  assert after[-1]["top1"] == before[-1]["top1"]
  np.testing.assert_allclose(after[-1]["loss"], before[-1]["loss"], rtol=1e-5)


def test_evaluation_gives_the_figures_of_the_training(unbroken, tiny_config, compilation_cache):
  workdir, _ = unbroken
  last = read_metrics(workdir / "metrics.jsonl")[-1]
  output = command.run(
    compilation_cache, f"--config={tiny_config}", f"--workdir={workdir}", "--mode=evaluate"
  )
  assert f"validation: loss {last['loss']:.4f}, top1 {last['top1']:.2%}" in output


def write_pictures(folder, classes=4):
  """Some of the embedded digits as real JPEG files, one of them torn."""
  source = create_source("digits", "train")
  for index in range(240):
    example = source[index]
    if example["label"] < classes:
      path = folder / "train" / source.info["class_names"][example["label"]] / f"{index}.jpg"
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(example["image"]).resize((20, 20)).save(path, quality=95)
  path.write_bytes(path.read_bytes()[:100])
  return path


def test_fine_tuning_on_a_folder_of_pictures(unbroken, tiny_config, compilation_cache, tmp_path):
  torn = write_pictures(tmp_path / "pictures")
  arguments = (
    f"--config={tiny_config}",
    f"--workdir={tmp_path / 'run'}",
    f"--config.data.source=folder:{tmp_path / 'pictures'}",
    "--config.data.batch_size=16",
    "--config.accumulation_steps=1",
    f"--config.init_from={unbroken[0]}",
    "--config.total_epochs=8",
    "--config.evaluate_every_epochs=8",
  )
  refused = command.run(compilation_cache, *arguments, code=1)
  assert re.search(r"found: +'one', 'three', 'two', 'zero'", refused)  # both lists are shown
  assert "--config.reinitialize_head=True" in refused
  assert "Traceback" not in refused
  arguments += ("--config.reinitialize_head=True",)
  output = command.run(compilation_cache, *arguments)
  assert f"starting from {unbroken[0]}" in output
  assert re.search(r"loaded: \d\d, of which resized: 0", output)
  assert "initialised anew: 2" in output and "params/head/kernel ((16, 10) in the source" in output
  assert "unused: 0" in output
  assert str(torn) in output  # skipped, and named
  last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
  assert last["kind"] == "eval/validation" and last["top1"] > 0.4
  # Evaluating looks at what was trained here, not at what it began from.
  again = command.run(compilation_cache, *arguments, "--mode=evaluate")
  assert f"weights from {tmp_path / 'run'}" in again
  assert f"top1 {last['top1']:.2%}" in again


PREPARE = """
import sys
import numpy as np, cv2
import tensorflow_datasets as tfds
from hybrid_vit.data.sources import create_source

class Drawn(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version("1.0.0")
  def _info(self):
    features = {
      "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
      "label": tfds.features.ClassLabel(names=["zero", "one", "two"]),
    }
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))
  def _split_generators(self, dl_manager):
    return {name: self._generate_examples(name) for name in ("train", "validation")}
  def _generate_examples(self, split):
    source = create_source("digits", split)
    for index in range(200):
      example = source[index]
      if example["label"] < 3:
        png = cv2.imencode(".png", example["image"])[1].tobytes()
        yield index, {"image": png, "label": example["label"]}

Drawn(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
from hybrid_vit import main
sys.argv = ["main", *sys.argv[2:]]
try:
  main.entry_point()
finally:
  assert "tensorflow" not in sys.modules, "TensorFlow was imported"
  print("no TensorFlow")
"""


def test_training_on_a_tfds_data_set_without_tensorflow(tiny_config, compilation_cache, tmp_path):
  found = subprocess.run(
    [
      *(sys.executable, "-c", PREPARE, str(tmp_path / "data")),
      f"--config={tiny_config}",
      f"--workdir={tmp_path / 'run'}",
      f"--config.data.source=tfds:{tmp_path / 'data' / 'drawn' / '1.0.0'}",
      "--config.data.batch_size=16",
      "--config.accumulation_steps=1",
      "--config.total_epochs=3",
    ],
    cwd=command.ROOT,
    env=command.environment(compilation_cache),
    capture_output=True,
    text=True,
    timeout=180,
  )
  assert found.returncode == 0 and "no TensorFlow" in found.stdout, found.stdout + found.stderr
  last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
  assert last["kind"] == "eval/validation" and last["examples"] == 60


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--config=configs/moat.py:moat_00"], "unknown variant 'moat_00'.*did you mean 'moat_0'"),
    (["--config=configs/none.py"], "no configuration file 'configs/none.py'"),
    (
      ["--config=TINY", "--config.data.batch_siz=3"],
      "config.data.batch_siz` is not read .*did you mean `config.data.batch_size`",
    ),
    (
      ["--config=TINY", "--config.data.source=folder:/none"],
      "was looked for at /none",
    ),
    (["--config=TINY", "--config.mesh.fsdp=3"], "needs a multiple of 3 devices, and 1 are here"),
    (["--config=TINY", "--mode=evaluate", "--workdir=NEW"], "no weights in "),
    (
      ["--config=TINY", "--workdir=DONE", "--config.model.arguments.widths=(8,24)"],
      "is of another configuration: .* has shape",
    ),
  ],
)
def test_errors_are_one_paragraph(
  arguments, message, tiny_config, unbroken, compilation_cache, tmp_path
):
  places = {"TINY": tiny_config, "DONE": unbroken[0], "NEW": tmp_path / "new"}
  for name, path in places.items():
    arguments = [a.replace(name, str(path)) for a in arguments]
  if not any("--workdir" in a for a in arguments):
    arguments.append(f"--workdir={tmp_path / 'new'}")
  output = command.run(compilation_cache, *arguments, code=1)
  assert "Traceback" not in output
  paragraph = output.partition("error: ")[2]
  assert re.search(message, paragraph), output
  assert len(paragraph.strip().splitlines()) <= 2
  assert not (tmp_path / "new").exists()


def test_a_nan_stops_the_run_and_leaves_the_last_good_state(
  tiny_config, compilation_cache, tmp_path
):
  arguments = [f"--config={tiny_config}", f"--workdir={tmp_path}"]
  # A rate that throws the weights out of float32's range in the first steps.
  arguments += ["--config.optimizer.learning_rate=1e30", "--config.checkpoint.every_steps=1"]
  output = command.run(compilation_cache, *arguments, code=1)
  assert "loss or gradient is not finite in step" in output and "Traceback" not in output
  bad = int(output.split("not finite in step ")[1].split(";")[0])
  assert "first bad tensor: " in output and "data positions of the batch: " in output
  assert f"the last good checkpoint is that of step {bad - 1}" in output
  load_weights(tmp_path / "checkpoints" / str(bad - 1))
  assert not (tmp_path / "checkpoints" / str(bad)).exists()
