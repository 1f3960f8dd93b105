# Triton with the chest-CT models inside. `make image` builds it and brings as context, from the published repository,
#
#   requirements.txt    what its Python models need, exact pins; ca.pem beside it where pip is to trust another authority
#   *.tar               /models, in parts: the largest, which changes the least, comes first, so that a new head is
#                       megabytes to push; each makes the same layer on every machine, with BuildKit and without
ARG BASE

# Triton and what the Python models need: `make up` runs this stage, the published repository mounted at /models
FROM ${BASE} AS server
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST
COPY requirements.txt ca.pem* /tmp/pip/
# An address with a password is a secret of the build, which no layer and no history keeps
RUN for name in PIP_INDEX_URL PIP_EXTRA_INDEX_URL; do \
      if [ -e /run/secrets/$name ]; then export "$name=$(cat /run/secrets/$name)"; fi; done; \
    if [ -e /tmp/pip/ca.pem ]; then export PIP_CERT=/tmp/pip/ca.pem; fi; \
    python3 -m pip install --no-cache-dir --disable-pip-version-check --root-user-action=ignore \
      --requirement /tmp/pip/requirements.txt && rm -r /tmp/pip
# triton-server, the user that NVIDIA's image has for this; by number, so that Kubernetes can tell that it is not root
USER 1000:1000
EXPOSE 8000 8001 8002
# Its models' configs are complete, and are served as they are written
ENV CHEST_OPTIONS=--disable-auto-complete-config
# The server alone: in explicit mode the client loads the models it asks
HEALTHCHECK --interval=5s --timeout=5s --start-period=60s --retries=6 \
  CMD curl --fail --silent --noproxy '*' http://127.0.0.1:8000/v2/health/ready
# The pool of pinned memory holds two batches of four volumes, from which they are copied to the GPU
# What asks for a key, and LOCK=1: docker/compose.yaml
CMD ["sh", "-c", "key=chest-key=${CHEST_KEY:-$(cat /proc/sys/kernel/random/uuid)}; \
exec tritonserver --model-repository=/models --model-control-mode=explicit $CHEST_OPTIONS \
--pinned-memory-pool-byte-size=1769472000 \
${LOCK:+\"--load-model=*\"} \
\"--http-restricted-api=model-repository,shared-memory,trace,logging:$key\" \
\"--grpc-restricted-protocol=${LOCK:+model-repository,}shared-memory,trace,logging:$key\""]

FROM server
ADD vit.tar /
ADD bpr.tar /
ADD heads.tar /
