import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from hybrid_vit import checkpoints, photos
from hybrid_vit.models.registry import Preprocessing, create_model
from hybrid_vit.tools import predict
from hybrid_vit.train_state import create_state
from hybrid_vit.weights import stored
from hybrid_vit.weights.stored import load_network
from tests import small
from tests.models.contract import drawn_variables
from tests.models.test_moat import SMALL

CROP = Preprocessing(32, 0.875, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SQUASH = Preprocessing(32, 1.0, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "squash")
NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]


def photo(path, height, width, seed=0):
  rng = np.random.default_rng(seed)
  small = rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)
  # Smooth parts with noise, so that each filter gives other pixels.
  picture = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
  noise = rng.integers(-20, 21, picture.shape)
  Image.fromarray(np.clip(picture + noise, 0, 255).astype(np.uint8)).save(path)
  return path


@functools.cache
def drawn():
  return jax.device_get(drawn_variables(create_model("tiny_moat_0", 7, **SMALL)))


def about(preprocessing=CROP, **metadata):
  fields = preprocessing.__dict__ | {"mean": list(preprocessing.mean)}
  return {"name": "tiny_moat_0", "arguments": SMALL, "preprocessing": fields, **metadata}


def weights(directory, preprocessing=CROP, num_classes=7, **metadata):
  variables = drawn()
  if not num_classes:
    body = {k: v for k, v in variables["params"].items() if not k.startswith("head")}
    variables = {**variables, "params": body}
  checkpoints.export(directory, variables, about(preprocessing, **metadata))
  return directory


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  return weights(tmp_path_factory.mktemp("trained") / "w", class_names=NAMES)


def by_hand(path, preprocessing):
  """The evaluation of published figures, with PIL and NumPy alone."""
  picture = Image.open(path).convert("RGB")
  filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
  size, resampling = preprocessing.image_size, filters[preprocessing.interpolation]
  if preprocessing.resize == "squash":
    return np.asarray(picture.resize((size, size), resampling))
  short = int(size / preprocessing.crop_ratio)
  width, height = picture.size
  if width < height:
    picture = picture.resize((short, int(short * height / width)), resampling)
  else:
    picture = picture.resize((int(short * width / height), short), resampling)
  left, top = round((picture.width - size) / 2), round((picture.height - size) / 2)
  return np.asarray(picture.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize("preprocessing", [CROP, SQUASH])
@pytest.mark.parametrize("shape", [(50, 71), (91, 40), (36, 36), (20, 25)])
@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_photos_are_prepared_as_pil_does_pixel_by_pixel(tmp_path, preprocessing, shape, ending):
  path = photo(tmp_path / f"photo.{ending}", *shape)
  found = photos.prepare(path, preprocessing)
  assert found.dtype == np.uint8
  np.testing.assert_array_equal(found, by_hand(path, preprocessing))


@functools.cache
def logits_by_hand(directory, paths):
  network = load_network(directory)
  batch = np.stack([by_hand(path, CROP) for path in paths]) / 255.0
  batch = ((batch - CROP.mean) / CROP.std).astype(np.float32)
  return np.asarray(jax.jit(network.model.apply)(network.variables, batch)[0], np.float64)


def probabilities_by_hand(directory, paths):
  logits = logits_by_hand(directory, paths)
  exponentials = np.exp(logits - logits.max(-1, keepdims=True))
  return exponentials / exponentials.sum(-1, keepdims=True)


def test_the_likeliest_classes_with_their_names(trained, tmp_path):
  # More than one batch, the last one not full.
  paths = tuple(photo(tmp_path / f"{i}.png", 40 + i, 60 - i, seed=i) for i in range(9))
  predictions, skipped = predict.predict(load_network(trained), paths, top=3)
  assert not skipped and [p.photo for p in predictions] == list(paths)
  for prediction, expected in zip(predictions, probabilities_by_hand(trained, paths)):
    best = np.argsort(-expected)[:3]
    assert prediction.classes == tuple(best)
    assert prediction.names == tuple(NAMES[i] for i in best)
    np.testing.assert_allclose(prediction.probabilities, expected[best], rtol=1e-4)
  assert len({p.classes for p in predictions}) > 1  # the pictures matter


def test_the_command_names_what_it_cannot_read_and_goes_on(trained, tmp_path, capsys):
  good = photo(tmp_path / "good.png", 40, 50)
  cut, text = tmp_path / "cut.jpg", tmp_path / "notes.jpg"
  cut.write_bytes(photo(tmp_path / "whole.jpg", 60, 60).read_bytes()[:-300])
  text.write_text("no picture")
  output = tmp_path / "out" / "seen.png"
  arguments = [f"--weights={trained}", f"--output={output}"]
  missing = tmp_path / "missing.jpg"
  assert predict.main([*arguments, str(good), str(cut), str(text), str(missing)]) == 2
  out, err = capsys.readouterr()
  assert "resize_center_crop(32, 0.875, 'bicubic'), mean (0.485, 0.456, 0.406)" in out
  assert out.count("%") == 5 and str(good) in out
  assert [line.split(":")[0] for line in err.splitlines()] == [
    f"skipped {path}" for path in (cut, text, missing)
  ]
  assert Image.open(io.BytesIO(output.read_bytes())).width > 300
  assert predict.main([*arguments, str(good)]) == 0


def test_nothing_is_drawn_where_nothing_could_be_read(trained, tmp_path):
  output = tmp_path / "seen.png"
  assert predict.main([f"--weights={trained}", f"--output={output}", str(tmp_path / "no.jpg")]) == 2
  assert not output.exists()


def test_errors_are_one_line(trained, tmp_path, capsys):
  path = str(photo(tmp_path / "good.png", 40, 50))
  for arguments, message in [
    ([f"--weights={tmp_path}", path], "error: no weights in"),
    (
      [f"--weights={trained}", "--arch=moat_0", path],
      "holds weights of tiny_moat_0, not of moat_0",
    ),
  ]:
    assert predict.main(arguments) == 1
    assert message in capsys.readouterr().err


def test_without_a_classifier(tmp_path):
  network = load_network(weights(tmp_path / "w", num_classes=0))
  with pytest.raises(ValueError, match="have no classifier"):
    predict.predict(network, [photo(tmp_path / "good.png", 40, 50)])


def test_names_of_classes(trained, tmp_path):
  names = stored.imagenet_class_names()
  assert len(names) == len(set(names)) == 1000
  # Known places of ImageNet-1K's order.
  assert (names[0], names[207], names[999]) == ("tench", "golden retriever", "toilet tissue")
  assert stored.class_names(load_network(trained)) == tuple(NAMES)
  unnamed = load_network(weights(tmp_path / "w", class_names=None))
  assert stored.class_names(unnamed)[6] == "class 6"


def save_state(workdir, step, scale=1.0, **info):
  """A checkpoint as a training leaves it: the drawn weights times `scale`."""
  variables = jax.tree.map(lambda leaf: jnp.asarray(leaf * scale), drawn())
  task = small.make_task()
  state = create_state(jax.random.key(0), task, optax.sgd(0.1), small.make_batch(), ema=False)
  state = state.replace(**variables, opt_state=(), step=jnp.int32(step))
  checkpointer = checkpoints.Checkpointer(
    workdir, run_config={"model": {"name": "tiny_moat_0"}}, info=about(**info), keep_best=False
  )
  assert checkpointer.save(state, step, {})
  checkpointer.close()


def test_a_run_without_export_is_predicted_by_what_its_state_says(tmp_path):
  """Fails where the registry's preprocessing is taken, or the names of the classes are lost."""
  save_state(
    tmp_path, 3, preprocessing=SQUASH, class_names=NAMES, task_settings={"loss": "sigmoid"}
  )
  for directory in (tmp_path, tmp_path / "checkpoints" / "3"):
    network = load_network(directory)
    assert network.preprocessing == SQUASH and network.class_names == tuple(NAMES)
    assert network.loss == "sigmoid" and network.preprocessing_said_by == "as the weights say"
    assert network.metadata["step"] == 3


def test_a_finished_run_that_goes_on_is_predicted_by_its_newest_state(tmp_path, capsys):
  path = photo(tmp_path / "good.png", 40, 50)
  weights(tmp_path / "run" / "export", class_names=NAMES, step=5)
  exported, _ = predict.predict(load_network(tmp_path / "run"), [path])
  save_state(tmp_path / "run", 5, scale=0.5, class_names=NAMES)
  same, _ = predict.predict(load_network(tmp_path / "run"), [path])
  assert same[0].probabilities == exported[0].probabilities
  save_state(tmp_path / "run", 6, scale=0.5, class_names=NAMES)
  arguments = [f"--weights={tmp_path / 'run'}", f"--output={tmp_path / 'seen.png'}", str(path)]
  assert predict.main(arguments) == 0
  said = capsys.readouterr().out
  assert "state of step 6" in said and f"{exported[0].probabilities[0]:6.1%}" not in said


def test_weights_trained_with_a_sigmoid_are_shown_as_sigmoids(tmp_path, capsys):
  paths = tuple(photo(tmp_path / f"{i}.png", 40 + i, 60 - i, seed=i) for i in range(2))
  directory = weights(tmp_path / "w", class_names=NAMES, task_settings={"loss": "sigmoid"})
  predictions, _ = predict.predict(load_network(directory), paths, top=7)
  for prediction, logits in zip(predictions, logits_by_hand(directory, paths)):
    expected = np.sort(1 / (1 + np.exp(-logits)))[::-1]
    np.testing.assert_allclose(prediction.probabilities, expected, rtol=1e-4)
    assert not np.isclose(sum(prediction.probabilities), 1)
  arguments = [f"--weights={directory}", f"--output={tmp_path / 'seen.png'}", str(paths[0])]
  assert predict.main(arguments) == 0
  assert "the probability of each class stands by itself" in capsys.readouterr().out


def test_weights_of_another_task_are_not_shown_as_classes(tmp_path):
  network = load_network(weights(tmp_path / "w", task="depth", task_settings={"loss": "silog"}))
  with pytest.raises(ValueError, match=r"task 'depth' with the loss 'silog'.*are no classes"):
    predict.predict(network, [photo(tmp_path / "good.png", 40, 50)])


def test_weights_that_are_no_numbers_are_named_before_any_figure(tmp_path, capsys):
  broken = jax.tree.map(np.array, drawn())
  broken["params"]["head"]["bias"][3] = np.nan
  checkpoints.export(tmp_path / "w", broken, about())
  path = str(photo(tmp_path / "good.png", 40, 50))
  arguments = [f"--weights={tmp_path / 'w'}", f"--output={tmp_path / 'seen.png'}", path]
  assert predict.main(arguments) == 1
  out, err = capsys.readouterr()
  assert not out and "hold NaN or infinity, first in 'params/head/bias'" in err


def test_pictures_are_read_by_what_training_reads(tmp_path):
  """Sixteen bits of grey, which PIL alone shows nearly white, and more pixels than PIL allows."""
  grey = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
  Image.fromarray(grey).save(tmp_path / "grey.png")
  expected = np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=-1)
  plain = Preprocessing(32, 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3)
  np.testing.assert_array_equal(photos.prepare(tmp_path / "grey.png", plain), expected)
  # 201 megapixels, in a shape that is quickly read.
  Image.new("L", (65500, 3069), 77).save(tmp_path / "large.jpg")
  assert (photos.prepare(tmp_path / "large.jpg", SQUASH) == 77).all()


def test_names_are_drawn_as_they_stand(tmp_path):
  names = ["$", "$x_1", r"$\no_such_letter$", "a\nb", "\x1b[31mred", "caf\u00e9", "x" * 90]
  directory = weights(tmp_path / "w", class_names=names)
  path = photo(tmp_path / "$5 and \udcff$.png", 40, 50)
  output = tmp_path / "seen.png"
  arguments = [f"--weights={directory}", f"--output={output}", "--top=7", str(path)]
  assert predict.main(arguments) == 0
  assert Image.open(output).width > 300
  blocked = tmp_path / "file"
  blocked.write_text("")
  assert predict.main([arguments[0], f"--output={blocked}/seen.png", str(path)]) == 1
