"""EfficientTrain's tables against the authors' launch scripts."""

import numpy as np
import pytest

from hybrid_vit import efficienttrain
from hybrid_vit.efficienttrain import ReplayBuffer, fitted_sizes, launches, learning_rate, stages
from tests import golden

# Golden run → arguments of `stages`.
RUNS = {
  "swin_tiny_300_bs256": ("efficienttrain", 300, {}),
  "deit_small_patch16_224_300_bs256": ("efficienttrain", 300, {"family": "deit"}),
  "swinT_200": ("efficienttrain++", 200, {}),
  "deitS_200": ("efficienttrain++", 200, {"family": "deit"}),
  "swinT_100": ("efficienttrain++", 100, {}),
  "swinT_300": ("efficienttrain++", 300, {}),
  "deitS_replay_200": ("efficienttrain++", 200, {"family": "deit", "replay": 4}),
}


def published(run):
  """Columns of a golden run, by name."""
  for name in ("schedule_v1", "schedule_pp"):
    description, tables = golden.load("efficienttrain", name)
    if run in tables:
      return dict(zip(description["columns"], tables[run].T))
  raise KeyError(run)


@pytest.mark.parametrize("run", RUNS)
def test_the_launches_are_the_authors(run):
  name, epochs, options = RUNS[run]
  expected, found = published(run), launches(name, epochs, **options)
  for column, field in (
    ("input_size", "size"),
    ("epochs", "total_epochs"),
    ("start_epoch", "start_epoch"),
    ("end_epoch", "end_epoch"),
    ("warmup_epochs", "warmup_epochs"),
    ("magnitude", "magnitude"),
  ):
    np.testing.assert_array_equal([getattr(x, field) for x in found], expected[column], column)


@pytest.mark.parametrize("run", RUNS)
def test_the_stages_are_the_launches_without_their_roundings(run):
  name, epochs, options = RUNS[run]
  expected, found = published(run), stages(name, epochs, **options)
  np.testing.assert_array_equal([s.replay for s in found], expected["replay_times"])
  np.testing.assert_array_equal([s.replay_batches for s in found], expected["replay_buffer_size"])
  # A launch rounds its first and last epoch: three of them at most.
  lengths = expected["end_epoch"] - expected["start_epoch"]
  assert np.abs(lengths - [s.epochs for s in found]).max() <= 3
  first = [learning_rate(s, s.begin, peak=4e-3) for s in found]
  last = [learning_rate(s, s.end, peak=4e-3) for s in found]
  tolerance = 4e-3 * 0.02  # of the peak: the rate moves by that in an epoch or two
  np.testing.assert_allclose(first, expected["first_step_lr"], atol=tolerance)
  np.testing.assert_allclose(last, expected["last_step_lr"], atol=tolerance)


def test_each_stage_of_plus_plus_costs_the_same():
  found = stages("efficienttrain++", 200)
  np.testing.assert_allclose([s.epochs * (s.size / 224) ** 2 for s in found], 20.0)
  assert sum(s.epochs for s in found) == pytest.approx(454.6, abs=0.1)
  np.testing.assert_allclose(efficienttrain.relative_cost(found), 200.0)
  # The first version saves by its small pictures: every example comes as often as ever.
  first = stages("efficienttrain", 300)
  assert sum(s.epochs for s in first) == pytest.approx(300)
  assert 300 / efficienttrain.relative_cost(first) == pytest.approx(1.53, abs=0.01)
  np.testing.assert_allclose([s.magnitude for s in first], [1, 3, 5, 7, 9])


def test_a_replayed_training_costs_the_same_and_loads_less():
  plain, replayed = (stages("efficienttrain++", 200, replay=times) for times in (1, 4))
  costs = [efficienttrain.relative_cost(found) for found in (plain, replayed)]
  np.testing.assert_allclose(costs, 200.0)
  assert sum(s.epochs for s in replayed) < 0.5 * sum(s.epochs for s in plain)


def test_early_stages_take_larger_batches_of_about_as_many_pixels():
  found = stages("efficienttrain++", 200, early_batch=4)
  assert [s.batch_factor for s in found] == [4, 4, 2, 2, 2, 2, 1, 1, 1, 1]


def test_sizes_are_fractions_of_another_full_size():
  assert fitted_sizes("efficienttrain++", 224, multiple=32) == (96, 160, 224)
  assert fitted_sizes("efficienttrain++", 384, multiple=32) == (160, 288, 384)
  assert fitted_sizes("efficienttrain++", 32) == (14, 22, 32)
  assert fitted_sizes("efficienttrain++", 32, family="deit", multiple=4) == (12, 24, 28, 32)
  assert fitted_sizes("efficienttrain", 32, multiple=8) == (24, 24, 32)
  found = stages("efficienttrain++", 20, sizes=(12, 24, 32))
  np.testing.assert_allclose([s.epochs * (s.size / 32) ** 2 for s in found], 2.0)


def test_a_replay_buffer_draws_from_what_it_keeps():
  buffer, rng = ReplayBuffer(4, batches=2, pieces=2), np.random.default_rng(0)
  seen = set()
  for step in range(30):
    rows = 10 * step + np.arange(4)
    found = buffer.mix({"index": rows, "image": rows[:, None] * 2}, rng)
    assert found["index"].shape == (16,) and found["image"].shape == (16, 1)
    np.testing.assert_array_equal(found["index"][:4], rows)
    np.testing.assert_array_equal(found["image"][:, 0], 2 * found["index"])
    steps = {int(i) // 10 for i in found["index"]}
    assert steps <= {step, step - 1}
    seen |= {step - s for s in steps}
  assert seen == {0, 1}
  with pytest.raises(ValueError, match=r"a batch of \[3\] rows does not fall into 2"):
    buffer.mix({"index": np.arange(3)}, rng)
  with pytest.raises(ValueError, match="times is 0"):
    ReplayBuffer(0, 1)


@pytest.mark.parametrize(
  ("arguments", "options", "message"),
  [
    (("efficienttrian", 200), {}, "no curriculum is named 'efficienttrian'; there are: efficient"),
    (("efficienttrain++", 0), {}, "the budget is 0 epochs; a number above 0"),
    (("efficienttrain++", 200), {"family": "moat"}, "family is 'moat'; one of usual"),
    (("efficienttrain++", 200), {"sizes": (16, 32)}, r"\(16, 32\); 3 rising ones .* \(96, 160, 22"),
    (("efficienttrain++", 200), {"early_batch": 0}, "early_batch is 0"),
    (("efficienttrain++", 200), {"replay": 3}, r"replay is 3; one of \[1, 4, 2\]"),
    (("efficienttrain", 200), {"replay": 2}, "replay belongs to"),
  ],
)
def test_what_cannot_be_is_named(arguments, options, message):
  with pytest.raises(ValueError, match=message):
    stages(*arguments, **options)
