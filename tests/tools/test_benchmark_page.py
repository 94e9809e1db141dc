from pathlib import Path

from hybrid_vit.tools import benchmark, benchmark_page

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "speed"


def estimate(network, rate, **shares):
  row = {"network": network, "batch": 64, "size": 224, "images_per_second": rate, "mfu": 0.1234}
  return {
    **row,
    "memory_mib": 1536.0,
    "traffic_mb_per_image": 1234.5,
    **{f"{k}_%": v for k, v in shares.items()},
  }


def test_the_page_has_the_figures_of_its_results():
  page = (RESULTS / "README.md").read_text("utf-8")
  said = "run python -m hybrid_vit.tools.benchmark page docs/results/speed"
  assert benchmark_page.written(page, RESULTS) == page, said
  assert benchmark_page.written(page.replace("| cvt_13 |", "| cvt_14 |"), RESULTS) == page


def test_fastest_first_with_the_shares_that_count():
  rows = [
    estimate("slow", 99.6, norms=9.4, products=30.2, attention=60.4),
    {**estimate("fast", 1234.4, products=95.0), "size": 384},
  ]
  assert benchmark_page.of_shares(rows).splitlines()[2:] == [
    "| fast, 64 x 384 | 1,234 | 12.3 % | 1.5 GiB | 1,234 MB | products 95 % |",
    "| slow | 100 | 12.3 % | 1.5 GiB | 1,234 MB | attention 60 %, products 30 % |",
  ]


def test_networks_of_more_than_one_chip():
  results = {"a": [estimate("x", 10.0), estimate("y", 20.0)], "b": [estimate("y", 30.0)]}
  assert benchmark_page.of_chips(results).splitlines() == [
    "| network | a | b |",
    "| --- | ---: | ---: |",
    "| y | 20 (12.3 %) | 30 (12.3 %) |",
  ]
  results["c"] = [estimate("x", 5.0)]
  assert benchmark_page.of_chips(results).splitlines()[2:] == [
    "| x | 10 (12.3 %) |  | 5 (12.3 %) |",
    "| y | 20 (12.3 %) | 30 (12.3 %) |  |",
  ]


def test_levels_side_by_side():
  def row(network, level, seconds):
    form = f"hybrid_vit{level}, v5e estimated"
    return {"network": network, "form": form, "compile_seconds": seconds, "ms": 27.97,
            "memory_mib": 2866.5}  # fmt: skip

  rows = [row("x", "", 149.6), row("x", ", O1", 32.1), row("y", "", 1234.0), row("y", ", O0", 9.4)]
  assert benchmark_page.of_levels(rows).splitlines() == [
    "| network | whole | O1 | O0 |",
    "| --- | ---: | ---: | ---: |",
    "| x | 150 s; 28 ms; 2.8 GiB | 32 s; 28 ms; 2.8 GiB |  |",
    "| y | 1,234 s; 28 ms; 2.8 GiB |  | 9 s; 28 ms; 2.8 GiB |",
  ]


def test_ratios_to_the_fastest_other_form():
  def row(network, mode, ratio, form="hybrid_vit", beside="timm, compiled"):
    return {
      "network": network, "mode": mode, "speed_ratio": ratio, "form": form, "ratio_to": beside,
    }  # fmt: skip

  rows = [
    row("x", "inference", 1.504),
    row("x", "inference", 1.0, form="timm, compiled"),
    row("y", "training", 0.7, beside="coatnet, channels_last"),
    {"network": "z", "mode": "training", "form": "hybrid_vit"},
  ]
  assert benchmark_page.of_comparison(rows).splitlines()[2:] == [
    "| x | 1.50 |  |",
    "| y (beside coatnet, a stand-in) |  | 0.70 |",
  ]


def test_a_place_that_is_missing_is_named(tmp_path, capsys):
  for name in ("v4", "v5e", "v6e", "v5e_levels", "cpu", "data"):
    (tmp_path / f"{name}.json").write_text((RESULTS / f"{name}.json").read_text("utf-8"), "utf-8")
  page = tmp_path / "README.md"
  page.write_text("# a page\n", "utf-8")
  assert benchmark.main(["page", str(tmp_path)]) == 1
  assert "the page has no lines '<!-- begin: written by" in capsys.readouterr().err
  assert page.read_text("utf-8") == "# a page\n"
  whole = (RESULTS / "README.md").read_text("utf-8")
  page.write_text(whole.replace("| cvt_13 |", "| cvt_14 |"), "utf-8")
  assert benchmark.main(["page", str(tmp_path)]) == 0
  assert page.read_text("utf-8") == whole
  (tmp_path / "v6e.json").unlink()
  assert benchmark.main(["page", str(tmp_path)]) == 1
  assert "v6e.json" in capsys.readouterr().err
