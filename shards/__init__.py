"""Tar shards: building, checking and streaming them; no model code here."""
