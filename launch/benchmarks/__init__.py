"""What `avs-dist bench` times and how; needs torch, triton and numpy only."""
