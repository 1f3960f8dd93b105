# Every knob by theme: what it means, and its default.  On the command line: make repository WEIGHTS=synthetic; in the
# environment with the prefix CT_: export CT_WEIGHTS=synthetic.  scripts/steps/knobs.py checks the values

# --- Models -------------------------------------------------------------------

# weights: build from checkpoints; prebuilt: check and publish model_repository_running.zip
FROM = $(or $(CT_FROM),weights)
# yandex: weights.zip, and your own files in training/weights/; synthetic: seeded, made here
WEIGHTS = $(or $(CT_WEIGHTS),yandex)
# A weights.zip that you downloaded yourself
WEIGHTS_ZIP = $(CT_WEIGHTS_ZIP)
# A model_repository_running.zip that you downloaded yourself
REPOSITORY_ZIP = $(CT_REPOSITORY_ZIP)
# Variant of the CT-ViT: LiPro, Base or VocabFine
VIT = $(or $(CT_VIT),LiPro)
# Optional models to add, such as lipro; for `make compare` the folder of the other repository
WITH = $(CT_WITH)
# What `make onnx` and `make trt` make: vit, head, bpr or a model's name; empty: all
MODEL = $(CT_MODEL)
# Precision of the ViT on a GPU: fp32, tf32 (10-bit products) or fp16 (half the size)
PRECISION = $(or $(CT_PRECISION),fp32)
# ONNX operator set; scripts/serve/releases.yaml lists what each Triton reads
OPSET = $(or $(CT_OPSET),20)
# onnx, plan (plans instead of ONNX: the existing client will not find its models) or both
FORMAT = $(or $(CT_FORMAT),onnx)
# Folder where the finished models are published
REPOSITORY = $(or $(CT_REPOSITORY),model_repository_running)
# Your consent: 1 (newer archives), unserved or slower (publish anyway), licences (push)
ACCEPT = $(CT_ACCEPT)

# --- TensorRT -----------------------------------------------------------------

# NVIDIA's release of the TensorRT and Triton images
NGC_RELEASE = $(or $(CT_NGC_RELEASE),24.06)
# Prefix of a mirror of nvcr.io, such as registry.example.org/
REGISTRY = $(CT_REGISTRY)
# Folders with plans built on other machines, laid out as build/plan is here
PLANS = $(CT_PLANS)
# Options to add for trtexec, such as --builderOptimizationLevel=4
TRTEXEC_FLAGS = $(CT_TRTEXEC_FLAGS)
# 1: `make trt` prints its commands and does not run them
DRY = $(CT_DRY)
# 1: `make trt` asks NVIDIA's parser, no GPU; `make status` fails if stale; a file: provenance
CHECK = $(CT_CHECK)
# Kinds of GPU for `make trt-fleet`, such as "a100 l4": names in scripts/plans/fleet.yaml
GPUS = $(CT_GPUS)

# --- Serve and share ----------------------------------------------------------

# Where serve and up listen; 0.0.0.0: on all networks; none (up): only Docker's network chest
ADDRESS = $(or $(CT_ADDRESS),127.0.0.1)
# Ports of serve and up for HTTP, gRPC and metrics
PORTS = $(or $(CT_PORTS),8000 8001 8002)
# 1: serve and up load all models at the start; to load others then needs the key, over gRPC too
LOCK = $(CT_LOCK)
# Device that `make up` gives to Triton: gpu or cpu
DEVICE = $(or $(CT_DEVICE),gpu)
# Image that `make image` builds, push pushes, up runs and verify asks; empty: the usual one
IMAGE = $(CT_IMAGE)
# Image that `make image` builds: triton or inference
TARGET = $(or $(CT_TARGET),triton)
# Base of the inference image, with the GPU's libraries; python:3.11-slim: smaller, for CPUs
BASE = $(or $(CT_BASE),nvidia/cuda:12.6.3-cudnn-runtime-ubuntu24.04)
# Private key for `make sign`; public key for verify, FROM=prebuilt and PLANS
KEY = $(CT_KEY)

# --- Infer --------------------------------------------------------------------

# Folder that `make infer` reads: a folder, an archive or a NIfTI file for each study
INPUT = $(CT_INPUT)
# Folder where `make infer` writes its tables
OUTPUT = $(CT_OUTPUT)
# host:port of a running Triton's gRPC for `make infer`; empty: ONNX Runtime on this machine
TRITON = $(CT_TRITON)
# 1: `make infer` also reads the studies that OUTPUT already has
AGAIN = $(CT_AGAIN)

# --- This machine -------------------------------------------------------------

# Folder or s3://bucket/prefix that machines share; results of steps are taken from it
CACHE = $(CT_CACHE)
# write, or read: take results and store none
CACHE_MODE = $(or $(CT_CACHE_MODE),write)
# Artifact whose whole chain `make status` prints
FILE = $(CT_FILE)
# An earlier build/bench.json; `make bench` prints what changed since
COMPARE = $(CT_COMPARE)
# 1: `make help` lists the knobs
KNOBS = $(CT_KNOBS)
# Python for .venv, 3.11 or 3.12; if it is another version, uv installs 3.12
PYTHON = $(or $(CT_PYTHON),python3)
