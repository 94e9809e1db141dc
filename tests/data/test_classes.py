import importlib.resources

import pytest

from hybrid_vit.data.classes import ClassesError, check_same_classes, sort_classes


def imagenet():
  """Its WordNet numbers and its words."""
  path = importlib.resources.files("hybrid_vit.data") / "embedded/imagenet1k_classes.txt"
  return [
    list(column) for column in zip(*(line.split("\t") for line in path.read_text().splitlines()))
  ]


NUMBERS, WORDS = imagenet()


def test_numeric_names_are_in_numeric_order():
  assert sort_classes(["10", "9", "1", "0"]) == ["0", "1", "9", "10"]
  assert sort_classes(["010", "009", "1"]) == ["1", "009", "010"]
  assert sort_classes(["10", "9", "b"]) == ["10", "9", "b"]
  assert sort_classes(["n02", "n01"]) == ["n01", "n02"]
  assert sort_classes(["²", "1"]) == ["1", "²"]  # a digit, and no number


@pytest.mark.parametrize("other", ["words", "first word", "plain"])
def test_imagenets_classes_are_known_by_all_their_names(other):
  names = {
    "words": WORDS,
    "first word": [words.split(",")[0] for words in WORDS],
    "plain": [str(i) for i in range(1000)],
  }[other]
  check_same_classes(NUMBERS, names, "x")
  check_same_classes(names, NUMBERS, "x")
  check_same_classes(names, names, "x")
  swapped = [*names[:5], names[6], names[5], *names[7:]]
  for pair in ((NUMBERS, swapped), (swapped, NUMBERS)):
    with pytest.raises(
      ClassesError, match="2 of 1,000 differ; the first difference is at number 5"
    ):
      check_same_classes(*pair, "x")


def test_a_part_of_imagenet_is_known_too_but_not_by_plain_numbers():
  check_same_classes(NUMBERS[5:8], WORDS[5:8], "x")
  with pytest.raises(ClassesError):
    check_same_classes(NUMBERS[:3], ["0", "1", "2"], "x")
  with pytest.raises(ClassesError):
    check_same_classes(NUMBERS[5:8], WORDS[6:9], "x")


def test_names_that_differ_are_shown_around_the_first_difference():
  expected = [f"c{i}" for i in range(20)]
  found = [*expected[:10], "cat", *expected[11:]]
  with pytest.raises(ClassesError) as caught:
    check_same_classes(expected, found, "evaluation set 'validation'")
  assert str(caught.value) == (
    "the classes of evaluation set 'validation' are not those expected: 1 of 20 differ; the first "
    "difference is at number 10.\n"
    "  expected: (7 names), 'c7', 'c8', 'c9', 'c10', 'c11', 'c12', 'c13', (6 more)\n"
    "  found:    (7 names), 'c7', 'c8', 'c9', 'cat', 'c11', 'c12', 'c13', (6 more)"
  )


@pytest.mark.parametrize(
  ("expected", "found", "message"),
  [
    (["a", "b"], ["b", "a"], "the same in another order, which numbers them otherwise; the first"),
    (["a", "b"], ["a", "b", "c"], r"there are 3 where 2 were expected; .* at number 2\.\n  exp"),
    (["a", "b"], [], r"there are 0 where 2 were expected(.|\n)*found:    \(only 0 names\)"),
    (["10", "9"], ["9", "10"], "the same in another order"),
    (["cat", "dog"], ["cat", "Dog"], "1 of 2 differ"),
  ],
)
def test_every_kind_of_difference_is_an_error(expected, found, message):
  check_same_classes(expected, tuple(expected), "x")
  with pytest.raises(ClassesError, match=message):
    check_same_classes(expected, found, "x")
