"""Heat maps of every family, and what a network without a method is told."""

import dataclasses

import numpy as np
import pytest
from jax import numpy as jnp

from hybrid_vit import heat_map_plots, saliency
from hybrid_vit.class_prediction import Texts, class_index
from hybrid_vit.heat_maps import METHODS, HeatMap, HeatMapper
from hybrid_vit.intermediates import attention_weights, evaluation_form, modulators
from hybrid_vit.models.registry import Preprocessing
from hybrid_vit.weights.stored import StoredNetwork
from tests.models import (
  contract,
  test_convnext,
  test_cswin,
  test_cvt,
  test_focalnet,
  test_l2vit,
  test_mci,
  test_moat,
  test_pvt,
  test_resnet,
  test_revcol,
  test_smt,
  test_swin,
  test_vit,
)

SIZE = 64
# Family: (its tests' small network, the map of Grad-CAM, methods besides Grad-CAM and PCA).
FAMILIES = {
  "moat": (test_moat, "stage4", ("attention",)),
  "cvt": (test_cvt, "stage2_block0", ("attention",)),
  "focalnet": (test_focalnet, "head_norm", ("modulators",)),
  "smt": (test_smt, "stage3", ("attention",)),
  "l2vit": (test_l2vit, "stage2", ()),
  "revcol": (test_revcol, "stage4", ()),
  "mci": (test_mci, "head_conv", ("attention",)),
  "vit": (test_vit, "stage1_block0", ("attention", "rollout")),
  # Its windows are smaller than its maps.
  "swin": (test_swin, "stage2", ()),
  "convnext": (test_convnext, "stage4", ()),
  "resnet": (test_resnet, "stage4", ()),
  "pvt": (test_pvt, "stage3", ("attention",)),
  "cswin": (test_cswin, "stage4", ("attention",)),
}


def make_mapper(model, size=SIZE, **fields):
  variables = contract.drawn_variables(model, (size, size))
  return HeatMapper(
    StoredNetwork(
      **{
        "name": type(model).__name__,
        "model": model,
        "variables": variables,
        "num_classes": model.num_classes,
        "preprocessing": Preprocessing(size, 1.0, "bilinear", (0.5,) * 3, (0.25,) * 3),
        "preprocessing_said_by": "made",
        "class_names": tuple(f"class {i}" for i in range(model.num_classes)),
        "loss": "softmax",
        "metadata": {},
        **fields,
      }
    )
  )


def pictures(count, size=SIZE):
  return list(np.random.default_rng(3).integers(0, 256, (count, size, size, 3), np.uint8))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
  tests, endpoint, more = FAMILIES[family]
  mapper = make_mapper(tests.small())
  assert set(mapper.methods) == {"grad_cam", "pca", *more}
  images = pictures(2)
  shapes = {name: x.shape[1:3] for name, x in mapper._split.endpoints.items()}
  cams = mapper.maps("grad_cam", images, target=3)
  assert [cam.source for cam in cams] == [endpoint] * 2 and cams[0].title == "Grad-CAM: class 3"
  for cam in cams:
    assert cam.values.shape == shapes[endpoint] and cam.values.dtype == np.float32
    assert cam.values.min() >= 0 and np.isfinite(cam.values).all()
  assert max(cam.values.max() for cam in cams) > 0
  assert (cams[0].values != cams[1].values).any()
  colours = mapper.maps("pca", images)
  assert [c.values.shape for c in colours] == [(*shapes[colours[0].source], 3)] * 2
  both = np.stack([c.values for c in colours])
  # One scale for the two.
  np.testing.assert_allclose(both.min((0, 1, 2)), 0)
  np.testing.assert_allclose(both.max((0, 1, 2)), 1)


@pytest.fixture(scope="module")
def vit():
  return make_mapper(test_vit.small(), size=32)


def softmax(x):
  weights = np.exp(x - x.max(-1, keepdims=True))
  return weights / weights.sum(-1, keepdims=True)


def test_attention_of_a_class_token_is_that_of_its_row(vit):
  """The last block's, from its input by NumPy alone."""
  (image,) = pictures(1, 32)
  (found,) = vit.maps("attention", [image])
  x = (image[None] / 255.0 - 0.5) / 0.25
  endpoints = contract.run(vit._model, vit.network.variables, jnp.asarray(x, jnp.float32))[1]
  patches, token = endpoints["stage1_block0"], endpoints["stage1_block0_token"]
  tokens = np.concatenate([token[0][None], patches[0].reshape(-1, patches.shape[-1])])
  own = vit.network.variables["params"]["stage1_block1"]
  y = (tokens - tokens.mean(-1, keepdims=True)) / np.sqrt(tokens.var(-1, keepdims=True) + 1e-6)
  y = y * own["attention_norm"]["scale"] + own["attention_norm"]["bias"]
  qkv = y @ own["qkv"]["kernel"].reshape(24, 72) + own["qkv"]["bias"]
  query, key = (part.reshape(-1, 3, 8) for part in np.split(qkv, 3, axis=-1)[:2])
  weights = softmax(np.einsum("qhd,khd->hqk", query, key) / np.sqrt(8))
  assert found.source == "stage1_block1" and found.values.shape == (4, 4)
  np.testing.assert_allclose(found.values.ravel(), weights[:, 0, 1:].mean(0), rtol=1e-3)
  (rolled,) = vit.maps("rollout", [image])
  assert rolled.source == "stage1_block0 to stage1_block1"
  every = attention_weights(vit._model, vit.network.variables, jnp.asarray(x, jnp.float32))
  assert list(every) == ["stage1_block0", "stage1_block1"]
  np.testing.assert_allclose(every["stage1_block1"][0], weights, rtol=1e-3, atol=1e-6)
  expected = saliency.attention_rollout(list(every.values()))[0, 0, 1:]
  np.testing.assert_allclose(rolled.values.ravel(), expected, rtol=1e-4)


def test_weights_that_are_sown_are_those_that_the_network_uses():
  """Weights times values are what attention gave: of a hybrid, with a bias, in one window."""
  model = test_moat.small()
  variables = contract.drawn_variables(model, (SIZE, SIZE))
  x = contract.images(1, SIZE, SIZE)
  names = ("query", "key", "value", "out")
  _, inside = model.apply(
    variables, x, mutable=["intermediates"],
    capture_intermediates=lambda m, _: m.name in names and m.parent.name == "attention",
  )  # fmt: skip
  found = attention_weights(model, variables, x)
  assert found and all(w.shape[-1] == w.shape[-2] for w in found.values())
  for block, weights in found.items():
    parts = inside["intermediates"][block]["attention"]
    value, out = parts["value"]["__call__"][0][:, 0], parts["out"]["__call__"][0][:, 0]
    mixed = np.einsum("bhqk,bkhd->bqhd", weights, value)
    own = variables["params"][block]["attention"]["out"]
    expected = np.einsum("bqhd,hdc->bqc", mixed, own["kernel"]) + own["bias"]
    np.testing.assert_allclose(out, expected, atol=1e-4)


def test_nothing_is_sown_where_nobody_asked():
  model = test_vit.small()
  variables = contract.drawn_variables(model)
  assert set(variables) <= {"params", "batch_stats"}
  logits, _ = model.apply(variables, contract.images(1, 32, 32), mutable=False)
  assert logits.shape == (1, 10)


def test_modulators_are_what_queries_are_multiplied_by():
  model = evaluation_form(test_focalnet.small())
  variables = contract.drawn_variables(model)
  x = contract.images(1, 32, 32)
  found = modulators(model, variables, x)
  assert list(found) == ["stage1_block0", "stage2_block0", "stage2_block1"]
  last = "stage2_block1"
  _, inside = model.apply(
    variables, x, mutable=["intermediates"],
    capture_intermediates=lambda m, _: m.name in ("projection_in", "projection_out"),
  )  # fmt: skip
  parts = inside["intermediates"][last]["modulation"]
  query = parts["projection_in"]["__call__"][0][..., : found[last].shape[-1]]
  kernel = variables["params"][last]["modulation"]["projection_out"]
  expected = (query * found[last]) @ kernel["kernel"].reshape(query.shape[-1], -1) + kernel["bias"]
  np.testing.assert_allclose(parts["projection_out"]["__call__"][0], expected, atol=1e-4)


def test_a_scanned_network_is_looked_into_block_by_block():
  mapper = make_mapper(test_vit.small(scan_blocks=True, remat=True), size=32)
  assert mapper.methods == ("grad_cam", "attention", "rollout", "pca")


def test_the_likeliest_class_is_taken_where_none_is_named(vit):
  images = pictures(2, 32)
  x = jnp.asarray((np.stack(images) / 255.0 - 0.5) / 0.25, jnp.float32)
  likeliest = np.asarray(contract.run(vit._model, vit.network.variables, x)[0]).argmax(-1)
  for image, best in zip(images, likeliest):
    (found,) = vit.maps("grad_cam", [image])
    (named,) = vit.maps("grad_cam", [image], target=int(best))
    (other,) = vit.maps("grad_cam", [image], target=(int(best) + 1) % 10)
    assert found.title == f"Grad-CAM: class {best}" == named.title
    np.testing.assert_array_equal(found.values, named.values)
    assert (found.values != other.values).any()


def test_texts_are_classes_of_an_image_tower():
  mapper = make_mapper(test_vit.small(), size=32, loss="", class_names=())
  assert "grad_cam" not in mapper.methods
  (image,) = pictures(1, 32)
  with pytest.raises(ValueError, match="grad_cam: VisionTransformer has outputs that are no"):
    mapper.maps("grad_cam", [image])
  embeddings = np.eye(10, dtype=np.float32)[[4, 7]]
  texts = Texts(("a cat", "a dog"), embeddings)
  (found,) = mapper.maps("grad_cam", [image], target=1, texts=texts)
  assert found.title == "Grad-CAM: a dog"
  # Of cosines: a longer embedding of the picture changes nothing, unlike a logit.
  variables = mapper.network.variables
  head = {k: 2.0 * v for k, v in variables["params"]["head"].items()}
  longer = dataclasses.replace(
    mapper.network, variables={**variables, "params": {**variables["params"], "head": head}}
  )
  (same,) = HeatMapper(longer).maps("grad_cam", [image], target=1, texts=texts)
  np.testing.assert_allclose(same.values, found.values, rtol=1e-4, atol=1e-7)


def test_what_a_network_has_not_is_said_with_what_it_has():
  mapper = make_mapper(test_resnet.small())
  for method, reason in {
    "attention": "ResNet .ResNet. has no softmax attention over a whole map",
    "rollout": "does not attend over one whole map in every block",
    "modulators": "has no focal modulation",
  }.items():
    with pytest.raises(ValueError, match=f"{method}: .*{reason}; of it there are: grad_cam, pca"):
      mapper.check(method)
  with pytest.raises(
    ValueError, match=f"no method is named 'cam'; there are: {', '.join(METHODS)}"
  ):
    mapper.check("cam")
  with pytest.raises(ValueError, match="no map is named 'stage5'; did you mean"):
    mapper.maps("pca", pictures(1), endpoint="stage5")
  bare = dataclasses.replace(mapper.network, num_classes=0)
  with pytest.raises(ValueError, match="grad_cam: ResNet has no classifier here"):
    HeatMapper(bare).check("grad_cam")


def test_a_class_by_name_or_number():
  names = ("cat", "Dog", "7", "dog")
  assert [class_index(text, names) for text in ("cat", "CAT", "Dog", "7", "0")] == [0, 0, 1, 2, 0]
  for text in ("DOG", "4", "-1", "cot"):
    with pytest.raises(ValueError, match=f"no class is named '{text}'.*from 0 to 3 was expected"):
      class_index(text, names)


def test_overlays():
  image = np.full((32, 32, 3), 100, np.uint8)
  cam = HeatMap("grad_cam", np.array([[0.0, 2.0]], np.float32), "", "")
  drawn = heat_map_plots.overlay_heat(image, cam)
  assert drawn.shape == (224, 224, 3) and drawn.dtype == np.uint8
  # From blue to red.
  assert drawn[0, 0, 2] > drawn[0, 0, 0] and drawn[0, -1, 0] > drawn[0, -1, 2]
  # Without differences all is at the low end, and is drawn without a warning.
  flat = heat_map_plots.overlay_heat(image, dataclasses.replace(cam, values=cam.values * 0))
  np.testing.assert_array_equal(flat, np.broadcast_to(drawn[0, 0], flat.shape))
  # An attention map's colours begin at its least value, Grad-CAM's at 0.
  high = np.array([[1.0, 2.0]], np.float32)
  least = heat_map_plots.overlay_heat(image, HeatMap("attention", high, "", ""))
  np.testing.assert_array_equal(least[0, 0], drawn[0, 0])
  assert (
    heat_map_plots.overlay_heat(image, HeatMap("grad_cam", high, "", ""))[0, 0] != drawn[0, 0]
  ).any()
  colours = HeatMap("pca", np.array([[[1.0, 0.0, 0.5]]], np.float32), "", "")
  assert heat_map_plots.overlay_heat(image, colours)[5, 5].tolist() == [255, 0, 128]
