"""Launchers of the C++ kernels: allocate the outputs, hand over pointers and sizes."""
