import csv
import pathlib

import jax
import jax.numpy as jnp
import pytest

from hybrid_vit.models.registry import list_models, model_entry
from hybrid_vit.ops.depthwise_conv import depthwise_conv
from hybrid_vit.tools import summarize

DOCS = pathlib.Path(__file__).parents[2] / "docs"


def shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


def convolve(x, kernel):
  return jax.lax.conv_general_dilated(
    x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def test_products_and_convolutions_count_by_hand():
  x, kernel = shape(1, 9, 7, 3), shape(3, 3, 3, 8)
  assert summarize.count_multiply_adds(convolve, x, kernel) == 5 * 4 * 8 * 27
  assert summarize.count_activations(convolve, x, kernel) == 5 * 4 * 8
  product = lambda a, b: jnp.tanh(jnp.einsum("bqd,bkd->bqk", a, b))  # noqa: E731
  a, b = shape(2, 5, 6), shape(2, 7, 6)
  assert summarize.count_multiply_adds(product, a, b) == 2 * 5 * 7 * 6
  assert summarize.count_activations(product, a, b) == 2 * 5 * 7


def test_depthwise_convolutions_count_as_what_they_compute():
  x, kernel = shape(1, 8, 8, 16), shape(3, 3, 1, 16)
  forward = lambda x, k: depthwise_conv(x, k, stride=1, padding="SAME")  # noqa: E731
  assert summarize.count_multiply_adds(forward, x, kernel) == 8 * 8 * 16 * 9
  assert summarize.count_activations(forward, x, kernel) == 8 * 8 * 16


def test_loops_count_as_often_as_they_run():
  def looped(x, w):
    return jax.lax.scan(lambda c, _: (c @ w, None), x, length=5)[0]

  assert summarize.count_activations(looped, shape(2, 4), shape(4, 4)) == 5 * 8
  assert summarize.count_multiply_adds(looped, shape(2, 4), shape(4, 4)) == 5 * 32

  def endless(x, w):
    return jax.lax.while_loop(lambda c: c.sum() < 1, lambda c: c @ w, x)

  for count in (summarize.count_activations, summarize.count_multiply_adds):
    with pytest.raises(ValueError, match="loop of unknown length"):
      count(endless, shape(2, 4), shape(4, 4))


def test_activations_of_a_known_network():
  # DeiT-S by hand, 11.9 M in timm's model card: patches, then 12 blocks of projections, attention
  # and MLP, then the head.
  tokens, width, heads = 197, 384, 6
  block = tokens * (3 * width + width + 4 * width + width) + heads * tokens**2 + tokens * width
  by_hand = 196 * width + 12 * block + 1000
  assert summarize.summarize("deit_small_patch16_224").activations == by_hand


def test_tables():
  rows = [
    summarize.Summary("a", 224, 1234567, 10**9, 2 * 10**6, 1.2e6, None, 81.25),
    summarize.Summary("longer", 8, 1, 2, 3, None, None, None),
  ]
  text, markdown = (summarize.format_table(rows, style) for style in ("text", "markdown"))
  assert "1,234,567  1,200,000     1.00 G" in text and "2.0 M" in text
  assert len({len(line) for line in text.splitlines()}) == 1
  assert markdown.splitlines()[2].startswith(
    "| a | 224 | 1,234,567 | 1,200,000 | 1.00 G |  | 2.0 M"
  )
  table = list(csv.DictReader(summarize.format_table(rows, "csv").splitlines()))
  assert table[0]["activations"] == "2000000" and table[1]["published_top1"] == ""
  with pytest.raises(ValueError, match="'html'"):
    summarize.format_table(rows, "html")


def test_the_page_of_networks_is_of_today():
  """Names and published figures; counting everything again would take minutes."""
  command = "run python -m hybrid_vit.tools.summarize --docs=docs"
  rows = list(csv.DictReader((DOCS / "networks.csv").read_text(encoding="utf-8").splitlines()))
  assert [row["name"] for row in rows] == list_models(), command
  page = (DOCS / "networks.md").read_text(encoding="utf-8")
  for row in rows:
    entry = model_entry(row["name"])
    published = entry.published
    assert int(row["image_size"]) == entry.preprocessing.image_size, command
    for field, value in (
      ("published_parameters", published.parameters),
      ("published_multiply_adds", published.multiply_adds),
      ("published_top1", published.top1),
    ):
      assert (float(row[field]) if row[field] else None) == value, (row["name"], field, command)
    assert f"| {row['name']} | {row['image_size']} | {int(row['parameters']):,} |" in page, command


@pytest.mark.parametrize(
  ("name", "millions"),
  # As timm's model cards give them, made with fvcore.
  [
    ("focalnet_tiny_srf", 16.3),
    ("deit_base_patch16_224", 23.9),
    ("swin_tiny", 17.1),
    ("swin_small", 27.5),
    ("convnext_tiny", 13.4),
    ("resnet50", 11.1),
  ],
)
def test_activations_are_what_others_count(name, millions):
  rows = list(csv.DictReader((DOCS / "networks.csv").read_text(encoding="utf-8").splitlines()))
  (found,) = [int(row["activations"]) for row in rows if row["name"] == name]
  assert round(found / 1e6, 1) == millions


def test_the_command_writes_the_docs(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(summarize.registry, "list_models", lambda pattern="*": ["tiny_moat_0"])
  summarize.main([f"--docs={tmp_path}"])
  assert "## [moat](../hybrid_vit/models/moat.py)" in (tmp_path / "networks.md").read_text()
  summarize.main(["tiny_moat_0", "--image_size=64", "--format=csv"])
  row = next(csv.DictReader(capsys.readouterr().out.splitlines()))
  assert row["image_size"] == "64" and row["published_multiply_adds"] == ""
