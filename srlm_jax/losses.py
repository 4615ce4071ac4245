"""Losses as functions of log-probabilities; they never see a model."""

import jax
import jax.numpy as jnp


def sft(logprobs_BT: jax.Array, mask_BT: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Mean negative log-likelihood (nats) over the target tokens of the whole batch."""
  tokens = jnp.sum(mask_BT)
  loss = -jnp.sum(logprobs_BT * mask_BT) / jnp.maximum(tokens, 1)
  return loss, {"loss": loss, "target_tokens": tokens.astype(jnp.float32)}


def dpo(
  chosen_B: jax.Array,
  rejected_B: jax.Array,
  reference_chosen_B: jax.Array,
  reference_rejected_B: jax.Array,
  beta: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Direct Preference Optimization (Rafailov et al. 2023), the sigmoid loss of the paper's §2.4.

  Args:
    chosen_B: policy log-prob of each chosen response, summed over its tokens (nats).
    rejected_B: the same for the rejected responses.
    reference_chosen_B: the reference model's log-prob of the chosen responses.
    reference_rejected_B: the same for the rejected ones.
    beta: strength of the tie to the reference model.

  Returns:
    the mean loss (log 2 where policy = reference), and metrics: rewards are β · (policy − reference) log-probs; "drift"
    is the mean of reference − policy log-probs over both responses of each pair, in nats a response: an estimate of
    KL(reference ‖ policy) as far as the pairs are samples of the reference. (They are its best and worst ones.)
  """
  chosen_reward_B = beta * (chosen_B - reference_chosen_B)
  rejected_reward_B = beta * (rejected_B - reference_rejected_B)
  margin_B = chosen_reward_B - rejected_reward_B
  loss = -jnp.mean(jax.nn.log_sigmoid(margin_B))
  return loss, {
    "loss": loss,
    "margin": jnp.mean(margin_B),
    "accuracy": jnp.mean(margin_B > 0),
    "chosen_reward": jnp.mean(chosen_reward_B),
    "rejected_reward": jnp.mean(rejected_reward_B),
    "chosen_logprob": jnp.mean(chosen_B),
    "rejected_logprob": jnp.mean(rejected_B),
    "drift": jnp.mean(reference_chosen_B - chosen_B + reference_rejected_B - rejected_B) / 2,
  }
