# Every knob, by theme: its meaning and its default.  make repository WEIGHTS=synthetic, or export CT_WEIGHTS=synthetic:
# in the environment CT_ keeps them apart from others' variables.  What each may be: scripts/steps/knobs.py

# --- Models -------------------------------------------------------------------

# weights (built here) or prebuilt (model_repository_running.zip, checked and served here)
FROM = $(or $(CT_FROM),weights)
# Checkpoints: yandex (weights.zip, and your own in training/weights/) or synthetic (made here)
WEIGHTS = $(or $(CT_WEIGHTS),yandex)
# weights.zip fetched by hand, used instead of downloading it
WEIGHTS_ZIP = $(CT_WEIGHTS_ZIP)
# model_repository_running.zip fetched by hand, likewise
REPOSITORY_ZIP = $(CT_REPOSITORY_ZIP)
# Variant of the CT-ViT: LiPro, Base or VocabFine
VIT = $(or $(CT_VIT),LiPro)
# Optional models to add, such as lipro; for `make compare`, the folder of the other repository
WITH = $(CT_WITH)
# What `make onnx` and `make trt` make: vit, head, bpr or a model's name (nothing: all)
MODEL = $(CT_MODEL)
# Of the ViT on a GPU: fp32, tf32 (products of 10 bits) or fp16 (half the size)
PRECISION = $(or $(CT_PRECISION),fp32)
# ONNX operator set; what a release of Triton reads: scripts/serve/releases.yaml
OPSET = $(or $(CT_OPSET),20)
# onnx, plan (TensorRT plans instead; the existing client misses the ONNX models) or both
FORMAT = $(or $(CT_FORMAT),onnx)
# Where the finished models are published
REPOSITORY = $(or $(CT_REPOSITORY),model_repository_running)
# Consent: 1 (new archives), unserved or slower (publish all the same), licences (push)
ACCEPT = $(CT_ACCEPT)

# --- TensorRT -----------------------------------------------------------------

# NVIDIA's release of the images of TensorRT and Triton
NGC_RELEASE = $(or $(CT_NGC_RELEASE),24.06)
# Prefix of a mirror of nvcr.io, such as registry.example.org/
REGISTRY = $(CT_REGISTRY)
# Folders with plans built elsewhere, like build/plan here
PLANS = $(CT_PLANS)
# Options for trtexec, such as --builderOptimizationLevel=4
TRTEXEC_FLAGS = $(CT_TRTEXEC_FLAGS)
# 1: `make trt` prints its commands, to paste, and runs none
DRY = $(CT_DRY)
# 1: `make trt` asks NVIDIA's parser, no GPU; `make status` fails if stale; a file: provenance
CHECK = $(CT_CHECK)
# Kinds of GPU for `make trt-fleet`, such as "a100 l4": names in scripts/plans/fleet.yaml
GPUS = $(CT_GPUS)

# --- Serve and share ----------------------------------------------------------

# Where serve and up listen; 0.0.0.0 lets other machines ask, none (up) only the network chest
ADDRESS = $(or $(CT_ADDRESS),127.0.0.1)
# Their ports for HTTP, gRPC and metrics
PORTS = $(or $(CT_PORTS),8000 8001 8002)
# 1: serve and up load the models at the start, and others only with the key, over gRPC, too
LOCK = $(CT_LOCK)
# What `make up` gives Triton: gpu, or cpu where there is none
DEVICE = $(or $(CT_DEVICE),gpu)
# The image that image makes, push pushes, up runs and verify asks (nothing: each its own)
IMAGE = $(CT_IMAGE)
# Which image `make image` makes: triton or inference
TARGET = $(or $(CT_TARGET),triton)
# Base of the inference image: the GPU's libraries; python:3.11-slim is smaller, for CPUs
BASE = $(or $(CT_BASE),nvidia/cuda:12.6.3-cudnn-runtime-ubuntu24.04)
# Private key for `make sign`; the public one for verify, FROM=prebuilt and PLANS
KEY = $(CT_KEY)

# --- Infer --------------------------------------------------------------------

# What `make infer` reads: a folder with a folder, archive or NIfTI file for each study
INPUT = $(CT_INPUT)
# The folder that it writes its tables to
OUTPUT = $(CT_OUTPUT)
# A running Triton that it asks, host:port of gRPC (nothing: ONNX Runtime here)
TRITON = $(CT_TRITON)
# 1: it reads also the studies that are in OUTPUT already
AGAIN = $(CT_AGAIN)

# --- This machine -------------------------------------------------------------

# Folder or s3://bucket/prefix that machines share: results of steps are taken from there
CACHE = $(CT_CACHE)
# write, or read: nothing is put there
CACHE_MODE = $(or $(CT_CACHE_MODE),write)
# An artifact of which `make status` tells all that it is made from
FILE = $(CT_FILE)
# An earlier build/bench.json: `make bench` then says what moved
COMPARE = $(CT_COMPARE)
# 1: `make help` lists these knobs
KNOBS = $(CT_KNOBS)
# Python that .venv is made with, 3.11 or 3.12; of another one uv brings 3.12
PYTHON = $(or $(CT_PYTHON),python3)
