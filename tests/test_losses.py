"""Losses against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax import losses


def numpy_dpo(chosen, rejected, ref_chosen, ref_rejected, beta):
  margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
  return np.mean(np.log1p(np.exp(-margin)))


def test_dpo_starts_at_log_2():
  logprobs = jnp.array([-12.5, -3.0, -40.0])
  loss, metrics = losses.dpo(logprobs, logprobs - 5, logprobs, logprobs - 5, 0.1)
  assert loss == pytest.approx(np.log(2), abs=1e-7)
  assert metrics["margin"] == 0 and metrics["accuracy"] == 0


def test_dpo_and_its_gradient_equal_numpy():
  rng = np.random.default_rng(0)
  arrays = [rng.normal(-20, 5, 8) for _ in range(4)]
  loss, metrics = losses.dpo(*map(jnp.asarray, arrays), beta=0.3)
  assert loss == pytest.approx(numpy_dpo(*arrays, beta=0.3), rel=1e-5)
  gradient = jax.grad(lambda chosen: losses.dpo(chosen, *map(jnp.asarray, arrays[1:]), beta=0.3)[0])(
    jnp.asarray(arrays[0])
  )
  margin = 0.3 * ((arrays[0] - arrays[2]) - (arrays[1] - arrays[3]))
  np.testing.assert_allclose(gradient, -0.3 / (1 + np.exp(margin)) / 8, rtol=1e-4)
  np.testing.assert_allclose(metrics["margin"], margin.mean(), rtol=1e-4)
  np.testing.assert_allclose(metrics["accuracy"], (margin > 0).mean())
  chosen, rejected, ref_chosen, ref_rejected = arrays
  np.testing.assert_allclose(metrics["drift"], np.mean([ref_chosen - chosen, ref_rejected - rejected]), rtol=1e-4)


def test_dpo_prefers_the_chosen():
  better, _ = losses.dpo(jnp.array([-1.0]), jnp.array([-9.0]), jnp.array([-5.0]), jnp.array([-5.0]), 0.1)
  worse, _ = losses.dpo(jnp.array([-9.0]), jnp.array([-1.0]), jnp.array([-5.0]), jnp.array([-5.0]), 0.1)
  assert better < np.log(2) < worse


def test_sft_is_the_mean_over_target_tokens_of_the_whole_batch():
  logprobs = jnp.array([[-1.0, -2.0, -4.0], [-8.0, -100.0, -100.0]])
  mask = jnp.array([[True, True, False], [True, False, False]])
  loss, metrics = losses.sft(logprobs, mask)
  assert loss == pytest.approx((1 + 2 + 8) / 3)
  assert metrics["target_tokens"] == 3


def test_sft_of_a_batch_without_targets_is_zero():
  loss, _ = losses.sft(jnp.array([[-1.0]]), jnp.array([[False]]))
  assert loss == 0
