"""Probes held to their definitions, and the command on the embedded digits."""

import csv

import numpy as np
import pytest

from hybrid_vit.inference import Answers
from hybrid_vit.probing import knn_votes, linear_probe, shots, top1
from hybrid_vit.tools import probe
from tests.tools.test_predict import weights


def test_votes_of_the_nearest_by_the_definition():
  rng = np.random.default_rng(0)
  bank, queries = rng.normal(size=(50, 6)), rng.normal(size=(7, 6))
  labels = rng.integers(0, 4, 50)
  found = knn_votes(bank, labels, queries, num_classes=4, k=9, temperature=0.1)
  for query, row in zip(queries, found):
    cosines = [q @ query / np.linalg.norm(q) / np.linalg.norm(query) for q in bank]
    nearest = sorted(range(50), key=lambda i: -cosines[i])[:9]
    expected = np.zeros(4)
    for i in nearest:
      expected[labels[i]] += np.exp(cosines[i] / 0.1)
    np.testing.assert_allclose(row, expected / expected.sum(), rtol=1e-5)
  # Length does not matter, and of fewer examples all vote.
  longer = knn_votes(bank * 7, labels, queries / 3, num_classes=4, k=9, temperature=0.1)
  np.testing.assert_allclose(longer, found, rtol=1e-4)
  alone = knn_votes(bank[:1], labels[:1], queries, num_classes=4, temperature=1e-4)
  assert (alone[:, labels[0]] == 1).all()
  with pytest.raises(ValueError, match=r"k is 0, the temperature 0\.07"):
    knn_votes(bank, labels, queries, num_classes=4, k=0)


def test_shots_are_so_many_of_each_class_and_follow_the_seed():
  labels = np.repeat([0, 1, 5], [10, 4, 20])
  chosen = shots(labels, 4, seed=3)
  assert np.bincount(labels[chosen]).tolist() == [4, 4, 0, 0, 0, 4]
  assert len(set(chosen)) == 12
  assert np.array_equal(chosen, shots(labels, 4, 3)) and not np.array_equal(
    chosen, shots(labels, 4, 4)
  )
  with pytest.raises(ValueError, match="class 1 has 4: choose fewer"):
    shots(labels, 5, 0)


def test_the_linear_probe_is_at_its_minimum():
  rng = np.random.default_rng(1)
  labels = rng.integers(0, 3, 60)
  x = rng.normal(size=(60, 5)) * [1, 10, 0.1, 1, 1] + labels[:, None] * [0, 3, 0, 1, 0] + 4
  kernel, bias = linear_probe(x, labels, num_classes=3, l2=0.1)
  mean, std = x.mean(0), x.std(0)
  normal, k = (x - mean) / std, kernel * std[:, None]
  logits = x @ kernel + bias
  p = np.exp(logits - logits.max(1, keepdims=True))
  p /= p.sum(1, keepdims=True)
  off = (p - np.eye(3)[labels]) / 60
  assert np.abs(normal.T @ off + 0.1 * k).max() < 1e-4 and np.abs(off.sum(0)).max() < 1e-4


def test_ties_are_not_right():
  assert top1(np.array([[1.0, 1.0], [0.0, 2.0]]), np.array([0, 1])) == 0.5


def test_rows_are_means_over_draws():
  rng = np.random.default_rng(2)
  labels = np.arange(40) % 2
  features = rng.normal(size=(40, 3)) + 4 * labels[:, None]
  answers = Answers(features, None, labels, np.arange(40), ())
  rows = probe.probe(answers, answers, num_classes=2, k=(3,), n_shots=(2,), seeds=3)
  assert [row["probe"] for row in rows] == ["3-NN", "2-shot linear"]
  each = []
  for seed in range(3):
    chosen = shots(labels, 2, seed)
    kernel, bias = linear_probe(features[chosen], labels[chosen], num_classes=2)
    each.append(top1(features @ kernel + bias, labels))
  assert rows[1]["top1"] == pytest.approx(np.mean(each))
  assert rows[1]["spread"] == pytest.approx(np.std(each, ddof=1))


def test_the_command_on_weights_without_a_head(tmp_path, capsys):
  where = weights(tmp_path / "w", num_classes=0)
  arguments = ["--data=digits", "--known=train[:200]", "--shots=2", "--seeds=2", "--k=5"]
  arguments += [f"--output={tmp_path / 't.csv'}", f"--weights={where}", "--asked=test[:60]"]
  assert probe.main(arguments) == 0
  out = capsys.readouterr().out
  assert "32 features" in out and "2-shot linear" in out and "over 2 draws" in out
  rows = list(csv.DictReader((tmp_path / "t.csv").open()))
  assert [row["probe"] for row in rows] == ["5-NN", "2-shot linear"]
  assert probe.main([f"--weights={tmp_path}", "--data=digits"]) == 1
  assert probe.main([f"--weights={where}", "--data=folder:/not/there"]) == 1
  assert capsys.readouterr().err.count("error: ") == 2
