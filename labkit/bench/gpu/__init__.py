"""`labkit bench gpu`: everything there is to measure on one GPU, in one command.

    labkit bench gpu --json FILE
    PYTHONPATH=.:kernels python -m labkit.bench.gpu --json FILE

Every part runs in a process of its own, so that a part which fails or hangs loses only its own figures, and the file is
written after each part. Kernels and the quality gate are checked first: what fails them is not timed. `--quick
--device cpu` runs every part in miniature.
"""
