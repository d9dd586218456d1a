"""Builds a segmenter's bundle from the ONNX files of public segmentation networks. Needs no PyTorch."""
