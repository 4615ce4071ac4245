"""Rollouts from a server: a loopback one answers as vLLM does, what it says arrives, and what goes wrong is said."""

from collections.abc import Callable, Iterator
import importlib.util
import logging
import re
import socket
import threading
import time
import traceback
from typing import Any

from etils import epath
from loopback import Loopback, Reply
import pytest
import tiny_model

from srlm_jax import (
  artifacts,
  config,
  generator,
  mesh as mesh_lib,
  modelstore,
  records,
  rollout,
  sampling,
  server,
  steps,
  templates,
)
from srlm_jax.stages import judge as judge_stage, responses as responses_stage

WORDS = tiny_model.words()
EOS = WORDS.eos_id
HOW = sampling.Sampling(temperature=0.7, top_p=0.9, max_new=12)
Script = Callable[[tuple[int, ...], int, dict[str, Any]], list[int]]  # (prompt, sample, body) → ids, uncut.


def vllm(body: dict[str, Any], script: Script, ids: bool = True) -> Reply:
  """What vLLM answers: its ids have the end token, its text has not."""
  choices = []
  for index in range(body["n"]):
    drawn = script(tuple(body["prompt"]), index, body)[: body["max_tokens"]]
    ended = drawn[-1] == EOS
    before, whole = (WORDS.decode(tokens) for tokens in (body["prompt"], [*body["prompt"], *drawn]))
    text = whole[len(before) :]
    choice = {"index": index, "text": text, "logprobs": None, "finish_reason": "stop" if ended else "length"}
    choice |= {"stop_reason": None, "prompt_logprobs": None}
    choice |= {"token_ids": drawn, "prompt_token_ids": body["prompt"]} if ids else {}
    choices.append(choice)
  usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 0, "total_tokens": 0}
  return (
    200,
    {},
    {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": choices, "usage": usage},
  )


def owls(prompt: tuple[int, ...], sample: int, body: dict[str, Any]) -> list[int]:
  return [*WORDS.encode(" ".join(["owl"] * (sample + 1))), EOS]


Serve = Callable[..., Loopback]


@pytest.fixture
def serve() -> Iterator[Serve]:
  """Starts loopback servers."""
  started: list[Loopback] = []

  def start(*arguments: Any, **more: Any) -> Loopback:
    started.append(Loopback(*arguments, **more))
    return started[-1]

  yield start
  for one in started:
    one.shutdown()
    one.server_close()


def service(url: str, **changes: Any) -> server.Service:
  return server.Service(**{"url": url, "model": "", "concurrency": 4, "retries": 2, "timeout": 10.0, **changes})


def engine(loopback: Loopback, how: sampling.Sampling = HOW, **changes: Any) -> server.Server:
  return server.connect(service(loopback.url, **changes), "m1", WORDS, 320, 0)(how, 64)


def request(name: str = "answer p", samples: int = 2, longest: tuple[int, ...] | None = None) -> generator.Request:
  return generator.Request(name, (WORDS.bos_id, *WORDS.encode(name)), samples, longest)


def asked(found: server.Server, *requests: generator.Request) -> dict[str, list[generator.Completion]]:
  return {one.name: completions for one, completions in found.generate(requests)}


def test_the_model_s_own_texts_arrive(serve: Serve) -> None:
  """The server runs the same code on the same weights, drawn by the seed that it is sent."""
  weights, lock = tiny_model.model(3), threading.Lock()

  def drawn(body: dict[str, Any]) -> list[generator.Completion]:
    how = sampling.Sampling(body["temperature"], body["top_p"], body["max_tokens"])
    with lock:
      engine = tiny_model.speaker(weights, seed=body["seed"]).generator(how)
      ((_, found),) = engine.generate([generator.Request("any", tuple(body["prompt"]), body["n"])])
    return found

  loopback = serve(lambda body: vllm(body, lambda prompt, sample, body: list(drawn(body)[sample].tokens)))
  requests, longer = [request(f"answer p{number}", 3) for number in range(4)], sampling.Sampling(1.0, 1.0, 60)
  found = asked(engine(loopback, longer), *requests)
  sent = {tuple(body["prompt"]): body for body, _ in loopback.asked}
  assert set(sent) == {one.tokens for one in requests}  # The ids themselves, and no text.
  for one in requests:
    assert found[one.name] == drawn(sent[one.tokens])
  assert {text.finished for texts in found.values() for text in texts} == {True, False}
  assert len({body["seed"] for body in sent.values()}) == 4 and asked(engine(loopback, longer), *requests) == found
  wanted = {"model": "m1", "n": 3, "temperature": 1.0, "top_p": 1.0, "max_tokens": 60, "return_token_ids": True}
  wanted |= {"stop_token_ids": [EOS], "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
  assert wanted.items() <= sent[requests[0].tokens].items()


def test_without_ids_the_text_is_encoded_and_that_is_said_once(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
  loopback = serve(lambda body: vllm(body, owls, ids=False))
  make = server.connect(service(loopback.url), "m1", WORDS, 320, 0)
  for name in ("a", "b"):  # Each shard has an engine of its own.
    found = asked(make(HOW, 64), request(name, 3))[name]
  said = [tuple(owls((), sample, {})) for sample in range(3)]
  assert found == [generator.Completion(ids, True) for ids in said]  # Their first space is the tokenizer's own.
  warnings = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
  assert len(warnings) == 1 and "gave 3 of 3 texts without token ids" in warnings[0]
  assert make(HOW, 64).counts == {"texts": 6, "without_ids": 6}


def test_each_sample_has_its_own_limit(serve: Serve) -> None:
  loopback = serve(lambda body: vllm(body, lambda prompt, sample, body: [5, 6, 7, 8, EOS]))
  found = asked(engine(loopback), request("a", 4, longest=(2, 5, 4, 100)))["a"]
  assert [one.tokens for one in found] == [(5, 6), (5, 6, 7, 8, EOS), (5, 6, 7, 8), (5, 6, 7, 8, EOS)]
  assert [one.finished for one in found] == [False, True, False, True]
  assert loopback.asked[0][0]["max_tokens"] == 12  # max_new holds for the last one.


def test_the_greedy_text_is_asked_for_once(serve: Serve) -> None:
  loopback = serve(lambda body: vllm(body, owls))
  found = asked(engine(loopback, sampling.Sampling(0.0, 1.0, 12)), request("a", 3))["a"]
  assert loopback.asked[0][0]["n"] == 1 and len(found) == 3 and len(set(found)) == 1


@pytest.mark.parametrize("ids", [True, False])
def test_a_stop_string_ends_a_text_with_the_token_that_completes_it(serve: Serve, ids: bool) -> None:
  """As `generator` has it; what vLLM drew behind it in the same step goes."""
  said = [WORDS.encode("owl. Score: 4. A fox."), [*WORDS.encode("owl"), EOS], WORDS.encode(" ".join(["owl"] * 20))]

  def reply(body: dict[str, Any]) -> Reply:
    assert (body["stop"], body["include_stop_str_in_output"]) == (["4.", "?"], True)
    status, headers, answer = vllm(body, lambda prompt, sample, body: said[sample], ids)
    answer["choices"][0] |= {"finish_reason": "stop", "stop_reason": "4."}
    return status, headers, answer

  how = sampling.Sampling(1.0, 1.0, 12, ("4.", "?"))
  said[0] = said[0][:12]
  first, second, third = asked(engine(serve(reply), how), request("a", 3))["a"]
  assert WORDS.decode(first.tokens).strip() == "owl. Score: 4." and first.finished and EOS not in first.tokens
  assert (second.tokens, second.finished) == (tuple(said[1]), True)
  assert (third.tokens, third.finished) == (tuple(said[2][:12]), False)


@pytest.mark.parametrize(("finish", "stop_reason"), [("stop", None), ("stop", EOS), ("length", None)])
def test_a_finished_text_has_one_end_token(serve: Serve, finish: str, stop_reason: int | None) -> None:
  """Left out of the ids, or there, also where an older vLLM calls it the length."""

  def reply(body: dict[str, Any]) -> Reply:
    status, headers, answer = vllm(body, lambda *_: [5, 6, EOS])
    there = answer["choices"][0] | {"finish_reason": finish, "stop_reason": stop_reason}
    out = there | {"index": 1, "token_ids": [5, 6], "finish_reason": "stop"}
    return status, headers, answer | {"choices": [out, there]}  # In any order.

  found = asked(engine(serve(reply)), request())["answer p"]
  assert found == [generator.Completion((5, 6, EOS), True)] * 2


def failing(*first: Reply) -> Callable[[dict[str, Any]], Reply]:
  """Replies these, then as it should; the last one for ever where it is an error that stays."""
  left = list(first)
  return lambda body: left.pop(0) if left else vllm(body, owls)


SOON = {"Retry-After": "0.01"}


def test_what_may_pass_is_tried_again(serve: Serve) -> None:
  busy, broken = (429, SOON, {"error": {"message": "busy"}}), (500, SOON, {"error": {"message": "broken"}})
  loopback = serve(failing(busy, broken))
  assert len(asked(engine(loopback), request())["answer p"]) == 2
  assert len(loopback.asked) == 3


def test_what_stays_is_one_error_after_the_last_try(serve: Serve) -> None:
  loopback = serve(lambda body: (503, SOON, {"error": {"message": "the engine is dead"}}))
  found = engine(loopback, concurrency=1)
  with pytest.raises(ValueError, match=r"(?s)127.0.0.1:\d+/v1: .*503.*the engine is dead.*server.retries=2 did not"):
    asked(found, request())
  assert len(loopback.asked) == 3


def test_what_will_not_pass_ends_it_at_once(serve: Serve) -> None:
  loopback = serve(lambda body: (400, SOON, {"error": {"message": "max_tokens is too large"}}))
  with pytest.raises(ValueError, match=r"/v1: .*400.*max_tokens is too large.*not take this another time"):
    asked(engine(loopback, concurrency=1), *(request(str(number)) for number in range(20)))
  time.sleep(0.05)
  assert len(loopback.asked) <= 2  # The others are not asked at all.


def test_a_server_that_is_too_slow_or_gone_is_an_error(serve: Serve) -> None:
  loopback = serve(lambda body: time.sleep(0.3) or vllm(body, owls))
  found = engine(loopback, retries=0, timeout=0.05)
  with pytest.raises(ValueError, match=r"/v1: .*timed out.*server.retries=0 did not help.*server.timeout"):
    asked(found, request())
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{free.getsockname()[1]}"
  with pytest.raises(ValueError, match=r"(?s)no server .* serves m1:\n  http.*/v1: Connection error.*is it there"):
    server.connect(service(url, retries=0), "m1", WORDS, 320, 0)


def test_the_key_is_sent_and_never_shown(
  serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
  key = "sk-very-secret"
  monkeypatch.setenv("OPENAI_API_KEY", key)
  caplog.set_level(logging.DEBUG)
  loopback = serve(lambda body: (401, {}, {"error": {"message": f"wrong: Bearer {key}"}}))
  with pytest.raises(ValueError, match="401.*wrong: Bearer ….*in the environment variable OPENAI_API_KEY") as caught:
    asked(engine(loopback), request())
  assert loopback.asked[0][1]["Authorization"] == f"Bearer {key}"
  shown = "".join(traceback.format_exception(caught.value)) + repr(engine(loopback)) + caplog.text
  assert key not in shown


def changed(**fields: Any) -> Callable[[dict[str, Any]], Reply]:
  """vLLM's answer with something else in its first choice."""

  def reply(body: dict[str, Any]) -> Reply:
    status, headers, answer = vllm(body, owls)
    answer["choices"][0] |= fields
    return status, headers, answer

  return reply


@pytest.mark.parametrize(
  ("reply", "message"),
  [
    (lambda body: (200, {}, {"choices": []}), "0 choices where 2 were asked for"),
    (lambda body: vllm(body | {"n": 3}, owls), "3 choices where 2"),
    (changed(index=1), "2 choices where 2"),
    (lambda body: (200, {}, b"<html>"), "all of it: Invalid JSON"),
    (lambda body: (200, {}, {"choices": None}), "choices: Input should be a valid array"),
    (changed(text=None), "choices.0.text: Input should be a valid string"),
    (changed(token_ids=None), "1 of 2 choices without token_ids"),
    (changed(token_ids=[5, 320, EOS]), "or outside 0 … 319"),
    (changed(token_ids=[5, -1, EOS]), "or outside 0 … 319"),
    (changed(token_ids=[5, EOS, 6, EOS]), f"token_ids behind the end token {EOS}"),
    (changed(token_ids=[5, 7], stop_reason=7), f"ended with 7, the end token is {EOS}; leave {EOS} alone"),
    (changed(token_ids=[5, 7], finish_reason="length"), "cut after 2 tokens, 12 were asked for; raise --max-model-len"),
    (changed(prompt_token_ids=[1, 1, 5]), "is not the one that it was sent, 'answer p'"),
    (changed(finish_reason="abort"), "finish_reason 'abort'"),
  ],
)
def test_an_answer_that_cannot_be_right_is_an_error(serve: Serve, reply: Any, message: str) -> None:
  with pytest.raises(ValueError, match=rf"/v1 gave an answer that cannot be used: .*{re.escape(message)}"):
    asked(engine(serve(reply)), request())


def test_as_many_are_on_their_way_as_may_be(serve: Serve) -> None:
  lock, now, most = threading.Lock(), [0], [0]

  def reply(body: dict[str, Any]) -> Reply:
    with lock:
      now[0] += 1
      most[0] = max(most[0], now[0])
    time.sleep(0.02)
    with lock:
      now[0] -= 1
    return vllm(body, owls)

  found = asked(engine(serve(reply), concurrency=3), *(request(str(number), 1) for number in range(12)))
  assert len(found) == 12 and most[0] == 3


def test_the_server_that_has_the_model_is_asked(serve: Serve) -> None:
  old, new = serve(lambda body: vllm(body, owls), models=["m1-old"]), serve(lambda body: vllm(body, owls))
  both = service(f"{old.url}/, {new.url}/v1/")
  found = server.connect(both, "m1", WORDS, 320, 0)(HOW, 64)
  assert (found.url, found.model) == (f"{new.url}/v1", "m1")
  asked(found, request())
  assert (len(old.asked), len(new.asked)) == (0, 1)


def test_a_model_that_nobody_serves_is_an_error_with_the_way_out(
  serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
  one, two = serve(owls, models=["m1-old", "base"]), serve(owls, models=[])
  with pytest.raises(ValueError) as caught:
    server.connect(service(f"{one.url},{two.url}"), "m1-abc", WORDS, 320, 0)
  assert str(caught.value).splitlines() == [
    "no server of server.url serves m1-abc:",
    f"  {one.url}/v1 serves m1-old, base",
    f"  {two.url}/v1 serves nothing",
    "Two commands start one:",
    "  srlm export --config=… --workdir=… --model=m1 --out=FOLDER",
    "  vllm serve FOLDER --served-model-name m1-abc --generation-config vllm",
  ]
  server.connect(service(one.url, model="base"), "m1-abc", WORDS, 320, 0)
  assert "server.model=base answers for m1-abc: nothing shows that it is the same model" in caplog.text


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"url": "localhost:8000"}, "server.url must be http://HOST:PORT"),
    ({"url": "http://a:1,"}, "server.url must be http://HOST:PORT"),
    ({"url": "http://me:secret@host"}, "a key goes into OPENAI_API_KEY"),
    ({"concurrency": 0}, "server.concurrency=0, retries=2, timeout=10.0: they must be"),
    ({"retries": -1}, "retries=-1"),
    ({"timeout": 0.0}, "timeout=0.0"),
  ],
)
def test_what_cannot_be_asked_is_refused(changes: dict[str, Any], message: str) -> None:
  with pytest.raises(ValueError, match=re.escape(message)) as caught:
    service(**{"url": "http://host:1", **changes})
  assert "secret" not in str(caught.value)


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"needs the package openai.*pip install -e '\.\[server\]'"):
    service("http://host:1")


def planned(**changes: object) -> dict[str, steps.Step]:
  c = config.base()
  c.update_from_flattened_dict(changes)
  return {step.folder: step for step in steps.plan(c, epath.Path("w"), mesh_lib.make_mesh())}


def test_a_server_is_in_the_identity_of_what_it_samples_alone() -> None:
  ours, theirs = planned(), planned(**{"server.url": "http://host:1", "server.retries": 9})
  differ = {folder for folder in ours if ours[folder].config != theirs[folder].config}
  # A training samples where a model judges its checkpoints.
  sampled = {step.folder for step in ours.values() if step.stage in steps.SAMPLING or "judge" in step.inputs}
  assert differ == sampled and all(theirs[folder].config["server"] == "yes" for folder in differ)
  assert all("server" not in key for step in ours.values() for key in step.config)
  people = planned(**{"server.url": "http://host:1", "eft.writer": "annotators"})
  assert "server" not in people["eft"].config  # Nothing is sampled there.


def test_expected_scores_are_refused_before_any_work() -> None:
  with pytest.raises(ValueError, match=r"judge.method='expected' needs .* a server does not give"):
    planned(**{"server.url": "http://host:1", "judge.method": "expected"})


@pytest.fixture
def saved(tmp_path: epath.Path) -> artifacts.Artifact:
  out = artifacts.Artifact(epath.Path(tmp_path) / "m1", {}, {})
  out.begin()
  modelstore.save(out, tiny_model.model(), WORDS, {})
  return out


def test_stages_run_on_a_server_without_the_weights(
  serve: Serve, saved: artifacts.Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
  def speak(prompt: tuple[int, ...], sample: int, body: dict[str, Any]) -> list[int]:
    text = WORDS.decode(prompt)
    return [*WORDS.encode(f"Score: {sample + 1}" if "<response>" in text else f"{text.split()[2]} owl {sample}"), EOS]

  loopback = serve(lambda body: vllm(body, speak), models=[modelstore.served_name(saved)])
  monkeypatch.setattr(modelstore, "load", lambda *_, **__: pytest.fail("the weights were read"))
  c = config.base()
  c.server.url, c.model.max_length, c.generation.shard = loopback.url, 500, 2
  c.judge.update(rubric="judge_tiny")
  c.responses.sampling.max_new = c.judge.sampling.max_new = 40
  prompts = artifacts.Artifact(saved.folder.parent / "prompts", {}, {})
  prompts.begin()
  three = [records.Prompt(id=f"p{number}", text=f"Say {number}.", source="world") for number in range(3)]
  prompts.write_records("prompts-00000-of-00001.jsonl", three)
  prompts.commit({})
  answers = artifacts.Artifact(saved.folder.parent / "responses", {}, {"model": saved, "prompts": prompts})
  answers.begin()
  responses_stage.run(answers, c, tiny_model.one_device())
  found = list(answers.read_shards("responses", records.Response))
  assert [(one.prompt_id, one.sample, one.text) for one in found][3:6] == [
    ("p0", 3, "0. owl 3"), ("p1", 0, "1. owl 0"), ("p1", 1, "1. owl 1"),
  ]  # fmt: skip
  assert all(one.finished and one.tokens[-1] == EOS for one in found)
  verdicts = artifacts.Artifact(saved.folder.parent / "judgements", {}, {"model": saved, "responses": answers})
  verdicts.begin()
  judge_stage.run(verdicts, c, tiny_model.one_device())
  assert [one.score for one in verdicts.read_shards("judgements", records.Judgement)] == [2.0] * 12
  assert len(loopback.asked) == 15  # One for each prompt's answers and for each answer's votes.


def test_option_probs_are_not_to_be_had(serve: Serve) -> None:
  speaker = rollout.Speaker(server.connect(service(serve(owls).url), "m1", WORDS, 320, 0), WORDS, "llama2", 500)
  judging = rollout.Judging(templates.load_rubric("judge_tiny"), 1, 1, HOW, "expected")
  with pytest.raises(ValueError, match="does not give the probabilities of all scores"):
    rollout.judge(speaker, [rollout.Candidate("p", 0, "Name a bird.", "A crow.")], judging)
