"""Published systems, one file each, behind the System protocol."""
