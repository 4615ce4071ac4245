"""Models and tokenizers that the configuration names are opened before the first stage, and refused by setting."""

import json
import pathlib
import shutil
from typing import Any

from etils import epath
from ml_collections import config_dict
import numpy as np
import pytest
from test_convert import change, rewrite
import tiny_model

from srlm_jax import checks, config, convert, main, mesh as mesh_lib, steps


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A Hugging Face folder with a model and its tokenizer."""
  folder = tmp_path_factory.mktemp("model")
  tiny_model.words().save(epath.Path(folder / "words"))
  convert.export_hf(tiny_model.model(), folder / "hf", folder / "words")
  return folder / "hf"


@pytest.fixture
def model(made: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
  """One to damage."""
  return pathlib.Path(shutil.copytree(made, tmp_path / "hf"))


def settings(**changes: Any) -> config_dict.ConfigDict:
  c = config.base()
  c.update_from_flattened_dict({"model.max_length": 128, **changes})
  return c


def refused(files: dict[str, pathlib.Path], mesh: Any = None, **changes: Any) -> str:
  with pytest.raises(ValueError) as caught:
    paths = {key: epath.Path(path) for key, path in files.items()}
    checks.models(settings(**changes), paths, mesh or tiny_model.one_device())
  return str(caught.value)


def test_a_good_model_passes(model: pathlib.Path) -> None:
  files = {key: epath.Path(model) for key in ("base.path", "tokenizer", "prompts.path", "evaluate.judge")}
  checks.models(settings(), files, mesh_lib.make_mesh(fsdp=4, tensor=2))
  checks.models(settings(), {"tokenizer": epath.Path(model), "data.trees": epath.Path("/nowhere")}, None)
  checks.models(settings(), {"tokenizer": epath.Path("/nowhere/world/files/tokenizer.model")}, None)


@pytest.mark.parametrize("key", ["base.path", "prompts.path", "evaluate.judge"])
def test_what_is_wrong_with_a_model_is_said_with_its_setting(key: str, model: pathlib.Path) -> None:
  rewrite(model, model__norm__weight=np.ones(17, np.float32))
  assert refused({key: model}) == (
    f"config.{key}={model}: model.norm.weight has shape (17,), config.json makes it (16,): the two are of "
    "different models."
  )


def test_a_folder_without_a_tokenizer(model: pathlib.Path) -> None:
  (model / "tokenizer.model").unlink()
  assert refused({"base.path": model}).startswith(f"config.base.path={model}: no tokenizer at {model}")


@pytest.mark.parametrize("content", [b"", b"\0\1", b"{}"])
def test_a_damaged_tokenizer(content: bytes, model: pathlib.Path) -> None:
  (model / "tokenizer.model").write_bytes(content)
  assert "fetch it again" in refused({"prompts.path": model})
  assert refused({"tokenizer": model / "tokenizer.model"}).startswith("config.tokenizer=")


@pytest.mark.parametrize("size", [310, 336])
def test_a_tokenizer_of_another_size(size: int, model: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """A smaller one may be padded for; far smaller is another model's, as one with more tokens than rows."""
  tiny_model.words(size).save(epath.Path(tmp_path / "other"))
  files = {"base.path": model, "tokenizer": tmp_path / "other"}
  if size < 320:
    checks.models(settings(), {key: epath.Path(path) for key, path in files.items()}, tiny_model.one_device())
  else:
    assert f"the tokenizer has {size} tokens, the model's embedding 320 rows" in refused(files)


def test_an_embedding_with_far_more_rows_than_tokens(tmp_path: pathlib.Path) -> None:
  tiny_model.words().save(epath.Path(tmp_path / "words"))
  convert.export_hf(tiny_model.model(vocab_size=8192), tmp_path / "hf", tmp_path / "words")
  assert "the tokenizer has 320 tokens, the model's embedding 8192 rows" in refused({"base.path": tmp_path / "hf"})


def test_a_chat_template_that_is_missing(model: pathlib.Path) -> None:
  assert "the tokenizer has no chat template" in refused({"base.path": model}, chat="model")


def test_a_model_made_for_shorter_texts(model: pathlib.Path) -> None:
  found = refused({"base.path": model}, **{"model.max_length": 256})
  assert "its max_position_embeddings is 128, model.max_length=256" in found


def test_a_mesh_that_does_not_divide_the_model(model: pathlib.Path) -> None:
  found = refused({"base.path": model}, mesh_lib.make_mesh(tensor=8))
  assert found.startswith(f"config.base.path={model}: parameter ") and "does not divide into 8 pieces" in found


def test_a_run_is_refused_before_its_first_stage(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """The judge of evaluation comes last of all, and is opened first."""
  c = settings(**{"base.path": str(model), "prompts.path": str(model), "evaluate.judge": str(tmp_path / "judge")})
  for section in ("prompts.sampling", "responses.sampling", "judge.sampling", "evaluate.sampling", "analysis.sampling"):
    c.update_from_flattened_dict({f"{section}.max_new": 32})
  c.select.sampling.max_new = c.select.verdict.max_new = 32
  shutil.copytree(model, tmp_path / "judge")
  change(tmp_path / "judge", model_type="mistral")
  trees = tmp_path / "trees.jsonl"
  c.data.trees = str(trees)
  trees.write_text(json.dumps({"message_tree_id": "a"}))
  todo = [step for step in steps.plan(c, epath.Path(tmp_path / "w"), tiny_model.one_device()) if step.stage == "base"]
  assert [step.folder for step in todo] == ["m0", "writer", "judge"]
  with pytest.raises(ValueError, match=r"config\.evaluate\.judge=.*: model_type is 'mistral'|config\.json: model_type"):
    steps.check_start(c, epath.Path(tmp_path / "w"), tiny_model.one_device(), todo)
  assert not (tmp_path / "w").exists()


def test_another_tokenizer_at_the_same_path_is_another_run(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """What a stopped run has encoded is not read with other ids."""
  place, mesh = epath.Path(tmp_path / "w"), tiny_model.one_device()
  c = config.base()
  c.update_from_flattened_dict({"base.kind": "random", "base.size": "smoke", "tokenizer": str(model)})
  first = steps.artifacts_of(steps.plan(c, place, mesh), place)["m0"]
  first.check_config()
  first.begin()
  steps.artifacts_of(steps.plan(c, place, mesh), place)["m0"].check_config()
  tiny_model.words(336).save(epath.Path(model))
  with pytest.raises(ValueError, match=r"(?s)m0 was made with another configuration.*tokenizer \(SHA-256\): "):
    steps.artifacts_of(steps.plan(c, place, mesh), place)["m0"].check_config()


def test_another_runs_folder_is_refused_and_not_touched(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
  place, mesh = epath.Path(tmp_path / "w"), tiny_model.one_device()
  c = config.base()
  c.update_from_flattened_dict({"base.kind": "random", "base.size": "smoke", "tokenizer": str(model)})
  steps.artifacts_of(steps.plan(c, place, mesh), place)["m0"].begin()
  before = {path: path.stat().st_mtime_ns for path in (tmp_path / "w").rglob("*")}
  c.seed = 1
  with pytest.raises(ValueError, match=r"(?s)m0 was made with another configuration.*seed: 0 there, 1 here"):
    main.run_steps(c, place, "pairs")  # Which reads no files.
  assert {path: path.stat().st_mtime_ns for path in (tmp_path / "w").rglob("*")} == before
