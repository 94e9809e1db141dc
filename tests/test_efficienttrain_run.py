"""`config.curriculum` in the engine: read, refused, trained through its sizes, resumed."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from hybrid_vit import build, main, programs, sharding
from hybrid_vit.build import DataFacts
from hybrid_vit.checkpoints import abstract_like, restore_from
from hybrid_vit.config import Config, ConfigError, load_config
from hybrid_vit.curriculum_reading import magnitude_of, with_magnitude, without_erasing
from hybrid_vit.data.erasing import random_erase
from hybrid_vit.exports import load_weights
from hybrid_vit.table_resizing import resize_tables
from hybrid_vit.tasks.classification import Erasing
from hybrid_vit.tasks.pictures import Shrinking
from hybrid_vit.tasks.registry import register_task
from hybrid_vit.weights.stored import load_network
from tests import small

CONFIGS = Path(__file__).parent.parent / "configs"
BEST = dict(best_metric="held_out/loss")
DIGITS = DataFacts({"class_names": tuple("0123456789")}, 1437)
NETWORKS = {
  "vit": (
    "deit_tiny_patch16_224",
    dict(width=16, depth=1, num_heads=2, patch_size=4, position_size=4, drop_path_rate=0.1),
  ),
  "swin": (
    "swin_tiny",
    dict(width=8, depths=(1, 1), num_heads=(1, 2), window_size=4, patch_size=1),
  ),
}


def config(network="vit", **changes):
  """Pictures of 16 px; some two dozen steps."""
  name, arguments = NETWORKS[network]
  values = ConfigDict()
  values.curriculum = "efficienttrain++"
  values.total_steps = 20
  values.model = dict(name=name, arguments=arguments)
  values.task = dict(mixing=dict(mixup_alpha=0.8, cutmix_alpha=1.0))
  values.data = dict(
    source="digits",
    batch_size=96,
    image_size=16,
    transform="decode|resize({image_size})|randaugment(2, 9, increasing=True)|random_erasing(0.5)",
  )
  values.evaluation = dict(sets=dict(held_out=dict(transform="decode|resize(16)")))
  values.optimizer = dict(
    name="adamw", learning_rate=3e-3, schedule=dict(name="cosine", warmup_epochs=0.1)
  )
  values.ema_decay = 0.9
  values.evaluate_every_steps = 11
  values.log_every_steps = 1
  values.checkpoint = dict(BEST)
  for name, value in changes.items():
    if name in values:
      del values[name]  # another type may come in its place
    values[name] = value
  return values


def short(network):
  """Twenty steps: twelve at 8 px, four at 12, four at 16; saved inside a phase and at a border."""
  own = dict(name="efficienttrain", sizes=(8, 12, 16))
  checkpoint = dict(every_steps=6, keep=9, **BEST)
  # Without mixing, whose draws take the most of the compilation.
  return config(network, curriculum=own, checkpoint=checkpoint, task=dict(label_smoothing=0.1))


def read(values):
  return build.read_curriculum(Config(values), 1437, build.preprocessing_of(Config(values)))


def test_one_line_gives_all_phases():
  run = build.build(Config(config()), DIGITS)
  phases = run.curriculum.phases
  assert [phase.shown_size for phase in phases] == [8, 8, *[12] * 6, None, None]
  assert [task.shrink for task in run.tasks[1:3]] == [Shrinking(8), Shrinking(12)]
  assert {task.erasing for task in run.tasks} == {Erasing(0.5)}
  assert [magnitude_of(phase.transform) for phase in phases] == list(range(10))
  assert "erasing" not in phases[0].transform and "resize(16)" in phases[0].transform
  assert [task.model.position_size for task in run.tasks] == [2, 2, *[3] * 6, 4, 4]
  assert {batch["image"].shape for batch in run.batches} == {(96, 16, 16, 3)}
  assert run.params["position_embedding"].shape == (5, 16)
  # As many pixels in each stage, up to the rounding of its steps, and as much of the schedule.
  pixels = [phase.steps * (phase.shown_size or 16) ** 2 for phase in phases]
  assert max(pixels) <= 2 * min(pixels)
  done = [float(run.curriculum.schedule_step(s)) for s in run.curriculum.first_steps]
  np.testing.assert_allclose(done, np.arange(10) * run.curriculum.total_steps / 10, rtol=1e-5)
  # A fifth of the training warms up: the first two stages.
  rates = [float(run.schedule(s)) for s in (0, run.curriculum.first_steps[2])]
  assert rates[0] < 1e-3 and rates[1] == pytest.approx(3e-3, rel=0.05)


def test_a_weak_host_loads_less_and_sees_as_much():
  plain = read(config(total_steps=200)).phases
  own = dict(name="efficienttrain++", replay=4, replay_examples=240)
  found = read(config(curriculum=own, total_steps=200)).phases
  assert [phase.replay for phase in found] == [4, 4, 2, 2, 2, 2, 1, 1, 1, 1]
  assert [phase.replay_steps for phase in found] == [10, 10, *[5] * 4, 1, 1, 1, 1]
  for one, other in zip(found, plain):
    assert abs(one.steps - other.steps) <= 1 and one.share == other.share
  assert str(found[0]).endswith("shrunk to 8 px, each loaded picture shown 4 times")


def test_the_first_version_keeps_the_examples_and_crops_frequencies():
  values = config(curriculum="efficienttrain", total_steps=50)
  found = read(values)
  assert [phase.steps for phase in found.phases] == [10] * 5
  assert [phase.shown_size for phase in found.phases] == [12, 12, 12, 12, None]
  assert found.phases[0].task["shrink"] == {"size": 12, "method": "low_frequency"}
  assert [magnitude_of(phase.transform) for phase in found.phases] == [1, 3, 5, 7, 9]


@pytest.mark.parametrize(
  ("path", "variant", "sizes", "drop_path"),
  [
    ("swin.py", "swin_small", {96: {"window_size": 3}, 160: {"window_size": 5}}, 0.15),
    (
      "cswin.py",
      "cswin_tiny",
      {96: {"stripe_widths": (1, 2, 3, 3)}, 160: {"stripe_widths": (1, 2, 5, 5)}},
      0.1,
    ),
    ("convnext.py", "convnext_base", {160: {}}, 0.25),
    (
      "vit.py",
      "deit_small_patch16_224",
      {96: {"position_size": 6}, 160: {"position_size": 10}, 192: {"position_size": 12}},
      0.05,
    ),
    ("resnet.py", "resnet50", {96: {}, 160: {}}, None),
  ],
)
def test_published_networks_take_their_published_sizes(path, variant, sizes, drop_path):
  values = load_config(CONFIGS / path, variant)
  epochs = 100 if values.total_epochs == 300 else 30
  values.curriculum = dict(name="efficienttrain++", epochs=epochs)
  found = build.read_curriculum(Config(values), 1_281_167, build.preprocessing_of(Config(values)))
  shown = {phase.shown_size: dict(phase.arguments) for phase in found.phases if phase.shown_size}
  rate = {} if drop_path is None else {"drop_path_rate": pytest.approx(drop_path)}
  assert shown == {size: rate | own for size, own in sizes.items()}
  # Half of what 200 of 300 epochs are: half the drop path.
  assert found.phases[-1].arguments == rate and found.phases[-1].shown_size is None


def test_early_stages_take_larger_batches_at_larger_rates():
  values = config(curriculum=dict(name="efficienttrain++", early_batch=3), total_steps=90)
  values.optimizer.learning_rate_batch_size = 96
  run = build.build(Config(values), DIGITS)
  assert [phase.batch_size for phase in run.curriculum.phases] == [288] * 2 + [192] * 6 + [96] * 2
  first = run.curriculum.first_steps[2]
  before, after = float(run.schedule(first - 1)), float(run.schedule(first))
  assert 1.2 < before / after < 1.6
  del values.optimizer["learning_rate_batch_size"]
  with pytest.raises(ConfigError, match=r"early_batch` is 3.*learning_rate_batch_size"):
    read(values)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(phases=(dict(steps=3),)), "`config.curriculum` and `config.phases` are both given"),
    (dict(curriculum="efficientrain++"), "'efficientrain\\+\\+'; there are: .*did you mean 'effi"),
    (dict(curriculum=3), "`config.curriculum` is 3; a name"),
    (dict(curriculum=dict(name="efficienttrain", epochs=0)), "epochs` is 0.0; more than 0.0"),
    (dict(curriculum=dict(name="efficienttrain", early_batch=0)), "early_batch` is 0; at least 1"),
    (dict(curriculum=dict(name="efficienttrain", family="x")), "family is 'x'; one of usual"),
    (dict(total_steps=3), "leaves no step of 96 to stage 3 of the 10 of efficienttrain\\+\\+"),
    (dict(total_steps=None), "`config.curriculum.epochs` is needed"),
    (
      dict(curriculum=dict(name="efficienttrain++", sizes=(6, 8, 12, 16))),
      "deit_tiny_patch16_224 does not take pictures of 6x6: .*not whole patches of 4x4",
    ),
    (dict(curriculum=dict(name="efficienttrain++", sizes=(8, 16))), r"\(8, 16\); 4 rising ones"),
    (
      dict(curriculum=dict(name="efficienttrain++", sizes=(4, 8, 12, 12))),
      "the last one must be the full size, 16",
    ),
    (dict(task=dict(name="no_shrinking_of_a_test")), "no setting 'shrink'"),
  ],
)
def test_what_cannot_be_is_said_before_the_first_step(changes, message):
  register_a_task_that_does_not_shrink()
  with pytest.raises(ConfigError, match=message):
    read(config(**changes))


def register_a_task_that_does_not_shrink():
  @dataclasses.dataclass(frozen=True)
  class Settings:
    scale: float = 1.0

  register_task("no_shrinking_of_a_test", Settings)(lambda settings, context: None)


@pytest.mark.parametrize(
  ("own", "message"),
  [
    (dict(name="efficienttrain", replay=4), "replay belongs to efficienttrain"),
    (dict(name="efficienttrain++", replay=3), r"replay is 3; one of \[1, 4, 2\] was expected"),
    (dict(name="efficienttrain++", replay_examples=0), "replay_examples` is 0"),
  ],
)
def test_a_replay_that_cannot_be_is_said(own, message):
  with pytest.raises(ConfigError, match=message):
    read(config(curriculum=own))
  values = config(curriculum=dict(name="efficienttrain++", replay=4))
  values.data.batch_size = 90
  with pytest.raises(ConfigError, match="batch of 90 does not fall into groups of 4 rows"):
    read(values)


def test_other_parameters_than_tables_must_not_differ_between_phases():
  values = config(phases=(dict(steps=3), dict(steps=3, arguments=dict(depth=2))))
  del values.curriculum
  with pytest.raises(ValueError, match="same parameters"):
    build.build(Config(values), DIGITS)
  values.phases = (dict(steps=3), dict(steps=3, arguments=dict(width=32)))
  with pytest.raises(ValueError, match="only tables of positions are resized"):
    build.build(Config(values), DIGITS)


def test_transform_strings_are_edited_at_their_operations():
  text = "decode|flip_lr|randaugment(2, 15, magnitude_max=30.0)|random_erasing(0.1, (0.1, 0.2))"
  assert magnitude_of(text) == 15 and magnitude_of("decode|randaugment") == 9
  assert magnitude_of("decode") is None and with_magnitude("decode|flip_lr", 3) == "decode|flip_lr"
  changed = with_magnitude(text, 5 / 3)
  assert magnitude_of(changed) == 5 / 3 and "magnitude_max=30.0" in changed
  assert magnitude_of(with_magnitude("randaugment(magnitude=4)", 0)) == 0
  assert without_erasing(changed)[1] == {"probability": 0.1, "area": (0.1, 0.2)}
  assert without_erasing("decode|random_erasing|flip_lr") == (
    "decode|flip_lr",
    {"probability": 0.25},
  )


def test_pictures_are_shrunk_then_erased_then_mixed():
  batch, key = small.make_batch(4), jax.random.key(0)
  task = small.make_task()
  for method in ("lanczos", "low_frequency"):
    smaller = dataclasses.replace(task, shrink=Shrinking(6, method))
    found = smaller.augment(batch, key, jnp.zeros((), jnp.int32))["image"]
    assert found.shape == (4, 6, 6, 3) and found.dtype == jnp.float32
    erased = dataclasses.replace(smaller, erasing=Erasing(1.0, (0.2, 0.4), (0.5, 2.0)))
    changed = np.any(np.asarray(erased.augment(batch, key, 0)["image"] != found), -1)
    for picture in changed:
      rows, columns = np.flatnonzero(picture.any(1)), np.flatnonzero(picture.any(0))
      # One whole box of the small picture's cells.
      assert picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
      assert 4 <= picture.sum() <= 20
  with pytest.raises(ValueError, match="size is 7; an even number"):
    Shrinking(7, "low_frequency")
  with pytest.raises(ValueError, match=r"erasing\.probability is 2"):
    Erasing(2)


def test_erasing_on_the_device_has_timms_areas_and_noise():
  images = jnp.full((2000, 32, 32, 3), 100.0)
  erase = jax.jit(
    lambda key: random_erase(
      key, images, probability=0.25, area=(0.02, 1 / 3), aspect=(0.3, 10 / 3)
    )
  )
  found = np.asarray(erase(jax.random.key(0)))
  changed = np.any(found != 100.0, -1)
  assert changed.any((1, 2)).mean() == pytest.approx(0.25, abs=0.04)
  areas = changed.mean((1, 2))[changed.any((1, 2))]
  assert (
    areas.min() > 0.015 and areas.max() < 0.36 and areas.mean() == pytest.approx(0.17, abs=0.02)
  )
  noise = found[changed]
  assert abs(noise.mean()) < 0.02 and noise.std() == pytest.approx(1.0, abs=0.02)


def test_tables_are_resized_as_torch_does_it():
  """Bilinear, half-pixel centres, edges repeated, not antialiased; the token stays."""

  def matrix(old, new):
    found = np.zeros((new, old))
    for i in range(new):
      place = max((i + 0.5) * old / new - 0.5, 0.0)
      low = int(place)
      found[i, low] += 1 - (place - low)
      found[i, min(low + 1, old - 1)] += place - low
    return found

  rng = np.random.default_rng(0)
  for old, new in ((3, 6), (7, 4)):
    tree = {
      "position_bias": rng.standard_normal((2, old, old)),
      "position_embedding": rng.standard_normal((1 + old * old, 5)),
      "kernel": np.ones(3),
    }
    tree = jax.tree.map(lambda x: x.astype(np.float32), tree)
    shape = lambda *n: jax.ShapeDtypeStruct(n, jnp.float32)  # noqa: E731
    wanted = {
      "position_bias": shape(2, new, new),
      "position_embedding": shape(1 + new * new, 5),
      "kernel": shape(3),
    }
    found, m = resize_tables(tree, wanted), matrix(old, new)
    np.testing.assert_allclose(
      found["position_bias"], m @ tree["position_bias"] @ m.T, rtol=1e-4, atol=1e-5
    )
    grid = tree["position_embedding"][1:].reshape(old, old, 5)
    grid = np.einsum("ih,jw,hwc->ijc", m, m, grid).reshape(-1, 5)
    np.testing.assert_allclose(found["position_embedding"][1:], grid, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found["position_embedding"][0], tree["position_embedding"][0])


@pytest.fixture(scope="module", params=list(NETWORKS))
def whole(request, tmp_path_factory, shared_programs):
  workdir = tmp_path_factory.mktemp("curriculum") / request.param
  main.train(short(request.param), workdir)
  return request.param, workdir


def tables_of(state):
  leaves = jax.tree_util.tree_leaves_with_path(state)
  named = [(sharding.path_name(path), leaf) for path, leaf in leaves]
  return {name: leaf for name, leaf in named if "/position_" in name}


@pytest.mark.slow
@pytest.mark.parametrize("stop", [6, 12], ids=["inside a phase", "at a border"])
def test_it_goes_on_bit_for_bit(whole, tmp_path, stop):
  network, workdir = whole
  broken = shutil.copytree(workdir, tmp_path / "run")
  for path in (broken / "checkpoints").iterdir():
    if path.name.isdecimal() and int(path.name) > stop:
      shutil.rmtree(path)
  main.train(short(network), broken)
  assert (broken / "metrics.jsonl").read_bytes() == (workdir / "metrics.jsonl").read_bytes()
  ours, theirs = (load_weights(d / "export")[0] for d in (broken, workdir))
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.slow
def test_tables_moments_and_average_grow_together(whole):
  """The state saved at a border is the ended phase's; entering the next one resizes it."""
  network, workdir = whole
  run = build.build(Config(short(network)), DIGITS)
  mesh = sharding.make_mesh(run.mesh_axes)
  assert [phase.shown_size for phase in run.curriculum.phases] == [8, 8, 8, 12, None]
  assert run.curriculum.first_steps[3] == 12
  tables = [tables_of(programs.state_shapes(run, k)) for k in (2, 3)]
  names = list(tables[0])
  parameters = sum(name.startswith("params") for name in names)
  assert parameters and sum(name.startswith("opt_state") for name in names) == 2 * parameters
  assert sum(name.startswith("ema") for name in names) == parameters
  target = abstract_like(*programs.abstract_state(run, mesh, 2))
  before = restore_from(workdir / "checkpoints" / "12", target).state
  after = programs.enter_phase(run, 3, mesh, before)
  assert programs.enter_phase(run, 2, mesh, before) is before
  found = tables_of(after)
  for name, old in tables_of(before).items():
    assert old.shape == tables[0][name].shape != tables[1][name].shape == found[name].shape
    # Bilinear leaves neither the range of the values nor their sign: second moments stay such.
    assert found[name].min() >= old.min() and found[name].max() <= old.max()
    assert jnp.abs(found[name]).max() > 0
  others = [
    {n: x for n, x in zip(sharding.leaf_names(s), jax.tree.leaves(s)) if n not in names}
    for s in (before.replace(rng=0), after.replace(rng=0))
  ]
  jax.tree.map(np.testing.assert_array_equal, *others)


@pytest.mark.slow
def test_weights_kept_on_the_way_are_those_of_the_full_size(whole):
  """The best weights were measured at the full size; a state of a small phase can be used, too."""
  network, workdir = whole
  run = build.build(Config(short(network)), DIGITS)
  wanted = tables_of({"params": programs.state_shapes(run, 4).params})
  for place in ("export", "best"):
    directory = workdir / place
    if place == "best":
      (directory,) = [path for path in directory.iterdir() if path.name.isdecimal()]
    found = tables_of({"params": load_weights(directory)[0]["params"]})
    assert {n: x.shape for n, x in found.items()} == {n: x.shape for n, x in wanted.items()}
  stored = load_network(workdir / "checkpoints" / "6")
  logits, _ = stored.model.apply(stored.variables, jnp.zeros((1, 16, 16, 3)))
  assert logits.shape == (1, 10)
