"""Recall in blocks against all similarities at once."""

import numpy as np
import pytest

from hybrid_vit.tasks.retrieval import RECALLS, ranks, recalls


def unit(rng, *shape):
  x = rng.normal(size=shape).astype(np.float32)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def by_definition(images, texts, owners):
  """The measures from the whole matrix in float64, ties against."""
  similar, found = images.astype(np.float64) @ texts.T.astype(np.float64), {}
  with_caption = [i for i in range(len(images)) if (owners == i).any()]
  image_ranks = [
    (similar[i, owners != i] >= similar[i, owners == i].max()).sum() for i in with_caption
  ]
  text_ranks = [
    (np.delete(similar[:, j], owners[j]) >= similar[owners[j], j]).sum() for j in range(len(texts))
  ]
  for direction, rank in (("image_to_text", image_ranks), ("text_to_image", text_ranks)):
    found |= {f"{direction}_r{k}": np.mean(np.array(rank) < k) for k in (1, 5, 10)}
  return found


@pytest.mark.parametrize("block", [None, (7, 11), (64, 3), (200, 500)])
def test_blocks_give_what_the_whole_matrix_gives(block):
  rng = np.random.default_rng(0)
  images = unit(rng, 57, 8)
  owners = rng.integers(0, 50, 203)  # some pictures have no caption
  texts = images[owners] + unit(rng, 203, 8)
  texts /= np.linalg.norm(texts, axis=-1, keepdims=True)
  found, expected = (
    recalls(images, texts, owners, block=block),
    by_definition(images, texts, owners),
  )
  assert set(found) == set(RECALLS) == set(expected)
  assert 0.1 < found["image_to_text_r1"] < 0.95 and found["text_to_image_r1"] < 0.9
  for name, value in expected.items():
    assert found[name] == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("count", [40, 300])
def test_a_model_that_answers_the_same_to_all_finds_nothing(count):
  images = np.repeat(unit(np.random.default_rng(1), 1, 24), count, 0)
  owners = np.repeat(np.arange(count), 2)
  found = recalls(images, images[owners], owners, block=(128, 256))
  assert set(found.values()) == {0.0}


def test_what_is_no_number_is_never_right():
  images = np.eye(12, dtype=np.float32)
  owners = np.arange(12)
  assert recalls(images, images, owners)["image_to_text_r1"] == 1.0
  broken = images.copy()
  broken[3] = np.nan
  found = ranks(broken, images, owners, owners)
  assert found[3] == 11 and (np.delete(found, 3) == 0).all()
  # As a rival it stands before all others.
  assert (np.delete(ranks(images, broken, owners, owners), 3) == 1).all()


def test_errors():
  images = np.eye(3, dtype=np.float32)
  for owners in (np.zeros(0, int), np.array([0, 3, 1])):
    with pytest.raises(ValueError, match="captions of 3 pictures"):
      recalls(images, images[: len(owners)], owners)
