"""`labkit bench gpu`: every measurement on one GPU, in one command.

    labkit bench gpu --json FILE
    PYTHONPATH=.:kernels python -m labkit.bench.gpu --json FILE

Each part runs in its own process, so a part that fails or hangs loses only its own figures. The file is written after
each part. Kernels and the quality gate are checked first, and what fails is not timed. `--quick --device cpu` runs a
small version of every part.
"""
