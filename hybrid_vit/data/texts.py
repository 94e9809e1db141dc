"""Small files of text: names, lists."""

from __future__ import annotations


def as_text(content: bytes, name: str) -> str:
  """A file's bytes as text in UTF-8, without the mark that some editors begin it with.

  Args:
    content: the bytes.
    name: of the file, for the message.

  Raises:
    ValueError: they are none.
  """
  try:
    return content.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(f"{name} is no text in UTF-8: {error}") from error
