"""Implementations of the operators, and the choice between them.

`choice` says which backend runs, `operators` holds the schema of every operator and how one is
called. `reference` is the specification in plain PyTorch; `compiled` launches the C++ kernels;
`triton` holds the GPU kernels and their launchers. A file is named after its operation in each of
them.
"""
