"""The demo's measures can fail."""

import numpy as np
import pytest

from var_jax import demo


def digits(rng, count):
  return rng.integers(0, 256, (count, 32, 32, 3)).astype(np.uint8)


def test_copies_of_the_training_images_are_not_novel():
  rng = np.random.default_rng(0)
  train, held_out = digits(rng, 60), digits(rng, 30)
  assert demo.novelty(train[:20], held_out, train) == 0.0
  assert demo.novelty(held_out, held_out, train) == 1.0


def test_one_image_over_and_over_is_not_diverse():
  rng = np.random.default_rng(0)
  real, labels = digits(rng, 60), np.repeat([0, 1], 30)
  same = np.repeat(real[[0, 30]], 10, axis=0)
  drawn = np.repeat([0, 1], 10)
  assert demo.diversity(same, drawn, real, labels) == 0.0
  others = np.concatenate([real[:10], real[30:40]])
  assert demo.diversity(others, drawn, real, labels) == 1.0


def test_a_measure_that_misses_its_bound_is_named(capsys):
  metrics = {name: bound for name, (bound, _) in demo.BOUNDS.items()}
  metrics["seconds"] = 1.0
  assert demo._print_metrics(metrics) == []
  metrics |= {"novelty": 0.79, "token_copies": 0.03}
  assert demo._print_metrics(metrics) == ["novelty", "token_copies"]
  assert capsys.readouterr().out.count("MISSED") == 2


def test_features_bring_a_digit_back_to_its_scanned_values():
  """32 px digits, averaged in cells of 4, are close to the 8x8 scan."""
  from sklearn.datasets import load_digits

  from var_jax.data import sources

  source = sources.open_source("digits", "val")
  pixels = np.stack([source[i]["image"] for i in range(40)])
  features = demo._features(pixels)
  scans = load_digits().data
  nearest = [np.abs(scans - feature).mean(axis=1).min() for feature in features]
  assert features.shape == (40, 64)
  assert max(nearest) < 1.5  # of 16 grey levels; bicubic is not exact


@pytest.mark.parametrize("config", [demo.tokenizer_config, demo.var_config])
def test_configs_name_the_digits_and_count_in_steps(config):
  assert config().data.source == "digits"
  assert config().steps > 0
