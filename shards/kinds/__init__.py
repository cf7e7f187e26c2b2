"""The kinds of `esol-shards create`, one file each; whatever stands here is found."""
