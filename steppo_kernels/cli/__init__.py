"""The command line; nothing else of the package imports it, or typer and rich."""

from .app import main

__all__ = ["main"]
