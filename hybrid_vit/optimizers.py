"""Optimizers and schedules, told by regex which parameters they concern.

Every list of rules is of pairs (regex, value), matched with `re.search` against a parameter's path
("stage3/block0/attention/query/kernel"); the first match wins. Each parameter must be covered and
each rule must match, since a rule that silently matches nothing is the usual way for a recipe to
be wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hybrid_vit.config import Config, ConfigError
from hybrid_vit.models.depth import layer_depths
from hybrid_vit.sharding import path_name

Schedule = Callable[[Any], Any]

OPTIMIZERS = ("adamw", "lamb", "sgd")
SCHEDULES = ("cosine", "linear", "polynomial", "power", "steps", "constant")

# Biases, scales of norms and of layers, class tokens and position tables are vectors or lookups:
# decaying them helps nobody.
DEFAULT_WEIGHT_DECAY_RULES = (
  (
    r"(^|/)(bias|scale|gamma|class_token|distillation_token|position_[a-z]+\d*"
    r"|logit_scale|logit_bias)$",
    0.0,
  ),
  (r".*", 1.0),
)


def match_rules(
  params: Any, rules: Sequence[tuple[str, Any]], *, field: str, must_match: bool = True
) -> Any:
  """A tree like `params` that holds, for each parameter, the value of the first rule that matches.

  Raises:
    ValueError: a parameter that no rule covers, or a rule that matches no parameter.
  """
  used: set[str] = set()

  def value(path: Sequence[Any], _: Any) -> Any:
    name = path_name(path)
    for regex, result in rules:
      if re.search(regex, name):
        used.add(regex)
        return result
    raise ValueError(f"{field}: no rule covers parameter {name!r}; end the list with ('.*', ...)")

  tree = jax.tree_util.tree_map_with_path(value, params)
  unused = [regex for regex, _ in rules if regex not in used and regex != ".*"]
  if unused and must_match:
    example = path_name(jax.tree_util.tree_leaves_with_path(params)[0][0])
    raise ValueError(
      f"{field}: rule {unused[0]!r} matches no parameter (they are named like {example!r})"
    )
  return tree


def make_schedule(
  name: str,
  *,
  peak: float,
  total_steps: int,
  warmup_steps: int = 0,
  warmup_start: float = 0.0,
  end: float = 0.0,
  power: float = 1.0,
  warmup_power: float = 1.0,
  drops: Sequence[int] = (),
  drop_factor: float = 0.1,
) -> Schedule:
  """Learning rate as a function of the step.

  A warm-up from `warmup_start` to `peak` over `warmup_steps`, with the `warmup_power` of its part
  done, then to `end` at `total_steps`: cosine, linear, "polynomial" (mmsegmentation's poly, with
  the `power` of the part left) or "power" (with that of the part done, as GLPN and
  MIM-Depth-Estimation have it); by "steps", `drop_factor` times lower from each step of `drops` on;
  or constant at `peak`. The first step of a warm-up from 0 has rate peak/warmup_steps, not 0, so
  that no step is lost.

  Raises:
    ValueError: unknown name, or a warm-up that is not shorter than the training.
  """
  if name not in SCHEDULES:
    raise ValueError(f"schedule {name!r} is not one of {', '.join(SCHEDULES)}")
  if warmup_steps and warmup_steps >= total_steps:
    raise ValueError(
      f"a warm-up of {warmup_steps} steps leaves nothing of a training of {total_steps} steps: "
      "shorten config.optimizer.schedule.warmup_epochs (or warmup_steps)"
    )

  def schedule(step: Any) -> Any:
    step = jnp.asarray(step, jnp.float32)
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    progress = jnp.clip(progress, 0.0, 1.0)
    if name == "cosine":
      rate = end + (peak - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    elif name == "linear":
      rate = peak + (end - peak) * progress
    elif name == "polynomial":
      rate = end + (peak - end) * (1.0 - progress) ** power
    elif name == "power":
      rate = peak + (end - peak) * progress**power
    elif name == "steps":
      passed = sum((jnp.float32(step >= drop) for drop in drops), start=jnp.zeros(()))
      rate = peak * drop_factor**passed
    else:
      rate = jnp.full_like(progress, peak)
    if warmup_steps:
      # Phases may lay their steps between whole ones: the last would overshoot.
      fraction = jnp.minimum((step + 1.0) / warmup_steps, 1.0)
      risen = fraction if warmup_power == 1.0 else fraction**warmup_power
      warm = warmup_start + (peak - warmup_start) * risen
      rate = jnp.where(step < warmup_steps, warm, rate)
    return rate

  return schedule


def schedule_from_config(
  config: Config,
  *,
  batch_size: int,
  total_steps: int,
  steps_per_epoch: float,
  warmup_share: float | None = None,
) -> Schedule:
  """`config.optimizer` → schedule; with `learning_rate_batch_size` the rate is scaled linearly.

  `schedule.end_learning_rate` and `schedule.warmup_start_learning_rate` are rates as they stand;
  `schedule.end_learning_rate_factor` and `schedule.warmup_start_factor` are parts of the peak, and
  so follow the batch as it does. `warmup_share`, of all steps, takes the place of the warm-up that
  the configuration says. "steps" has `drop_epochs` or `drop_steps`, rising, and `drop_factor`.

  Raises:
    ConfigError: a field of another type or out of range, or a rate given in both ways.
  """
  reference = config.integer("learning_rate_batch_size", None, minimum=1)
  rate = config.number("learning_rate", minimum=0.0) * (batch_size / reference if reference else 1)
  fields = config.group("schedule")
  warmup_steps = fields.integer("warmup_steps", None, minimum=0)
  if warmup_steps is None:
    warmup_steps = round(fields.number("warmup_epochs", 0.0, minimum=0.0) * steps_per_epoch)
  if warmup_share is not None:
    warmup_steps = round(warmup_share * total_steps)
  name = fields.choice("name", SCHEDULES, "cosine")
  # A constant schedule has no end; reading the field there would hide that it is not used.
  end = start = 0.0
  drops: dict[str, Any] = {}
  if name == "steps":
    drops = {"drops": _drops(fields, steps_per_epoch)}
    drops["drop_factor"] = fields.number("drop_factor", 0.1, above=0.0)
  elif name != "constant":
    end = _rate_or_factor(fields, "end_learning_rate", "end_learning_rate_factor", rate)
  if warmup_steps:
    start = _rate_or_factor(fields, "warmup_start_learning_rate", "warmup_start_factor", rate)
  return make_schedule(
    name,
    peak=rate,
    total_steps=total_steps,
    warmup_steps=warmup_steps,
    warmup_start=start,
    end=end,
    power=fields.number("power", 1.0, above=0.0) if name in ("polynomial", "power") else 1.0,
    warmup_power=fields.number("warmup_power", 1.0, above=0.0) if warmup_steps else 1.0,
    **drops,
  )


def _drops(fields: Config, steps_per_epoch: float) -> tuple[int, ...]:
  """The steps at which the rate of a schedule by "steps" falls."""
  given = [name for name in ("drop_epochs", "drop_steps") if name in fields]
  if len(given) != 1:
    raise ConfigError(
      "`config.optimizer.schedule` is by 'steps': `drop_epochs` or `drop_steps` were expected, one "
      f"of them; there are {' and '.join(given) or 'none'}"
    )
  values = tuple(fields.typed(given[0], tuple))
  numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and v > 0 for v in values)
  if not numbers or list(values) != sorted(set(values)):
    raise ConfigError(
      f"`config.optimizer.schedule.{given[0]}` is {values!r}; rising numbers above 0 were expected"
    )
  return tuple(round(v * (steps_per_epoch if given[0] == "drop_epochs" else 1)) for v in values)


def _rate_or_factor(fields: Config, rate: str, factor: str, peak: float) -> float:
  if rate in fields and factor in fields:
    both = " and ".join(
      f"`config.optimizer.schedule.{name}` is {fields.get(name)!r}" for name in (rate, factor)
    )
    raise ConfigError(f"{both}: give one of them, a rate or a part of the peak")
  if factor in fields:
    return peak * fields.number(factor, minimum=0.0)
  return fields.number(rate, 0.0, minimum=0.0)


def make_optimizer(config: Config, params: Any, schedule: Schedule) -> optax.GradientTransformation:
  """`config.optimizer` → an optax chain.

  Order: clip the global norm, precondition (Adam, LAMB) or accumulate momentum (SGD), decoupled
  weight decay (for SGD coupled, before the momentum, as torch does), trust ratio (LAMB; only where
  the rules of weight decay give a factor that is not 0, the others take Adam's step), then the
  learning rate times each parameter's own factor. Frozen parameters have no optimizer state.

  Args:
    config: fields `name`, `b1`, `b2`, `eps` (AdamW, LAMB), `momentum`, `nesterov` (SGD),
      `weight_decay`, `weight_decay_rules`, `gradient_clip_norm`, `freeze` (regexes),
      `learning_rate_rules` (regex, factor), `layer_decay` (`rate`, `layers`: regex, depth; where
      they are left out, by the depth of the network's blocks).
    params: parameters or their `jax.ShapeDtypeStruct`.
    schedule: learning rate by step.

  Raises:
    ConfigError: a field of another type or out of range.
    ValueError: a parameter that rules do not cover, or a rule that matches none.
  """
  name = config.choice("name", OPTIMIZERS)
  weight_decay = config.number("weight_decay", 0.0, minimum=0.0)
  factors_of_decay = None
  if weight_decay or name == "lamb":
    factors_of_decay = _decay_factors(config, params)
  decay = [_decay_transform(weight_decay, factors_of_decay)] if weight_decay else []
  if name == "sgd":
    core = [
      *decay,
      optax.trace(
        decay=_below_one(config, "momentum", 0.9), nesterov=config.flag("nesterov", False)
      ),
    ]
  else:
    adam = optax.scale_by_adam(
      b1=_below_one(config, "b1", 0.9),
      b2=_below_one(config, "b2", 0.999),
      eps=config.number("eps", 1e-8 if name == "adamw" else 1e-6, minimum=0.0),
    )
    core = [adam, *decay]
    if name == "lamb":
      core.append(_trust_ratio(factors_of_decay))

  factors = learning_rate_factors(config, params)
  if factors is not None:
    core.append(_scale_by_tree(factors))
  core.append(optax.scale_by_learning_rate(schedule))
  optimizer = optax.chain(*core)

  frozen = frozen_parameters(config, params)
  if frozen is not None:
    labels = jax.tree.map(lambda is_frozen: "frozen" if is_frozen else "trained", frozen)
    optimizer = optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)
  clip_norm = config.number("gradient_clip_norm", None, minimum=0.0)
  if clip_norm:
    # Before the partition, so that a frozen part's gradient, zeroed here, does not count.
    clip: list[optax.GradientTransformation] = []
    if frozen is not None:
      clip.append(_scale_by_tree(jax.tree.map(lambda is_frozen: 0.0 if is_frozen else 1.0, frozen)))
    optimizer = optax.chain(*clip, optax.clip_by_global_norm(clip_norm), optimizer)
  return optimizer


def _below_one(config: Config, name: str, default: float) -> float:
  value = config.number(name, default, minimum=0.0)
  if value >= 1.0:
    raise ConfigError(f"`config.optimizer.{name}` is {value}; a number below 1 was expected")
  return value


def _rules(config: Config, name: str, field: str) -> tuple[tuple[str, float], ...] | None:
  """A list of pairs (regex, number); None where it is absent or empty."""
  rules = config.typed(name, tuple, None)
  for rule in rules or ():
    is_pair = isinstance(rule, tuple | list) and len(rule) == 2 and isinstance(rule[0], str)
    if not is_pair or isinstance(rule[1], bool) or not isinstance(rule[1], int | float):
      raise ConfigError(
        f"`{field}` holds {rule!r}; pairs (regex, number) were expected, e.g. (('bias$', 0.0), "
        "('.*', 1.0))"
      )
    _check_regex(rule[0], field)
  return tuple((regex, value) for regex, value in rules) if rules else None


def _check_regex(regex: str, field: str) -> None:
  try:
    re.compile(regex)
  except re.error as error:
    raise ConfigError(
      f"`{field}` holds {regex!r}, which is no regular expression: {error}"
    ) from None


def _decay_factors(config: Config, params: Any) -> Any:
  """Each parameter's factor of the weight decay."""
  field = "config.optimizer.weight_decay_rules"
  rules = _rules(config, "weight_decay_rules", field)
  # Our own default serves every network; rules somebody wrote must each match something.
  return match_rules(
    params, rules or DEFAULT_WEIGHT_DECAY_RULES, field=field, must_match=rules is not None
  )


def _trust_ratio(factors_of_decay: Any) -> optax.GradientTransformation:
  ratio = optax.scale_by_trust_ratio()

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    scaled, state = ratio.update(updates, state, params)
    chosen = jax.tree.map(
      lambda u, s, f: s if f else u,
      updates,
      scaled,
      _like(updates, factors_of_decay),
      is_leaf=_is_masked,
    )
    return chosen, state

  return optax.GradientTransformation(ratio.init, update)


def _decay_transform(weight_decay: float, factors: Any) -> optax.GradientTransformation:
  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    if params is None:
      raise ValueError("weight decay needs the parameters: optimizer.update(grads, state, params)")
    updates = jax.tree.map(
      lambda u, p, f: (
        u if f == 0.0 or isinstance(u, optax.MaskedNode) else u + weight_decay * f * p
      ),
      updates,
      params,
      _like(updates, factors),
      is_leaf=_is_masked,
    )
    return updates, state

  return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def _scale_by_tree(factors: Any) -> optax.GradientTransformation:
  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    del params
    scaled = jax.tree.map(
      lambda u, f: u if isinstance(u, optax.MaskedNode) else u * f,
      updates,
      _like(updates, factors),
      is_leaf=_is_masked,
    )
    return scaled, state

  return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def _is_masked(node: Any) -> bool:
  return isinstance(node, optax.MaskedNode)


def _like(updates: Any, factors: Any) -> Any:
  """`factors` in the very containers of `updates` (a partition masks leaves it does not own)."""
  return jax.tree.unflatten(
    jax.tree.structure(updates, is_leaf=_is_masked), jax.tree.leaves(factors)
  )


def frozen_parameters(config: Config, params: Any) -> Any:
  """A tree of booleans, or None where `config.optimizer.freeze` names nothing."""
  regexes = config.typed("freeze", tuple, ())
  if not regexes:
    return None
  for regex in regexes:
    if not isinstance(regex, str):
      raise ConfigError(f"`config.optimizer.freeze` holds {regex!r}; regexes were expected")
    _check_regex(regex, "config.optimizer.freeze")
  rules = [(regex, True) for regex in regexes] + [(".*", False)]
  return match_rules(params, rules, field="config.optimizer.freeze")


def learning_rate_factors(config: Config, params: Any) -> Any:
  """Each parameter's factor of the learning rate, or None where all are 1.

  `layer_decay=dict(rate=0.8)` gives a parameter of depth d the factor rate^(deepest - d), by
  `models.depth.layer_depths`, or by rules: `layers=(("^stem", 0), …, ("^head", 5))`.
  """
  factors = None
  if "layer_decay" in config:
    layer_decay, field = config.group("layer_decay"), "config.optimizer.layer_decay.layers"
    rate = layer_decay.number("rate", above=0.0)
    layers = _rules(layer_decay, "layers", field)
    if layers is None:
      names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
      of_name = layer_depths(names)
      depths = jax.tree_util.tree_map_with_path(lambda path, _: of_name[path_name(path)], params)
    else:
      depths = match_rules(params, layers, field=field)
    deepest = max(jax.tree.leaves(depths) if layers is None else [depth for _, depth in layers])
    factors = jax.tree.map(lambda depth: rate ** (deepest - depth), depths)
  field = "config.optimizer.learning_rate_rules"
  rules = _rules(config, "learning_rate_rules", field)
  if rules:
    own = match_rules(params, rules, field=field)
    factors = own if factors is None else jax.tree.map(lambda a, b: a * b, factors, own)
  return factors
