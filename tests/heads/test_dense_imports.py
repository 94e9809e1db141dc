"""Whole networks of other libraries: DPT by transformers' names, Swin as OpenMMLab merges cells."""

import jax
import numpy as np
import pytest

from hybrid_vit.checkpoints import load_weights
from hybrid_vit.heads.dense_model import create_dense_model
from hybrid_vit.models.registry import create_model
from hybrid_vit.stored_tasks import load_task
from hybrid_vit.tools import export_weights, import_weights
from hybrid_vit.weights import dense_checkpoints, keymap_swin, readers
from tests import golden
from tests.models.contract import drawn_variables

VIT = "vit_base_patch16_224"


def recipe(path, task, head, arguments, name=VIT):
  """A recipe of a head on a network, as a file."""
  path.write_text(
    "from hybrid_vit import dense_recipes\n\n\n"
    "def get_config():\n"
    f"  config = dense_recipes.dense_frame({name!r}, dict(head={head!r}), image_size=64,\n"
    f"    batch_size=2, source='scenes', task={task!r})\n"
    f"  config.model.arguments = {arguments!r}\n"
    "  return config\n"
  )
  return path


def vit_arguments(given):
  return {
    "width": given["hidden_size"],
    "depth": given["num_hidden_layers"],
    "num_heads": given["num_attention_heads"],
    "patch_size": given["patch_size"],
    "position_size": given["image_size"] // given["patch_size"],
    "mlp_ratio": given["intermediate_size"] / given["hidden_size"],
    "layer_norm_epsilon": given["layer_norm_eps"],
    "output_blocks": tuple(given["backbone_out_indices"]),
  }


def test_dpt_of_transformers(tmp_path, capsys):
  description, _ = golden.load("dense/dpt", "dpt_depth_64")
  given = description["arguments"]
  head = {
    "name": "dpt_depth",
    "channels": given["fusion_hidden_size"],
    "level_channels": tuple(given["neck_hidden_sizes"]),
    "use_batch_norm": given["use_batch_norm_in_fusion_residual"],
  }
  config = recipe(tmp_path / "dpt.py", "depth", head, vit_arguments(given))
  weights, file = golden.weights(description), tmp_path / "dpt.safetensors"
  readers.write_safetensors(file, weights, {"format": "pt"})
  out, back = tmp_path / "out", tmp_path / "back.safetensors"
  assert import_weights.main([f"--config={config}", f"--from={file}", f"--to={out}"]) == 0
  said = capsys.readouterr().out
  assert f"{VIT} under dpt_depth, depth, layout transformers" in said
  assert "initialised anew: 0" in said and "unused in the checkpoint: 0" in said
  stored = load_task(out)
  photo = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  assert np.isfinite(stored.depth(photo)).all() and stored.name == "depth"
  assert export_weights.main([f"--from={out}", f"--to={back}"]) == 0
  again = readers.read_checkpoint(back).weights
  assert set(again) == set(weights)
  # What no answer reads (the coarsest residual, the last norm) is filled in.
  unread = [k for k in weights if "layers.0.residual_layer1" in k or k.startswith("dpt.layernorm")]
  for name in set(weights) - set(unread):
    np.testing.assert_array_equal(again[name], weights[name])
  arguments = [f"--config={config}", f"--from={file}", f"--to={tmp_path / 'x'}", "--num_classes=3"]
  assert import_weights.main(arguments) == 1
  assert "depth has no classes" in capsys.readouterr().err


def test_dpt_of_classes_and_other_classes(tmp_path):
  given = golden.load("dense/dpt", "dpt_depth_64")[0]["arguments"]
  head = {"name": "dpt_segmentation", "channels": 8, "level_channels": (4, 5, 6, 7)}
  backbone = create_model(VIT, num_classes=0, **vit_arguments(given))
  model = create_dense_model(backbone, 5, head={**head, "auxiliary": True})
  variables = drawn_variables(model, (64, 64))
  exported, layout = dense_checkpoints.export_dense(variables, model, VIT)
  assert layout == "transformers" and exported["head.head.4.weight"].shape[0] == 5
  file = tmp_path / "dpt.safetensors"
  readers.write_safetensors(file, exported, {})
  config = recipe(
    tmp_path / "r.py", "segmentation", {**head, "auxiliary": True}, vit_arguments(given)
  )
  base = [f"--config={config}", f"--from={file}"]
  assert import_weights.main([*base, f"--to={tmp_path / 'same'}"]) == 0
  jax.tree.map(np.testing.assert_array_equal, load_weights(tmp_path / "same")[0], variables)
  assert import_weights.main([*base, f"--to={tmp_path / 'new'}", "--num_classes=2"]) == 0
  found, metadata = load_weights(tmp_path / "new")
  assert sorted(metadata["initialised_anew"]) == [
    f"params/head/{part}classifier/{leaf}"
    for part in ("auxiliary_", "")
    for leaf in ("bias", "kernel")
  ]
  assert found["params"]["head"]["auxiliary_classifier"]["kernel"].shape[-1] == 2


def unfolded(x):
  """PyTorch's unfold of 2x2 cells, `[H, W, C]` → `[H / 2, W / 2, 4 C]`: channel by channel."""
  height, width, channels = x.shape
  cells = x.reshape(height // 2, 2, width // 2, 2, channels)
  return cells.transpose(0, 2, 4, 1, 3).reshape(height // 2, width // 2, 4 * channels)


def merged(x):
  """Swin's own order: the four cells' channels, columns of a block first."""
  return np.concatenate([x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2]], -1)


@pytest.mark.parametrize("layout", ["official", "openmmlab"])
def test_a_merging_reads_its_cells_in_the_librarys_order(layout):
  key_map = keymap_swin.LAYOUTS[layout].key_map(create_model("swin_tiny", 0))
  rng = np.random.default_rng(0)
  weight, scale = rng.normal(size=(6, 20)), rng.normal(size=20)
  x = rng.normal(size=(4, 6, 5))
  reduction = key_map("params/stage2_merging/reduction/kernel")
  norm = key_map("params/stage2_merging/norm/scale")
  theirs = (merged if layout == "official" else unfolded)(x) * scale @ weight.T
  ours = merged(x) * norm.to_ours(scale) @ reduction.to_ours(weight)
  np.testing.assert_allclose(ours, theirs, rtol=1e-12)
  np.testing.assert_array_equal(reduction.to_theirs(reduction.to_ours(weight)), weight)
  np.testing.assert_array_equal(norm.to_theirs(norm.to_ours(scale)), scale)


def test_openmmlabs_names():
  model = create_model("swin_tiny", 0, output_norms=(1, 2, 3, 4))
  key_map = keymap_swin.LAYOUTS["openmmlab"].key_map(model)
  for path, name in {
    "stem/conv/kernel": "patch_embed.projection.weight",
    "stage1_block0/attention/qkv/kernel": "stages.0.blocks.0.attn.w_msa.qkv.weight",
    "stage1_block1/attention/out/bias": "stages.0.blocks.1.attn.w_msa.proj.bias",
    "stage3_block5/fc1/kernel": "stages.2.blocks.5.ffn.layers.0.0.weight",
    "stage4_block0/fc2/bias": "stages.3.blocks.0.ffn.layers.1.bias",
    "stage4_merging/norm/scale": "stages.2.downsample.norm.weight",
    "stage2_norm/scale": "norm1.weight",
  }.items():
    assert key_map(f"params/{path}").name == name
