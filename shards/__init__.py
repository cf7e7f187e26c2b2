"""Makes, indexes and checks shard sets: `esol-shards` or `python -m shards`."""
