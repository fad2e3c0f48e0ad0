"""What `avs-dist doctor` looks at. Everything heavy is imported inside a check: the doctor runs where imports fail."""
