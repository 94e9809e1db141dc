"""Learning from a teacher: the losses by their definition, then a whole run beside its teacher."""

import dataclasses
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from hybrid_vit import build, checkpoints, dry_run, evaluate, main, programs, sharding
from hybrid_vit.build import DataFacts
from hybrid_vit.config import Config
from hybrid_vit.models.registry import Preprocessing, create_model
from hybrid_vit.reporting import read_metrics
from hybrid_vit.tasks.distillation import Distillation, DistillationSettings
from tests.command import TINY_NETWORK

STUDENT = "deit_tiny_distilled_patch16_224"
SMALL = dict(width=16, depth=1, num_heads=2, patch_size=8, position_size=2)
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RNG = np.random.default_rng(0)
LOGITS, BY_TEACHER, OF_TEACHER = (RNG.normal(size=(3, 4)) for _ in range(3))
TARGET = np.array([[1, 0, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0, 1]])


def softmax(x):
  return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def fake_task(endpoints, **settings):
  student = types.SimpleNamespace(apply=lambda *_, **__: ((jnp.asarray(LOGITS), endpoints), {}))
  network = types.SimpleNamespace(apply=lambda v, x, train: (v["scale"] * OF_TEACHER, {}))
  network.clone = lambda **_: network
  teacher = types.SimpleNamespace(
    model=network, preprocessing=Preprocessing(8, 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3)
  )
  return Distillation(student, 4, (0.5,) * 3, (0.5,) * 3, teacher=teacher, **settings)


def loss_of(task):
  batch = {"image": jnp.zeros((3, 8, 8, 3)), "target": jnp.asarray(TARGET)}
  variables = {"params": {}, "constants": {"scale": jnp.asarray(1.0)}}
  return task.loss(variables, batch, jax.random.key(0))


def by_label(logits):
  return -(TARGET * np.log(softmax(logits))).sum(-1)


@pytest.mark.parametrize("token", [False, True], ids=["one head", "a token"])
def test_hard_distillation_by_its_definition(token):
  heads = {"class_logits": jnp.asarray(LOGITS + 1), "distillation_logits": jnp.asarray(BY_TEACHER)}
  loss, aux = loss_of(fake_task(heads if token else {}, alpha=0.3))
  student = BY_TEACHER if token else LOGITS
  best = OF_TEACHER.argmax(-1)
  of_teacher = -np.log(softmax(student))[np.arange(3), best]
  # A constant in all logits of a row changes no softmax.
  np.testing.assert_allclose(loss, (0.7 * by_label(LOGITS) + 0.3 * of_teacher).mean(), rtol=1e-5)
  assert float(aux["metrics"]["agreement"][0]) == (student.argmax(-1) == best).sum()
  np.testing.assert_allclose(aux["metrics"]["teacher_loss"][0], of_teacher.sum(), rtol=1e-5)


def test_soft_distillation_by_its_definition():
  task = fake_task({}, kind="soft", alpha=0.9, temperature=2.0)
  p, q = softmax(OF_TEACHER / 2), softmax(LOGITS / 2)
  divergence = (p * np.log(p / q)).sum(-1)
  expected = (0.1 * by_label(LOGITS) + 0.9 * 4.0 * divergence).mean()
  np.testing.assert_allclose(loss_of(task)[0], expected, rtol=1e-5)


def test_a_student_like_its_teacher_has_nothing_to_learn_from_it():
  task = fake_task({}, kind="soft")
  losses = task.distillation_losses(jnp.asarray(OF_TEACHER), jnp.asarray(OF_TEACHER))
  np.testing.assert_allclose(losses, 0.0, atol=1e-5)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(kind="warm"), "config.task.kind 'warm' is not one of hard, soft"),
    (dict(alpha=1.5), r"alpha is 1.5; a number in \[0, 1\]"),
    (dict(temperature=0.0), "temperature is 0.0; a number above 0"),
    (dict(kind="soft", loss="sigmoid"), "'soft' and config.task.loss 'sigmoid'"),
  ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    DistillationSettings(**settings)


def write_teacher(directory, seed=0, num_classes=10, class_names=DIGITS, **metadata):
  """A tiny MOAT with drawn weights, which expects pictures otherwise than the student."""
  model = create_model("tiny_moat_0", num_classes=num_classes, **TINY_NETWORK)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
  rng = np.random.default_rng(seed)
  variables = jax.tree.map(lambda x: abs(0.3 * rng.normal(size=x.shape)).astype(x.dtype), shapes)
  checkpoints.export(
    directory,
    variables,
    {
      "name": "tiny_moat_0",
      "arguments": TINY_NETWORK,
      "preprocessing": dataclasses.asdict(
        Preprocessing(16, 1.0, "bilinear", (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
      ),
      "class_names": list(class_names),
      "task": "classification",
      "task_settings": {"loss": "softmax"},
      **metadata,
    },
  )
  return str(directory)


def config(teacher, **changes):
  values = ConfigDict()
  values.model = dict(name=STUDENT, arguments=SMALL)
  values.task = dict(name="distillation", teacher=teacher)
  values.data = dict(
    source="digits", batch_size=64, image_size=16, transform="decode|resize(16, 'bilinear')"
  )
  values.evaluation = dict(
    sets=dict(held_out=dict(split="validation", transform="decode|resize(16)"))
  )
  values.phases = (dict(steps=4), dict(steps=2, task=dict(alpha=0.2)))
  values.mesh = dict(data=-1, fsdp=2, tensor=1)
  values.optimizer = dict(name="adamw", learning_rate=3e-3, schedule=dict(name="constant"))
  values.checkpoint = dict(every_steps=3, keep=9)
  values.log_every_steps = 1
  values.update(changes)
  return values


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  base = tmp_path_factory.mktemp("distillation")
  teacher = write_teacher(base / "teacher")
  return teacher, base / "run", main.train(config(teacher), base / "run")


def test_a_run_keeps_its_teachers_name_and_not_its_weights(whole):
  teacher, workdir, results = whole
  metadata = json.loads((workdir / "export" / "metadata.json").read_text())
  assert metadata["teacher"]["path"] == teacher and metadata["teacher"]["name"] == "tiny_moat_0"
  assert metadata["task_settings"]["alpha"] == 0.5
  stored, _ = checkpoints.load_weights(workdir / "checkpoints" / "6")
  assert set(stored["params"]) >= {"distillation_head", "distillation_token"}
  path = workdir / "checkpoints" / "6" / "metadata" / "metadata"
  assert not any(word in path.read_text() for word in ("stage2_block0", "constants"))
  train = [line for line in read_metrics(workdir / "metrics.jsonl") if line["kind"] == "train"]
  assert {"loss", "label_loss", "teacher_loss", "agreement", "top1"} <= set(train[0])
  first, last = train[0], train[-1]
  for line, alpha in ((first, 0.5), (last, 0.2)):
    expected = (1 - alpha) * line["label_loss"] + alpha * line["teacher_loss"]
    np.testing.assert_allclose(line["loss"], expected, rtol=1e-5)
  assert set(results) >= {"held_out/top1", "held_out/loss"}


def test_it_goes_on_bit_for_bit_and_is_evaluated_without_its_teacher(whole, tmp_path, capsys):
  teacher, workdir, results = whole
  broken = shutil.copytree(workdir, tmp_path / "run")
  shutil.rmtree(broken / "checkpoints" / "6")
  main.train(config(teacher), broken)
  assert (broken / "metrics.jsonl").read_bytes() == (workdir / "metrics.jsonl").read_bytes()
  # The same path, other weights: it goes on, and says so.
  shutil.rmtree(broken / "checkpoints" / "6")
  main.train(config(write_teacher(tmp_path / "other", seed=1)), broken)
  assert "the weights of the teacher" in capsys.readouterr().out
  assert (broken / "metrics.jsonl").read_bytes() != (workdir / "metrics.jsonl").read_bytes()
  found = evaluate.evaluate(Config(config(str(tmp_path / "nowhere"))), workdir)
  assert found == pytest.approx(results)


def test_the_teacher_is_an_argument_of_the_program_wherever_it_lies(whole):
  teacher, _, _ = whole
  facts = DataFacts({"class_names": DIGITS}, 1437)
  reports = []
  for axes in (dict(data=1, fsdp=1, tensor=1), dict(data=2, fsdp=2, tensor=1)):
    run = build.build(Config(config(teacher, mesh=axes, sharding_rules=((".*", "fsdp"),))), facts)
    mesh = sharding.make_mesh(axes, jax.devices()[: axes["data"] * axes["fsdp"]])
    compiled = programs.compile_step(run, 0, mesh)
    state = programs.new_state(run, jax.random.key(0))
    _, layout = programs.abstract_state(run, mesh)
    rows = {
      name: np.random.default_rng(1).integers(0, 10, leaf.shape).astype(leaf.dtype)
      for name, leaf in run.batches[0].items()
    }
    constants = run.task.constants()
    placed = sharding.put_tree(constants, programs.constants_layout(run.task, mesh))
    count = sum(len(jax.tree.leaves(tree)) for tree in (state, rows, constants))
    assert compiled.in_tree.num_leaves == count
    batch = sharding.put_batch(rows, sharding.batch_sharding(mesh))
    _, report = compiled(jax.device_put(state, layout), batch, placed)
    reports.append(jax.device_get(report["metrics"]))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), *reports)
  split = [leaf.sharding.spec for leaf in jax.tree.leaves(placed) if leaf.size >= 1024]
  assert split and all("fsdp" in spec for spec in split)


def test_the_teacher_sees_the_very_picture_in_its_own_units(whole):
  teacher, _, _ = whole
  run = build.build(Config(config(teacher)), DataFacts({"class_names": DIGITS}, 1437))
  task = run.task
  picture = np.random.default_rng(0).random((2, 16, 16, 3)).astype(np.float32)
  of_student = (picture - np.array(task.mean)) / np.array(task.std)
  of_teacher = (picture - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 0.6, 0.7])
  expected, _ = task.teacher.model.apply(task.teacher.variables, of_teacher, train=False)
  found = task.teacher_logits(task.constants(), jnp.asarray(of_student, jnp.float32))
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
  ("kinds", "message"),
  [
    (dict(num_classes=7, class_names=()), "has 7 classes, the training data has 10"),
    (dict(num_classes=0, class_names=()), "has no classifier, the training data has 10"),
    (dict(class_names=(*DIGITS[:9], "ten")), r"config.task.teacher, the teacher .* 1 of 10 differ"),
    (None, "config.task.teacher: no weights in .*nowhere"),
  ],
)
def test_a_teacher_of_other_classes_is_refused_before_the_first_step(kinds, message, tmp_path):
  teacher = write_teacher(tmp_path / "teacher", **kinds) if kinds else str(tmp_path / "nowhere")
  with pytest.raises(ValueError, match=message):
    main.train(config(teacher), tmp_path / "run")
  assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_without_a_teacher_is_told_and_the_dry_run_counts_with_one(whole):
  teacher, _, _ = whole
  plan = dry_run.examine(Config(config(teacher)), devices=8)
  assert plan.problems == []
  # Two devices of the axis fsdp share what is large enough.
  leaves = jax.tree.leaves(checkpoints.load_weights(teacher)[0])
  expected = sum(leaf.nbytes // (2 if leaf.size >= 1024 else 1) for leaf in leaves)
  assert plan.state_bytes["constants"] == expected < sum(leaf.nbytes for leaf in leaves)
  (problem,) = dry_run.examine(Config(config(None)), devices=8).problems
  assert "needs a teacher: set config.task.teacher" in problem
