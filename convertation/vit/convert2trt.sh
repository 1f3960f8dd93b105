#!/bin/sh
# ONNX -> TensorRT plan: sh convert2trt.sh
cd "$(dirname "$0")/../.." || exit
echo "this is done by: make trt MODEL=vit"
exec make trt MODEL=vit
