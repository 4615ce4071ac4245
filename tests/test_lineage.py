"""The tree of the models of a run."""

import dataclasses

from etils import epath
import made_run

from srlm_jax import lineage


def test_lineage_text_is_a_tree_of_models(tmp_path: epath.Path) -> None:
  run = made_run.whole_run(tmp_path)
  digest = {name: made.digest()[:12] for name, made in run.made.items()}
  assert lineage.lineage_text(lineage.models(run.made)).splitlines() == [
    f"M0 {digest['m0']} (pretrained, 1,000 documents, 20,000 tokens; 1,234 parameters)",
    f"├─ SFT baseline {digest['baseline']} (SFT, IFT 7; 1,234 parameters)",
    f"└─ M1 {digest['m1']} (SFT, IFT 7 + EFT 1,200; 1,234 parameters)",
    f"   └─ M2 {digest['m2']} (DPO, 3 pairs of AIFT1, reference M1; 1,234 parameters)",
  ]
  places = {node.name: (node.x, node.y, node.to) for node in lineage.diagram(lineage.models(run.made), {}).nodes}
  assert places["M0"][1] == places["M1"][1] == places["M2"][1] < places["SFT baseline"][1]
  assert places["M2"][2] == places["M1"][:2]


def test_what_changed_since_is_named(tmp_path: epath.Path) -> None:
  run = made_run.whole_run(tmp_path)
  run.made["seed"].commit({"ift": 7, "eval_prompts": 2})  # Other facts alone change no content.
  assert lineage.stale(run.made) == []
  run.made["seed"].write("ift.jsonl", "")
  run.made["seed"].commit({"ift": 7, "eval_prompts": 2})
  fresh = dataclasses.replace(run.made["baseline"], inputs={"seed": dataclasses.replace(run.made["seed"])})
  assert lineage.stale({"baseline": fresh}) == ["baseline was made from another seed than the one that is there now"]
