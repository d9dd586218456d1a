"""What the model learns from: rendered and real pairs of views of one object."""
