"""Times the kernels and the worker's steps on a GPU at the 8B model's shape: ``python -m kernels.bench``.

Everything is compared with a twin first; what is wrong is not timed. Figures are ratios against ceilings that are
measured in the same run, in turns, so that a clock that drifts hits all alike. Rows are appended to a CSV.
"""
