"""CLIP with Quality Captions (arXiv:2405.08911): image–text pretraining; captions are what varies.

    --config=configs/clip_quality_captions.py:datacomp12m       web captions
    --config=configs/clip_quality_captions.py:datacompdr12m     real and synthetic, two teachers
    --config=configs/clip_quality_captions.py:datacompdr1b,model=mobileclip_s2
    --config=configs/clip_quality_captions.py:one_gpu           ViT-B/16 at batch 1,024 in 16 parts
    --config=configs/clip_quality_captions.py:v5e8              the same on eight chips
    --config=configs/clip_quality_captions.py:runlocal          ten minutes on a laptop, on scenes

`model` is a published pair (`models.clip_systems.CLIP_MODELS`) or any image network of the
registry, with CLIP's text tower. The data are tars, `--config.data.source=tar:/path/{00..99}.tar`,
whose pairs have a caption "caption" and in the DR sets "syn_text" and the teachers' embeddings.

Published (apple/ml-mobileclip's scripts, the same group's): batch, iterations, AdamW with b2 0.95,
weight decay 0.2, rate 1e-3 after 1,000 steps, cosine, clipping at 1, captions a step, weights of
the losses. The paper itself was not at hand; its pretraining is recalled to be theirs. Recalled,
too: scale of the crops of plain CLIP (0.9 to 1), where the cosine ends (0). Not published: the
presets for few chips.
"""

from ml_collections import ConfigDict

from hybrid_vit import recipes
from hybrid_vit.config import parse_argument
from hybrid_vit.models.clip_systems import CLIP_MODELS

# Batch, iterations, contrastive and distillation weight, captions of a step.
DATA = {
  "datacomp12m": (8192, 30_000, 1.0, 0.0, "captions('caption')"),
  "datacompdr12m": (8192, 30_000, 0.0, 1.0, "captions('caption', 'syn_text')"),
  "datacompdr1b": (65_536, 200_000, 0.0, 1.0, "captions('caption', 'syn_text')"),
}
VARIANTS = (*DATA, "one_gpu", "v5e8", "runlocal")
# ViT-B/16 has a part of the contrastive loss on the large set; the S models have none.
WITH_CONTRASTIVE = {("datacompdr1b", "mobileclip_b"): (0.25, 0.75)}
TEXT_TOWER = "clip_vit_b16"


def get_config(argument: str | None = None) -> ConfigDict:
  """See the head of this file. Keys: `model`, `batch_size`, `steps`; `captions` for runlocal."""
  variant, keys = parse_argument(
    argument,
    VARIANTS,
    "datacompdr12m",
    runlocal_keys=("batch_size", "steps", "captions"),
    model="mobileclip_b",
    batch_size=None,
    steps=None,
    captions="exact",
  )
  if variant == "runlocal":
    return local(keys["captions"], keys["steps"] or 2000, keys["batch_size"] or 128)
  small = {"one_gpu": (1024, 100_000, 16), "v5e8": (4096, 30_000, 1)}
  data = "datacomp12m" if variant in small else variant
  config = pretraining(data, keys["model"])
  if variant in small:
    batch, steps, parts = small[variant]
    config.data.batch_size, config.total_steps, config.accumulation_steps = batch, steps, parts
    config.remat = True
  if keys["batch_size"]:
    config.data.batch_size = keys["batch_size"]
  if keys["steps"]:
    config.total_steps = keys["steps"]
  return config


def pretraining(data: str, model: str) -> ConfigDict:
  """A published row: one of `DATA`, and a pair of towers or an image network."""
  batch, steps, contrastive, distillation, captions = DATA[data]
  contrastive, distillation = WITH_CONTRASTIVE.get((data, model), (contrastive, distillation))
  system = CLIP_MODELS.get(model)
  image = system.image if system else model
  config = recipes.imagenet(image, batch_size=batch, source="tar:data/" + data, num_classes=None)
  scale, more = ((0.08, 1.0), ("randaugment(2, 9)",)) if distillation else ((0.9, 1.0), ())
  picture = recipes.train_transform(*more, scale=scale).replace("|flip_lr", "")
  config.data.transform = f"{picture}|{captions}|tokenize(77)"
  config.total_steps = steps
  config.task = dict(
    name="contrastive",
    text_tower=system.text if system else TEXT_TOWER,
    embedding_size=512,
    loss="softmax",
    max_scale=100.0,
    contrastive_weight=contrastive,
    distillation_weight=distillation,
    teacher_scale=100.0,
  )
  config.optimizer = dict(
    name="adamw",
    learning_rate=1e-3,
    b1=0.9,
    b2=0.95,
    weight_decay=0.2,
    # open_clip's: tables of positions decay, which elsewhere here they do not.
    weight_decay_rules=(
      (r"(^|/)(bias|scale|gamma|class_token|logit_scale|logit_bias)$", 0.0),
      (r".*", 1.0),
    ),
    gradient_clip_norm=1.0,
    schedule=dict(name="cosine", warmup_steps=1000, end_learning_rate=0.0),
  )
  config.evaluation = dict(
    sets=dict(
      imagenet=dict(
        source="tfds:imagenet2012",
        split="validation",
        kind="zero_shot",
        options=dict(templates="imagenet"),
      ),
      coco=dict(source="tfds:coco_captions", split="validation", kind="retrieval"),
    )
  )
  config.evaluate_every_steps = 2000
  config.checkpoint.best_metric = "imagenet/top1"
  return config


def local(captions: str, steps: int, batch_size: int) -> ConfigDict:
  """Two small towers from nothing, on scenes; zero-shot on pairs that no training scene has.

  `captions` is one of the scenes' qualities, or "noisy". Classes are asked for as the captions say
  them; the retrieval set has exact captions.
  """
  config = pretraining("datacomp12m", "tiny_moat_0")
  scenes = "scenes:size=48,objects=2"
  config.precision = "float32"
  config.model = dict(
    name="tiny_moat_0",
    arguments={**recipes.TINY_MOAT, "widths": (24, 48, 64), "strides": (2, 2, 2)},
  )
  config.task.update(
    text_arguments=dict(width=64, depth=2, num_heads=2, context_length=40), embedding_size=64
  )
  config.data.update(
    source=scenes,
    batch_size=batch_size,
    image_size=48,
    crop_ratio=1.0,
    interpolation="bilinear",
    transform=f"decode|resize(48)|captions({captions!r})|tokenize(40)",
  )
  config.total_steps = steps
  config.optimizer.update(dict(learning_rate=2e-3, weight_decay=0.1))
  config.optimizer.schedule.warmup_steps = max(1, steps // 20)
  held_out = "scenes:size=48,objects=1,combinations=held_out"
  options = dict(templates=("a {}", "a large {}", "a picture of a {}"))
  config.evaluation.sets = dict(
    held_out=dict(source=held_out, batch_size=200, options=options, transform="decode|resize(48)"),
    captions=dict(
      source=f"{scenes},count=200",
      batch_size=200,
      kind="retrieval",
      transform="decode|resize(48)|all_captions(3, 'exact')|tokenize(40)",
    ),
  )
  config.evaluate_every_steps = max(1, steps // 4)
  config.checkpoint = dict(keep=1, every_minutes=15, best_metric="held_out/top1")
  return config
