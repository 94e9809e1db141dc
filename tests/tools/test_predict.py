import functools
import io

import jax
import numpy as np
import pytest
from PIL import Image

from hybrid_vit import checkpoints
from hybrid_vit.models.registry import Preprocessing, create_model
from hybrid_vit.tools import predict
from hybrid_vit.weights.stored import load_network
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


def weights(directory, preprocessing=CROP, num_classes=7, **metadata):
  variables = jax.device_get(drawn_variables(create_model("tiny_moat_0", 7, **SMALL)))
  if not num_classes:
    body = {k: v for k, v in variables["params"].items() if not k.startswith("head")}
    variables = {**variables, "params": body}
  fields = preprocessing.__dict__ | {"mean": list(preprocessing.mean)}
  about = {"name": "tiny_moat_0", "arguments": SMALL, "preprocessing": fields, **metadata}
  checkpoints.export(directory, variables, about)
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
  found = predict.prepare(path, preprocessing)
  assert found.dtype == np.uint8
  np.testing.assert_array_equal(found, by_hand(path, preprocessing))


@functools.cache
def probabilities_by_hand(directory, paths):
  network = load_network(directory)
  batch = np.stack([by_hand(path, CROP) for path in paths]) / 255.0
  batch = ((batch - CROP.mean) / CROP.std).astype(np.float32)
  logits = np.asarray(jax.jit(network.model.apply)(network.variables, batch)[0], np.float64)
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
  names = predict.imagenet_class_names()
  assert len(names) == len(set(names)) == 1000
  # Known places of ImageNet-1K's order.
  assert (names[0], names[207], names[999]) == ("tench", "golden retriever", "toilet tissue")
  assert predict.class_names(load_network(trained)) == tuple(NAMES)
  unnamed = load_network(weights(tmp_path / "w", class_names=None))
  assert predict.class_names(unnamed)[6] == "class 6"
