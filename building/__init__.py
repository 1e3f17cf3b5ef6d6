"""What setup.py builds the compiled modules with. It needs no torch and no GPU."""


class CannotBuild(Exception):
    """A module is left out; the text says why."""


class CompilerFailed(CannotBuild):
    """A compiler was there, and did not take the sources."""
