"""What a training run does, stage by stage: one module per system, and what they share."""
