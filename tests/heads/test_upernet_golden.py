"""Whole networks under UPerNet: imported strictly, transformers' answers, written back."""

import json
import pickle
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.checkpoints import load_weights
from hybrid_vit.ops.resize import resize_bilinear
from hybrid_vit.stored_tasks import load_task
from hybrid_vit.tasks.map_losses import cross_entropy
from hybrid_vit.tools import export_weights, import_weights
from hybrid_vit.weights import readers
from tests import golden

FOLDER = "dense/upernet"
IGNORE = 255


@pytest.fixture(autouse=True)
def _exact():
  with jax.default_matmul_precision("float32"):
    yield


def recipe_of(description, path):
  """A recipe of the network that a golden file describes, as a file."""
  given = description["arguments"]
  backbone = given["backbone"]
  arguments = {"output_norms": (1, 2, 3, 4), "depths": tuple(backbone["depths"])}
  if backbone["model_type"] == "swin":
    name = "swin_tiny"
    arguments |= {
      "width": backbone["embed_dim"],
      "num_heads": tuple(backbone["num_heads"]),
      "window_size": backbone["window_size"],
      "shrink_windows": False,
    }
  else:
    name = "convnext_tiny"
    arguments |= {"widths": tuple(backbone["hidden_sizes"]), "layer_scale_init": 1.0}
  path.write_text(
    textwrap.dedent(f"""
      from hybrid_vit import dense_recipes

      def get_config(variant=None):
        config = dense_recipes.dense_frame(
          {name!r},
          dict(
            head=dict(
              name="upernet",
              channels={given["hidden_size"]},
              pool_scales={tuple(given["pool_scales"])},
            ),
            auxiliary=dict(name="fcn", channels={given["auxiliary_channels"]}),
          ),
          image_size=64, batch_size=2, source="scenes",
        )
        config.model.arguments = {arguments!r}
        if variant:
          config.task.head.channels = int(variant)
        return config
    """)
  )
  return path


@pytest.fixture(scope="module", params=golden.names(FOLDER))
def imported(request, tmp_path_factory):
  """(description, answers, recipe, file, directory) after an import by the command."""
  description, expected = golden.load(FOLDER, request.param)
  directory = tmp_path_factory.mktemp(request.param)
  recipe = recipe_of(description, directory / "recipe.py")
  file = directory / "model.safetensors"
  weights = golden.weights(description)
  counters = {name: np.zeros((), np.int64) for name in description["derived"]}
  readers.write_safetensors(file, {**weights, **counters}, {"format": "pt"})
  out = directory / "imported"
  assert import_weights.main([f"--config={recipe}", f"--from={file}", f"--to={out}"]) == 0
  return description, expected, recipe, file, out


def test_logits_and_losses_are_transformers(imported):
  description, expected, _, _, directory = imported
  stored = load_task(directory)
  x, task = golden.image(description), stored.task
  variables, model = stored.variables, task.model
  assert task.num_classes == description["arguments"]["num_labels"]

  @jax.jit
  def run(variables, x):
    logits, found = model.apply(variables, x, train=False)
    own = {name: tree["auxiliary_head"] for name, tree in variables.items()}
    return logits, found, model.auxiliary_head.apply(own, found)

  logits, found, auxiliary = run(variables, x)
  size = x.shape[1:3]
  at_size = [resize_bilinear(maps, size, align_corners=False) for maps in (logits, auxiliary)]
  rng = np.random.RandomState(description["input"]["seed"] + 1)
  labels = rng.randint(0, task.num_classes, (2, *size))
  labels[:, :5] = IGNORE
  options = dict(ignore=IGNORE, class_weights=None)
  main, beside = (
    cross_entropy(maps, jnp.asarray(labels), average="valid", **options) for maps in at_size
  )
  by_all = cross_entropy(at_size[0], jnp.asarray(labels), average="all", **options)
  np.testing.assert_allclose(
    np.stack([main + 0.4 * beside, main, beside, by_all]), expected["loss"], rtol=1e-5
  )
  golden.assert_matches(
    {name: value for name, value in expected.items() if name != "loss"},
    {
      **{f"feature{i}": found[f.name] for i, f in enumerate(model.backbone.features)},
      "logits_stride4": logits,
      "aux_logits_stride16": auxiliary,
      "logits": at_size[0],
    },
  )


def test_it_comes_back_by_the_names_of_both_libraries(imported, tmp_path):
  _, _, recipe, _, directory = imported
  weights, metadata = load_weights(directory)
  assert metadata["source"]["layout"] == "transformers"
  for layout, classifier, norm in (
    ("transformers", "decode_head.classifier.weight", "backbone.hidden_states_norms.stage1.weight"),
    ("mmseg", "decode_head.conv_seg.weight", "backbone.norm0.weight"),
    ("openmmlab", "decode_head.conv_seg.weight", "backbone.norm0.weight"),
  ):
    file, again = tmp_path / f"{layout}.safetensors", tmp_path / layout
    arguments = [f"--from={directory}", f"--to={file}", f"--layout={layout}"]
    assert export_weights.main(arguments) == 0
    names = readers.read_checkpoint(file).weights
    assert {classifier, norm} < set(names)
    assert any(name.endswith("num_batches_tracked") for name in names)
    assert import_weights.main([f"--config={recipe}", f"--from={file}", f"--to={again}"]) == 0
    back, said = load_weights(again)
    assert said["source"]["layout"] == layout
    jax.tree.map(np.testing.assert_array_equal, back, weights)
    # And by the names that it was read by, without being told.
    assert export_weights.main([f"--from={again}", f"--to={tmp_path / 'x.safetensors'}"]) == 0
    twice = readers.read_checkpoint(tmp_path / "x.safetensors").weights
    assert set(twice) == set(names)
    for name, value in names.items():
      np.testing.assert_array_equal(twice[name], value)


def test_what_does_not_fit_is_told_in_three_lists(imported, tmp_path, capsys):
  description, _, recipe, file, _ = imported
  weights = golden.weights(description)
  out = tmp_path / "out"

  def fails(message, *arguments, changed=None, source=file, config=recipe):
    if changed is not None:
      source = tmp_path / "changed.safetensors"
      readers.write_safetensors(source, changed, {})
    command = [f"--config={config}", f"--from={source}", f"--to={out}", *arguments]
    capsys.readouterr()
    assert import_weights.main(command) == 1
    said = capsys.readouterr().err
    assert message in said, said
    assert not out.exists()

  more = {**weights, "decode_head.more.weight": np.zeros(3)}
  fails("decode_head.more.weight: no variable takes it", changed=more)
  fails("loaded: ", changed=more)
  less = {k: v for k, v in weights.items() if k != "decode_head.fpn_bottleneck.conv.weight"}
  fails("params/head/fusion/conv/kernel: the checkpoint has no decode_head.fpn_bott", changed=less)
  fails("without numbers: 1, unused: 0", changed=less)
  fails("has shape", config=f"{recipe}:20")
  backbone = {k: v for k, v in weights.items() if k.startswith("backbone.")}
  fails("without --config it is read as a network alone", changed=backbone)
  fails("a backbone of", changed={k: v for k, v in weights.items() if k not in backbone})
  fails("either part of", changed={"something": np.zeros(3)})
  fails("has no layout 'timm'; it has: mmseg, openmmlab, transformers", "--layout=timm")
  fails("leave --arch out", "--arch=smt_s")
  fails("recipe of the task 'classification'", config="configs/swin.py")
  fails("did you mean", config="configs/swin_ade20")


def test_other_classes_begin_the_classifiers_alone(imported, tmp_path, capsys):
  _, _, recipe, file, directory = imported
  out = tmp_path / "out"
  arguments = [f"--config={recipe}", f"--from={file}", f"--to={out}", "--num_classes=3"]
  assert import_weights.main(arguments) == 0
  said = capsys.readouterr().out
  assert "initialised anew: 4\n" in said and "under upernet, 3 classes, layout transformers" in said
  stored, before = load_task(out), load_weights(directory)[0]
  assert stored.task.num_classes == 3
  for part in ("head", "auxiliary_head"):
    ours, theirs = stored.variables["params"][part], before["params"][part]
    assert ours["classifier"]["kernel"].shape[-1] == 3
    assert np.std(ours["classifier"]["kernel"]) > 0
    for name in set(theirs) - {"classifier"}:
      jax.tree.map(np.testing.assert_array_equal, ours[name], theirs[name])
  said = json.loads((out / "metadata.json").read_text())["initialised_anew"]
  assert all("classifier" in path for path in said) and len(said) == 4


@pytest.mark.parametrize("version", [0, 1])
def test_classes_of_mmsegmentations_files_have_names_and_colours(imported, version, tmp_path):
  _, _, recipe, _, directory = imported
  exported = tmp_path / "mmseg.safetensors"
  arguments = [f"--from={directory}", f"--to={exported}", "--layout=mmseg"]
  assert export_weights.main(arguments) == 0
  weights = readers.read_checkpoint(exported).weights
  classes = len(weights["decode_head.conv_seg.bias"])
  names = tuple(f"thing {i}" for i in range(classes))
  palette = [[i, 2 * i, 255 - i] for i in range(classes)]
  meta = {"CLASSES": names, "PALETTE": palette, "mmseg_version": "0.30.0"}
  if version:
    meta = {"dataset_meta": {"classes": names, "palette": np.array(palette)}, "epoch": 3}
  file = tmp_path / "iter_160000.pth"
  saved = {"meta": meta, "state_dict": weights, "optimizer": {"state": {}}}
  file.write_bytes(pickle.dumps(saved))
  arguments = [f"--config={recipe}", f"--from={file}", f"--to={tmp_path / 'out'}"]
  assert import_weights.main(arguments) == 0
  stored = load_task(tmp_path / "out")
  assert stored.task.map_class_names == names
  assert stored.task.palette == tuple(map(tuple, palette))
  assert stored.metadata["source"]["branch"] == "state_dict"
  jax.tree.map(np.testing.assert_array_equal, stored.variables, load_weights(directory)[0])
