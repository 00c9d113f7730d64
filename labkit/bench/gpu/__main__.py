"""`python -m labkit.bench.gpu`."""

from labkit.bench.gpu.run import main

raise SystemExit(main())
