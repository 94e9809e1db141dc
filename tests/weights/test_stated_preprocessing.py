import json

import pytest

from hybrid_vit.models.registry import Preprocessing
from hybrid_vit.weights.stated_preprocessing import described_difference, stated_preprocessing

USUAL = Preprocessing(224, 0.875, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# As timm writes it; keys that are not of pictures left out.
TIMM = {
  "architecture": "vit_base_patch16_384",
  "pretrained_cfg": {
    "input_size": [3, 384, 384],
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "squash",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.5, 0.75],
  },
}


def stated(tmp_path, **files):
  for name, content in files.items():
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / f"{name}.json").write_text(text)
  return stated_preprocessing(tmp_path, USUAL)


def test_timms_file_says_all_of_it(tmp_path):
  expected = Preprocessing(384, 1.0, "bilinear", (0.5, 0.5, 0.5), (0.25, 0.5, 0.75), "squash")
  assert stated(tmp_path, config=TIMM) == (expected, "config.json")
  # What it leaves out stays.
  assert stated(tmp_path, config={"pretrained_cfg": {"crop_pct": 0.95}})[0] == Preprocessing(
    224, 0.95, "bicubic", USUAL.mean, USUAL.std
  )


def test_of_transformers_files_mean_and_deviation_are_read(tmp_path):
  said = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "size": 256}
  found, by = stated(tmp_path, config={"model_type": "vit"}, preprocessor_config=said)
  assert by == "preprocessor_config.json"
  assert described_difference(USUAL, found) == (
    "mean (0.5, 0.5, 0.5) ((0.485, 0.456, 0.406) usually), "
    "std (0.5, 0.5, 0.5) ((0.229, 0.224, 0.225) usually)"
  )
  off = {**said, "do_normalize": False}
  assert stated(tmp_path, preprocessor_config=off) == (USUAL, "")


def test_without_such_files_it_is_the_usual(tmp_path):
  assert stated(tmp_path) == (USUAL, "") and described_difference(USUAL, USUAL) == ""
  assert stated(tmp_path, config={"model": 1}) == (USUAL, "")


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"crop_mode": "border"}, "crop_mode 'border'"),
    ({"input_size": [3, 224, 192]}, r"pictures of \[3, 224, 192\]"),
    ({"interpolation": "lanczos"}, "'lanczos'; squares"),
    ({"mean": [0.5]}, r"gives \[0.5\] where a number for each"),
  ],
)
def test_what_cannot_be_done_is_said(tmp_path, changed, message):
  with pytest.raises(ValueError, match=message):
    stated(tmp_path, config={"pretrained_cfg": {**TIMM["pretrained_cfg"], **changed}})


def test_a_broken_file_is_named(tmp_path):
  with pytest.raises(ValueError, match=r"config\.json is no JSON"):
    stated(tmp_path, config="{")
