import subprocess
import sys

import jax.numpy as jnp
import pytest

import hybrid_vit
from hybrid_vit.models import moat, registry


def test_names_are_listed_by_pattern():
  assert hybrid_vit.list_models("tiny_moat_?") == [f"tiny_moat_{i}" for i in range(4)]
  assert hybrid_vit.list_models("nothing*") == []
  assert len(hybrid_vit.list_models("*moat*")) == 18


def test_the_order_of_the_list_does_not_depend_on_what_was_imported_first():
  listing = "import hybrid_vit; print(hybrid_vit.list_models())"
  first = "import hybrid_vit.models.cswin, hybrid_vit.models.revcol; "
  run = [
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    for code in (listing, first + listing)
  ]
  assert run[0] == run[1] and "cswin_tiny" in run[0]


def test_overrides_and_the_head():
  model = hybrid_vit.create_model(
    "moat_0", num_classes=7, widths=[32, 64, 96, 128], dtype="bfloat16"
  )
  assert isinstance(model, moat.MOAT)
  assert model.num_classes == 7
  assert model.widths == (32, 64, 96, 128)
  assert model.dtype == jnp.bfloat16
  assert hybrid_vit.create_model("moat_0").num_classes == 1000
  assert hybrid_vit.create_model("moat_0", num_classes=0).num_classes == 0


def test_an_unknown_name_names_the_closest():
  with pytest.raises(ValueError, match=r"no model is named 'moat-0'; did you mean 'moat_0'\?"):
    hybrid_vit.create_model("moat-0")


def test_an_unknown_argument_names_the_closest_and_all():
  with pytest.raises(
    ValueError, match=r"'drop_path'; did you mean 'drop_path_rate'\?.*stem_widths"
  ):
    hybrid_vit.create_model("moat_0", drop_path=0.1)


def test_registering_twice_or_with_wrong_arguments_is_an_error():
  entry = registry.model_entry("moat_0")
  rest = {"preprocessing": entry.preprocessing, "published": entry.published}
  with pytest.raises(ValueError, match="'moat_0' is already registered"):
    registry.register("moat_0", moat.MOAT, {}, **rest)
  with pytest.raises(ValueError, match="no argument 'width'; did you mean 'widths'"):
    registry.register("moat_x", moat.MOAT, {"width": 3}, **rest)
  assert "moat_x" not in hybrid_vit.list_models()


@pytest.mark.parametrize("name", hybrid_vit.list_models())
def test_every_entry_says_what_its_weights_expect(name):
  entry = registry.model_entry(name)
  p = entry.preprocessing
  assert p.image_size % 32 == 0 and 0 < p.crop_ratio <= 1
  assert p.interpolation in ("bilinear", "bicubic") and p.resize in ("crop", "squash")
  assert all(0 <= m < 1 for m in p.mean) and all(0 < s <= 1 for s in p.std)
  assert entry.published.source


def test_importing_the_package_does_not_load_jax():
  check = "import sys, hybrid_vit; assert 'jax' not in sys.modules and 'flax' not in sys.modules"
  subprocess.run([sys.executable, "-c", check], check=True)


def test_an_unknown_attribute_of_the_package():
  with pytest.raises(AttributeError, match="no attribute 'create_modell'"):
    _ = hybrid_vit.create_modell
