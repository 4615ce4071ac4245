"""Starts srlm, here and as `python -m srlm_jax`: a signal to stop is heard before the seconds that its imports take."""

from srlm_jax import interruption


def main() -> None:
  """Console entry point."""
  interruption.at_once()
  from srlm_jax import main as command_line

  command_line.run()


if __name__ == "__main__":
  main()
