"""Notebook tools: try out kernels, and compare engines. The engine does not depend on them.

(These functions are names of the package, such as `labkit.divergence`. A module of that name there would hide them.)
"""
