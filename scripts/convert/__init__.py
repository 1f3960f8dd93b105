"""What turns checkpoints into compared ONNX files besides the exports in convertation/: entries of models.yaml, seeded
checkpoints, comparisons. Make runs these programs as steps. Each writes one output.
"""
