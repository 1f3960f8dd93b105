# From CT studies to findings, the models inside. `make image TARGET=inference` builds it and brings as context
#
#   requirements-inference.txt    exact pins; ca.pem beside it where pip is to trust another authority
#   vit/ models/                  of the published repository what is run: the largest, which changes the least, first
#   scripts/infer/                the program
#
# CUDA 12 and cuDNN 9, which ONNX Runtime 1.22 asks for on a GPU. Any Debian or Ubuntu serves without one.
ARG BASE=nvidia/cuda:12.6.3-cudnn-runtime-ubuntu24.04

FROM ${BASE}
RUN python3 -c "import ensurepip" 2> /dev/null || { apt-get update -qq && \
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends python3 python3-venv && \
    rm -rf /var/lib/apt/lists/*; }
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST
COPY requirements-inference.txt ca.pem* /tmp/pip/
# An address with a password is a secret of the build, which no layer and no history keeps
RUN for name in PIP_INDEX_URL PIP_EXTRA_INDEX_URL; do \
      if [ -e /run/secrets/$name ]; then export "$name=$(cat /run/secrets/$name)"; fi; done; \
    if [ -e /tmp/pip/ca.pem ]; then export PIP_CERT=/tmp/pip/ca.pem; fi; \
    python3 -m venv /opt/inference && \
    /opt/inference/bin/python3 -m pip install --no-cache-dir --disable-pip-version-check \
      --requirement /tmp/pip/requirements-inference.txt && rm -r /tmp/pip
COPY vit/ /models/
COPY models/ /models/
COPY scripts/ /app/scripts/
WORKDIR /app
ENV PYTHONDONTWRITEBYTECODE=1
# As root the tables get the owner of /output; or run it as anyone: docker run --user "$(id -u):$(id -g)"
ENTRYPOINT ["/opt/inference/bin/python3", "-m", "scripts.infer", "--models", "/models"]
CMD ["/input", "/output"]
