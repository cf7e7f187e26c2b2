"""`python -m shards` is `esol-shards`."""

from shards.cli import main

raise SystemExit(main())
