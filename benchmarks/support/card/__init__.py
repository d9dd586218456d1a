"""The parts of card.py: each measures in a process of its own and prints its rows."""
