"""The account of the CUDA kernels: what they have to do on an H100, and what nvcc makes of them."""
