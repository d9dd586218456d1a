"""Every number in the README and in docs/ comes out of a command in here."""
