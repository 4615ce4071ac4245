"""The health of a training: what is a spike and what is not, what is said once, and what the report shows."""

from typing import Any

import numpy as np
import pytest

from srlm_jax import health, tables

LIMITS = health.Limits(window=50, spike=8.0, margin=10.0, drift=50.0)


def rows(losses: list[float | None], **more: list[float]) -> list[dict[str, Any]]:
  return [
    {
      "step": place + 1,
      "loss": loss,
      "skipped": float(loss is None),
      **{name: one[place] for name, one in more.items()},
    }
    for place, loss in enumerate(losses)
  ]


def usual(count: int) -> list[float]:
  """Losses that fall, with the noise of batches."""
  rng = np.random.default_rng(0)
  return [2 + 3 * 0.97**place + float(rng.normal(0, 0.1)) for place in range(count)]


def test_a_usual_training_has_no_spikes() -> None:
  for losses in (usual(500), usual(500)[::-1][:60], [0.7] * 100, [0.0] * 100):
    observer, said = health.observe(rows(losses), LIMITS)
    assert not observer.spikes and not said
  assert observer.facts() == {"steps": 100, "skipped": 0, "spikes": 0}


def test_a_spike_is_found_and_its_kind_said_once() -> None:
  losses = usual(300)
  losses[200] += 3
  losses[250] += 6
  observer, said = health.observe(rows(losses), LIMITS)
  assert list(observer.spikes) == [201, 251] and len(said) == 1
  assert "the loss of step 201 is" in said[0]
  found = observer.facts()
  assert found["spikes"] == 2 and found["worst spike"]["step"] == 251 and found["worst spike"]["height"] > 20


def test_a_spike_needs_losses_to_compare_with() -> None:
  assert not health.observe(rows([*usual(health.SEEN - 1), 9.0]), LIMITS)[0].spikes
  assert health.observe(rows([*usual(health.SEEN)[::-1], 9.0]), LIMITS)[0].spikes


def test_the_window_forgets() -> None:
  losses = [1.0] * 100 + [5.0] * 100  # Another level is a spike until most of the window is at it.
  found = list(health.observe(rows(losses), LIMITS)[0].spikes)
  assert found == list(range(101, 101 + LIMITS.window // 2))


def test_skipped_steps_are_counted_and_compare_with_nothing() -> None:
  losses: list[float | None] = [*usual(60)]
  losses[30] = losses[40] = None
  observer, said = health.observe(rows(losses), LIMITS)
  assert observer.skipped == [31, 41] and not observer.spikes and not said
  assert observer.facts()["skipped"] == 2


@pytest.mark.parametrize(
  ("name", "limit", "words"), [("margin", 10, "margin has grown to"), ("drift", 50, "less likely")]
)
def test_growth_of_margin_and_drift_is_said_once(name: str, limit: float, words: str) -> None:
  grown = [limit * place / 50 for place in range(100)]
  observer, said = health.observe(rows([0.5] * 100, **{name: grown}), LIMITS)
  assert len(said) == 1 and words in said[0]
  assert observer.facts()[name] == {"step": 100, "highest": pytest.approx(limit * 94.5 / 50)}
  one = [limit * 5 if place == 50 else 0.0 for place in range(100)]
  assert not health.observe(rows([0.5] * 100, **{name: one}), LIMITS)[1]  # One batch says little.
  never = health.Limits(margin=float("inf"), drift=float("inf"))
  assert not health.observe(rows([0.5] * 100, **{name: grown}), never)[1]


def test_the_table_has_a_row_for_each_training() -> None:
  losses: list[float | None] = [*usual(100)]
  losses[10], losses[90] = None, 20.0
  plain = health.observe(rows(losses), LIMITS)[0]
  tuned = health.observe(rows([0.5] * 20, margin=[0.25] * 20, drift=[1.5] * 20), LIMITS)[0]
  table = health.table({"M1": plain, "M2": tuned}, LIMITS)
  shown = [[cell.text for cell in row] for row in table.rows]
  assert shown[0][:4] == ["M1", "100", "1", "1"] and shown[0][4].endswith("(step 91)")
  assert shown[1] == ["M2", "20", "0", "0", tables.MISSING, "0.250 (step 10)", "1.50 (step 10)"]
