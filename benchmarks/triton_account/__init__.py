"""What an H100 could do with the kernels of the vocabulary level at best, from their machine code.

``python -m benchmarks.triton_account`` compiles them for sm_90, counts the instructions and bytes
of their inner loops, and prints the numbers of ``triton_account.md``; with ``--write`` it puts them
there, between the comments that name them. Needs Triton but no GPU: nothing is run or timed.
"""
