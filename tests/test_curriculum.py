"""Phases as a pure function of the step."""

import jax
import numpy as np
import pytest

from hybrid_vit.curriculum import Curriculum, Phase


def phases(*specs):
  return Curriculum([Phase(steps, size, "decode", 32, share) for steps, size, share in specs])


THREE = phases((10, 4, None), (5, 8, None), (1, 3, None))


def test_each_step_has_its_phase_and_position():
  assert THREE.total_steps == 16 and THREE.total_examples == 10 * 4 + 5 * 8 + 3
  assert [THREE.phase_of(s) for s in (0, 9, 10, 14, 15, 16)] == [0, 0, 1, 1, 2, 2]
  position, found = 0, []
  for step in range(THREE.total_steps + 1):
    found.append(THREE.examples_before(step))
    assert found[-1] == position
    position += THREE.phases[THREE.phase_of(step)].batch_size
  assert found[-1] == THREE.total_examples


def test_examples_lead_back_to_steps():
  for examples in (0, 1, 4, 39, 40, 41, 48, 79, 80, 83):
    step = THREE.steps_for(examples)
    assert THREE.examples_before(step) >= examples
    assert step == 0 or THREE.examples_before(step - 1) < examples


def test_the_schedule_is_the_step_where_shares_follow_the_steps():
  assert THREE.schedule_step(7) == 7
  assert phases((10, 4, 2.0), (5, 8, 1.0)).schedule_step(12) == 12


def test_shares_stretch_the_schedule():
  halves = phases((30, 4, 1.0), (10, 8, 1.0))
  found = [float(halves.schedule_step(s)) for s in (0, 15, 30, 35, 40)]
  np.testing.assert_allclose(found, [0, 10, 20, 30, 40])
  np.testing.assert_allclose(jax.jit(halves.schedule_step)(15), 10)


@pytest.mark.parametrize(
  ("specs", "message"),
  [
    ([], "at least one phase"),
    ([(0, 4, None)], "0 steps; at least 1"),
    ([(3, 0, None)], "batch of 0"),
    ([(3, 4, 0.0)], "share 0.0"),
    ([(3, 4, 0.5), (3, 4, None)], "1 of 2 phases say their share"),
  ],
)
def test_what_cannot_be_is_named(specs, message):
  with pytest.raises(ValueError, match=message):
    phases(*specs)
