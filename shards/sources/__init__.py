"""Readers of the data layouts that `shards build` accepts."""
