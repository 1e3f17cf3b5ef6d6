"""``python -m steppo_kernels`` is the command ``steppo-kernels``."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="steppo-kernels")
