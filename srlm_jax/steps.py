"""The order of the stages: which artifacts a configuration makes, from what, and by which stage."""

from collections.abc import Callable, Mapping, Sequence
import copy
import dataclasses
import functools
import math
from typing import Any

from etils import epath
import jax
from ml_collections import config_dict

from srlm_jax import (
  artifacts,
  checks,
  classes,
  config as config_lib,
  digests,
  early_stopping,
  endpoint,
  given,
  mesh as mesh_lib,
  ranges,
  safety,
  service,
  templates,
  tokenizer,
)
from srlm_jax.stages import (
  analyse,
  base,
  canaries,
  classify,
  dpo,
  eft,
  embed,
  evaluate,
  judge,
  pairs,
  prompts,
  report,
  responses,
  safety as safety_stage,
  seed,
  sft,
  world,
)

DATA = ("trees", "heldout_trees", "eval_prompts", "judgements", "pretrain")  # Settings of `data` that name files.

STAGES = {
  "world": "the embedded world's files (configs/tiny.py alone)",
  "base": "M0: imported, pretrained or random weights",
  "seed": "IFT, ranked replies and evaluation prompts from Open Assistant trees",
  "sft": "the SFT baseline (M0 on IFT) and M1 (M0 on IFT and EFT)",
  "eft": "judgements written by the baseline, accepted by people's ranks",
  "prompts": "new instructions by 8-shot prompting",
  "responses": "N answers of M_t to each new instruction",
  "judge": "M_t's votes on each answer",
  "pairs": "best against worst answer, with the reference's log-probs",
  "dpo": "M_{t+1} by DPO of M_t on the pairs",
  "evaluate": "both skills of a model on held-out data",
  "canaries": "what a model falls for as a judge",
  "safety": "a model's answers to your own prompts (monitors.prompts): refused, or helping with harm",
  "classify": "what each evaluation prompt asks for: category, complexity, expected length",
  "analyse": "each model's duels and lengths by category, complexity and expected length",
  "embed": "the map of IFT, EFT and AIFT prompts",
  "report": "one page with everything",
}


SAMPLING = (
  "eft",
  "prompts",
  "responses",
  "judge",
  "evaluate",
  "canaries",
  "safety",
  "classify",
)  # Stages that generate.

# Of these settings the choice among checkpoints depends, beside those of training and of the seed data.
SELECT = (
  *("select.judge", "select.every", "select.patience", "select.pairwise", "select.sampling", "select.verdict"),
  *("chat", "generation.shard"),
)


@dataclasses.dataclass(frozen=True)
class Step:
  """One artifact to make: its folder below the work directory, its stage, its inputs (role → folder), its function."""

  folder: str
  stage: str
  config: dict[str, Any]
  inputs: dict[str, str]
  run: Callable[..., None]
  mesh: jax.sharding.Mesh | None = None  # Sampling has one of its own: weights that stay where they are.


def subset(settings: config_dict.ConfigDict, keys: tuple[str, ...]) -> dict[str, Any]:
  """The named parts of the configuration ("judge", "generation.shard"), flat: what an artifact's content depends on."""
  chosen: dict[str, Any] = {"seed": settings.seed}
  for key in keys:
    value = functools.reduce(lambda section, part: section[part], key.split("."), settings)
    chosen[key] = value.to_dict() if isinstance(value, config_dict.ConfigDict) else value
  return artifacts.flatten(chosen)


def resolve(value: str, workdir: epath.Path) -> epath.Path | None:
  """A configured path; one that begins with "world/" lies in the work directory; None where it is empty."""
  if not value:
    return None
  return workdir / value if value.startswith("world/") else epath.Path(value).expanduser()


def endpoint_cache(settings: config_dict.ConfigDict, workdir: epath.Path) -> epath.Path:
  """The folder in which an endpoint's replies are kept."""
  return resolve(settings.endpoint.cache, workdir) or workdir / "endpoint"


def read_files(settings: config_dict.ConfigDict, workdir: epath.Path) -> dict[str, str]:
  """SHA-256 of each file from outside that the configuration names, by setting: another content is another run."""
  found = {
    "judge.rubric": templates.load_rubric(settings.judge.rubric).digest,
    "evaluate.pairwise": templates.load_pairwise(settings.evaluate.pairwise).digest,
    "prompts.few_shot": templates.few_shot_digest(),
    "select.pairwise": templates.load_pairwise(settings.select.pairwise).digest,
    "monitors.rubric": templates.load_rubric(settings.monitors.rubric).digest,
    "monitors.refusals": safety.load_openings(settings.monitors.refusals).digest,
  }
  if settings.analysis.classes:
    found["analysis.classes"] = classes.load_template(settings.analysis.classes).digest
  named = {f"data.{name}": settings.data[name] for name in DATA}
  named |= {"monitors.prompts": settings.monitors.prompts, "analysis.vectors": settings.analysis.vectors}
  for key, value in {**named, "select.path": settings.select.path}.items():
    path = resolve(value, workdir)
    if path and not value.startswith("world/") and path.exists():  # Missing ones: see check_start.
      if path.is_dir():
        raise ValueError(f"{key}={value}: this is a folder. Name the file in it.")
      found[key] = digests.file_sha256(path)
  words = resolve(settings.tokenizer, workdir)
  if words and not settings.tokenizer.startswith("world/") and words.exists():
    found["tokenizer"] = tokenizer.digest_of(words)
  return found


def check_start(
  settings: config_dict.ConfigDict, workdir: epath.Path, mesh: jax.sharding.Mesh, todo: Sequence[Step]
) -> None:
  """ValueError, before any work starts, for a file or an endpoint that a step needs and lacks, or an uneven batch."""
  c, stages = settings, {step.stage for step in todo}
  folders = {step.folder for step in todo}
  needed = {
    "base.path": "m0" in folders and c.base.kind == "hf",
    "tokenizer": "m0" in folders and (c.base.kind != "hf" or c.tokenizer),
    "prompts.path": "writer" in folders,
    "evaluate.judge": "judge" in folders,
    "data.pretrain": "m0" in folders and c.base.kind == "pretrain",
    "data.trees": "seed" in stages,
    "data.heldout_trees": "seed" in stages and c.data.heldout_trees,
    "data.eval_prompts": "seed" in stages and c.data.eval_prompts,
    "select.path": "seed" in stages and c.select.path and c.select.judge != "none",
    "data.judgements": "eft" in stages and c.eft.writer == "annotators",
    "monitors.prompts": "safety" in stages,
    "analysis.vectors": "embed" in stages and c.analysis.vectors,
  }
  files = {}
  for key in (key for key, wanted in needed.items() if wanted):
    value = functools.reduce(lambda section, part: section[part], key.split("."), c)
    path = resolve(value, workdir)
    if path is None:
      both = key == "prompts.path" and c.select.judge == "writer"
      other = " Its model judges checkpoints, too (select.judge; 'none' makes no choice among them)." if both else ""
      raise ValueError(f"{key} is not set: give --config.{key}=PATH.{other}")
    if not value.startswith("world/") and not path.exists():
      raise ValueError(f"{key}={value}: there is no such file or folder.")
    # What a killed stage left of the world is made anew; where there is no world, its readers say what to run.
    if not value.startswith("world/") or ("world" not in stages and path.exists()):
      files[key] = path
  asks = {"evaluate": c.evaluate.grader, "sft": c.select.judge, "dpo": c.select.judge}
  asks["classify"] = "" if c.world.enabled else c.evaluate.grader
  if any(asks.get(stage) == "endpoint" for stage in stages):  # Both raise for what they cannot use.
    endpoint.terms(c.endpoint)
    endpoint.check_local(endpoint_cache(c, workdir))
  pretrains = c.base.kind == "pretrain" and "m0" in folders
  trained = {"pretrain": pretrains, "sft": "sft" in stages, "dpo": "dpo" in stages}
  check_batches(settings, mesh, [name for name, wanted in trained.items() if wanted])
  given.check(settings, files, stages)
  checks.models(settings, files, mesh)


def check_batches(settings: config_dict.ConfigDict, mesh: jax.sharding.Mesh, trained: Sequence[str]) -> None:
  """ValueError where the batch of one of these sections ("sft", "dpo" …) does not divide among the devices."""
  ways = mesh.size // mesh.shape["tensor"]
  for name in trained:
    section, sides = settings[name], 2 if name == "dpo" else 1  # A pair is two rows.
    least = math.lcm(ways, section.accumulate, ways * section.accumulate // math.gcd(ways * section.accumulate, sides))
    if section.batch % least:
      raise ValueError(
        f"{name}.batch={section.batch} does not divide among {ways} devices (mesh.slice × mesh.data × mesh.fsdp) in "
        f"{section.accumulate} part(s): change it to a multiple of {least}, or raise mesh.tensor."
      )


def sampling_mesh(settings: config_dict.ConfigDict, mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
  """The mesh of sampling: training's, unless generation.mesh.tensor is set.

  Then it is of the same devices, or of this process's alone where they hold the whole model (generation.mesh.data=-1,
  and the rest divides them): processes that need not wait for each other sample faster.
  """
  own = settings.generation.mesh
  if not own.tensor:
    return mesh
  devices = list(mesh.devices.flat)
  here = [device for device in devices if device.process_index == jax.process_index()]
  whole = own.data == -1 and here and len(here) % (own.fsdp * own.tensor) == 0
  try:
    return mesh_lib.make_mesh(**own, slice=1 if whole else mesh.shape["slice"], devices=here if whole else devices)
  except ValueError as error:
    raise ValueError(f"generation.mesh: {error}") from error


def check_choices(settings: config_dict.ConfigDict) -> None:
  """ValueError for settings that are out of range or contradict each other, before any work starts."""
  ranges.check(settings)
  if settings.evaluate.grader == "oracle" and not settings.world.enabled:
    raise ValueError("evaluate.grader='oracle' grades the tiny world alone: use 'judge', 'endpoint' or 'none'.")
  select = settings.select
  if select.judge == "oracle" and not settings.world.enabled:
    raise ValueError("select.judge='oracle' judges the tiny world alone: use 'writer', 'endpoint' or 'none'.")
  if settings.responses.sampling.stop:
    raise ValueError(
      f"responses.sampling.stop={settings.responses.sampling.stop}: answers that a string ends have no end token, and "
      "training on them would teach the model not to stop. Leave it empty."
    )
  if settings.judge.method == "expected" and settings.dpo.method == "positive_only":
    raise ValueError("an expected score is never a full 5: dpo.method='positive_only' needs judge.method='sampled'.")
  if settings.server.url:
    config_lib.frozen(service.Service, settings.server)  # Raises for what it cannot use.
    if settings.judge.method == "expected":
      raise ValueError(
        "judge.method='expected' needs the probabilities of all scores, which a server does not give: set it to "
        "'sampled', or server.url to ''."
      )


class _Plan:
  """Collects the steps of a run; each method adds those of one part of the paper."""

  def __init__(self, settings: config_dict.ConfigDict, workdir: epath.Path, mesh: jax.sharding.Mesh) -> None:
    self.settings, self.mesh, self.workdir = settings, mesh, workdir
    # A server computes elsewhere: each process may ask it about shards of its own.
    own = mesh_lib.make_mesh(devices=jax.local_devices()) if settings.server.url else None
    self.sampling = own or sampling_mesh(settings, mesh)
    self.steps: list[Step] = []
    self.world = {"world": "world"} if settings.world.enabled else {}
    self.where = {name: resolve(settings.data[name], workdir) for name in DATA}
    self.where["validation"] = resolve(settings.select.path, workdir)
    self.read = read_files(settings, workdir)

  def add(
    self, folder: str, stage: str, keys: tuple[str, ...], inputs: Mapping[str, str], run: Callable[..., None]
  ) -> None:
    read = {
      f"{setting} (SHA-256)": digest
      for setting, digest in self.read.items()
      if any(setting == key or setting.startswith(f"{key}.") for key in keys)
    }
    asks = stage in SAMPLING and (stage != "eft" or self.settings.eft.writer == "baseline")
    if self.settings.server.url and (asks or "judge" in inputs):
      read["server"] = "yes"  # Its texts are others than our own sampler's.
    self.steps.append(Step(folder, stage, subset(self.settings, keys) | read, dict(inputs), run, self.mesh_of(stage)))

  def mesh_of(self, stage: str) -> jax.sharding.Mesh:
    return self.sampling if stage in SAMPLING else self.mesh

  def call(self, run: Callable[..., None], settings: config_dict.ConfigDict | None = None) -> Callable[..., None]:
    stage = run.__module__.rpartition(".")[2]
    return functools.partial(run, settings=settings or self.settings, mesh=self.mesh_of(stage))

  def train(
    self, folder: str, stage: str, keys: tuple[str, ...], inputs: Mapping[str, str], run: Callable[..., None]
  ) -> None:
    """Adds a step that trains and, unless that is off, chooses among its checkpoints (paper §3.1.2)."""
    c, work = self.settings, self.call(run)
    if c.select.judge != "none":
      keys, inputs = (*keys, *SELECT), {**inputs, "seed": "seed"}
      if c.select.judge == "endpoint":
        keys += ("endpoint.url", "endpoint.model")
      elif c.select.judge != "oracle":
        inputs["judge"] = self.referee(folder, inputs["parent"])
      where = early_stopping.Where(sampling_mesh(c, self.mesh), endpoint_cache(c, self.workdir))
      work = functools.partial(work, where=where)
    self.add(folder, stage, keys, inputs, work)

  def referee(self, folder: str, parent: str) -> str:
    """The folder of the model that compares the checkpoints of a training."""
    name = self.settings.select.judge
    if name == "writer":
      return self.fixed_writer()
    models = [step.folder for step in self.steps if step.stage in ("base", "sft", "dpo")]
    if name not in ("parent", *models):
      raise artifacts.unknown(
        name, ["none", "oracle", "endpoint", "writer", "parent", *models], f"select.judge of {folder}"
      )
    return parent if name == "parent" else name

  def base_model(self, folder: str, settings: config_dict.ConfigDict) -> None:
    words, path = resolve(settings.tokenizer, self.workdir), resolve(settings.base.path, self.workdir)
    run = functools.partial(
      self.call(base.run, settings), where={"tokenizer": words, "base": path, "pretrain": self.where["pretrain"]}
    )
    keys = ("base", "tokenizer", "chat", "model", "pretrain")
    files = ("data.pretrain", *(["tokenizer"] if words else []))
    read = {f"{key} (SHA-256)": self.read[key] for key in files if key in self.read}
    self.steps.append(Step(folder, "base", subset(settings, keys) | read, dict(self.world), run))

  def seed_models(self) -> None:
    """M0, the seed data, the SFT baseline, EFT and M1 (paper §2.2)."""
    c, keys = self.settings, ("sft", "chat", "model")
    if c.world.enabled:
      self.add("world", "world", ("world", "judge.rubric"), {}, functools.partial(world.run, settings=c))
    self.base_model("m0", c)
    of = ("data", *(("select.prompts", "select.path") if c.select.judge != "none" else ()))
    self.add("seed", "seed", of, self.world, functools.partial(seed.run, settings=c, where=self.where))
    self.train("baseline", "sft", keys, {"parent": "m0", "seed": "seed"}, sft.run)
    self.evaluation("baseline", [])
    inputs = {"parent": "m0", "seed": "seed"}
    if c.eft.enabled:
      sources = {"seed": "seed", **({"baseline": "baseline"} if c.eft.writer == "baseline" else self.world)}
      run = functools.partial(self.call(eft.run), where=self.where)
      self.add("eft", "eft", ("eft", "judge", "chat", "data.judgements", "generation.shard"), sources, run)
      inputs["eft"] = "eft"
    self.train("m1", "sft", keys, inputs, sft.run)
    self.evaluation("m1", ["baseline"])

  def iteration(self, index: int) -> None:
    """AIFT(M_t) and from it M_{t+1}, index = t + 1 (paper §2.3–2.4)."""
    c, parent, aift = self.settings, f"m{index - 1}", f"aift{index - 1}"
    names = {part: f"{aift}/{part}" for part in ("prompts", "responses", "judgements", "pairs")}
    sharded = ("chat", "generation.shard")
    earlier = {f"earlier {t}": f"aift{t}/prompts" for t in range(1, index - 1)}
    writer = self.writer(parent)
    self.add(
      names["prompts"],
      "prompts",
      ("prompts", "chat", "generation.shard"),
      {"writer": writer, "seed": "seed", **earlier},
      self.call(prompts.run),
    )
    inputs = {"model": parent, "prompts": names["prompts"]}
    self.add(names["responses"], "responses", ("responses", *sharded), inputs, self.call(responses.run))
    inputs = {"model": parent, "responses": names["responses"]}
    self.add(names["judgements"], "judge", ("judge", *sharded), inputs, self.call(judge.run))
    scored = {"responses": names["responses"], "judgements": names["judgements"]}
    if c.dpo.method == "positive_only":
      eft_input = {"eft": "eft"} if c.eft.enabled else {}
      inputs = {"parent": "m0", "seed": "seed", **eft_input, **scored}
      keys = ("sft", "dpo.method", "judge.rubric", "chat", "model")
      self.train(f"m{index}", "dpo", keys, inputs, dpo.run_positive_only)
      return
    references = {"previous": parent, "baseline": "baseline"}
    inputs = {"reference": references[c.dpo.reference], **scored}
    self.add(names["pairs"], "pairs", ("pairs", "dpo.batch", "chat", "model"), inputs, self.call(pairs.run))
    self.train(f"m{index}", "dpo", ("dpo", "model"), {"parent": parent, "pairs": names["pairs"]}, dpo.run)

  def writer(self, parent: str) -> str:
    """The folder of the model that writes new prompts."""
    kind = self.settings.prompts.writer
    return self.fixed_writer() if kind == "fixed" else {"m0": "m0", "parent": parent}[kind]

  def fixed_writer(self) -> str:
    """The folder of the fixed model from outside."""
    self.outside_model("writer", self.settings.prompts.path)
    return "writer"

  def outside_model(self, folder: str, path: str) -> None:
    """Imports a model from outside the run, once."""
    if any(step.folder == folder for step in self.steps):
      return
    outside = copy.deepcopy(self.settings)
    with outside.unlocked():
      outside.base.kind, outside.base.path, outside.tokenizer = "hf", path, ""
    self.base_model(folder, outside)

  def evaluation(self, name: str, others: list[str]) -> None:
    """Measures a model, against others that were measured before."""
    c = self.settings
    inputs = {"model": name, "seed": "seed", **{f"against {other}": f"eval/{other}" for other in others}}
    keys = ["evaluate", "judge", "chat", "generation.shard"]
    if others and c.evaluate.grader == "judge":
      inputs["judge"] = self.judge(name)
    if others and c.evaluate.grader == "endpoint":
      keys += ["endpoint.url", "endpoint.model"]
    run = functools.partial(self.call(evaluate.run), cache=endpoint_cache(c, self.workdir))
    self.add(f"eval/{name}", "evaluate", tuple(keys), inputs, run)
    if c.monitors.canary_prompts:
      sources = ("monitors.canary_prompts", "evaluate.sampling", "judge", "chat", "generation.shard")
      self.add(f"canaries/{name}", "canaries", sources, {"model": name, "seed": "seed"}, self.call(canaries.run))

  def judge(self, name: str) -> str:
    """The folder of the model that decides the duels of another one; one from outside gets its own step, once."""
    wanted = self.settings.evaluate.judge
    if "/" in wanted:
      self.outside_model("judge", wanted)
      return "judge"
    models = [step.folder for step in self.steps if step.stage in ("base", "sft", "dpo")]
    if wanted not in models:
      raise artifacts.unknown(wanted, models, f"model that is there when {name} is evaluated, nor a path with a '/'")
    return wanted

  def safety(self, name: str) -> None:
    """Watches what a model refuses and what it helps with, on a user's own prompts."""
    c = self.settings
    if not c.monitors.prompts:
      return
    keys = ("prompts", "rubric", "refusals")
    self.add(
      f"safety/{name}",
      "safety",
      (*(f"monitors.{key}" for key in keys), "evaluate.sampling", "judge", "chat", "generation.shard"),
      {"model": name, "judge": self.judge(name), **(self.world if c.monitors.prompts.startswith("world/") else {})},
      functools.partial(self.call(safety_stage.run), where=resolve(c.monitors.prompts, self.workdir)),
    )

  def analysis(self) -> None:
    """What the paper shows beside its main figures: duels by category, and the map of all prompts (§3.2)."""
    c, evaluated = self.settings, [step for step in self.steps if step.stage == "evaluate"]
    if c.analysis.classes and c.evaluate.grader != "none":
      inputs = {"seed": "seed"}
      keys = ["world.enabled", "analysis.classes", "analysis.sampling", "chat", "generation.shard"]
      if not c.world.enabled and c.evaluate.grader == "endpoint":
        keys += ["endpoint.url", "endpoint.model"]
      elif not c.world.enabled:
        inputs["judge"] = self.judge("the evaluation prompts")
      sort = functools.partial(self.call(classify.run), cache=endpoint_cache(c, self.workdir))
      self.add("analysis/classes", "classify", tuple(keys), inputs, sort)
      for step in evaluated:
        others = {role: folder for role, folder in step.inputs.items() if role.startswith("against ")}
        inputs = {"evaluation": step.folder, "classes": "analysis/classes", **others}
        run = functools.partial(analyse.run, settings=c)
        self.add(step.folder.replace("eval/", "analysis/"), "analyse", ("evaluate.grader",), inputs, run)
    if c.analysis.points:
      self.prompt_map()

  def prompt_map(self) -> None:
    """The map of the prompts of all iterations, in a folder named after the last one: a longer loop makes another."""
    c, made = self.settings, {step.folder: step.stage for step in self.steps}
    inputs = {"seed": "seed", **({"eft": "eft"} if "eft" in made else {})}
    inputs |= {folder.partition("/")[0]: folder for folder, stage in made.items() if stage == "prompts"}
    vectors, keys = resolve(c.analysis.vectors, self.workdir), ["analysis.points", "analysis.perplexity"]
    name = f"analysis/map-m{c.models}"
    if vectors:
      name, keys = f"{name}-{vectors.stem}", [*keys, "analysis.vectors"]
    else:
      models = [folder for folder, stage in made.items() if stage in ("base", "sft", "dpo")]
      if c.analysis.model not in models:
        raise artifacts.unknown(c.analysis.model, models, "model of this run (analysis.model)")
      inputs["model"], keys = c.analysis.model, [*keys, "analysis.model", "chat", "model"]
    self.add(name, "embed", tuple(keys), inputs, functools.partial(self.call(embed.run), vectors=vectors))


def plan(settings: config_dict.ConfigDict, workdir: epath.Path, mesh: jax.sharding.Mesh) -> list[Step]:
  """All steps of a run, in their order; the last one is the report."""
  check_choices(settings)
  made = _Plan(settings, workdir, mesh)
  made.seed_models()
  for name in ("baseline", "m1"):  # Behind M1, which may be the judge.
    made.safety(name)
  for index in range(2, settings.models + 1):
    made.iteration(index)
    made.evaluation(f"m{index}", list(dict.fromkeys([f"m{index - 1}", "m1", "baseline"])))
    made.safety(f"m{index}")
  made.analysis()
  inputs = {step.folder: step.folder for step in made.steps}
  run = functools.partial(report.run, settings=settings, steps=made.steps)
  made.add("report", "report", (), inputs, run)
  return made.steps


def folders(planned: Sequence[Step], workdir: epath.Path) -> list[epath.Path]:
  """Where the steps write."""
  return [workdir / step.folder for step in planned]


def artifacts_of(planned: Sequence[Step], workdir: epath.Path) -> dict[str, artifacts.Artifact]:
  """The artifact of every step by its folder, each with those that it is made from; a step comes after its inputs."""
  made: dict[str, artifacts.Artifact] = {}
  for step in planned:
    inputs = {role: made[folder] for role, folder in step.inputs.items()}
    made[step.folder] = artifacts.Artifact(workdir / step.folder, step.config, inputs)
  return made
