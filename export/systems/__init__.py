"""Which graphs a system has, with their signatures."""
