"""``edgekit check``: will a model run on a device? Operators, opset, precision, DLA, memory; no GPU.

check(load_model("model.onnx"), [profile.load("jetson-agx-xavier")])    a verdict for each device
"""
