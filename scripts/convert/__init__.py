"""From checkpoints to compared ONNX files, beside convertation/: parts of models.yaml, seeded checkpoints, comparisons.
Make calls these as steps; each writes its one output.
"""
