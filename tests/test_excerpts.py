"""Which texts are shown, and how they are marked."""

import dataclasses

from etils import epath
import made_run

from srlm_jax import diagnostics, excerpts


def test_chosen_and_rejected_are_marked_once(tmp_path: epath.Path) -> None:
  [one] = diagnostics.load_rounds(made_run.whole_run(tmp_path).made, whole=True)
  exchanges = excerpts.sampled(one, 3, None)
  assert [[answer.mark for answer in exchange.answers] for exchange in exchanges] == [["chosen", "rejected"]] * 3
  again = dataclasses.replace(
    one,
    responses=[*one.responses[:2], made_run.response("a0", 2, made_run.GOOD)],
    judgements=[*one.judgements[:2], made_run.judgement("a0", 2, 4.0)],
  )
  [exchange] = excerpts.sampled(again, 3, None)
  assert [answer.mark for answer in exchange.answers] == ["chosen", "rejected", ""]


def test_excerpts_are_spread_evenly_and_cut() -> None:
  assert excerpts.spread(range(10), 3) == [0, 3, 6]
  assert excerpts.spread([1, 2], 3) == [1, 2]
  assert excerpts.shorten("x" * (excerpts.LONGEST + 1234)).endswith("x … (1,234 more characters)")
