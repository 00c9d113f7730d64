"""The workbench of a notebook: what is tried out on kernels and engines there. Knows engines and ops from outside;
nothing of the engine knows it.

(Its functions are names of the package, such as `labkit.divergence`: a module of that name there would hide them.)
"""
