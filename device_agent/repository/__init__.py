"""A Triton-layout repository of ONNX models: read, checked and served beside the installed bundles."""
