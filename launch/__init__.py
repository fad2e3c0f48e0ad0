"""Command-line entry points: everything that is run, nothing that is imported by the library."""
