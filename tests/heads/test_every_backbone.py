"""Every family of backbones under every head, at the size of the papers, by shapes alone."""

import functools

import jax
import jax.numpy as jnp
import pytest

from hybrid_vit.heads.dense_model import create_dense_model
from hybrid_vit.heads.registry import head_names, neck_names
from hybrid_vit.models.dense import dense_arguments
from hybrid_vit.models.registry import create_model

SIZE, BATCH, CLASSES = 512, 2, 150
# One of each family, and whatever has another kind of pyramid.
BACKBONES = (
  "tiny_moat_0", "cvt_13", "focalnet_tiny_lrf", "focalnet_tiny_iso", "smt_t", "l2vit_tiny",
  "revcol_tiny", "mci0", "vit_base_patch16_224", "vit_b16", "swin_tiny", "convnext_tiny",
  "resnet50", "pvt_tiny", "cswin_tiny",
)  # fmt: skip
DEPTH = ("adabins", "dpt_depth", "glpn", "mim_depth")
ARGUMENTS = {"dpt_depth": {"answer": "bounded"}}


@functools.cache
def backbone(name):
  model = create_model(name, num_classes=0, **dense_arguments(name, SIZE))
  images = jax.ShapeDtypeStruct((BATCH, SIZE, SIZE, 3), jnp.float32)
  shapes = jax.eval_shape(
    lambda x: model.init_with_output(jax.random.key(0), x, train=False)[0][1], images
  )
  return model, shapes


@pytest.mark.parametrize("name", BACKBONES)
def test_every_head_takes_a_step_on_it(name):
  """Each head's loss and its gradient by parameters and maps; the neck that it needs included."""
  model, shapes = backbone(name)
  for head in head_names():
    outputs = 1 if head in DEPTH else CLASSES
    dense = create_dense_model(model, outputs, head={"name": head, **ARGUMENTS.get(head, {})})
    neck = dense.neck

    def loss(maps, key, dense=dense, neck=neck):
      def run(maps):
        if neck is not None:
          variables = neck.init(key, maps)
          maps = {**maps, **neck.apply(variables, maps, True, mutable=["batch_stats"])[0]}
        rngs = {"params": key, "dropout": key}
        answer, _ = dense.head.init_with_output(rngs, maps, True)
        return jnp.sum(answer), answer

      return jax.value_and_grad(run, has_aux=True)(maps)

    wanted = {f.name: shapes[f.name] for f in model.features}
    wanted |= {k: v for k, v in shapes.items() if k.endswith("_token")}
    if neck is None and head.startswith("dpt"):
      assert len(model.features) > 1
    (value, answer), _ = jax.eval_shape(loss, wanted, jax.random.key(0))
    assert value.shape == ()
    assert answer.shape[0] == BATCH and answer.shape[-1] == outputs, (name, head)
    assert answer.dtype == jnp.float32
    # No coarser than the coarsest map, no larger than the picture.
    assert SIZE // 32 <= answer.shape[1] <= SIZE, (name, head, answer.shape)


def test_the_tables_are_whole():
  assert set(DEPTH) < set(head_names())
  assert {"fpn", "feature2pyramid", "simple_pyramid"} == set(neck_names())
