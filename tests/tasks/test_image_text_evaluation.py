"""Zero-shot classification and retrieval: exact on uneven sets, on one device and on eight."""

import dataclasses
import types
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit import build, sharding
from hybrid_vit.config import Config, ConfigError
from hybrid_vit.data import evaluation as data_evaluation
from hybrid_vit.data.pipeline import EvaluationSettings
from hybrid_vit.data.prompts import prompts, read_names, read_templates
from hybrid_vit.data.tokenizer import ClipTokenizer
from hybrid_vit.models.registry import Preprocessing
from hybrid_vit.settings import read_settings
from hybrid_vit.tasks import image_text_evaluation as measured
from hybrid_vit.tasks.base import EvaluationKind, evaluation_kind
from tests.tasks.test_retrieval import by_definition

NAMES = ("red_ball", "blue cube", "green cone", "grey cat", "old dog", "tall tree", "small house")
LENGTH = 10


@dataclasses.dataclass(frozen=True)
class Length:
  context_length: int = LENGTH


class Towers(nn.Module):
  """A dense layer for pictures, a bag of embedded words for texts."""

  size: int = 12
  text: Length = Length()

  @nn.compact
  def __call__(self, images, tokens, train=False):
    self.param("logit_scale", nn.initializers.constant(2.0), ())
    dense, words = nn.Dense(self.size, name="image"), nn.Embed(49408, self.size, name="words")
    image = None if images is None else dense(images.reshape(len(images), -1))
    text = None if tokens is None else words(tokens).sum(1)
    return image, text, None


TASK = measured.Encoders(Towers(), (0.5,) * 3, (0.25,) * 3)


def made_variables():
  made = TASK.model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)), jnp.zeros((1, LENGTH), int))
  return jax.tree.map(np.asarray, made)


@pytest.fixture(scope="module")
def variables():
  return made_variables()


def both_kinds(mesh):
  """Measures of a zero-shot and of a retrieval set, uneven both."""
  variables = placed(made_variables(), mesh)
  labels = np.random.default_rng(3).integers(0, 7, 21).astype(np.int32)
  sets = [
    Data({"image": pictures(21), "label": labels}, mesh, info={"class_names": NAMES}),
    Data(captioned()[0], mesh, kind="retrieval"),
  ]
  return [evaluator.run(variables) for evaluator in measured.evaluators_for(TASK, sets)]


class Data:
  """Batches of eight rows, the last one padded with rows that do not count."""

  def __init__(self, rows, mesh=None, name="set", info=None, **settings):
    self.name, self.info, self._rows, self._mesh = name, info or {}, rows, mesh
    self.settings = types.SimpleNamespace(**{"kind": "", "options": {}, **settings})

  def __len__(self):
    return len(self._rows["image"])

  def batches(self):
    for start in range(0, len(self), 8):
      part = {k: v[start : start + 8] for k, v in self._rows.items()}
      there = len(part["image"])
      batch = {k: np.pad(v, ((0, 8 - there), *[(0, 0)] * (v.ndim - 1))) for k, v in part.items()}
      batch["mask"] = (np.arange(8) < there).astype(np.float32)
      batch["index"] = np.arange(start, start + 8, dtype=np.int32)
      where = self._mesh and sharding.batch_sharding(self._mesh)
      if where:
        # This process's rows.
        part, parts = sharding.batch_part(where)
        batch = {k: np.split(v, parts)[part] for k, v in batch.items()}
      yield (sharding.put_batch(batch, where) if where else batch), {}

  def sample(self, count):
    return {k: v[:count] for k, v in self._rows.items()}


def pictures(count, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), np.uint8)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def embedded(variables, images=None, texts=None):
  """In float64, by the definition of the stand-in."""
  params = variables["params"]
  if images is not None:
    flat = ((images / 255.0 - 0.5) / 0.25).reshape(len(images), -1)
    return unit(flat @ params["image"]["kernel"].astype(float) + params["image"]["bias"])
  return unit(params["words"]["embedding"].astype(float)[ClipTokenizer(LENGTH)(texts)].sum(1))


def placed(variables, mesh):
  if mesh is None:
    return variables
  return sharding.put_tree(variables, jax.tree.map(lambda _: sharding.replicated(mesh), variables))


def meshes():
  return [None, {"data": 8}, {"data": 2, "fsdp": 4}]


@pytest.mark.parametrize("axes", meshes())
def test_zero_shot_by_its_definition(variables, axes):
  mesh = axes and sharding.make_mesh(axes)
  templates = ("a photo of a {}.", "the {} in a video game.", "art of {}")
  spoken, images = [name.replace("_", " ") for name in NAMES], pictures(21)
  found = [embedded(variables, texts=[t.format(n) for t in templates]) for n in spoken]
  classes = unit(np.stack([rows.mean(0) for rows in found]))
  logits = embedded(variables, images) @ classes.T
  rng = np.random.default_rng(3)
  labels = np.where(rng.random(21) < 0.5, logits.argmax(-1), rng.integers(0, 7, 21))
  rows = {"image": images, "label": labels.astype(np.int32)}
  data = Data(rows, mesh, info={"class_names": NAMES}, options={"templates": templates})
  (evaluator,) = measured.evaluators_for(TASK, [data])
  found = evaluator.run(placed(variables, mesh))
  np.testing.assert_allclose(
    evaluator.class_embeddings(placed(variables, mesh)), classes, atol=2e-6
  )
  order = np.argsort(-logits, axis=-1)
  right = order == rows["label"][:, None]
  assert found["examples"] == 21
  assert found["top1"] == pytest.approx(right[:, :1].any(1).mean())
  assert found["top5"] == pytest.approx(right[:, :5].any(1).mean())
  assert 0 < found["top1"] < found["top5"] < 1


def test_many_prompts_are_encoded_in_batches(variables, monkeypatch):
  data = Data({"image": pictures(3)}, info={"class_names": NAMES})
  whole = measured.evaluators_for(TASK, [data])[0].class_embeddings(variables)
  monkeypatch.setattr(measured, "_PROMPTS", 3)
  parts = measured.evaluators_for(TASK, [data])[0].class_embeddings(variables)
  np.testing.assert_allclose(parts, whole, atol=1e-6)


def test_the_same_answer_to_all_is_never_right(variables):
  constant = jax.tree.map(np.zeros_like, variables)
  constant["params"]["image"]["bias"] = np.ones(12, np.float32)
  constant["params"]["words"]["embedding"] = np.ones((49408, 12), np.float32)
  rows = {"image": pictures(9), "label": np.zeros(9, np.int32)}
  (evaluator,) = measured.evaluators_for(TASK, [Data(rows, info={"class_names": NAMES})])
  assert evaluator.run(constant)["top1"] == 0.0
  constant["params"]["image"]["bias"][0] = np.nan
  assert evaluator.run(constant) == {"top1": 0.0, "top5": 0.0, "examples": 9.0}


def captioned(count=19, seed=4):
  """Pictures with one to three captions; the fourth and the last have none."""
  rng = np.random.default_rng(seed)
  words = ["red", "blue", "small", "tall", "cat", "dog", "tree", "house", "snow", "old", "ball"]
  captions = [
    [] if i in (3, count - 1) else [" ".join(rng.choice(words, 4)) for _ in range(1 + i % 3)]
    for i in range(count)
  ]
  text = np.zeros((count, 5, LENGTH), np.int32)
  for row, found in zip(text, captions):
    if found:
      row[: len(found)] = ClipTokenizer(LENGTH)(found)
  return {"image": pictures(count, seed), "text": text}, captions


@pytest.mark.parametrize("axes", meshes())
def test_retrieval_by_its_definition(variables, axes):
  mesh = axes and sharding.make_mesh(axes)
  rows, captions = captioned()
  (evaluator,) = measured.evaluators_for(TASK, [Data(rows, mesh, kind="retrieval")])
  found = evaluator.run(placed(variables, mesh))
  owners = np.array([i for i, listed in enumerate(captions) for _ in listed])
  texts = embedded(variables, texts=[c for listed in captions for c in listed])
  expected = by_definition(embedded(variables, rows["image"]), texts, owners)
  assert (found["examples"], found["captions"]) == (19, len(owners))
  for name, value in expected.items():
    assert found[name] == pytest.approx(value), name
  assert 0 < expected["text_to_image_r5"] < 1


def test_pictures_are_drawn(variables, tmp_path):
  rows, _ = captioned()
  (evaluator,) = measured.evaluators_for(TASK, [Data(rows, kind="retrieval")])
  assert evaluator.draw(variables, tmp_path / "retrieval.png")
  rows = {"image": rows["image"], "label": np.zeros(19, np.int32)}
  (evaluator,) = measured.evaluators_for(TASK, [Data(rows, info={"class_names": NAMES})])
  assert evaluator.draw(variables, tmp_path / "zero_shot.png")
  for name in ("retrieval", "zero_shot"):
    assert (tmp_path / f"{name}.png").stat().st_size > 5000
  nothing = {k: v[:0] for k, v in rows.items()}
  (evaluator,) = measured.evaluators_for(TASK, [Data(nothing, info={"class_names": NAMES})])
  assert not evaluator.draw(variables, tmp_path / "none.png")


def test_templates_and_names(tmp_path):
  listed = read_templates("imagenet")
  assert len(listed) == len(set(listed)) == 80
  assert listed[0] == "a bad photo of a {}." and listed[-1] == "a tattoo of the {}."
  (tmp_path / "own.txt").write_text("a {}\n\nsome {} here\n")
  assert read_templates(str(tmp_path / "own.txt")) == ("a {}", "some {} here")
  assert prompts(["red_ball"], ["a {}", "my {}."]) == [["a red ball", "my red ball."]]
  for bad, message in ((("a cat",), "has 'a cat'; exactly one"), ((), "holds none")):
    with pytest.raises(ValueError, match=message):
      read_templates(bad)
  data = Data({"image": pictures(1)}, info={"class_names": ("n01440764", "n01443537")})
  (evaluator,) = measured.evaluators_for(TASK, [data])
  assert evaluator._names == ("tench", "goldfish")
  (tmp_path / "names.txt").write_text("one\ntwo\n")
  data.settings.options = {"class_names": str(tmp_path / "names.txt")}
  assert measured.evaluators_for(TASK, [data])[0]._names == ("one", "two")
  data.info = {"class_names": NAMES}
  with pytest.raises(ValueError, match=r"has 2 names, and evaluation set 'set' 7 classes"):
    measured.evaluators_for(TASK, [data])


def test_errors_name_the_set(variables):
  for settings, message in (
    ({"kind": "retrival"}, "kind 'retrival' is not one of zero_shot, retrieval"),
    ({"options": {"template": ("a {}",)}}, "did you mean `config.evaluation.sets.set.options.temp"),
    ({"kind": "retrieval", "options": {"k": 3}}, "options.k` is not read"),
  ):
    with pytest.raises(ValueError, match=message):
      measured.evaluators_for(TASK, [Data({}, info={"class_names": NAMES}, **settings)])
  with pytest.raises(ValueError, match="does not say what its classes are called"):
    measured.evaluators_for(TASK, [Data({})])
  rows = {"image": pictures(3), "text": np.zeros((3, 5, LENGTH), np.int32)}
  (evaluator,) = measured.evaluators_for(TASK, [Data(rows, kind="retrieval")])
  with pytest.raises(ValueError, match="'set' holds no readable picture with a caption"):
    evaluator.run(variables)


class Source:
  """Pictures with captions in one file, as a source of image–text pairs gives them."""

  info: typing.ClassVar = {}

  def __len__(self):
    return 11

  def __getitem__(self, index):
    found = {"alt": [f"a cat {index}"], "synthetic": ["a dog"] * (index % 3)}
    return {"image": pictures(1, index)[0], "captions": found}

  def describe(self, index):
    return f"picture {index}"


class Task:
  """What the engine asks of a task where only evaluation sets matter."""

  separable = True
  evaluation_kinds = measured.evaluation_kinds(LENGTH)
  spec = types.SimpleNamespace(evaluation=evaluation_kinds["zero_shot"].fields)
  measures = evaluation_kinds["zero_shot"].measures


PREPARED = Preprocessing(4, 1.0, "bilinear", (0.5,) * 3, (0.25,) * 3)


def config_of(**sets):
  given = {"data": {"source": "x", "batch_size": 8}, "evaluation": {"sets": sets}}
  return Config({**given, "checkpoint": {}})


def test_a_set_says_what_is_measured_on_it(variables, monkeypatch):
  config = config_of(imagenet={"options": {"templates": "imagenet"}}, coco={"kind": "retrieval"})
  zero_shot, retrieval = build.read_evaluation(config, PREPARED, Task())
  assert zero_shot.kind == "" and zero_shot.options == {"templates": "imagenet"}
  assert retrieval.transform == f"{zero_shot.transform}|all_captions(5)|tokenize({LENGTH})"
  assert read_settings(config, Task(), (zero_shot, retrieval)).best_metric == "imagenet/top1"
  assert read_settings(config, Task(), (retrieval,)).best_metric == "coco/image_to_text_r1"
  with pytest.raises(ValueError, match="kind is 'retrival'; there are: zero_shot, retrieval"):
    build.read_evaluation(config_of(coco={"kind": "retrival"}), PREPARED, Task())
  plain = types.SimpleNamespace(spec=Task.spec, measures={})
  assert evaluation_kind(plain, "") == EvaluationKind(Task.spec.evaluation, {})
  with pytest.raises(ValueError, match="this task has one alone: leave it out"):
    evaluation_kind(plain, "retrieval")
  with pytest.raises(ConfigError, match="is needed and was not given"):
    build.read_evaluation(Config({"evaluation": {"sets": {"a": {}}}}), PREPARED)
  # From the source to the figures, on eight devices.
  monkeypatch.setattr(data_evaluation, "open_source", lambda settings: Source())
  mesh = sharding.make_mesh({"data": 8})
  fields = lambda kind: evaluation_kind(Task(), kind).fields  # noqa: E731
  (opened,) = data_evaluation.open_evaluation([retrieval], fields, mesh)
  found = measured.evaluators_for(TASK, [opened])[0].run(placed(variables, mesh))
  assert (found["examples"], found["captions"]) == (11, 11 + sum(i % 3 for i in range(11)))


def test_settings_of_a_set_are_as_they_were():
  plain = EvaluationSettings("a", "digits", 8, "decode", False)
  assert (plain.kind, plain.options) == ("", {})


@pytest.mark.parametrize(
  ("content", "message"), [(b"\n \n", "names no class"), (b"\xff\n", "is no text in UTF-8")]
)
def test_damaged_names_of_classes_are_told(tmp_path, content, message):
  (tmp_path / "names.txt").write_bytes(content)
  with pytest.raises(ValueError, match=rf"names.txt {message}"):
    read_names(str(tmp_path / "names.txt"))
