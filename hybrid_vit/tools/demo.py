"""A page in the browser: drop a photo, see what the weights make of it and what they looked at.

python -m hybrid_vit.tools.demo --weights=DIR
python -m hybrid_vit.tools.demo --weights=runs/flowers --weights=runs/segmenter --port=8000

Needs gradio: pip install -e '.[demo]'. Each DIR is what hybrid_vit.tools.predict takes: classes, a
text tower, segmentation, depth, detection, panoptic segments. With several the page has a menu. The
page is served to this machine alone, at http://127.0.0.1:7860, unless --host or --share say
otherwise. Programs are compiled at the first photo, so that it takes longer than the next ones.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from hybrid_vit import checkpoints
from hybrid_vit.heat_maps import METHODS, OF_ENDPOINTS
from hybrid_vit.object_prediction import MIN_SCORE
from hybrid_vit.photo_answers import Answer, PhotoModel
from hybrid_vit.standard_streams import run_tool

_FONTS = ["system-ui", "sans-serif"]
_MONO = ["ui-monospace", "monospace"]
# A photo of a telephone stays whole on its screen.
_CSS = "#photo img, #found img {max-height: 70vh}"


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; 0 after it was stopped, or 1 after an error."""
  parser = argparse.ArgumentParser(prog="demo", description=__doc__.splitlines()[0])
  parser.add_argument(
    "--weights", action="append", required=True, help="directory of the weights; may come again"
  )
  parser.add_argument(
    "--host", default="127.0.0.1", help="address to serve at; default: %(default)s"
  )
  parser.add_argument("--port", type=int, default=7860, help="default: %(default)s")
  parser.add_argument("--share", action="store_true", help="through gradio's servers, to anyone")
  args = parser.parse_args(argv)
  try:
    require_gradio()
    models = [PhotoModel.load(place) for place in dict.fromkeys(args.weights)]
    page = make_page(models)
    for model in models:
      print(f"loaded {model.name}", flush=True)
    serve(page, host=args.host, port=args.port, share=args.share)
  except (ValueError, ImportError, OSError, checkpoints.CheckpointError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  return 0


def require_gradio() -> Any:
  """The library.

  Raises:
    ModuleNotFoundError: it is not installed.
  """
  try:
    import gradio
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      "the demo needs gradio, which is not installed: pip install -e '.[demo]'"
    ) from error
  return gradio


def serve(
  page: Any, *, host: str, port: int | None, share: bool = False, block: bool = True
) -> str:
  """Serves a page and gives its address; with `block` until it is stopped by the keyboard.

  Raises:
    OSError: the port is taken.
  """
  gradio = require_gradio()
  theme = gradio.themes.Default(font=_FONTS, font_mono=_MONO)
  _, address, _ = page.launch(
    server_name=host, server_port=port, share=share, theme=theme, css=_CSS, ssr_mode=False,
    prevent_thread_lock=True, quiet=True, show_error=True,
  )  # fmt: skip
  if block:
    print(f"open {address} (stop with Ctrl-C)", flush=True)
    page.block_thread()
  return str(address)


def look(
  model: PhotoModel,
  photo: str | None,
  texts: str,
  min_score: float,
  methods: Sequence[str],
  target: str,
  endpoint: str,
) -> tuple[str, Answer, list[tuple[Any, str]]]:
  """(what went wrong, for people; what was found; heat maps) of one photo.

  A photo that cannot be read, or a wish that cannot be met, is an answer too, not an error.
  """
  nothing = Answer(())
  if not photo:
    return "Drop a photo first.", nothing, []
  try:
    found = model.answer(photo, texts=texts, min_score=min_score)
  except (ValueError, ImportError, OSError) as error:
    return str(error), nothing, []
  try:
    heats = model.heat(photo, methods, target=target, endpoint=endpoint, texts=texts)
  except (ValueError, ImportError, OSError) as error:
    return str(error), found, []
  return "", found, heats


def make_page(models: Sequence[PhotoModel]) -> Any:
  """The page, not served yet: a `gradio.Blocks`."""
  gradio = require_gradio()
  by_name = {model.name: model for model in models}
  first = models[0]

  with gradio.Blocks(title="hybrid_vit", analytics_enabled=False) as page:
    gradio.Markdown(f"# hybrid_vit\n{first.name if len(models) == 1 else ''}")
    with gradio.Row():
      with gradio.Column(min_width=300):
        chosen = gradio.Dropdown(
          list(by_name), value=first.name, label="Weights", visible=len(models) > 1,
          elem_id="weights",
        )  # fmt: skip
        photo = gradio.Image(
          type="filepath", sources=["upload", "clipboard"], label="Photo", elem_id="photo"
        )
        # The file as it was dropped: what is no picture is said by `look`, where the component
        # would raise.
        photo.preprocess = lambda dropped: None if dropped is None else dropped.path
        button = gradio.Button("Look", variant="primary", elem_id="look")
        wishes = _wishes(gradio, first)
      with gradio.Column(min_width=300):
        wrong = gradio.Markdown(visible=False, elem_id="wrong")
        label = gradio.Label(label="Classes", visible=False, elem_id="classes")
        regions = gradio.AnnotatedImage(label="Found", visible=False, elem_id="found")
        picture = gradio.Image(label="Picture", visible=False, elem_id="picture")
        lines = gradio.Textbox(label="In words", visible=False, elem_id="lines")
        heats = gradio.Gallery(
          label="What it looked at", visible=False, columns=2, object_fit="contain",
          height="auto", elem_id="heats",
        )  # fmt: skip
    results = [wrong, label, regions, picture, lines, heats]

    def asked(name: str, *given: Any) -> list[Any]:
      return _shown(gradio, *look(by_name[name], *given))

    def changed(name: str) -> list[Any]:
      hidden = [gradio.update(visible=False) for _ in results]
      return [*_wishes(gradio, by_name[name]), *hidden]

    button.click(asked, [chosen, photo, *wishes], results)
    chosen.change(changed, [chosen], [*wishes, *results])
  return page


def _wishes(gradio: Any, model: PhotoModel) -> list[Any]:
  """The inputs beside the photo, in the order in which `look` takes them; as a result, updates."""
  methods = model.methods
  layers = [("the usual", ""), *((name, name) for name in model.mapper.endpoints)]
  classes = [("the likeliest", ""), *((name, name) for name in model.class_names)]
  return [
    gradio.Textbox(
      label="Texts, one a line or between commas", value="", lines=3, visible=model.has_texts,
      elem_id="texts",
    ),
    gradio.Slider(
      label="Least score of an object", minimum=0.0, maximum=1.0, step=0.01, value=MIN_SCORE,
      visible=model.has_scores, elem_id="min_score",
    ),
    gradio.CheckboxGroup(
      label="Heat maps", choices=[(METHODS[m], m) for m in methods], value=list(methods),
      elem_id="methods",
    ),
    gradio.Dropdown(
      label="Grad-CAM of the class", choices=classes, value="", visible=len(classes) > 1,
      elem_id="target",
    ),
    gradio.Dropdown(
      label="Layer of Grad-CAM and PCA", choices=layers, value="",
      visible=bool(set(OF_ENDPOINTS) & set(methods)), elem_id="endpoint",
    ),
  ]  # fmt: skip


def _shown(gradio: Any, wrong: str, found: Answer, heats: list[tuple[Any, str]]) -> list[Any]:
  """Updates of the results: what there is not is hidden."""
  has_classes, has_regions = bool(found.probabilities), bool(found.regions)
  overlay = None
  if found.picture is not None and has_regions:
    overlay = (found.picture, [(region.place, region.name) for region in found.regions])
  colours = {region.name: "#{:02x}{:02x}{:02x}".format(*region.colour) for region in found.regions}
  in_words = "" if has_classes else "\n".join(found.lines)
  only_picture = found.picture if found.picture is not None and not has_regions else None
  return [
    gradio.update(value=f"**{wrong}**", visible=bool(wrong)),
    gradio.update(value=dict(found.probabilities) or None, visible=has_classes),
    gradio.update(value=overlay, color_map=colours, visible=overlay is not None),
    gradio.update(value=only_picture, visible=only_picture is not None),
    gradio.update(value=in_words, visible=bool(in_words), lines=max(1, len(found.lines))),
    gradio.update(value=heats or None, visible=bool(heats)),
  ]


if __name__ == "__main__":
  run_tool(main)
