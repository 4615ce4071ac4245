"""Open Assistant's message trees: prompts with their ranked replies, for IFT and EFT.

`read_trees` takes the `*.trees.jsonl[.gz]` file of either release and keeps what the paper uses (§3.1.1): English
first turns with their direct, human-ranked replies; `oasst_split` divides them. Everything left out is counted, with
its reason. Counts are flat: for a name such as "trees", counts["trees"] equals the sum over "trees/kept" and
"trees/<reason>".
"""

from collections import Counter
from collections.abc import Iterator
import dataclasses
from typing import Annotated, Any

from etils import epath
import pydantic

from srlm_jax import lines
from srlm_jax.records import RankedReplies, Reply, SFTExample

LONGEST = 1_000_000  # Characters of a message; people's are a few thousand, and no model's context holds this.


class _Node(pydantic.BaseModel):
  """The fields that we read of a message. A foreign format: what else it holds is ignored."""

  message_id: Annotated[str, pydantic.Field(min_length=1)]
  text: str
  role: str
  parent_id: str | None = None
  lang: str | None = None
  review_result: bool | None = None
  deleted: bool | None = None
  synthetic: bool | None = None
  rank: int | None = None


class _Root(_Node):
  replies: list[_Node] | None = None


class _Line(pydantic.BaseModel):
  message_tree_id: Annotated[str, pydantic.Field(min_length=1)]
  tree_state: str | None = None
  prompt: _Root


@dataclasses.dataclass(frozen=True)
class Tree:
  """A first-turn prompt and those of its direct replies that passed the filters, best first.

  The ranks are the file's own: where a reply was left out they have a gap, and there may be none of rank 0.
  """

  id: str
  prompt: str
  replies: tuple[Reply, ...]


def prompt_key(text: str) -> str:
  """The text by which two prompts count as the same: case and white space do not matter."""
  return " ".join(text.casefold().split())


def read_trees(path: epath.PathLike, lang: str = "en") -> tuple[list[Tree], Counter[str]]:
  """Reads and filters a file of trees, line by line.

  A tree needs tree_state "ready_for_export" and whole links: no message that occurs twice or is its own ancestor, none
  whose parent is another than it stands under, a prompter's prompt, an assistant's replies. Prompt and replies need the
  language and must not be deleted, synthetic, rejected by review, empty or longer than LONGEST; replies must be ranked.
  A field that is absent or null passes the rules that forbid (deleted, synthetic, review_result false, parent_id) and
  fails the ones that require (tree_state, lang, rank).

  Args:
    path: a `.jsonl` or `.jsonl.gz` file of either release.
    lang: the language code to keep.

  Returns:
    The trees with at least one reply left, in the file's order, and the counts "trees/…" and "replies/…" (direct
    replies only; of deeper turns only the ids are read).

  Raises:
    ValueError: a damaged line or archive (with file and line), a tree that occurs twice, or a file without any tree
      that can be used.
  """
  trees: list[Tree] = []
  counts: Counter[str] = Counter()
  seen: set[str] = set()  # Messages of the trees before.
  for line, raw in _lines(epath.Path(path)):
    names = {line.prompt.message_id, *(reply.message_id for reply in line.prompt.replies or ())}
    reason = "message of another tree" if names & seen else _broken_link(line.prompt, raw["prompt"])
    seen |= names
    tree, reason = _filter(line, lang, reason, counts)
    count(counts, "trees", reason or "kept")
    if tree:
      trees.append(tree)
  if not counts["trees"]:
    raise ValueError(f"{path}: holds no trees. Give a *.trees.jsonl or *.trees.jsonl.gz file of Open Assistant.")
  if not trees:
    reasons = ", ".join(f"{key[6:]} ({number})" for key, number in counts.most_common() if key.startswith("trees/"))
    raise ValueError(
      f"{path}: none of its {counts['trees']} trees can be used: {reasons}. Needed are trees in {lang!r} of tree_state "
      "ready_for_export with ranked replies."
    )
  return trees, counts


def _lines(path: epath.Path) -> Iterator[tuple[_Line, dict[str, Any]]]:
  """Yields the lines of a file, as what we read of them and as they are."""
  seen: dict[str, int] = {}
  for number, text in lines.numbered(path):
    where = f"{path}, line {number}"
    raw = lines.parse(where, text)
    try:
      line = _Line.model_validate_json(text)
    except pydantic.ValidationError as error:
      raise ValueError(
        f"{where}: not an Open Assistant tree: {lines.fault(error, 'the line')}. Repair or remove the line, or fetch "
        "the file again; needed is a *.trees.jsonl file, not *.messages.jsonl."
      ) from error
    if line.message_tree_id in seen:
      raise ValueError(
        f"{where}: tree {line.message_tree_id} was already on line {seen[line.message_tree_id]}. Remove one of them."
      )
    seen[line.message_tree_id] = number
    yield line, raw


def _broken_link(root: _Root, raw: dict[str, Any]) -> str | None:
  """Why a tree's messages do not hang together; None where they do."""
  replies = root.replies or []
  return (
    _repeated(raw)
    or ("parent of the prompt" if root.parent_id else None)
    or ("prompt not by a prompter" if root.role != "prompter" else None)
    or ("reply not by an assistant" if any(reply.role != "assistant" for reply in replies) else None)
    or (
      "reply to another message" if any(reply.parent_id not in (None, root.message_id) for reply in replies) else None
    )
  )


def _repeated(root: dict[str, Any]) -> str | None:
  """Whether a message is in a tree twice, at any depth; in a cycle it stands below itself."""
  ancestors: list[str] = []
  seen: set[str] = set()
  todo: list[tuple[Any, int]] = [(root, 0)]
  while todo:
    node, depth = todo.pop()
    del ancestors[depth:]
    if not isinstance(node, dict):  # Deeper turns are not ours to validate.
      continue
    name = str(node.get("message_id") or f"nameless {len(seen)}")
    if name in seen:
      return "cycle" if name in ancestors else "message occurs twice"
    ancestors.append(name)
    seen.add(name)
    replies = node.get("replies")
    todo += [(reply, depth + 1) for reply in replies] if isinstance(replies, list) else []
  return None


def _filter(line: _Line, lang: str, broken: str | None, counts: Counter[str]) -> tuple[Tree | None, str | None]:
  """A tree or why it is left out; counts its replies."""
  root, replies = line.prompt, line.prompt.replies or []
  reason = "tree_state" if line.tree_state != "ready_for_export" else broken or _node_reason(root, lang)
  ranks = [reply.rank for reply in replies if reply.rank is not None]
  if not reason and not replies:
    reason = "no reply"
  if not reason and any(rank < 0 for rank in ranks):
    reason = "negative rank"
  # An order with equals in it is none that a judge could be held to.
  if not reason and len(set(ranks)) < len(ranks):
    reason = "rank given twice"
  if reason:
    for _ in replies:
      count(counts, "replies", "tree left out")
    return None, reason
  kept: dict[int, Reply] = {}  # By rank: no two are equal.
  for reply in replies:
    reply_reason = _node_reason(reply, lang)
    if reply.rank is None:
      reply_reason = reply_reason or "unranked"
    elif not reply_reason:
      kept[reply.rank] = Reply(id=reply.message_id, text=reply.text, rank=reply.rank)
    count(counts, "replies", reply_reason or "kept")
  if not kept:
    return None, "no reply left"
  return Tree(line.message_tree_id, root.text, tuple(kept[rank] for rank in sorted(kept))), None


def _node_reason(node: _Node, lang: str) -> str | None:
  """Why a message is left out, whatever its role."""
  rules = {
    "deleted": node.deleted,
    "synthetic": node.synthetic,
    "review_result": node.review_result is False,
    "lang": node.lang != lang,
    "empty text": not node.text.strip(),
    f"over {LONGEST:,} characters": len(node.text) > LONGEST,
  }
  return next((reason for reason, applies in rules.items() if applies), None)


def count(counts: Counter[str], name: str, reason: str) -> None:
  """Counts one more `name`, and what became of it."""
  counts[name] += 1
  counts[f"{name}/{reason}"] += 1


def ift_example(tree: Tree) -> SFTExample | None:
  """The prompt and its reply of rank 0; None where that reply was left out."""
  best = tree.replies[0]
  if best.rank != 0:
    return None
  return SFTExample(id=tree.id, kind="ift", prompt=tree.prompt, response=best.text)


def ranked_replies(tree: Tree) -> RankedReplies | None:
  """The prompt and its ranked replies; None where there are fewer than two."""
  if len(tree.replies) < 2:
    return None
  return RankedReplies(prompt_id=tree.id, prompt=tree.prompt, replies=tree.replies)
