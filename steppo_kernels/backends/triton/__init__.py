"""The Triton backend: portable kernels for NVIDIA and AMD GPUs, also under TRITON_INTERPRET=1.

Conventions of the kernels: `p_x` pointers, `b_x` block values, `i_x` indices, `m_x` masks, upper
case for what is known when a kernel is compiled. Grids have one dimension and at most
`launch.MAX_PROGRAMS` programs for work that leaves partial sums, each of which strides over its
blocks: sums are then the same in every run, and a second kernel of one program adds up few of them.
Lengths are never specialized on, so that a new one compiles nothing; positions are int64.
"""
