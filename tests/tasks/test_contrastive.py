"""Image–text pretraining: its loss, its parts, and whole runs on scenes."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import hybrid_vit
from hybrid_vit import build, checkpoints, dry_run, evaluate, main, programs, sharding
from hybrid_vit.build import DataFacts
from hybrid_vit.config import Config, ConfigError, load_config
from hybrid_vit.models.registry import Preprocessing, create_model
from hybrid_vit.ops.contrastive import Teachers, plain_sigmoid_loss, plain_softmax_loss
from hybrid_vit.reporting import read_metrics
from hybrid_vit.tasks.contrastive import ContrastiveSettings, build_contrastive
from hybrid_vit.tasks.registry import Context
from hybrid_vit.train_state import loss_and_gradients
from hybrid_vit.weights.transfer import transfer

RESNET = dict(stem_width=4, widths=(8, 16), depths=(1, 1))
TEXT = dict(width=16, depth=1, num_heads=2, context_length=24)
EXPECTS = Preprocessing(32, 1.0, "bilinear", (0.5,) * 3, (0.25,) * 3)
VIT = dict(width=16, depth=1, num_heads=2, patch_size=16, position_size=2)


def make(image=("resnet50", RESNET), dtype=jnp.float32, **settings):
  name, arguments = image

  def make_network(classes):
    return create_model(name, num_classes=classes, dtype=dtype, **arguments)

  values = dict(text_arguments=TEXT, embedding_size=8, **settings)
  return build_contrastive(ContrastiveSettings(**values), Context({}, None, EXPECTS, make_network))


def rows(count=8, captions=2, teachers=0, seed=0):
  rng = np.random.default_rng(seed)
  text = rng.integers(1, 400, (count, captions, 24)).astype(np.int32)
  text[..., 12], text[..., 13:] = 49407, 0
  batch = {"image": rng.integers(0, 256, (count, 32, 32, 3), np.uint8), "text": text}
  if teachers:
    batch["image_teacher"] = rng.normal(size=(count, teachers, 5)).astype(np.float32)
    batch["text_teacher"] = rng.normal(size=(count, captions, teachers, 5)).astype(np.float32)
  return batch


def started(task, batch):
  variables = jax.jit(task.init)(jax.random.key(0), batch)
  return variables, task.augment(batch, jax.random.key(1), jnp.zeros((), jnp.int32))


def unit(x):
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize(
  "settings",
  [
    dict(),
    dict(loss="sigmoid"),
    dict(contrastive_weight=0.25, distillation_weight=0.75, teacher_scale=30.0),
  ],
  ids=["softmax", "sigmoid", "teachers"],
)
def test_the_loss_is_added_up_over_the_captions(settings):
  task, batch = make(**settings), rows(teachers=2 if "distillation_weight" in settings else 0)
  variables, given = started(task, batch)
  params = variables["params"]
  begun = np.exp(float(params["logit_scale"]))
  assert begun == pytest.approx(10.0 if "loss" in settings else 1 / 0.07, rel=1e-5)
  assert ("logit_bias" in params) == ("loss" in settings)
  loss, aux = jax.jit(task.loss)(variables, given, jax.random.key(2))
  embeddings, _ = task.embed(variables, given, jax.random.key(2))
  images, texts = embeddings["image"], embeddings["text"]
  assert images.shape == (8, 8) and texts.shape == (8, 2, 8)
  np.testing.assert_allclose(jnp.linalg.norm(texts, axis=-1), 1.0, rtol=1e-5)
  expected = 0.0
  for k in range(2):
    if settings.get("loss") == "sigmoid":
      expected += plain_sigmoid_loss(images, texts[:, k], begun, params["logit_bias"])
      continue
    contrastive = plain_softmax_loss(images, texts[:, k], begun)
    if "distillation_weight" not in settings:
      expected += contrastive
      continue
    theirs = Teachers(unit(batch["image_teacher"]), unit(batch["text_teacher"][:, k]), 30.0)
    expected += 0.25 * contrastive + 0.75 * plain_softmax_loss(images, texts[:, k], begun, theirs)
  assert float(loss) == pytest.approx(float(expected), rel=1e-4)
  metrics = {name: float(total / weight) for name, (total, weight) in aux["metrics"].items()}
  own = np.argmax(np.asarray(images @ texts[:, 0].T), axis=1) == np.arange(8)
  assert metrics["top1"] == pytest.approx(own.mean())
  assert metrics["scale"] == pytest.approx(begun, rel=1e-5)
  assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_the_scale_is_clamped_and_comes_back():
  model = make(max_scale=20.0).model
  value, slope = jax.value_and_grad(model.scale_of)(jnp.log(jnp.float32(30.0)))
  assert value == pytest.approx(20.0) and slope == pytest.approx(20.0)
  falling = jax.grad(lambda x: -model.scale_of(x))
  assert falling(jnp.log(jnp.float32(30.0))) == 0.0
  assert falling(jnp.log(jnp.float32(15.0))) == pytest.approx(-15.0)


@pytest.mark.parametrize("image", [("resnet50", RESNET), ("vit_base_patch16_224", VIT)])
def test_gradients_in_parts_are_those_of_the_whole(image):
  """Without batch norm exactly; with it those of statistics by groups, as accumulation has them."""
  task, batch = make(image, contrastive_weight=0.5, distillation_weight=0.5), rows(teachers=1)
  groups = 4
  variables, given = started(task, batch)
  parts = jax.jit(lambda v, b: loss_and_gradients(task, v, b, jax.random.key(0), groups))
  whole_task = task
  if image[0] == "resnet50":
    grouped = task.model.image.clone(batch_norm_groups=groups)
    whole_task = dataclasses.replace(task, model=task.model.clone(image=grouped))
  whole = jax.jit(lambda v, b: loss_and_gradients(whole_task, v, b, jax.random.key(0)))
  order = np.arange(8).reshape(-1, groups).T.reshape(-1)
  turned = {name: value[order] for name, value in given.items()}
  found = parts(variables, given)
  expected = whole(variables, turned)
  # `top1` counts, and the rest are means: the same in any order of the rows.
  for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-6)


def test_half_precision_of_the_towers_leaves_the_loss_in_float32():
  task = make(dtype=jnp.bfloat16)
  variables, given = started(task, rows())
  assert task.model.text.dtype == jnp.bfloat16
  embeddings, _ = task.embed(variables, given, jax.random.key(0))
  assert embeddings["image"].dtype == embeddings["text"].dtype == jnp.float32
  loss, _ = task.loss(variables, given, jax.random.key(0))
  full = make()
  expected, _ = full.loss(variables, given, jax.random.key(0))
  assert loss.dtype == jnp.float32 and float(loss) == pytest.approx(float(expected), rel=0.05)


def test_activations_name_both_towers():
  task = make()
  variables, given = started(task, rows())
  found = task.activations(variables, given, jax.random.key(0))
  names = list(found)
  assert names[0] == "image" and {"image/stage1", "text/block0", "text/embedding"} <= set(names)
  assert names.index("image/embedding") < names.index("text/block0")


def test_an_image_network_becomes_an_image_tower():
  task = make()
  variables, _ = started(task, rows())
  alone = create_model("resnet50", num_classes=7, **RESNET)
  source = jax.tree.map(
    np.asarray, jax.jit(alone.init)(jax.random.key(5), jnp.zeros((1, 32, 32, 3)))
  )
  found, report = transfer(source, jax.eval_shape(lambda: variables))
  stem = lambda tree: jax.tree.leaves(tree["stem"])  # noqa: E731
  for one, other in zip(stem(found["params"]["image"]), stem(source["params"])):
    np.testing.assert_array_equal(one, other)
  assert any("params/image/head/kernel (a projection" in name for name in report.initialised)
  assert any("params/text/token_embedding (no text" in name for name in report.initialised)
  assert not report.unused or all("head" in name for name in report.unused)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(loss="triplet"), "loss 'triplet' is not one of softmax, sigmoid"),
    (dict(max_scale=0.0), "max_scale is 0.0; above 0"),
    (dict(contrastive_weight=0.0), "none below 0 and one above were expected"),
    (dict(loss="sigmoid", distillation_weight=1.0), "loss 'softmax' was expected"),
    (dict(text_tower="bert"), "no text tower is named 'bert'"),
  ],
)
def test_what_cannot_be_is_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    make(**settings)


def config(**changes):
  values = ConfigDict()
  values.model = dict(name="resnet50", arguments=RESNET)
  values.task = dict(
    name="contrastive", text_tower="clip_vit_b16", text_arguments=TEXT, embedding_size=16
  )
  values.data = dict(
    source="scenes:size=32,count=96,objects=1",
    batch_size=32,
    image_size=32,
    transform="decode|resize(32)|captions('exact', 'short')|tokenize(24)",
  )
  evaluation = "decode|resize(32)|all_captions(5, 'exact')|tokenize(24)"
  values.evaluation = dict(
    sets=dict(
      classes=dict(
        source="scenes:size=32,count=40,objects=1", options=dict(templates=("a {}",)),
        transform="decode|resize(32)",
      ),
      captions=dict(
        source="scenes:size=32,count=20,objects=1", kind="retrieval", transform=evaluation
      ),
    )
  )  # fmt: skip
  values.total_steps = 12
  values.optimizer = dict(
    name="adamw", learning_rate=3e-3, weight_decay=0.1, schedule=dict(name="constant")
  )
  values.evaluate_every_steps = 12
  values.log_every_steps = 1
  values.checkpoint = dict(every_steps=4, keep=9)
  values.update(changes)
  return values


@pytest.fixture(scope="module")
def whole(tmp_path_factory, shared_programs):
  workdir = tmp_path_factory.mktemp("clip") / "run"
  return main.train(config(), workdir), workdir


def test_a_run_learns_measures_and_is_loaded(whole):
  results, workdir = whole
  lines = [x for x in read_metrics(workdir / "metrics.jsonl") if x["kind"] == "train"]
  assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["scale"] > 1
  assert {"classes/top1", "classes/top5", "captions/image_to_text_r1"} <= set(results)
  assert evaluate.evaluate(Config(config()), workdir) == pytest.approx(results)
  model = hybrid_vit.load_clip(workdir / "export")
  picture = np.zeros((1, 32, 32, 3), np.uint8)
  assert model.encode_image(picture).shape == model.encode_text("a red circle").shape == (1, 16)
  assert (workdir / "predictions.png").stat().st_size > 1000


@pytest.mark.slow
def test_it_goes_on_bit_for_bit(whole, tmp_path):
  _, workdir = whole
  broken = shutil.copytree(workdir, tmp_path / "run")
  for path in (broken / "checkpoints").iterdir():
    if int(path.name) > 4:
      shutil.rmtree(path)
  main.train(config(), broken)
  assert (broken / "metrics.jsonl").read_bytes() == (workdir / "metrics.jsonl").read_bytes()
  ours, theirs = (checkpoints.load_weights(d)[0] for d in (broken, workdir))
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.slow
def test_a_frozen_tower_stays_as_it_was(whole, tmp_path):
  """LiT: the image tower of the other run, its statistics too, and a new text tower's training."""
  _, workdir = whole
  changed = config(init_from=str(workdir), total_steps=4, evaluate_every_steps=4)
  changed.optimizer.freeze = ("^image/(?!head/)",)
  main.train(changed, tmp_path / "run")
  (ours, _), (theirs, _) = (checkpoints.load_weights(d) for d in (tmp_path / "run", workdir))
  for name, still in (("stem", True), ("stage1_block0", True), ("head", False)):
    pairs = zip(*(jax.tree.leaves(w["params"]["image"][name]) for w in (ours, theirs)))
    assert all(np.array_equal(a, b) for a, b in pairs) == still
  jax.tree.map(np.testing.assert_array_equal, ours["batch_stats"], theirs["batch_stats"])
  assert not np.array_equal(
    ours["params"]["text"]["token_embedding"], theirs["params"]["text"]["token_embedding"]
  )


def test_steps_on_several_devices_are_those_of_one():
  run = build.build(Config(config()), DataFacts(num_examples=96))
  batch = {**rows(32), "index": np.arange(32, dtype=np.int32), "replaced": np.zeros(32, np.float32)}
  found = []
  for axes in ({"data": 1}, {"data": 4, "fsdp": 2}):
    mesh = sharding.make_mesh(axes, devices=jax.devices()[: np.prod(list(axes.values()))])
    shapes, layout = programs.abstract_state(run, mesh)
    del shapes
    make_state = jax.jit(lambda key: programs.new_state(run, key), out_shardings=layout)
    state = make_state(jax.random.key(0))
    place = sharding.batch_sharding(mesh)
    placed = {name: sharding.put_tree(value, place) for name, value in batch.items()}
    new, report = programs.compile_step(run, 0, mesh)(state, placed)
    found.append(jax.device_get((report["metrics"], report["gradient_norm"], new.params)))
  for one, other in zip(*map(jax.tree.leaves, found)):
    np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-3)
  for one, other in zip(*(jax.tree.leaves(f[:2]) for f in found)):
    np.testing.assert_allclose(one, other, rtol=1e-4)


def test_the_dry_run_finds_what_is_wrong():
  plan = dry_run.examine(Config(config()), devices=8)
  assert plan.problems == [] and plan.notes == []
  recipe = load_config("clip_quality_captions", "datacompdr12m,model=mobileclip_s0,batch_size=64")
  plan = dry_run.examine(Config(recipe), devices=8)
  assert plan.problems == [] and not any("classes" in note for note in plan.notes)
  wrong = config(accumulation_steps=5)
  plan = dry_run.examine(Config(wrong), devices=8)
  assert any("accumulation" in str(problem) for problem in plan.problems)
  with pytest.raises(ConfigError, match="text_towr"):
    checked = Config(config(task=dict(name="contrastive", text_towr="clip_vit_b16")))
    build.build(checked, DataFacts(num_examples=96))
    checked.assert_all_read()
