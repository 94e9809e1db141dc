"""The demo's answers without a browser, and its page in one where gradio and Chromium are there."""

import shutil
import sys

import numpy as np
import pytest

from hybrid_vit.photo_answers import PhotoModel, depth_colours
from hybrid_vit.stored_tasks import load_task
from hybrid_vit.tools import demo
from tests import dense, masks
from tests.clips import write_small_clip
from tests.test_stored_tasks import written
from tests.tools import test_predict_segments as segments
from tests.tools.test_predict import NAMES, photo, trained  # noqa: F401
from tests.tools.test_predict_objects import weights as detector  # noqa: F401


@pytest.fixture(scope="module")
def classifier(trained):  # noqa: F811
  return PhotoModel.load(str(trained))


def asked(model, path, texts="", min_score=0.3, methods=(), target="", endpoint=""):
  return demo.look(
    model, None if path is None else str(path), texts, min_score, methods, target, endpoint
  )


def test_classes_and_heat_maps(classifier, tmp_path):
  path = photo(tmp_path / "a.png", 40, 60)
  wrong, found, heats = asked(classifier, path, methods=classifier.methods)
  assert not wrong and len(found.probabilities) == 5 and set(found.probabilities) <= set(NAMES)
  values = list(found.probabilities.values())
  assert values == sorted(values, reverse=True) and 0 < sum(values) <= 1
  assert [text.partition(" · ")[0].partition(":")[0] for _, text in heats] == [
    "Grad-CAM", "Attention", "PCA of features",
  ]  # fmt: skip
  assert all(image.shape == (224, 224, 3) and image.dtype == np.uint8 for image, _ in heats)
  likeliest = next(iter(found.probabilities))
  assert heats[0][1].startswith(f"Grad-CAM: {likeliest} · stage4")
  _, _, heats = asked(classifier, path, methods=["grad_cam"], target="gnu", endpoint="stage1")
  assert [text for _, text in heats] == ["Grad-CAM: gnu · stage1"]


def test_what_is_wrong_is_said_and_not_raised(classifier, tmp_path):
  assert asked(classifier, None)[0] == "Drop a photo first."
  bad = tmp_path / "bad.jpg"
  bad.write_text("no picture")
  wrong, found, heats = asked(classifier, bad, methods=classifier.methods)
  assert wrong.startswith("bad.jpg cannot be read: ") and str(tmp_path) not in wrong
  assert not found.lines and not heats
  cut = tmp_path / "cut.jpg"
  cut.write_bytes(photo(tmp_path / "whole.jpg", 60, 60).read_bytes()[:-300])
  assert asked(classifier, cut)[0].startswith("cut.jpg cannot be read: ")
  # What was found stays where a heat map is refused.
  path = photo(tmp_path / "a.png", 40, 60)
  wrong, found, heats = asked(classifier, path, methods=["pca"], endpoint="stage9")
  assert "no map is named 'stage9'" in wrong and found.probabilities and not heats


def test_texts(tmp_path):
  write_small_clip(tmp_path / "w")
  model, path = PhotoModel.load(str(tmp_path / "w")), photo(tmp_path / "a.png", 20, 20)
  assert model.has_texts and model.methods[0] == "grad_cam" and not model.class_names
  wrong, found, heats = asked(model, path, texts="a cat\na dog, a fox", methods=["grad_cam", "pca"])
  assert not wrong and set(found.probabilities) == {"a cat", "a dog", "a fox"}
  assert sum(found.probabilities.values()) == pytest.approx(1)
  assert len(heats) == 2 and "a " in heats[0][1]
  assert "give at least two" in asked(model, path, texts="a cat")[0]
  assert "no text was given" in asked(model, path)[0]


def test_a_map_of_classes(tmp_path):
  model = PhotoModel.load(str(written(tmp_path / "w", "segmentation")))
  pixels = dense.example(1)[0]
  path = tmp_path / "a.png"
  path.write_bytes(dense.png(pixels))
  wrong, found, heats = asked(model, path, methods=model.methods)
  assert not wrong and len(heats) == 1 and model.methods == ("pca",)
  np.testing.assert_array_equal(found.picture, pixels)
  classes = load_task(tmp_path / "w").classes(pixels)
  areas = [int(region.place.sum()) for region in found.regions]
  assert areas == sorted(areas, reverse=True) and sum(areas) == classes.size
  names, palette = model.stored.task.map_class_names, model.stored.task.palette
  for region in found.regions:
    label = names.index(region.name)
    np.testing.assert_array_equal(region.place, classes == label)
    assert region.colour == tuple(palette[label])


def test_a_large_photo_is_shown_smaller(tmp_path, monkeypatch):
  monkeypatch.setattr("hybrid_vit.photo_answers._LARGEST", 12)
  model = PhotoModel.load(str(written(tmp_path / "w", "segmentation")))
  pixels = dense.example(1)[0]
  (tmp_path / "a.png").write_bytes(dense.png(pixels))
  found = model.answer(tmp_path / "a.png")
  step = -(-max(pixels.shape) // 12)
  assert found.picture.shape[:2] == tuple(-(-n // step) for n in pixels.shape[:2])
  assert all(region.place.shape == found.picture.shape[:2] for region in found.regions)


def test_depth(tmp_path):
  model = PhotoModel.load(str(written(tmp_path / "w", "depth")))
  pixels = dense.example(1)[0]
  (tmp_path / "a.png").write_bytes(dense.png(pixels))
  wrong, found, _ = asked(model, tmp_path / "a.png")
  assert not wrong and found.lines[0].endswith(" m") and not found.regions
  assert found.picture.shape == pixels.shape
  near, far = depth_colours(np.array([[1.0, 9.0]]))[0].astype(int)
  assert near.tolist() == [253, 231, 37] and far.tolist() == [68, 1, 84]


def test_objects(detector, tmp_path):  # noqa: F811
  model = PhotoModel.load(str(detector))
  pixels = dense.example(1)[0]
  (tmp_path / "a.png").write_bytes(dense.png(pixels))
  assert model.has_scores
  wrong, found, _ = asked(model, tmp_path / "a.png", min_score=0.0)
  objects = model.stored.objects(pixels)
  assert not wrong and len(found.regions) == len(objects.labels) > 0
  for region, label, score in zip(found.regions, objects.labels, objects.scores):
    assert region.name == f"{('person', 'dog', 'toothbrush')[label]} {score:.0%}"
    assert region.place.shape == pixels.shape[:2] and region.place.dtype == bool
  assert not asked(model, tmp_path / "a.png", min_score=1.0)[1].regions


def test_segments(tmp_path):
  task = masks.make_task(num_classes=9, info={})
  variables = dense.drawn(task, masks.make_batch(task), seed=5)
  where = tmp_path / "w"
  loose = {"object_threshold": 0.0, "overlap_threshold": 0.0}
  segments.written(where, variables, "panoptic_segmentation", **segments.CANVAS, **loose)
  model, pixels = PhotoModel.load(str(where)), dense.example(1)[0]
  (tmp_path / "a.png").write_bytes(dense.png(pixels))
  found = model.answer(tmp_path / "a.png")
  picture = model.stored.panoptic(pixels)
  assert len(found.regions) == len(picture.segments) > 0
  assert len({region.name for region in found.regions}) == len(found.regions)
  assert sum(region.place.sum() for region in found.regions) == (picture.map > 0).sum()


def test_without_gradio_its_extra_is_named(trained, monkeypatch, capsys):  # noqa: F811
  monkeypatch.setitem(sys.modules, "gradio", None)
  assert demo.main([f"--weights={trained}"]) == 1
  assert capsys.readouterr().err == (
    "error: the demo needs gradio, which is not installed: pip install -e '.[demo]'\n"
  )


def test_it_is_served_to_this_machine_alone_unless_told(trained, monkeypatch, capsys):  # noqa: F811
  served = []
  monkeypatch.setattr(demo, "require_gradio", lambda: None)
  monkeypatch.setattr(demo, "make_page", lambda models: [model.place for model in models])
  monkeypatch.setattr(demo, "serve", lambda page, **options: served.append((page, options)))
  assert demo.main([f"--weights={trained}", f"--weights={trained}"]) == 0
  assert served == [([str(trained)], {"host": "127.0.0.1", "port": 7860, "share": False})]
  assert demo.main([f"--weights={trained / 'none'}"]) == 1
  assert capsys.readouterr().err.startswith("error: no weights in ")


@pytest.fixture(scope="module")
def browser():
  pytest.importorskip("gradio", reason="gradio is not installed (pip install -e '.[demo]')")
  webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
  program, driver = shutil.which("chromium"), shutil.which("chromedriver")
  if program is None or driver is None:
    pytest.skip("no chromium with its driver (apt-get install chromium chromium-driver)")
  options = webdriver.ChromeOptions()
  options.binary_location = program
  for option in ("--headless=new", "--no-sandbox", "--window-size=1280,1600"):
    options.add_argument(option)
  made = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
  yield made
  made.quit()


@pytest.fixture(scope="module")
def address(browser, classifier, tmp_path_factory):
  """Of a served page with a classifier and a segmenter."""
  segmenter = written(tmp_path_factory.mktemp("segmenter") / "w", "segmentation")
  page = demo.make_page([classifier, PhotoModel.load(str(segmenter))])
  yield demo.serve(page, host="127.0.0.1", port=None, block=False)
  page.close()


def wait_for(browser, css, text=""):
  """The text of an element once it is shown and has `text` in it."""
  from selenium.webdriver.common.by import By
  from selenium.webdriver.support.ui import WebDriverWait

  def shown(driver):
    found = [e for e in driver.find_elements(By.CSS_SELECTOR, css) if e.is_displayed()]
    return next((e for e in found if text in e.text), None)

  return WebDriverWait(browser, 60).until(shown, f"no {css} with {text!r}").text


def drop(browser, path):
  from selenium.webdriver.common.by import By

  wait_for(browser, "#look")
  browser.find_element(By.CSS_SELECTOR, "#photo input[type=file]").send_keys(str(path))
  wait_for(browser, "#photo img")
  browser.find_element(By.CSS_SELECTOR, "#look").click()


def test_the_page_in_a_browser(browser, address, tmp_path):
  browser.get(address)
  drop(browser, photo(tmp_path / "a.png", 40, 60))
  shown = wait_for(browser, "#classes", "%")
  assert any(name in shown for name in NAMES)
  assert "PCA of features" in wait_for(browser, "#heats", "Grad-CAM")


def test_a_bad_photo_is_said_in_the_page(browser, address, tmp_path):
  browser.get(address)
  bad = tmp_path / "bad.png"
  bad.write_text("no picture")
  drop(browser, bad)
  assert "bad.png cannot be read" in wait_for(browser, "#wrong", "cannot be read")
