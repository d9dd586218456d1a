"""Training stages and losses of each system."""
