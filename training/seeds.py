"""Seeds of what training draws at random, one per use: no two stages see the same crops or pairs."""

from __future__ import annotations

AUTOENCODER_CROPS = 0
IDENTITY_VIEWS = 1
ENCODED_PAIRS = 2
"""Which views make a pair, and how; drawn once, when the pairs are encoded."""
TRAINING_PAIRS = 3
"""Which pair is a sample, with which noise and timestep."""
DECODER_CROPS = 4
VIEW_SAMPLES = 5
SUBJECT_PICTURES = 6
CAPTIONED_VIEWS = 7
CUT_OUTS = 8
FRESH_WEIGHTS = 0
"""Weights that a stage starts from where nothing is given: a recipe gives the same network every time."""
