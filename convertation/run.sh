#!/bin/sh
# The container with trtexec, and in it the plan of every model: sh run.sh
cd "$(dirname "$0")/.." || exit
echo "this is done by: make trt, which runs trtexec in its container; nothing is to be typed there"
exec make trt
