"""Packaging of srlm_jax. Lower bounds are versions that were run; `constraints/` pins whole tested sets."""

import pathlib
import runpy

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = runpy.run_path(str(HERE / "srlm_jax" / "version.py"))["VERSION"]  # Without importing what it needs.

CORE = [
  "absl-py>=2.5.1,<3",
  "array-record>=0.8.6,<0.9",
  "etils[epath]>=1.15,<2",
  "filelock>=4.2,<5",
  "flax>=0.12.8,<0.13",
  "fsspec>=2026.9",
  "grain>=0.2.18,<0.3",
  "huggingface_hub>=2.4,<3",
  "importlib_resources>=7.1,<8",  # tensorflow-datasets needs it and does not declare it.
  "jax>=0.10.2,<0.13",  # The last for Python 3.11 is 0.10.2.
  "jinja2>=3.1.6,<4",
  "matplotlib>=3.11.2,<4",
  "ml-collections>=1.1,<2",
  "numpy>=2.4,<3",
  "optax>=0.2.8,<0.3",
  "orbax-checkpoint>=0.12.8,<0.13",
  "pydantic>=2.14,<3",
  "rapidfuzz>=3.14.6,<4",
  "safetensors>=0.8,<0.9",
  "scikit-learn>=1.9.1,<2",
  "scipy>=1.17.1,<2",
  "sentencepiece>=0.2.3,<0.3",
  "tensorflow-datasets>=4.9.10,<5",
  "threadpoolctl>=3.8,<4",
  "tqdm>=4.70,<5",
  "transformers>=5.23,<6",
]

KERNEL = "ipykernel>=7.4,<8"
OPENAI = "openai>=3.57,<4"
TORCH = "torch==2.13.0"

EXTRAS = {
  # Accelerators: at most one of them, beside the core.
  "tpu": ["jax[tpu]"],
  "cuda": ["jax[cuda13]"],
  "cuda12": ["jax[cuda12]"],
  # Storage and reporting.
  "gcs": ["gcsfs>=2026.9"],
  "report": ["tensorboardX>=2.6.5,<3"],
  # Rollouts from an OpenAI-compatible server, and the outside evaluations.
  "server": [OPENAI],
  "eval": [
    "alpaca-eval>=0.6.6,<0.7",
    "lm-eval>=0.4.13,<0.5",
    "pandas<3",  # alpaca-eval takes up whole-number verdicts again in a way that pandas 3 refuses.
    "setuptools<82",  # It imports pkg_resources, which later ones do not have.
  ],
  # Development.
  "notebook": [KERNEL, "jupyter>=1.1.1,<2"],
  "test": [
    "hypothesis>=6.170,<7",
    KERNEL,  # With nbclient, to run the notebook.
    "mypy>=2.4.1,<3",
    "nbclient>=0.11,<0.12",
    OPENAI,
    "playwright>=1.65.2,<2",  # Drives a chromium that is installed already; it needs none of its own.
    "psutil>=7.2,<8",  # What a process holds, for benchmarks/memory.py and the fault campaign.
    "pytest>=9.2,<10",
    "ruff>=0.17.6,<0.18",
  ],
  # Coverage-guided fuzzing, for pytest -m faults; without it hypothesis does it alone.
  "faults": ["atheris>=3.0,<4"],
  # For the parity tests alone: without it they compare with golden files. lm-eval's own backend needs accelerate.
  "torch": ["accelerate>=1.15,<2", TORCH],
  # What benchmarks/ compares with: they bring torch, and llama.cpp is built here, in about three minutes.
  "bench": ["gguf>=0.19,<0.20", "llama-cpp-python>=0.3.36,<0.4", TORCH, "trl==1.16.0"],
}

setuptools.setup(
  name="srlm_jax",
  version=VERSION,
  description="Self-Rewarding Language Models (arXiv 2401.10020) in JAX",
  long_description=(HERE / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  license_files=["LICENSE"],
  python_requires=">=3.11",
  packages=setuptools.find_packages(include=["srlm_jax", "srlm_jax.*"]),
  package_data={"srlm_jax": ["rubrics/*.txt", "*.jinja", "*.css", "*.js"]},
  install_requires=CORE,
  extras_require=EXTRAS,
  entry_points={"console_scripts": ["srlm = srlm_jax.__main__:main"]},
)
