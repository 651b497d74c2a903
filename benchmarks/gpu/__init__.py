"""What can only be measured on a GPU: `python3 -m benchmarks.gpu` in the project's root, see docs/gpu.md.

Three parts, each with a budget of time and a JSON file of its own that is written after every figure: `right` (do CUDA
and the CPU agree), `fast` (what scoring, training and evaluating cost) and `decisive` (which schedule keeps most).
"""
