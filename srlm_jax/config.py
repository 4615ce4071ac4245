"""The base configuration: the paper's values, and ours where the paper is silent.

`configs/*.py` start from `base()` and change a dozen lines. A comment that begins with "unstated" marks a value that
the paper does not give.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any, TypeVar

from ml_collections import config_dict

T = TypeVar("T")


def base() -> config_dict.ConfigDict:
  """The paper's run: Llama 2 70B, Open Assistant, M1 to M3."""
  c = config_dict.ConfigDict()
  c.name = ""  # Title of the report; "": the work directory's.
  c.reasons = config_dict.ConfigDict()  # Why a value is not the paper's, by section, for the report.
  c.seed = 0
  c.models = 3  # The last model to make: M1 is by SFT, each further one by DPO of the one before on its own AIFT.

  # M0. kind: "hf" (a Hugging Face folder at `path`), "pretrain" (from scratch, on the world's text), "random".
  c.base = dict(kind="hf", path="", size="llama2_70b")
  c.tokenizer = ""  # A SentencePiece .model or a Hugging Face folder; "" takes the one beside M0's weights.
  c.chat = "llama2"  # unstated: "llama2" ([INST] … [/INST]), "model" (the folder's own template), "plain".
  c.model = dict(
    dropout=0.1,
    dtype="bfloat16",  # of computation; log-softmax and norms are float32 always.
    param_dtype="float32",
    remat="full",
    max_length=2048,  # unstated; Llama 2's own limit is 4,096.
    logits_chunk=512,  # Sequence positions whose logits exist at once.
    attention="auto",  # "splash" on TPU, "cudnn" on NVIDIA GPUs, "blocked" on CPU; "xla" anywhere.
  )
  c.topology = ""  # The TPU slice that this configuration is for, such as "v5p:4x4x4"; `srlm plan` compiles for it.
  c.mesh = dict(slice=1, data=1, fsdp=-1, tensor=1)  # -1: all devices that are left; slice: TPU slices, of several.

  c.world = dict(enabled=False)
  c.data = dict(
    trees="",  # Open Assistant trees, .jsonl or .jsonl.gz.
    heldout_trees="",  # "": a part of `trees` is held out.
    eval_prompts="",  # Prompts (records.Prompt) for evaluation; "": roots of held-out trees.
    judgements="",  # EFT written by people (records.SFTExample), for eft.writer = "annotators".
    pretrain="",  # Documents for base.kind = "pretrain".
    ift_examples=3200,
    # Of the trees with two or more replies, so that IFT and EFT share no prompt: the paper's 762 of 3,962.
    eft_fraction=762 / 3962,
    heldout_fraction=0.25,  # Of EFT prompts: the paper's 541 of 2,171 examples.
    eval_prompts_count=256,
    overlap=False,  # True: IFT and EFT may share prompts, for samples too small to divide.
  )
  c.pretrain = _training(lr=3e-4, end_lr=3e-5, batch=16, decay="cosine")
  c.sft = _training(lr=5.5e-6, end_lr=1.1e-6, batch=16, decay="cosine")
  c.dpo = _training(lr=1e-6, end_lr=1e-7, batch=16, decay="linear")  # The shape of the decay is unstated.
  c.dpo.beta = 0.1
  c.dpo.reference = "previous"  # or "baseline": the SFT baseline for ever.
  c.dpo.pack = False  # Never packed: a pair is two whole rows.
  c.dpo.method = "dpo"  # or "positive_only": SFT of M0 on the seed data and the perfect answers (paper §3.1).

  # Which checkpoint of SFT and of DPO is the model (paper §3.1.2): the answers of each meet those of the one before it,
  # and training stops at one that loses.
  c.select = dict(
    # The paper's is Claude 2. Ours, as no run may need a paid service: "writer", the fixed chat model at prompts.path,
    # which stands outside the loop. Or "endpoint"; "parent", where training starts (M0, in SFT, has not learnt to
    # judge); "m0" for all; "oracle", the tiny world's; "none": the last weights are the model.
    judge="writer",
    every=200,  # The paper's, in steps; a training of fewer has no choice.
    prompts=253,  # The paper's number; unstated whose. Ours: of trees that nothing else uses, then the last of IFT.
    path="",  # Validation prompts of your own (records.Prompt) in place of those.
    patience=1,  # unstated: losses in a row (more losses than wins) that stop training.
    pairwise="pairwise",  # Template of the judge's prompt; the paper's is AlpacaEval's.
    sampling=_sampling(temperature=0.7, top_p=0.9, max_new=1024),  # unstated: of the answers.
    verdict=_sampling(temperature=0.0, top_p=1.0, max_new=256),  # unstated: of the judge.
  )

  c.eft = dict(
    enabled=True,  # False: M1 is the SFT baseline (paper's ablation, M′).
    writer="baseline",  # The paper's; "annotators" takes data.judgements.
    attempts=1,  # unstated: judgements sampled for each reply; the first set that agrees with the human ranks is kept.
    by="prompt",  # unstated: agreement over the whole prompt; "reply" asks each reply alone.
    ties="disagree",  # unstated: equal scores of replies with different ranks; or "agree".
    max_share=0.4,  # unstated: the most common score is thinned to this share.
    max_examples=0,  # 0: all.
  )
  c.prompts = dict(
    writer="fixed",  # The paper's: one fixed model for all iterations, at `path`; "m0"; "parent": M_t itself.
    path="",  # Hugging Face folder of the fixed model (the paper: Llama 2-Chat 70B).
    count=5000,  # unstated: new prompts wanted in each iteration.
    max_proposals=20000,  # unstated: completions to sample for them at the most.
    per_round=512,
    seed_demonstrations=6,
    generated_demonstrations=2,
    max_rouge=0.7,
    sampling=_sampling(temperature=0.6, top_p=0.9, max_new=512),
    chat=False,  # unstated: whether the few-shot text goes through the chat template.
  )
  c.responses = dict(n=4, sampling=_sampling(temperature=0.7, top_p=0.9, max_new=1024))
  c.judge = dict(
    rubric="judge_additive",  # A file of srlm_jax/rubrics without .txt, or a path; the compared: judge_five_bucket.
    method="sampled",  # "expected": no text, the score weighted by the probabilities of its digits; one vote.
    votes=3,
    min_votes=1,  # unstated: readable votes that a score needs.
    sampling=_sampling(temperature=0.7, top_p=0.9, max_new=256),
  )
  c.pairs = dict(margin=0.0, min_pairs=1)  # chosen − rejected must exceed the margin; fewer pairs stop the run.
  c.generation = dict(
    rows=64,  # Decoded at once; by each process, where processes sample apart.
    shard=256,  # Prompts or responses in a shard file: what a process takes on at once.
    # Of sampling: weights that stay where they are; tensor=0: as `mesh`. With data=-1 processes sample apart, if the
    # rest divides the devices of each.
    mesh=dict(data=-1, fsdp=1, tensor=0),
  )

  # An OpenAI-compatible server, vLLM say, in place of our own sampler; a key is read from OPENAI_API_KEY alone.
  c.server = dict(
    url="",  # http://HOST:PORT; of several, with commas between, the one that serves the model is asked.
    model="",  # "": the name that `srlm export` shows, which says which weights answer; nothing shows it for another.
    concurrency=32,  # Requests of each process on their way at once, each of all samples of a prompt.
    retries=5,  # Of a request that got no answer, or status 408, 409, 429 or 5xx; ever later, or when Retry-After says.
    timeout=600.0,  # Seconds of one try.
  )

  # A judge behind an OpenAI-compatible endpoint, for evaluate.grader="endpoint" (it sorts the evaluation prompts, too),
  # select.judge, mt_bench.judge and `srlm reward --model=endpoint`. Its key is read from OPENAI_API_KEY alone; each
  # sample is a request.
  c.endpoint = dict(
    url="",  # https://HOST/PATH, as openai's base_url; without a path, /v1.
    model="",  # Its name there.
    concurrency=8,  # Requests of each process on their way at once.
    retries=5,  # As server.retries.
    timeout=120.0,  # Seconds of one try.
    requests_per_minute=0.0,  # Of each process, tries included; 0: no limit.
    price_in=0.0,  # Of a million tokens of prompts, for the costs that are shown; in any currency.
    price_out=0.0,  # The same of replies.
    limit="max_tokens",  # What it calls the longest reply; newer models of OpenAI want "max_completion_tokens".
    cache="",  # Folder of paid replies, on a local disk; "": endpoint/ in the work directory.
  )

  c.evaluate = dict(
    samples=1,  # unstated: answers to each prompt.
    sampling=_sampling(temperature=0.7, top_p=0.9, max_new=1024),
    # "oracle": the world's ground truth; pairwise: "judge", the model `judge`, or "endpoint", the one there; "none".
    grader="judge",
    judge="m1",  # A model of the run, or the path (with a "/") of another one's Hugging Face folder.
    pairwise="pairwise",  # Template of the pairwise judge.
  )

  # Benchmarks from outside, by commands of their own; the answers are sampled as evaluate.sampling says.
  c.alpaca_eval = dict(
    annotators="weighted_alpaca_eval_gpt4_turbo",  # A judge of the package alpaca_eval, or a path with a "/".
    length_controlled=True,  # It fetches data of AlpacaEval's own; False works without a network.
    url="",  # An OpenAI-compatible server that judges; "": OpenAI's. A key is read from OPENAI_API_KEY alone.
  )
  c.mt_bench = dict(
    judge="m1",  # A model of the run, or "endpoint". The paper's is GPT-4.
    templates="mt_bench",  # Of rating: this and three more, see mt_bench.load_prompts; or a path.
  )

  # What a run is watched for; all of it ours. Nothing in the loop depends on it.
  c.monitors = dict(
    canary_prompts=8,  # Held-out prompts on which each model judges every canary; 0: none.
    prompts="",  # Your prompts (records.Prompt), harmful ones say: what does each model refuse, what does it help with?
    rubric="safety",  # Template by which `evaluate.judge` says whether an answer helps with something harmful.
    refusals="refusals",  # File of the openings by which a refusal is known.
    warn=_thresholds(),
  )

  # Beyond which a training warns, while it runs and in the report; all of it ours. 1e9: never.
  c.health = dict(
    window=100,  # Steps before a step with which its loss is compared.
    spike=8.0,  # Robust standard deviations above their median: the noise of batches hardly ever reaches 5.
    margin=10.0,  # Of DPO's rewards: the loss is then 5e-5, and its gradient as small; the pairs have no more to teach.
    drift=50.0,  # Nats by which both responses of a pair became less likely: with beta 0.1, a reward of -5 for each.
  )

  # NLP benchmarks by lm-eval: `srlm evaluate lm-eval`. No step of a run reads this.
  c.nlp = dict(
    tasks=dict(  # Each with its shots: unstated; these are Llama 2's.
      arc_easy=0, arc_challenge=0, hellaswag=0, social_iqa=0, piqa=0, gsm8k=8, mmlu=5, openbookqa=0, nq_open=0
    ),
    include_path="",  # A folder with lm-eval tasks (YAML) of your own.
    chat=False,  # unstated: whether prompts go through the chat template.
    add_bos=True,  # Whether texts begin with the begin token, as Llama's do.
    limit=0,  # Documents of each task, the first ones; 0: all.
    rows=64,  # Texts that go through the model at once.
  )

  # Closer looks at a finished run. Nothing in the loop depends on them.
  c.analysis = dict(
    # Template by which the judge of evaluation sorts its prompts (the tiny world knows them); "": no such analysis.
    classes="classify",
    sampling=_sampling(temperature=0.0, top_p=1.0, max_new=256),
    points=2000,  # unstated: prompts of each kind in the map of IFT, EFT and AIFT, at the most; 0: no map.
    model="m1",  # unstated: whose states are the vectors of the map.
    vectors="",  # FILE.npz of another encoder's: `ids`, those of the map's prompts.jsonl, and `vectors`, a row each.
    perplexity=30.0,  # unstated.
  )
  return c


def _thresholds() -> dict[str, float]:
  """Beyond which a monitor warns in the report; inf: never (-inf for entropy and variety, which warn below)."""
  return dict(
    inflation=0.25,  # Points by which the mean score of people's held-out replies rises: same texts, kinder judge.
    rise=0.75,  # The same of its own new answers, which may well become better: by 0.2 to 0.5 in the tiny world.
    top=0.8,  # Share of own answers with the highest score: a pair needs a lower one beside it.
    entropy=0.5,  # Bits of the scores: 0.47 where nine of ten are one, as the paper's without EFT (all are 4).
    ties=0.6,  # Share of prompts without a pair: more than half of answering and judging is then for nothing.
    variance=1.0,  # Of the votes on an answer: a mean of three then errs by 0.6 points, as much as answers differ.
    unreadable=0.1,  # Share of votes: the others come from the answers that are easy to judge.
    growth=1.5,  # Times the length of the model before; the paper's answers grew by 1.42 (M2) and 1.64 (M3).
    cut=0.05,  # Share of answers that do not end: such a one is never chosen.
    variety=0.8,  # Times the distinct pairs of words of the model before: a fifth of the variety is gone.
    repeating=0.05,  # Share of answers: people's hardly ever repeat themselves so much.
    agreement=0.03,  # Fall of pairwise accuracy, which in the paper rose by 0.017 (M2) and 0.013 (M3).
    canaries=0.1,  # Share scored above a person's best reply to the same prompt.
    refusals=0.1,  # Fall of the share of refusals.
    compliance=0.1,  # Share of answers that help with something harmful.
  )


def _training(lr: float, end_lr: float, batch: int, decay: str) -> dict[str, Any]:
  return dict(
    lr=lr,
    end_lr=end_lr,
    batch=batch,
    decay=decay,
    steps=0,  # 0: `epochs` passes over the data.
    epochs=2,  # unstated.
    min_steps=0,  # At least so many, where `epochs` of a small set are fewer.
    warmup=0,  # unstated.
    weight_decay=0.0,  # unstated.
    b2=0.95,  # unstated, as is the optimizer; ours is AdamW with b1 0.9.
    clip=1.0,  # unstated: of the global gradient norm.
    accumulate=1,  # Parts of a batch that go through the model one after the other: less memory, the same update.
    moments="float32",  # Of Adam's first moment; "bfloat16" needs half the memory.
    pack=False,  # unstated: several examples in a row of max_length tokens.
    save_every=200,  # The paper's.
    skip_limit=3,  # Steps without a finite loss and gradient are skipped; so many in a row end the run.
  )


def _sampling(temperature: float, top_p: float, max_new: int) -> dict[str, Any]:
  # unstated: the longest text, max_new, and strings that end one: --config.prompts.sampling.stop="('\\n\\n',)".
  return dict(temperature=temperature, top_p=top_p, max_new=max_new, stop=())


def frozen(kind: type[T], fields: Mapping[str, Any], **more: Any) -> T:
  """A frozen dataclass from the fields of a ConfigDict that it knows."""
  known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
  return kind(**{name: value for name, value in fields.items() if name in known}, **more)
