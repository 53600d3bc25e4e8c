"""From a model to a graph of operators with their prices, by TorchDynamo and AOTAutograd; knows no other package.

Importing this package costs nothing: :mod:`graph_capture.graph` has no torch in it, whoever captures imports
:mod:`graph_capture.capture`.
"""
