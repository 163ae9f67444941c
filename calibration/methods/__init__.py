"""Methods beyond rounding: what can be done to a float graph so that its INT8 form is closer to it.

Each module is one method, a function from a prepared graph to a graph:

- ``equalization``: scales channels between neighbouring layers; the float function stays the same.
- ``smoothing``: moves outliers of activations into weights (SmoothQuant); the float function stays the same.
- ``rounding``: chooses each weight's integer by the layer's output instead of the nearest.
- ``bias_correction``: takes the mean error of every channel out of the biases.

``calibration.choose`` tries them and keeps those that help.
"""
