"""The paper's figures, to stand beside a run's own (Yuan et al., Self-Rewarding Language Models, arXiv 2401.10020 v3).

Shares are fractions. A model that the paper does not have (an M4) is simply missing from these tables.
"""

SOURCE = "Yuan et al., Self-Rewarding Language Models, arXiv 2401.10020 v3"

# Table 4: agreement of the judge with people's ranks, on the held-out EFT prompts. "five_bucket" is the SFT baseline
# with the compared judge prompt of five mutually exclusive grades.
JUDGING: dict[str, dict[str, float]] = {
  "pairwise": {"baseline": 0.651, "m1": 0.787, "m2": 0.804, "m3": 0.817, "five_bucket": 0.266},
  "five_best": {"baseline": 0.396, "m1": 0.415, "m2": 0.443, "m3": 0.432, "five_bucket": 0.235},
  "exact_match": {"baseline": 0.101, "m1": 0.131, "m2": 0.143, "m3": 0.143, "five_bucket": 0.011},
  "spearman": {"baseline": 0.253, "m1": 0.279, "m2": 0.331, "m3": 0.349, "five_bucket": -0.18},
  "kendall": {"baseline": 0.233, "m1": 0.253, "m2": 0.315, "m3": 0.324, "five_bucket": -0.16},
}

# §3.2, head to head on 256 prompts by GPT-4, each pair in both orders: (win, tie, loss) of the first over the second.
DUELS: dict[tuple[str, str], tuple[float, float, float]] = {
  ("m1", "baseline"): (0.305, 0.387, 0.309),
  ("m2", "baseline"): (0.492, 0.363, 0.145),
  ("m3", "baseline"): (0.625, 0.277, 0.098),
  ("m2", "m1"): (0.555, 0.328, 0.117),
  ("m3", "m2"): (0.477, 0.398, 0.125),
  ("m3", "m1"): (0.688, 0.227, 0.086),
}

# AlpacaEval 2.0: mean length of an answer, in characters.
CHARACTERS: dict[str, int] = {"m1": 1092, "m2": 1552, "m3": 2552}

# §3.1.1 and §3.2: how much data each part had.
SIZES: dict[str, int] = {"ift": 3200, "eft": 1630, "eft held out": 541, "m2": 3964, "m3": 6942}

# AlpacaEval 2.0: win rate against GPT-4 Turbo, not length-controlled.
ALPACA_EVAL: dict[str, float] = {"m1": 0.0994, "m2": 0.1538, "m3": 0.2044}

# MT-Bench, of 10: all categories; math, coding and reasoning ("hard"); and the others.
MT_BENCH: dict[str, dict[str, float]] = {
  "all": {"baseline": 6.85, "m1": 6.78, "m2": 7.01, "m3": 7.25},
  "hard": {"baseline": 3.93, "m1": 3.83, "m2": 4.05, "m3": 4.17},
  "rest": {"baseline": 8.60, "m1": 8.55, "m2": 8.79, "m3": 9.10},
}

# The NLP benchmarks, of 1 (accuracy, or exact match for GSM8K and NQ); m0 is Llama 2 70B. The paper does not state its
# shots; Llama 2's are those of the configuration's section `nlp`.
NLP: dict[str, dict[str, float]] = {
  "arc_easy": {"m0": 0.8020, "baseline": 0.7649, "m1": 0.7814, "m2": 0.7484, "m3": 0.7235},
  "arc_challenge": {"m0": 0.5740, "baseline": 0.5597, "m1": 0.5751, "m2": 0.5451, "m3": 0.5313},
  "hellaswag": {"m0": 0.8530, "baseline": 0.8517, "m1": 0.8499, "m2": 0.8427, "m3": 0.8329},
  "social_iqa": {"m0": 0.5070, "baseline": 0.5148, "m1": 0.5302, "m2": 0.5123, "m3": 0.4928},
  "piqa": {"m0": 0.8280, "baseline": 0.8259, "m1": 0.8292, "m2": 0.8194, "m3": 0.8079},
  "gsm8k": {"m0": 0.5680, "baseline": 0.5072, "m1": 0.6027, "m2": 0.5929, "m3": 0.5770},
  "mmlu": {"m0": 0.6890, "baseline": 0.6976, "m1": 0.6934, "m2": 0.6931, "m3": 0.6937},
  "openbookqa": {"m0": 0.6020, "baseline": 0.5780, "m1": 0.5760, "m2": 0.5760, "m3": 0.5840},
  "nq_open": {"m0": 0.2530, "baseline": 0.3435, "m1": 0.3548, "m2": 0.3307, "m3": 0.3186},
}
