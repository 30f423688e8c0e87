"""ONNX export of a trained model (extra ``export``)."""
