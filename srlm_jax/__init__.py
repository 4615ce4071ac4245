"""srlm_jax: Self-Rewarding Language Models (arXiv 2401.10020) in JAX."""
