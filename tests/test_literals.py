import argparse

import pytest

from hybrid_vit.literals import literal, named_literal


@pytest.mark.parametrize(
  ("text", "value"),
  [
    ("0.1", 0.1), ("(1, None)", (1, None)), ("'a'", "a"), ("'1'", "1"), ("gelu", "gelu"),
    ("true", True), ("False", False), ("NONE", None), ("a b", "a b"), ("", ""), ("1e", "1e"),
  ],
)  # fmt: skip
def test_what_is_no_literal_is_text(text, value):
  assert literal(text) == value and type(literal(text)) is type(value)


def test_a_named_value():
  assert named_literal("depths=(1, 1, 2, 1)") == ("depths", (1, 1, 2, 1))
  assert named_literal("norm=layer=norm") == ("norm", "layer=norm")


@pytest.mark.parametrize("text", ["depths", "depths=", "=3", "a b=3", "1=2"])
def test_a_name_and_a_value_are_needed(text):
  with pytest.raises(argparse.ArgumentTypeError, match="NAME=VALUE was expected"):
    named_literal(text)


@pytest.mark.parametrize("text", ["(1, 1", "f()", "'a", "[1,", "{'a': x}"])
def test_a_broken_literal_is_no_text(text):
  with pytest.raises(argparse.ArgumentTypeError, match=r"of depths is no value .* such as 0\.1"):
    named_literal(f"depths={text}")
