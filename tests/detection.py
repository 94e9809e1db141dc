"""Detectors on a network that compiles in seconds, trained on drawn scenes of 32 x 32."""

from ml_collections import ConfigDict

from tests import dense

_ROI = dict(
  neck=dict(name="fpn", channels=8, extra="max_pool", num_extra=1),
  box_head=dict(fc_channels=16),
  mask_head=dict(channels=8, num_convs=1),
  settings=dict(
    anchor_scales=(2.0,),
    rpn_samples=16,
    rpn_before=(20, 20),
    rpn_after=(16, 12),
    roi_samples=8,
    num_roi_levels=2,
    finest_scale=8.0,
    sampling_ratio=1,
    detections=5,
    candidates=20,
  ),
)
_LEVELS = dict(neck=dict(name="fpn", channels=8, extra="on_output", num_extra=1))
DETECTORS = {
  "mask_rcnn": _ROI,
  "cascade_mask_rcnn": {
    **_ROI,
    "box_head": dict(num_convs=1, conv_channels=8, fc_channels=16, norm="batch"),
  },
  "retinanet": {**_LEVELS, "head": dict(channels=8, num_convs=1)},
  "atss": {**_LEVELS, "head": dict(channels=32, num_convs=1)},
  "dino": dict(
    num_levels=3,
    head=dict(
      channels=16,
      num_queries=10,
      num_heads=2,
      encoder_layers=1,
      decoder_layers=2,
      hidden=16,
      norm_groups=4,
    ),
    settings=dict(denoising_number=4, detections=5),
  ),
  "sparse_rcnn": dict(
    neck=dict(name="fpn", channels=16),
    head=dict(
      num_proposals=8,
      num_stages=2,
      num_heads=2,
      hidden=16,
      dynamic_hidden=8,
      pool_size=3,
      finest_scale=8.0,
    ),
  ),
}
WITH_MASKS = ("mask_rcnn", "cascade_mask_rcnn")


def config(name: str) -> ConfigDict:
  """A short training of a detector."""
  values = dense.config()
  masks = name in WITH_MASKS
  values.data.transform = "decode|flip_lr|keep_largest(4)|pad_to({image_size})" + (
    "|crop_masks(8)" if masks else ""
  )
  values.data.batch_size = 8
  values.total_steps = 4
  values.evaluate_every_steps = 2
  values.log_every_steps = 1
  values.checkpoint = dict(every_steps=2, keep=9)
  values.evaluation.sets.held_out = dict(split="validation[:6]", batch_size=8)
  values.task = dict(
    name="detection",
    detector=dict(DETECTORS[name], name=name),
    max_objects=4,
    mask_size=8 if masks else 0,
    inference=dict(scale=None),
  )
  return values
