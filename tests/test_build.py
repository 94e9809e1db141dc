"""From a configuration to a run: preprocessing, phases, evaluation, everything read and checked."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from hybrid_vit import build, recipes
from hybrid_vit.build import DataFacts
from hybrid_vit.config import Config, ConfigError, load_config
from hybrid_vit.data.evaluation import describe_preparation
from hybrid_vit.data.transforms import parse_transform
from hybrid_vit.evaluate import weights_preprocessing
from hybrid_vit.models.registry import Preprocessing, model_entry

CONFIGS = Path(__file__).parent.parent / "configs"
OTHER = Preprocessing(48, 0.75, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
DIGITS = DataFacts({"class_names": tuple("0123456789")}, 1437)


def local(**changes):
  """The local try of fine-tuning; changes by path, "data__batch_size"."""
  config = load_config(CONFIGS / "finetune.py", "runlocal")
  with config.unlocked(), config.ignore_type():
    for path, value in changes.items():
      *groups, name = path.split("__")
      group = config
      for part in groups:
        if part not in group:
          group[part] = {}
        group = group[part]
      group[name] = value
  return Config(config)


def test_the_registrys_entry_where_the_configuration_says_nothing():
  config = load_config(CONFIGS / "finetune.py", "moat_2")
  assert build.preprocessing_of(Config(config)) == model_entry("moat_2").preprocessing
  config.data.image_size, config.data.mean = 160, (0.1, 0.1, 0.1)
  changed = build.preprocessing_of(Config(config))
  assert changed.image_size == 160 and changed.mean == (0.1, 0.1, 0.1)
  assert changed.resize == "squash" and changed.std == (0.5, 0.5, 0.5)


def test_weights_decide_how_they_are_evaluated():
  stored = dataclasses.asdict(OTHER) | {"mean": [0.1, 0.2, 0.3]}  # as JSON has it
  expected, said_by = weights_preprocessing(local(), {"preprocessing": stored})
  assert expected == OTHER
  (found,) = build.read_evaluation(local(), expected)
  assert found.transform == "decode|resize_center_crop(48, 0.75, 'bilinear')"
  assert found.decoder == "pil" and not found.own_transform
  text = describe_preparation(expected, said_by, [found])
  assert text.count("as the weights' metadata says") == 2
  (task,), metadata = build.build_tasks(local(), DIGITS, expected, None)
  assert task.mean == OTHER.mean and task.std == OTHER.std
  assert metadata["preprocessing"] == dataclasses.asdict(OTHER)


def test_weights_that_say_nothing_leave_it_to_the_configuration():
  expected, said_by = weights_preprocessing(local(), {"step": 3})
  assert expected == build.preprocessing_of(local()) and expected.image_size == 32
  assert "the registry's entry of tiny_moat_0 and config.data" in said_by


def test_a_transform_of_the_sets_own_goes_first_and_is_said():
  config = local(evaluation__sets__validation__transform="decode|resize({image_size})")
  found = build.read_evaluation(config, OTHER)
  assert found[0].own_transform and found[0].transform == "decode|resize(48)"
  text = describe_preparation(OTHER, "as the weights' metadata says", found)
  assert "validation: decode|resize(48) (pil): by the configuration's own transform" in text


def test_evaluation_strings_are_what_they_are_named_for():
  squashed = dataclasses.replace(OTHER, resize="squash")
  assert recipes.eval_transform(squashed) == "decode|resize(48, 'bilinear')"
  for preprocessing in (OTHER, squashed):
    parse_transform(recipes.eval_transform(preprocessing))
  text = recipes.train_transform("randaugment(2, 9)", scale=(0.2, 1))
  parse_transform(build.fill_transform(text, OTHER))
  assert build.fill_transform(text, OTHER) == (
    "decode|random_resized_crop(48, (0.2, 1), interpolation='bilinear')|flip_lr|randaugment(2, 9)"
  )


def test_metadata_says_all_that_using_the_weights_needs():
  config = local(task=dict(name="classification", loss="sigmoid"))
  _, metadata = build.build_tasks(config, DIGITS, OTHER, None)
  assert metadata["task"] == "classification" and metadata["task_settings"]["loss"] == "sigmoid"
  assert metadata["class_names"] == list("0123456789") and metadata["num_classes"] == 10
  assert metadata["name"] == "tiny_moat_0" and "widths" in metadata["arguments"]


def test_the_default_is_one_phase_of_all_epochs():
  curriculum = build.read_curriculum(local(total_epochs=1.5), 1437, OTHER)
  (phase,) = curriculum.phases
  assert phase.steps == round(1.5 * 1437 / 64) and phase.batch_size == 64


PHASES = (
  dict(epochs=2, image_size=24, batch_size=128),
  dict(steps=7, share=0.25, task=dict(label_smoothing=0.2)),
)


def test_phases_are_read_and_filled_in():
  given = tuple({**phase, "share": 0.5} for phase in PHASES)
  run = build.build(local(phases=given, optimizer__schedule__warmup_epochs=0), DIGITS)
  first, second = run.curriculum.phases
  assert (first.steps, first.batch_size, first.image_size) == (round(2 * 1437 / 128), 128, 24)
  assert "random_crop(24)" in first.transform and "random_crop(32)" in second.transform
  assert (second.steps, second.batch_size) == (7, 64)
  assert run.batches[0]["image"].shape == (128, 24, 24, 3)
  assert run.batches[1]["image"].shape == (64, 32, 32, 3)
  assert run.tasks[0].label_smoothing == 0.1 and run.tasks[1].label_smoothing == 0.2
  # Half of the cosine in each phase.
  middle, end = (float(run.schedule(s)) for s in (run.curriculum.first_steps[1], 29))
  np.testing.assert_allclose(middle, (4e-3 + 1e-5) / 2, rtol=1e-3)
  np.testing.assert_allclose(end, 1e-5, rtol=1e-3)


def test_phases_without_a_length_share_the_whole():
  given = (dict(image_size=16), dict(image_size=24))
  curriculum = build.read_curriculum(local(phases=given, total_epochs=4), 1437, OTHER)
  assert [phase.steps for phase in curriculum.phases] == [round(2 * 1437 / 64)] * 2


def test_a_rate_that_follows_the_batch_follows_each_phases():
  given = (dict(steps=10, batch_size=128), dict(steps=10, batch_size=32))
  config = local(
    phases=given,
    optimizer__learning_rate_batch_size=64,
    optimizer__schedule=dict(name="constant"),
    optimizer__learning_rate=1e-3,
  )
  run = build.build(config, DIGITS)
  np.testing.assert_allclose([run.schedule(3), run.schedule(13)], [2e-3, 5e-4], rtol=1e-6)


def test_evaluations_fall_on_epochs_of_examples():
  run = build.build(local(total_epochs=3, evaluate_every_epochs=1), DIGITS)
  total = run.curriculum.total_steps
  found = [step for step in range(1, total + 1) if run.evaluates_at(step)]
  assert found == [23, 45, 67] and total == 67
  for changes, expected in (
    (dict(evaluate_every_epochs=0), [total]),
    (dict(evaluate_every_steps=30), [30, 60, total]),
  ):
    run = build.build(local(total_epochs=3, **changes), DIGITS)
    assert [s for s in range(1, total + 1) if run.evaluates_at(s)] == expected


def test_a_smoke_run_is_the_recipe_in_a_few_steps():
  given = dict(phases=(dict(epochs=1), dict(epochs=1)), optimizer__schedule__warmup_epochs=0)
  run = build.build(local(smoke_steps=3, **given), DIGITS)
  assert [phase.steps for phase in run.curriculum.phases] == [3, 3]
  assert run.settings.log_every == 1 and run.settings.smoke
  assert run.evaluation[0].max_batches == 3
  # The schedule is gone through as a whole.
  np.testing.assert_allclose(run.schedule(3), (4e-3 + 1e-5) / 2, rtol=1e-3)
  np.testing.assert_allclose(run.schedule(6), 1e-5, rtol=1e-3)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(data__batch_size=0), "`config.data.batch_size` is 0; at least 1"),
    (dict(data__batch_size=64.5), r"`config.data.batch_size` is 64.5; a whole number"),
    (dict(data__batch_size=2000), "batch of 2000 is larger than the training data.*1437"),
    (dict(log_every_steps=0), "`config.log_every_steps` is 0"),
    (dict(evaluate_every_steps=0), "`config.evaluate_every_steps` is 0"),
    (dict(evaluate_every_epochs=-1), "`config.evaluate_every_epochs` is -1"),
    (dict(seed=-1), "`config.seed` is -1; at least 0"),
    (dict(total_epochs=0), "`config.total_epochs` is 0.0; more than 0"),
    (dict(total_epochs=0.001), "less than one step of 64"),
    (dict(checkpoint__keep=0), "`config.checkpoint.keep` is 0"),
    (dict(checkpoint__best_metric="validation/examples"), "there are: validation/top1"),
    (dict(checkpoint__best_metric="val/top1"), "is 'val/top1'; there are"),
    (dict(phases=(dict(epoch=2),)), r"`config.phases\[0\].epoch` is not read.*epochs"),
    (dict(phases=(dict(epochs=2, share=1), dict(epochs=2))), "1 of 2 phases say their share"),
    (dict(phases=3), "a list of groups was expected"),
    (dict(phases=(dict(epochs=1, task=dict(los="x")),)), "config.phases.task.los` is not read"),
    (dict(data__repeats=0), "`config.data.repeats` is 0"),
    (dict(data__num_threads=0), "`config.data.num_threads` is 0"),
    (dict(data__num_processes=0), "`config.data.num_processes` is 0"),
    (
      dict(data__num_threads=2, data__num_processes=3),
      "`config.data.num_threads` is 2 and `config.data.num_processes` 3; one of them",
    ),
    (
      dict(
        evaluation__sets__validation__num_threads=2, evaluation__sets__validation__num_processes=2
      ),
      "`config.evaluation.sets.validation.num_threads` is 2",
    ),
    (dict(data__max_corrupt_fraction=2), "max_corrupt_fraction` is 2"),
    (dict(task__label_smoothing=1.5), "label_smoothing is 1.5"),
    (dict(task__loss="softmaks"), "loss 'softmaks' is not one of softmax, sigmoid"),
    (dict(model__num_classes=11), "is 11 and the training data has 10 classes"),
    (dict(sinks=("csw",)), "names 'csw'; there are"),
    (dict(remat=1), "`config.remat` is 1; True or False"),
    (dict(data__source=3), "`config.data.source` is 3; a text"),
    (dict(mesh=dict(data="all")), "`config.mesh.data` is 'all'; a whole number"),
  ],
)
def test_what_is_wrong_names_the_field(changes, message):
  with pytest.raises(ValueError, match=message):
    build.build(local(**changes), DIGITS)


def test_the_best_is_by_the_measures_own_direction():
  run = build.build(local(checkpoint__best_metric="validation/loss"), DIGITS)
  assert run.settings.best_metric == "validation/loss" and not run.settings.best_is_max
  assert build.build(local(), DIGITS).settings.best_is_max
  off = build.build(local(checkpoint__keep_best=False), DIGITS)
  assert off.settings.best_metric is None


def test_processes_of_a_set_are_its_own():
  run = build.build(local(data__num_processes=3), DIGITS)
  assert run.data.num_processes == 3 and run.evaluation[0].num_processes is None
  sets = dict(data__num_threads=2, evaluation__sets__validation__num_processes=2)
  (found,) = build.build(local(**sets), DIGITS).evaluation
  assert (found.num_processes, found.num_threads) == (2, None)


def test_everything_that_a_run_has_is_read():
  config = local(
    skip_bad_steps=2,
    resume_from="x",
    evaluation__sets__validation__decoder="opencv",
    evaluation__sets__validation__max_corrupt_fraction=0.5,
  )
  run = build.build(config, DIGITS)
  config.assert_all_read()
  assert run.settings.skip_bad_steps == 2 and run.settings.resume_from == "x"
  assert run.evaluation[0].decoder == "opencv" and run.evaluation[0].max_corrupt_fraction == 0.5
  config = local(evaluation__sets__validation__decoda="pil")
  build.build(config, DIGITS)
  with pytest.raises(ConfigError, match=r"validation.decoda` is not read.*decoder"):
    config.assert_all_read()


def test_without_data_a_known_number_of_classes_is_enough():
  config = local(model__num_classes=10)
  assert build.build(config).examples_per_epoch == 64 * build.STAND_IN_STEPS
  with pytest.raises(ValueError, match=r"`config\.model\.num_classes` is needed"):
    build.build(local(model__num_classes=None))
