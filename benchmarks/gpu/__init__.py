"""One command for a machine with an NVIDIA GPU: `make gpu-check`.

It builds, runs the tests that need a GPU, validates, looks for memory errors and races, measures,
and writes down what it found. It needs no network.
"""
