"""The specification: plain, readable PyTorch for any device, differentiated by autograd.

The compiled backends are held to these functions in fp64. They import nothing optional.
"""
