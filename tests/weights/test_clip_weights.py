"""Weights of both towers through the commands, and what is read back from their directory."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image

import hybrid_vit
from hybrid_vit import checkpoints
from hybrid_vit.data.tokenizer import ClipTokenizer
from hybrid_vit.models.clip_systems import CLIP_MODELS, create_clip
from hybrid_vit.models.registry import create_model
from hybrid_vit.tools import export_weights, import_weights
from hybrid_vit.weights import architectures, families, readers, stored, stored_clip, transfer
from tests import golden
from tests.clips import IMAGE, SMALL_TEXT, SMALL_VIT, small_clip, write_small_clip

LAYOUTS = {
  "mobileclip_s2": ("official", "timm"),
  "mobileclip_b": ("timm",),
  "openai_vit_b16": ("open_clip", "transformers"),
}


def of_both(variables):
  return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}


@functools.lru_cache(maxsize=1)
def made(name, merged=False):
  arguments = {"reparameterized": True} if merged else {}
  shapes = families._shapes(name, None, tuple(arguments.items()))
  rng = np.random.default_rng(0)
  flat = {k: rng.random(s.shape, np.float32) for k, s in shapes.items()}
  return of_both(traverse_util.unflatten_dict(flat, sep="/"))


@pytest.mark.parametrize("name", CLIP_MODELS)
def test_parameters_are_those_of_the_authors(name):
  shapes = families._shapes(name, None, ())
  count = sum(np.prod(s.shape) for k, s in shapes.items() if k.startswith("params/"))
  assert count == CLIP_MODELS[name].published.parameters


def test_every_system_prepares_pictures_as_its_weights_expect():
  """MobileCLIP's stay in [0, 1]; CLIP's own are normalised."""
  for name, system in CLIP_MODELS.items():
    expected = system.preprocessing
    if name.startswith("mobileclip"):
      assert (expected.mean, expected.std) == ((0.0,) * 3, (1.0,) * 3)
      assert expected.interpolation == "bilinear"
      assert expected.image_size == (224 if name == "mobileclip_b" else 256)
    else:
      assert expected.mean == (0.48145466, 0.4578275, 0.40821073)
      assert (expected.interpolation, expected.image_size) == ("bicubic", 224)
  for tower in (create_clip("openai_vit_b16").image, create_clip("openai_vit_b16").text):
    assert tower.activation == "quick_gelu"
  assert create_clip("openclip_vit_b16").text.activation == "gelu"
  assert create_clip("openclip_vit_b16").max_scale is None
  assert create_clip("mobileclip_s0").max_scale == 100.0


@pytest.mark.parametrize(
  ("name", "layout"), [(n, x) for n, found in LAYOUTS.items() for x in found]
)
def test_import_of_an_export_is_the_identity(name, layout):
  variables = made(name)
  file = families.export_checkpoint(variables, name, create_clip(name), layout)
  back = families.import_checkpoint(file, name, layout=layout)
  jax.tree.map(np.testing.assert_array_equal, back.variables, variables)
  assert len(back.report.loaded) == len(jax.tree.leaves(variables))
  assert not back.report.initialised and not back.report.unused and back.num_classes == 512


def test_a_merged_file_says_so_itself():
  variables, model = made("mobileclip_s0", True), create_clip("mobileclip_s0", reparameterized=True)
  file = families.export_checkpoint(variables, "mobileclip_s0", model)
  back = families.import_checkpoint(file, "mobileclip_s0")
  assert back.arguments == {"reparameterized": True}
  jax.tree.map(np.testing.assert_array_equal, back.variables, variables)


@pytest.fixture(scope="module")
def s0(tmp_path_factory):
  """(description, answers, the authors' file, the imported directory) of MobileCLIP-S0."""
  directory = tmp_path_factory.mktemp("s0")
  description, expected = golden.load("mobileclip", "mobileclip_s0_256")
  file, imported = directory / "mobileclip_s0.npz", directory / "imported"
  np.savez(file, **golden.weights(description))
  said = import_weights.main(["--arch=mobileclip_s0", f"--from={file}", f"--to={imported}"])
  assert said == 0
  return description, expected, file, imported


def test_the_golden_file_through_the_command(s0, tmp_path, capsys):
  description, expected, _, imported = s0
  metadata = json.loads((imported / "metadata.json").read_text())
  assert metadata["name"] == "mci0" and metadata["text_tower"] == "mobileclip_s0"
  assert metadata["embedding_size"] == 512 and metadata["max_scale"] == 100.0
  assert (metadata["task"], metadata["loss"]) == ("contrastive", "softmax")
  model = hybrid_vit.load_clip(imported)
  assert model.name == "mobileclip_s0"
  image = model.encode_image(golden.image(description))
  words = model.encode_text(expected["tokens"])
  actual = {"image_features": image, "text_features": words}
  golden.assert_matches({k: expected[k] for k in actual}, actual)
  golden.assert_matches(
    {"probabilities": expected["probabilities"]},
    {"probabilities": model.probabilities(image, words)},
  )
  # Out again, and as one network.
  assert export_weights.main([f"--from={imported}", f"--to={tmp_path / 'back.safetensors'}"]) == 0
  assert "layout official" in capsys.readouterr().out
  back = readers.read_checkpoint(tmp_path / "back.safetensors").weights
  for name, value in golden.weights(description).items():
    np.testing.assert_array_equal(back[name], value, name)


def test_the_merged_form_goes_out_and_in_and_answers_alike(s0, tmp_path):
  _, expected, _, imported = s0
  file, again = tmp_path / "merged.safetensors", tmp_path / "merged"
  assert export_weights.main([f"--from={imported}", f"--to={file}", "--merge"]) == 0
  assert import_weights.main(["--arch=mobileclip_s0", f"--from={file}", f"--to={again}"]) == 0
  merged = hybrid_vit.load_clip(again)
  assert merged.model.image.reparameterized and merged.model.text.reparameterized
  words = merged.encode_text(expected["tokens"])
  golden.assert_matches({"text_features": expected["text_features"]}, {"text_features": words})
  with pytest.raises(ValueError, match="no branches to merge"):
    hybrid_vit.load_clip(again, merge=True)


def test_a_file_of_both_towers_is_known_by_its_names(s0, monkeypatch):
  description = s0[0]
  names = {k: v for k, v in families.families().items() if k.endswith((".clip", ".mci"))}
  monkeypatch.setattr(families, "families", lambda: names)
  found, family = families.identify(golden.weights(description))
  assert (found, family) == (["mobileclip_s0"], "hybrid_vit.models.clip")


def test_the_image_tower_stands_alone_where_one_network_is_wanted(tmp_path):
  model = write_small_clip(tmp_path / "w")
  network = stored.load_network(tmp_path / "w")
  assert network.name == "vit_base_patch16_clip_224" and network.num_classes == 8
  assert network.loss == "contrastive"
  images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
  normalised = (images / np.float32(255) - 0.5) / 0.25
  logits, _ = network.model.apply(network.variables, normalised.astype(np.float32))
  unit = logits / jnp.linalg.norm(logits, axis=-1, keepdims=True)
  np.testing.assert_allclose(model.encode_image(images), unit, rtol=2e-4, atol=2e-5)
  # As the beginning of a classifier.
  classifier = create_model("vit_base_patch16_clip_224", 3, **{**SMALL_VIT, "head_bias": True})
  target = jax.eval_shape(classifier.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
  variables, report = transfer.transfer(model.variables, target, reinitialize_head=True)
  np.testing.assert_array_equal(
    variables["params"]["class_token"], model.variables["params"]["image"]["class_token"]
  )
  assert all(name.startswith("params/head") for name in report.initialised)
  assert "params/logit_scale" in report.unused
  assert "params/text/token_embedding" in report.unused


def test_encoding_in_batches_of_arrays_and_of_files(tmp_path):
  model = write_small_clip(tmp_path / "w")
  images = np.random.default_rng(1).integers(0, 256, (5, 16, 16, 3), np.uint8)
  whole = model.encode_image(images)
  np.testing.assert_allclose(np.linalg.norm(whole, axis=-1), 1.0, rtol=1e-5)
  np.testing.assert_allclose(model.encode_image(images, batch_size=2), whole, atol=1e-6)
  assert model.encode_image([]).shape == (0, 8)
  for i, image in enumerate(images[:2]):
    Image.fromarray(image).save(tmp_path / f"{i}.png")
  files = model.encode_image([tmp_path / "0.png", str(tmp_path / "1.png")])
  np.testing.assert_allclose(files, whole[:2], atol=1e-6)
  np.testing.assert_allclose(model.encode_image(tmp_path / "0.png"), whole[:1], atol=1e-6)
  texts = ["a cat", "two dogs in the snow"]
  tokens = ClipTokenizer(12)(texts)
  np.testing.assert_array_equal(model.encode_text(texts), model.encode_text(tokens))
  assert model.encode_text("a cat").shape == (1, 8)
  probabilities = model.probabilities(whole, model.encode_text(texts))
  np.testing.assert_allclose(probabilities.sum(-1), 1.0, rtol=1e-5)
  with pytest.raises(ValueError, match=r"shape \[16, 16, 3\]; uint8 or float32"):
    model.encode_image(images[0])
  with pytest.raises(ValueError, match="this text tower knows 0 to 49407"):
    model.encode_text(np.array([[49408, 0]]))


def test_a_state_that_says_its_task_in_the_configuration_alone(tmp_path, monkeypatch):
  model = write_small_clip(tmp_path / "w")
  task = {"name": "contrastive", "text_tower": "clip_vit_b16", "text_arguments": SMALL_TEXT}
  network = {"name": "vit_base_patch16_clip_224", "arguments": SMALL_VIT}
  config = {"model": network, "task": {**task, "loss": "sigmoid", "embedding_size": 8}}
  state = model.variables, {"config": config, "preprocessing": model.metadata["preprocessing"]}
  monkeypatch.setattr(checkpoints, "load_weights", lambda *_, **__: state)
  found = stored_clip.load_clip("somewhere")
  assert (found.model, found.loss) == (model.model.clone(max_scale=100.0), "sigmoid")
  assert found.name == "vit_base_patch16_clip_224 + clip_vit_b16"
  pair = found.probabilities(np.eye(2, 8), np.eye(2, 8))
  assert not np.allclose(pair.sum(-1), 1)


def test_fingerprints_differ_where_weights_do(tmp_path):
  first, second = (write_small_clip(tmp_path / str(seed), seed) for seed in (0, 1))
  assert first.fingerprint != second.fingerprint
  assert first.fingerprint == stored_clip.load_clip(tmp_path / "0").fingerprint


def test_errors_say_what_is_wrong(tmp_path, capsys):
  write_small_clip(tmp_path / "w")
  with pytest.raises(ValueError, match="did you mean 'mobileclip_s2'"):
    create_clip("mobileclip_s3")
  with pytest.raises(ValueError, match="argument 'reparametrized'; did you mean 'reparam"):
    create_clip("mobileclip_s2", reparametrized=True)
  with pytest.raises(ValueError, match="not mobileclip_s0"):
    stored_clip.load_clip(tmp_path / "w", "mobileclip_s0")
  variables = {"params": {"head": {"kernel": np.ones((2, 3))}}, "batch_stats": {}}
  checkpoints.export(tmp_path / "one", variables, {"name": "mci0"})
  with pytest.raises(ValueError, match="has no text tower: its weights are of mci0 alone"):
    stored_clip.load_clip(tmp_path / "one")
  bad = small_clip()[1]
  bad["params"]["text"]["token_embedding"][0, 0] = np.nan
  checkpoints.export(tmp_path / "bad", bad, {"name": IMAGE, "text_tower": "clip_vit_b16"})
  with pytest.raises(ValueError, match="hold NaN or infinity, first in 'params/text/token_emb"):
    stored_clip.load_clip(tmp_path / "bad")
  out = tmp_path / "out.safetensors"
  arguments = [f"--from={tmp_path / 'w'}", f"--to={out}"]
  assert export_weights.main([*arguments, "--merge"]) == 1
  assert "no branches to merge" in capsys.readouterr().err
  assert export_weights.main([*arguments, "--layout=timm"]) == 1
  assert "has the layout open_clip" in capsys.readouterr().err
  assert not out.exists()


def test_no_head_of_another_width(s0, tmp_path, capsys):
  *_, file, _ = s0
  said = ["--arch=mobileclip_s0", f"--from={file}", f"--to={tmp_path / 'x'}", "--num_classes=10"]
  assert import_weights.main(said) == 1
  assert "has an embedding (512 wide), not 10 classes" in capsys.readouterr().err
  assert architectures.clip_with("mci0", "mobileclip_s0") == "mobileclip_s0"
  assert architectures.clip_with("mci0", "mobileclip_s2") is None
