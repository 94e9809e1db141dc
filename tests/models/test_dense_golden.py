"""Dense backbones against the authors' code for segmentation and detection, on sizes of all kinds.

Swin's maps are smaller than a window, as large and larger; PVT's positions are of another size.
"""

import jax
import pytest

from hybrid_vit.models.dense import dense_arguments
from hybrid_vit.models.registry import create_model
from hybrid_vit.weights import convert, families
from tests import golden
from tests.models import contract

FOLDER = "dense/backbones"


@pytest.mark.parametrize("name", golden.names(FOLDER))
def test_backbone(name):
  description, expected = golden.load(FOLDER, name)
  architecture, x = description["architecture"], golden.image(description)
  arguments = {**dense_arguments(architecture, 64), **description["our_arguments"]}
  model = create_model(architecture, num_classes=0, **arguments)
  template = jax.eval_shape(model.init, jax.random.key(0), x)
  key_map = families.layouts(architecture)["official"].key_map(model)
  # Each of the file's names is used, each of our parameters filled.
  variables, _ = convert.import_weights(golden.weights(description), template, key_map)
  _, endpoints = contract.run(model, variables, x)
  golden.assert_matches(
    expected, {f"out{i}": endpoints[f.name] for i, f in enumerate(model.features)}
  )
