"""TensorRT plans: which GPU is here, trtexec in Docker, comparison with ONNX Runtime, Slurm. Make calls these for
`make trt`, `make trt-fleet` and `make doctor`; they write build/plan/.
"""
