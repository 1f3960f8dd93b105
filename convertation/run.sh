#!/bin/sh
# Start the container with trtexec and make the plan of every model in it: sh run.sh
cd "$(dirname "$0")/.." || exit
echo "this is done by: make trt, which runs trtexec in its container; nothing is to be typed there"
exec make trt
