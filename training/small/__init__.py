"""What only the small example models need."""
