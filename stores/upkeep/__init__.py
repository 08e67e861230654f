"""What lies under a root: looked at, verified, repaired, listed and removed."""
