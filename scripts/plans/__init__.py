"""TensorRT plans: find the GPU, run trtexec in Docker, compare with ONNX Runtime, submit jobs to Slurm.

Make calls these programs for `make trt`, `make trt-fleet` and `make doctor`; they write build/plan/.
"""
