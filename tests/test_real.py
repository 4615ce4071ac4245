"""The whole run on real input: the Llama 2 tokenizer and real Open Assistant trees, with a small random Llama."""

import importlib.util
import json
import os
import pathlib

from etils import epath
import pytest
import tiny_model

from srlm_jax import main, mesh as mesh_lib

ROOT = pathlib.Path(__file__).parents[1]
REAL = os.environ.get("SRLM_REAL_DATA")


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="SRLM_REAL_DATA names no folder with the Open Assistant sample and the tokenizer")
def test_every_stage_runs_on_real_trees_with_the_real_tokenizer(tmp_path, monkeypatch):
  spec = importlib.util.spec_from_file_location("sample", ROOT / "configs" / "oasst_sample.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  settings = module.get_config()
  settings.data.trees = f"{REAL}/en_100_tree.jsonl"
  settings.tokenizer = f"{REAL}/llama2_tokenizer.model"
  mesh = tiny_model.one_device()
  monkeypatch.setattr(mesh_lib, "make_mesh", lambda **_: mesh)
  workdir = epath.Path(tmp_path / "run")
  main.run_steps(settings, workdir, "all")

  def facts(folder):
    return json.loads((workdir / folder / "manifest.json").read_text())["facts"]

  assert 94 <= facts("seed")["ift"] <= 99 and facts("seed")["ranked_train"] == 70
  assert facts("eft")["counts"]["judgements written"] == 235
  assert facts("aift1/prompts")["prompts"] > 0
  assert facts("aift1/pairs")["pairs"] > 0
  assert facts("m2")["steps"] > 0
  assert "Deviations" in (workdir / "report" / "report.html").read_text()
