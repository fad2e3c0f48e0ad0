"""Network parts (nn.Module): no losses, no distributed code."""
