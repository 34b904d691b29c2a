"""What the scripts share, and nobody needs in order to understand GR-1."""
