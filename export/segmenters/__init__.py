"""ONNX files of public segmentation networks -> bundle of a segmenter. Needs no PyTorch."""
