"""Programs of networks, held to the networks, and read by a process that has JAX alone."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit import checkpoints, model_export, tiny_networks
from hybrid_vit.models.registry import create_model, model_entry
from hybrid_vit.ops.depthwise_conv import depthwise_conv
from hybrid_vit.ops.platforms import on_cpu, target_platform, tracing_for
from hybrid_vit.photos import prepare
from hybrid_vit.stored_tasks import load_task
from hybrid_vit.tools import export_model
from hybrid_vit.weights import stored
from tests import dense, golden, masks
from tests.data.pictures import encoded, photo
from tests.test_stored_tasks import NAMES, written
from tests.tools import test_predict_segments

pytest.importorskip("flatbuffers")

NETWORKS = {
  "tiny_moat_0": tiny_networks.MOAT,
  "smt_t": tiny_networks.SMT,
  "focalnet_tiny_srf": tiny_networks.FOCALNET,
  "l2vit_tiny": tiny_networks.L2VIT,
  "swin_tiny": tiny_networks.SWIN,
  "mci0": tiny_networks.MCI,
  "revcol_tiny": tiny_networks.REVCOL,
}
READER = """
import json, pathlib, sys
class Refuse:
  def find_spec(self, name, *_):
    if name.split(".")[0] in ("hybrid_vit", "flax"):
      raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import numpy as np
from jax import export
folder = pathlib.Path(sys.argv[1])
program = export.deserialize(bytearray((folder / "model.jax").read_bytes()))
metadata = json.loads((folder / "metadata.json").read_text())
assert list(program.platforms) == metadata["platforms"]
np.save(sys.argv[3], program.call(np.load(sys.argv[2])))
"""


def make_network(name="tiny_moat_0", num_classes=5, image_size=64):
  """A tiny one with numbers by rule."""
  arguments = dict(NETWORKS[name])
  model = create_model(name, num_classes, **arguments)
  images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
  shapes = {"batch_stats": {}, **jax.eval_shape(model.init, jax.random.key(0), images)}

  def number(path, leaf):
    return golden.tensor("/".join(str(key.key) for key in path), leaf.shape, "tf")

  variables = jax.tree_util.tree_map_with_path(number, shapes)
  preprocessing = dataclasses.replace(model_entry(name).preprocessing, image_size=image_size)
  metadata = {
    "name": name,
    "arguments": arguments,
    "preprocessing": dataclasses.asdict(preprocessing),
    "task": "classification",
    "class_names": [f"class {i}" for i in range(num_classes)],
  }
  return stored.network_of("made", variables, metadata)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  path = tmp_path_factory.mktemp("runs") / "export"
  network = make_network()
  checkpoints.export(path, network.variables, network.metadata)
  return path


def pictures(count, size=64):
  return np.random.default_rng(3).integers(0, 256, (count, size, size, 3), np.uint8)


def test_a_process_without_the_package_gives_the_same_logits(directory, tmp_path, capsys):
  out = tmp_path / "out"
  assert export_model.main([str(directory), str(out)]) == 0
  printed = capsys.readouterr().out
  assert "tiny_moat_0 for cpu, cuda, tpu: uint8 [b, 64, 64, 3] → float32 [b, 5]" in printed
  assert "held to the network on cpu" in printed
  network = stored.load_network(directory)
  # Numbers of pictures that nothing was traced with.
  for count in (1, 3):
    images = pictures(count)
    np.save(tmp_path / "images.npy", images)
    command = [sys.executable, "-c", READER, str(out), "images.npy", "logits.npy"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    found = np.load(tmp_path / "logits.npy")
    expected = np.asarray(jax.jit(model_export._answers(network))(images))
    assert found.shape == (count, 5) and np.std(expected) > 0
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.std(expected))
  metadata = json.loads((out / "metadata.json").read_text())
  assert metadata["class_names"] == [f"class {i}" for i in range(5)]
  assert metadata["preprocessing"]["image_size"] == 64 and metadata["normalized_inside"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_every_family_for_all_platforms_with_any_number_of_pictures(name, tmp_path):
  # It raises where the program is not the network.
  metadata = model_export.export_model(make_network(name), tmp_path / "out")
  assert metadata["held_to_the_network_on"] == "cpu"
  assert metadata["output"] == {"shape": ["b", "5"], "dtype": "float32"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_moat_0", "smt_t", "swin_tiny", "l2vit_tiny"])
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_the_forms_for_other_devices_give_the_same(name, platform):
  """As this machine computes them: what a program holds for a device that is not here."""
  network, images = make_network(name), pictures(2)
  expected = jax.jit(model_export._answers(network))(images)
  with tracing_for((platform,)):
    found = jax.jit(model_export._answers(network))(images)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.std(expected))


def test_a_program_holds_the_forms_of_its_platforms():
  x, kernel = jnp.ones((1, 5, 5, 4)), jnp.ones((3, 3, 1, 4))

  def held(*platforms):
    """(whether the CPU's form is in it, how many convolutions of the library)."""
    with tracing_for(tuple(model_export.PLATFORMS[name] for name in platforms)):
      convolve = jax.jit(lambda x, kernel: depthwise_conv(x, kernel))
      text = jax.export.export(convolve, platforms=platforms)(x, kernel).mlir_module()
    return "depthwise_conv_shift_add" in text, text.count("stablehlo.convolution")

  # The CPU's form has the library's within it, for a kernel that is no number.
  alone, elsewhere, all_of_them = held("cpu"), held("cuda", "tpu"), held("cpu", "cuda", "tpu")
  assert alone == (True, 1)
  assert not elsewhere[0] and elsewhere[1] >= 1
  assert all_of_them[0] and all_of_them[1] >= alone[1] + elsewhere[1]


def test_a_function_traced_for_several_runs_the_form_of_where_it_is():
  double, add = (lambda x: x * 2.0), (lambda x: x + 100.0)

  def both(x):
    return on_cpu(double, add)(x)

  x = jnp.ones(3)
  with tracing_for(("cpu", "gpu")):
    assert target_platform() == "several"
    np.testing.assert_array_equal(jax.jit(lambda x: both(x))(x), [2, 2, 2])
    program = jax.export.export(jax.jit(lambda x: both(x)), platforms=["cpu", "cuda"])(x)
  np.testing.assert_array_equal(program.call(x), [2, 2, 2])
  with tracing_for(("gpu", "tpu")):
    np.testing.assert_array_equal(jax.jit(lambda x: both(x))(x), [101, 101, 101])
  with tracing_for(("cpu", "cpu")):
    assert target_platform() == "cpu"
  assert target_platform() == jax.default_backend()


def test_normalised_outside_and_without_a_classifier(tmp_path):
  network = make_network(num_classes=0)
  metadata = model_export.export_model(
    network, tmp_path / "out", normalize=False, batch_size=2, platforms=("cpu",)
  )
  assert metadata["input"] == {"shape": ["2", "64", "64", "3"], "dtype": "float32"}
  assert metadata["answers"] == "features"
  program = jax.export.deserialize(bytearray((tmp_path / "out" / "model.jax").read_bytes()))
  expected = network.preprocessing
  images = pictures(2).astype(np.float32)
  images = (images / 255.0 - np.float32(expected.mean)) / np.float32(expected.std)
  apply = jax.jit(lambda x: network.model.apply(network.variables, x, train=False)[1]["pre_logits"])
  features = np.asarray(apply(images))
  found = program.call(images.astype(np.float32))
  np.testing.assert_allclose(found, features, rtol=0, atol=1e-4 * np.std(features))


@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize("moment", range(5))
def test_a_killed_export_leaves_no_program_beside_what_is_said_of_another(
  moment, over, tmp_path, monkeypatch
):
  """`moment`: how many changes of files are done; of a file that is written then, a half is."""
  files = lambda: {path.name: path.read_bytes() for path in tmp_path.iterdir()}  # noqa: E731
  contents = {"model.jax": b"new program", "metadata.json": b"of new program"}
  if over:
    model_export._write(tmp_path, {"model.jax": b"old program", "metadata.json": b"of old program"})
  done = []

  def ends(name):
    real = getattr(pathlib.Path, name)

    def changes(path, *arguments, **options):
      if len(done) == moment:
        if name == "write_bytes":
          real(path, arguments[0][: len(arguments[0]) // 2])
        raise KeyboardInterrupt
      done.append(name)
      return real(path, *arguments, **options)

    return changes

  with monkeypatch.context() as killed:
    for name in ("write_bytes", "replace", "unlink"):
      killed.setattr(pathlib.Path, name, ends(name))
    with pytest.raises(KeyboardInterrupt):
      model_export._write(tmp_path, contents)
  left = files()
  if "metadata.json" in left:
    assert left["metadata.json"] == b"of " + left["model.jax"]
  model_export._write(model_export._free(tmp_path), contents)
  assert files() == contents


@pytest.mark.parametrize("batch_size", [None, 2])
def test_photos_of_any_size_resized_inside(directory, tmp_path, capsys, batch_size):
  fixed = [] if batch_size is None else [f"--batch_size={batch_size}"]
  out, network = tmp_path / "out", stored.load_network(directory)
  assert export_model.main([str(directory), str(out), "--resize", "--platforms=cpu", *fixed]) == 0
  assert f"uint8 [{batch_size or 'b'}, h, w, 3] → float32" in capsys.readouterr().out
  metadata = json.loads((out / "metadata.json").read_text())
  assert metadata["resized_inside"] and metadata["normalized_inside"]
  program = jax.export.deserialize(bytearray((out / "model.jax").read_bytes()))
  for number, (height, width) in enumerate([(90, 131), (75, 50)]):
    photos = [photo(2 * number + i, height, width) for i in range(2)]
    seen = []
    for i, values in enumerate(photos):
      (tmp_path / f"{i}.png").write_bytes(encoded(values, "PNG"))
      seen.append(prepare(tmp_path / f"{i}.png", network.preprocessing))
    expected = np.asarray(jax.jit(model_export._answers(network))(np.stack(seen)))
    found = program.call(np.stack(photos))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.std(expected))


@pytest.mark.parametrize("name", ["segmentation", "depth"])
def test_what_makes_maps(name, tmp_path, capsys):
  settings = {
    "segmentation": {
      "head": dense.HEAD,
      "inference": {"mode": "slide", "crop": (16, 24), "stride": (16, 24)},
    },
    "depth": {"head": dense.DEPTH_HEAD, "protocol": {"max_depth": 8.0}},
  }
  directory = written(tmp_path / "weights", name, task_settings=settings[name])
  assert export_model.main([str(directory), str(tmp_path / "out")]) == 0
  size = (16, 24) if name == "segmentation" else (32, 32)
  printed = capsys.readouterr().out
  assert "uint8 [b, {}, {}, 3] → float32 [b, {}, {}, ".format(*size, *size) in printed
  program = jax.export.deserialize(bytearray((tmp_path / "out" / "model.jax").read_bytes()))
  images, task = pictures(3, 32)[:, : size[0], : size[1]], load_task(directory)
  found = np.asarray(program.call(images))
  for image, values in zip(images, found):
    # Probabilities of the classes, or metres.
    expected = task.inference.values(task.variables, image)
    values = jax.nn.softmax(values) if name == "segmentation" else values
    assert expected.std() > 1e-3
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-4 * expected.std())
  metadata = json.loads((tmp_path / "out" / "metadata.json").read_text())
  assert metadata["task"] == name and metadata["network"] == dense.NETWORK
  assert metadata["class_names"] == (list(NAMES) if name == "segmentation" else [])
  assert export_model.main([str(directory), str(tmp_path / "out"), "--resize"]) == 1
  assert "--resize is for classifiers" in capsys.readouterr().err
  with pytest.raises(ValueError, match="'detection' are not exported; those of classifiers"):
    model_export.export_model(dataclasses.replace(task, name="detection"), tmp_path / "out")


@pytest.mark.slow
def test_scores_of_masks(tmp_path):
  made = masks.make_task(num_classes=9, info={})
  noise = dense.drawn(made, masks.make_batch(made), seed=5)
  task = load_task(test_predict_segments.written(tmp_path / "weights", noise, "mask_segmentation"))
  metadata = model_export.export_model(task, tmp_path / "out", platforms=("cpu",))
  assert metadata["answers"] == "scores of each pixel"
  program = jax.export.deserialize(bytearray((tmp_path / "out" / "model.jax").read_bytes()))
  images = pictures(3, 32)
  for image, scores in zip(images, np.asarray(program.call(images))):
    expected = task.inference.values(task.variables, image)
    assert expected.shape == (32, 32, 9) and expected.std() > 1e-3
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4 * expected.std())


def test_what_is_refused(directory, tmp_path, capsys, monkeypatch):
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "cat.jpg").write_bytes(b"x")
  for arguments, message in [
    ([directory, tmp_path / "out", "--platforms=cpu,metal"], "platforms metal; known: cpu, cuda"),
    ([directory, tmp_path / "full"], "full holds something else"),
    ([tmp_path, tmp_path / "out"], "no weights in"),
    ([directory, tmp_path / "out", "--resize", "--no-normalize"], "must normalise them"),
  ]:
    assert export_model.main(list(map(str, arguments))) == 1
    assert message in capsys.readouterr().err
  # A program of something else than the network.
  network = make_network()
  other = jax.tree.map(lambda leaf: leaf * 1.01, network.variables)
  right, calls = model_export._answers, []

  def wrong(network):
    calls.append(1)
    broken = dataclasses.replace(network, variables=other)
    return right(broken if len(calls) == 1 else network)

  monkeypatch.setattr(model_export, "_answers", wrong)
  with pytest.raises(RuntimeError, match="from the network's answers"):
    model_export.export_model(network, tmp_path / "out", platforms=("cpu",))
  monkeypatch.setitem(sys.modules, "flatbuffers", None)
  assert export_model.main([str(directory), str(tmp_path / "out")]) == 1
  assert "pip install -e '.[export]'" in capsys.readouterr().err
  assert not (tmp_path / "out").exists()
