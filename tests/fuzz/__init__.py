"""Random compositions of the package's functions, and arguments that nobody expects."""
