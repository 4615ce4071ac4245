"""Which judgements become EFT data (paper §2.2 and §3.1.1): agreement with human ranks, then thinning.

A model has judged the human replies of `records.RankedReplies`. A judgement is kept where its scores agree with the
ranks (`accept`), part of the most common score is discarded (`thin`), and what remains is training text
(`to_examples`). Pure functions of lists; the counts have a reason for everything left out, and a name's count is the
sum over its "name/…".
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
import hashlib
from typing import Literal

from etils import epath

from srlm_jax import templates
from srlm_jax.oasst import prompt_key
from srlm_jax.records import Record, SFTExample, read_given


class Judged(Record):
  """A human reply and one sampled judgement of it."""

  prompt_id: str
  prompt: str
  reply_id: str
  reply: str
  rank: int  # Among its siblings; 0 is best.
  judgement_text: str
  score: float | None  # None where the judgement was unreadable.
  sample: int = 0  # Samples of the same index, over all replies of a prompt, form one attempt.


Attempt = list[Judged]  # One judgement of every reply of a prompt, all scores readable.


def accept(
  judged: Iterable[Judged], by: Literal["prompt", "reply"] = "prompt", ties: Literal["disagree", "agree"] = "disagree"
) -> tuple[list[Judged], Counter[str]]:
  """Keeps the judgements whose scores agree with the human ranks (paper §3.1.1; which of the rules is unstated).

  The unit is a pair of sibling replies with different ranks: it is *right* when the better-ranked reply has the higher
  score, *tied* when the scores are equal, else *wrong*. Pairs are compared within an attempt: sample i of every reply
  of the prompt.

  by="prompt": an attempt agrees when all its pairs are right. The first agreeing attempt is kept, whole.
  by="reply": a judgement agrees when more than half of the reply's pairs are right. Of each reply the first agreeing
    judgement is kept. (With two or three replies, that asks for all pairs.)
  ties="agree": a tied pair counts as right, but at least one pair must be truly right, so that a judge who gives
    everybody the same score is not agreed with.

  An attempt with an unreadable score, or one without a judgement for some reply, is passed over as a whole.

  Args:
    judged: judgements in any order; replies are grouped by `prompt_id`.
    by: the rule.
    ties: what equal scores mean.

  Returns:
    The kept judgements, prompts in the order of their first appearance, replies by rank; and the counts "prompts/…",
    "replies/…".

  Raises:
    ValueError: an unknown rule, or two judgements with the same prompt, reply and sample.
  """
  if by not in ("prompt", "reply"):
    raise ValueError(f"by={by!r} must be 'prompt' or 'reply'.")
  if ties not in ("disagree", "agree"):
    raise ValueError(f"ties={ties!r} must be 'disagree' or 'agree'.")
  prompts: dict[str, list[Judged]] = defaultdict(list)
  for one in judged:
    prompts[one.prompt_id].append(one)
  kept: list[Judged] = []
  counts: Counter[str] = Counter()
  choose = _whole_attempt if by == "prompt" else _single_replies
  for group in prompts.values():
    replies = {one.reply_id for one in group}
    attempts = _attempts(group, len(replies))
    chosen = choose(attempts, ties)
    reason = "kept" if chosen else _reason(attempts, len(replies))
    counts["prompts"] += 1
    counts[f"prompts/{reason}"] += 1
    counts["replies"] += len(replies)
    counts["replies/kept"] += len(chosen)
    # Where a prompt gives something, those of its replies that it does not give disagreed (by="reply" only).
    counts[f"replies/{'disagrees' if chosen else reason}"] += len(replies) - len(chosen)
    kept += chosen
  return kept, counts


def _attempts(group: Sequence[Judged], replies: int) -> list[Attempt]:
  """The complete, readable attempts of one prompt by sample index, each ordered by rank."""
  samples: dict[int, dict[str, Judged]] = defaultdict(dict)
  for one in group:
    if one.reply_id in samples[one.sample]:
      raise ValueError(
        f"prompt {one.prompt_id}, reply {one.reply_id}: two judgements are sample {one.sample}. Number the samples of"
        " a reply 0, 1, 2, …"
      )
    samples[one.sample][one.reply_id] = one
  attempts = []
  for _, found in sorted(samples.items()):
    if len(found) == replies and all(one.score is not None for one in found.values()):
      attempts.append(sorted(found.values(), key=lambda one: (one.rank, one.reply_id)))
  return attempts


def _pairs(one: Judged, siblings: Iterable[Judged]) -> Counter[str]:
  """How often a judgement is right, tied and wrong against its siblings; equal ranks and absent scores say nothing."""
  pairs: Counter[str] = Counter()
  for other in siblings:
    if one.rank == other.rank or one.score is None or other.score is None:
      continue
    lead = (one.score - other.score) * (other.rank - one.rank)
    pairs["right" if lead > 0 else "wrong" if lead < 0 else "tied"] += 1
  return pairs


def _whole_attempt(attempts: Iterable[Attempt], ties: str) -> Attempt:
  """The first attempt with all pairs right; [] where there is none."""
  for attempt in attempts:
    pairs = sum((_pairs(one, attempt) for one in attempt), Counter())
    if pairs["right"] and not pairs["wrong"] and (ties == "agree" or not pairs["tied"]):
      return attempt
  return []


def _single_replies(attempts: Sequence[Attempt], ties: str) -> list[Judged]:
  """Of each reply its first judgement with more than half of the pairs right, by rank."""
  found: dict[str, Judged] = {}
  for attempt in attempts:
    for one in attempt:
      pairs = _pairs(one, attempt)
      right = pairs["right"] + (pairs["tied"] if ties == "agree" else 0)
      if pairs["right"] and 2 * right > pairs.total():
        found.setdefault(one.reply_id, one)
  return sorted(found.values(), key=lambda one: (one.rank, one.reply_id))


def _reason(attempts: Sequence[Attempt], replies: int) -> str:
  """Why a prompt gives nothing."""
  if replies < 2:
    return "fewer than two replies"
  if not attempts:
    return "unreadable"
  # "tied": some attempt put nothing in the wrong order; it only failed to tell replies apart.
  wrong = [sum(_pairs(one, attempt)["wrong"] for one in attempt) for attempt in attempts]
  return "tied" if 0 in wrong else "disagrees"


def thin(examples: Sequence[Judged], max_share: float = 0.4, seed: int = 0) -> tuple[list[Judged], Counter[str]]:
  """Discards part of the most common score, so that the scores are less skewed (paper §3.1.1: part of score 4).

  Only that one score is thinned, until its share of what remains is at most `max_share`, but never below the second
  most common: then another score would be the skewed one. Which ones stay follows sha256(seed, ids).

  Args:
    examples: judgements with readable scores.
    max_share: in (0, 1]; 1 discards nothing. The paper's is unstated.
    seed: another choice for another seed.

  Returns:
    The remaining judgements in their order, and the counts "examples/kept", "examples/most common score", and
    "before: score k", "after: score k" for each score.

  Raises:
    ValueError: `max_share` out of range, or an unreadable score.
  """
  if not 0 < max_share <= 1:
    raise ValueError(f"max_share={max_share} must lie in (0, 1]. Give 1 to keep all.")
  if any(one.score is None for one in examples):
    raise ValueError("an example without a score cannot be thinned by score. Pass what `accept` kept.")
  # The commonest first; of two equally common the higher score, though then nothing is discarded.
  scores = sorted(Counter(one.score for one in examples).items(), key=lambda item: (item[1], item[0]), reverse=True)
  common, keep = scores[0] if scores else (None, 0)
  others, floor = len(examples) - keep, scores[1][1] if len(scores) > 1 else keep
  while keep > floor and keep > max_share * (others + keep):
    keep -= 1
  candidates = [index for index, one in enumerate(examples) if one.score == common]
  discarded = set(sorted(candidates, key=lambda index: _digest(examples[index], seed))[keep:])
  kept = [one for index, one in enumerate(examples) if index not in discarded]
  counts = Counter({"examples": len(examples), "examples/kept": len(kept)})
  counts["examples/most common score"] = len(discarded)
  for label, some in {"before": examples, "after": kept}.items():
    counts.update(f"{label}: score {one.score:g}" for one in some)
  return kept, counts


def _digest(one: Judged, seed: int) -> bytes:
  return hashlib.sha256("\n".join([str(seed), one.prompt_id, one.reply_id, str(one.sample)]).encode()).digest()


def to_examples(accepted: Iterable[Judged], rubric_fill: Callable[[str, str], str]) -> list[SFTExample]:
  """EFT examples: the judge prompt, filled by `rubric_fill(instruction, response)`, and the judgement (paper §2.2)."""
  return [
    SFTExample(
      id=f"{one.prompt_id}/{one.reply_id}",
      kind="eft",
      prompt=rubric_fill(one.prompt, one.reply),
      response=one.judgement_text,
    )
    for one in accepted
  ]


def annotated(
  path: epath.PathLike, rubric: templates.Rubric, heldout: Iterable[str] = ()
) -> tuple[list[SFTExample], Counter[str]]:
  """The judgements that annotators wrote and M1 can learn to judge from (`eft.writer="annotators"`).

  Args:
    path: of their file of SFTExample: a judge prompt, and a judgement that ends in a score.
    rubric: by which M1 will judge, and its judgements be read.
    heldout: prompts that models are measured by: a judgement of an answer to one, in this rubric's words, is left out.

  Returns:
    The judgements, and the counts "judgements/kept" and "judgements/<reason>", whose sum is "judgements".

  Raises:
    ValueError: a file that cannot be read (`records.read_given`), or of which nothing is left.
  """
  opening, _, _ = rubric.text.partition("{response}")
  measured: tuple[str, ...] = ()
  if "{instruction}" in opening:  # Else a prompt does not show what it is about before the response.
    measured = tuple(templates.fill(opening, {"instruction": text}) for text in heldout)
  kept: list[SFTExample] = []
  counts: Counter[str] = Counter()
  for one in read_given(path, SFTExample):
    _, reason = templates.parse_score(one.response, rubric.low, rubric.high)
    if one.kind != "eft":
      reason = "kind is not eft"
    elif not reason and one.prompt.startswith(measured):
      reason = "prompt held out"
    if not reason:
      kept.append(one)
    counts["judgements"] += 1
    counts[f"judgements/{reason or 'kept'}"] += 1
  if not kept:
    reasons = ", ".join(f"{key.partition('/')[2]} ({number})" for key, number in counts.items() if "/" in key)
    raise ValueError(
      f"{path}: none of its {counts['judgements']} judgements can be learned from: {reasons}. Needed are lines of kind "
      f'"eft" whose response ends in a line such as "Score: {rubric.high:g}", from {rubric.low:g} to {rubric.high:g}.'
    )
  return kept, counts


def no_overlap(train: Iterable[str], heldout: Iterable[str]) -> None:
  """ValueError, naming a prompt, where a text of `train` is also in `heldout`, but for case and white space."""
  seen = {prompt_key(prompt) for prompt in train}
  shared = [prompt for prompt in heldout if prompt_key(prompt) in seen]
  if shared:
    raise ValueError(
      f"{len(shared)} held-out prompt(s) are also trained on, the first {shared[0][:200]!r}. Divide the trees by"
      " oasst_split.split, or remove these prompts from one side."
    )
