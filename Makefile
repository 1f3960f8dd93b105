# weights.zip -> .pt -> .onnx -> checks -> Triton's verdict -> model_repository_running/        make help

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-builtin-rules --no-builtin-variables
.DEFAULT_GOAL := help
.SECONDEXPANSION:

include scripts/steps/given.mk

# --- Knobs: make repository WEIGHTS=synthetic ---------------------------------

# Where the models come from: weights (built here) or prebuilt (model_repository_running.zip, checked and served here)
FROM ?= weights
# Where checkpoints come from: yandex (weights.zip and your own files in training/weights/) or synthetic (made here)
WEIGHTS ?= $(or $(if $(of_the_published),$(filter synthetic,$(ours))),yandex)
# weights.zip fetched by hand, used instead of downloading it
WEIGHTS_ZIP ?=
# model_repository_running.zip fetched by hand, used instead of downloading it
REPOSITORY_ZIP ?=
# Variant of the CT-ViT: LiPro, Base or VocabFine
VIT ?= LiPro
# Optional models to add, such as lipro; in `make compare`, the folder of the other repository
WITH ?=
# What `make onnx` and `make trt` make: vit, head or bpr (nothing: all)
MODEL ?=
# Precision of the ViT on a GPU: fp32, tf32 (products of 10 bits) or fp16 (half the size); heads and bpr stay fp32
PRECISION ?= $(or $(if $(of_the_published),$(seen_precision)),fp32)
# ONNX operator set; what a release of Triton reads: scripts/serve/releases.yaml
OPSET ?= 20
# What is published: onnx, plan (TensorRT plans instead; the existing client misses the ONNX models) or both
FORMAT ?= onnx
# Where the finished models are published
REPOSITORY ?= model_repository_running

# NVIDIA's release that the images of TensorRT and Triton come from
NGC_RELEASE ?= 24.06
# Prefix of a mirror of nvcr.io, such as registry.example.org/
REGISTRY ?=
# Folders with plans built on other machines, like build/plan here
PLANS ?=
# Who signed: `make sign` takes the private key; the public one `make verify` and what is brought here (FROM=prebuilt, PLANS)
KEY ?=
# Further options for trtexec, such as --builderOptimizationLevel=4
TRTEXEC_FLAGS ?=
# 1: `make trt` prints its commands, ready to paste, and runs none
DRY ?=
# Kinds of GPU that `make trt-fleet` builds plans for, such as "a100 l4": names in scripts/plans/fleet.yaml
GPUS ?=

# Image that `make image` makes, `make push` pushes, `make up` runs, `make verify` asks (nothing: each its own)
IMAGE ?=
# Which image `make image` makes: triton or inference
TARGET ?= triton
# What the inference image starts from: the GPU's libraries; python:3.11-slim is smaller and runs on the CPU
BASE ?= nvidia/cuda:12.6.3-cudnn-runtime-ubuntu24.04
# What `make up` gives Triton: gpu, or cpu where there is none
DEVICE ?= gpu
# Where `make serve` and `make up` listen; 0.0.0.0 lets other machines ask, none (`make up`) only the network chest
ADDRESS ?= 127.0.0.1
# Its ports for HTTP, gRPC and metrics
PORTS ?= 8000 8001 8002
# 1: `make serve` and `make up` load the models at the start, and others only with the server's key, over gRPC too
LOCK ?=

# The folder that `make infer` reads: a folder, archive or NIfTI file per study; `make compare` takes volumes, too (.npy, .npz)
INPUT ?=
# The folder that `make infer` writes its tables to
OUTPUT ?=
# A running Triton that it asks, host:port of gRPC (nothing: ONNX Runtime here)
TRITON ?=
# 1: it reads also the studies that are in OUTPUT already
AGAIN ?=

# Consent: 1 (`make update` locks new archives), unserved (FROM=prebuilt publishes what cannot be served here), licences (`make push`)
ACCEPT ?=
# An earlier build/bench.json: `make bench` then says what moved
COMPARE ?=
# Folder or s3://bucket/prefix that machines share: results of steps are taken from there, or put there
CACHE ?=
# read: nothing is put there
CACHE_MODE ?= write
# Python that .venv is made with: 3.11 or 3.12; another one brings python3.12, by uv where there is none
PYTHON ?= python3

include scripts/steps/knobs.mk

# --- What there is ------------------------------------------------------------

models      := $(foreach model,$(sort $(all_models)),$(if $($(model).optional),$(filter $(model),$(WITH)),$(model)))
heads       := $(foreach model,$(models),$(if $(filter head,$($(model).family)),$(model)))
weights     := $(if $(filter synthetic,$(WEIGHTS)),build/synthetic,training/weights)
kind        := $(if $(filter synthetic,$(WEIGHTS)),synthetic,real)
checkpoints := $(foreach model,$(models),$(weights)/$($(model).checkpoint)) $(weights)/bpr/inference-settings.json
onnx        := $(models:%=build/onnx/%.onnx)
checks      := $(models:%=build/checks/%.json)
varied      := $(foreach model,$(models),$(if $($(model).variants),$(model)))
releases    := scripts/serve/releases.py scripts/serve/releases.yaml
onnx_tf32   := $(varied:%=build/onnx/%.tf32.onnx)
onnx_fp16   := $(varied:%=build/onnx/%.fp16.onnx)
checks_tf32 := $(varied:%=build/checks/%.tf32.json)
checks_fp16 := $(varied:%=build/checks/%.fp16.json)
limits      := $(foreach model,$(models) $(foreach precision,tf32 fp16,$(varied:%=%.$(precision))),build/models/$(model).tolerance.json)
entries     := $(models:%=build/models/%.json) $(limits)
bpreg       := $(sort $(wildcard convertation/bpr/bpreg/*.py))

# vit, vit.tf32 or vit.fp16, as PRECISION says
variant = $1$(if $(filter $1,$(varied)),$(filter-out .fp32,.$(PRECISION)))

# TensorRT plans: of each model for each GPU, which a folder is named after (build/plan/sm86); see scripts/plans/plans.mk
planned     := $(filter vit $(heads),$(models))
config.vit  := convertation/vit/config.pbtxt
$(foreach head,$(heads),$(eval config.$(head) := convertation/head/$(head).pbtxt))
config_of   = $(if $(filter %.tf32 %.fp16,$(call variant,$1)),$(config.$1:.pbtxt=.tf32.pbtxt),$(config.$1))
include scripts/plans/plans.mk

# What bpr_model needs in the image of a release; the usual one's file names none
bpr_pins := $(or $(wildcard convertation/bpr/requirements-$(NGC_RELEASE).txt),convertation/bpr/requirements.txt)

# Each file of the published repository, and the file it is a copy of
contents := \
  $(foreach model,$(if $(filter plan,$(FORMAT)),,$(planned)), \
    $(model)_onnx/config.pbtxt=$(call config_of,$(model)) $(model)_onnx/1/model.onnx=build/onnx/$(call variant,$(model)).onnx) \
  $(foreach model,$(if $(gpu),$(if $(filter onnx,$(FORMAT)),,$(planned))),$(model)_trt/config.pbtxt=build/plan/$(model).config.pbtxt \
    $(foreach folder,$(folders),$(model)_trt/1/$(folder).plan=build/plan/$(folder)/$(call variant,$(model)).plan)) \
  bpr_model/config.pbtxt=convertation/bpr/config.pbtxt bpr_model/1/model.py=convertation/bpr/model.py \
  bpr_model/1/requirements.txt=$(bpr_pins) \
  $(foreach file,$(bpreg),$(file:convertation/bpr/%=bpr_model/1/%)=$(file)) \
  bpr_model/1/weights/model.onnx=build/onnx/bpr.onnx \
  bpr_model/1/weights/inference-settings.json=$(weights)/bpr/inference-settings.json

# What each family's scripts are made of
network.vit  := convertation/vit/ctvit.py
network.head := convertation/head/mlp.py
network.bpr  := convertation/bpr/vgg.py
check.bpr    := $(bpreg) $(weights)/bpr/inference-settings.json

# --- The pipeline, in order ---------------------------------------------------

# Environments; the second is Triton's own, the third runs the published networks without PyTorch
.venv/installed: requirements.txt requirements.lock scripts/steps/venv.sh
	$(call step,scripts/steps/venv.sh $(PYTHON) .venv requirements.txt $(out))

.venv-triton/installed: requirements-triton.txt requirements-triton.lock convertation/bpr/requirements.txt scripts/steps/venv.sh
	$(call step,scripts/steps/venv.sh $(PYTHON) .venv-triton requirements-triton.txt $(out))

.venv/installed-for-s3: requirements-s3.txt requirements-s3.lock scripts/steps/venv.sh | .venv/installed
	$(call step,scripts/steps/venv.sh $(PYTHON) .venv requirements-s3.txt $(out))

.venv-inference/installed: requirements-inference.txt requirements-inference.lock scripts/steps/venv.sh
	$(call step,scripts/steps/venv.sh $(PYTHON) .venv-inference requirements-inference.txt $(out))

# NVIDIA's TensorRT for RTX, which judges without a GPU; only make trt CHECK=1 asks for it (its licence: requirements-rtx.txt)
.venv-rtx/installed: requirements-rtx.txt requirements-rtx.lock scripts/steps/venv.sh
	$(call step,scripts/steps/venv.sh $(PYTHON) .venv-rtx requirements-rtx.txt $(out))

# Signatures: make sign, and whatever is given a KEY
.venv-signing/installed: requirements-signing.txt requirements-signing.lock scripts/steps/venv.sh
	$(call step,scripts/steps/venv.sh $(PYTHON) .venv-signing requirements-signing.txt $(out))

.venv/installed-for-tests: tests/requirements.txt tests/requirements.lock scripts/steps/venv.sh | .venv/installed
	$(call step,scripts/steps/venv.sh $(PYTHON) .venv tests/requirements.txt $(out))

# One model's part of models.yaml
$(models:%=build/models/%.json): build/models/%.json: convertation/models.yaml scripts/convert/model_entry.py | .venv/installed
	$(call step,$(python) -m scripts.convert.model_entry $< $* model $(out))

$(limits): build/models/%.tolerance.json: convertation/models.yaml scripts/convert/model_entry.py \
  | .venv/installed
	$(call step,$(python) -m scripts.convert.model_entry $< $* tolerance $(out))

# A new head's Triton config
convertation/head/%.pbtxt:
	$(error $@ is missing, the Triton config of $*; cp convertation/head/binary.pbtxt $@, and write its name, $*_onnx, and its output into it)

# The two archives, each downloaded only when a step that runs has to read it, and their locks (see scripts/archives/fetch.py)
archives := training/weights.zip training/model_repository_running.zip
fetched  := $(archives) $(archives:=.lock.json)
$(fetched): FORCE | .venv/installed
	$(fetch)

# Checkpoints: seeded ones of the real size, or members of weights.zip where you have put none of your own
$(foreach model,$(models),$(eval model_of.$($(model).checkpoint) := $(model)))
model_of.bpr/inference-settings.json := bpr

ifeq ($(WEIGHTS),synthetic)
$(checkpoints): build/synthetic/%: build/models/$$(model_of.$$*).json scripts/convert/synthesize.py \
  $$(network.$$($$(model_of.$$*).family)) convertation/checkpoint.py | .venv/installed
	$(call step,$(python) -m scripts.convert.synthesize $< $(out),torch numpy)
else
$(checkpoints): training/weights/%: training/weights.zip.lock.json scripts/archives/unpack.py scripts/archives/progress.py scripts/steps/records.py \
  | training/weights.zip .venv/installed
	$(call step,$(python) -m scripts.archives.unpack training/weights.zip $* $(out))
endif

# PyTorch -> ONNX
$(onnx): build/onnx/%.onnx: $(weights)/$$($$*.checkpoint) build/models/%.json \
  convertation/$$($$*.family)/torch2onnx.py $$(network.$$($$*.family)) convertation/checkpoint.py convertation/export.py \
  convertation/onnx_file.py | .venv/installed
	$(call step,$(python) -m convertation.$($*.family).torch2onnx --opset $(OPSET) --weights $(kind) $< build/models/$*.json $(out),\
	  torch onnx onnxscript onnx-ir ml_dtypes numpy)

# The same for a GPU alone, whose arithmetic config.pbtxt says
$(onnx_tf32): build/onnx/%.tf32.onnx: $(weights)/$$($$*.checkpoint) build/models/%.json \
  convertation/$$($$*.family)/torch2onnx.py $$(network.$$($$*.family)) convertation/checkpoint.py convertation/export.py \
  convertation/onnx_file.py | .venv/installed
	$(call step,$(python) -m convertation.$($*.family).torch2onnx --opset $(OPSET) --weights $(kind) --for gpu $< build/models/$*.json $(out),\
	  torch onnx onnxscript onnx-ir ml_dtypes numpy)

# ONNX against PyTorch, on the same input, by our ONNX Runtime and by the one that serves the verdict
comparing = scripts/convert/compare.py scripts/convert/answer.py scripts/convert/compare_vit.py scripts/convert/compare_bpr.py scripts/convert/judge.py scripts/convert/collapse.py scripts/convert/onnx_session.py \
  scripts/convert/sample.py $$(check.$$($$*.family)) $$(network.$$($$*.family)) convertation/checkpoint.py
$(checks): build/checks/%.json: $(weights)/$$($$*.checkpoint) build/models/%.json build/models/%.tolerance.json build/onnx/%.onnx \
  $(comparing) requirements-triton.txt convertation/bpr/requirements.txt | .venv/installed .venv-triton/installed
	$(call step,$(python) -m scripts.convert.compare --deployed .venv-triton/bin/python3 $(wordlist 1,4,$^) $(out),torch onnxruntime-gpu onnx numpy)

$(checks_tf32): build/checks/%.tf32.json: $(weights)/$$($$*.checkpoint) build/models/%.json build/models/%.tf32.tolerance.json build/onnx/%.tf32.onnx \
  $(comparing) requirements-triton.txt convertation/bpr/requirements.txt | .venv/installed .venv-triton/installed
	$(call step,$(python) -m scripts.convert.compare --deployed .venv-triton/bin/python3 $(wordlist 1,4,$^) $(out),torch onnxruntime-gpu onnx numpy)

# That rounded to fp16 where the range of its values allows, and compared with what it was rounded from, as a GPU computes it
$(onnx_fp16): build/onnx/%.fp16.onnx: build/onnx/%.tf32.onnx build/models/%.json scripts/convert/round_fp16.py scripts/convert/onnx_session.py \
  scripts/convert/sample.py convertation/fp16.py convertation/onnx_file.py | .venv/installed
	$(call step,$(python) -m scripts.convert.round_fp16 $< build/models/$*.json $(out),onnxruntime-gpu onnx onnx-ir ml_dtypes numpy)

$(checks_fp16): build/checks/%.fp16.json: build/checks/%.tf32.json build/models/%.json build/models/%.fp16.tolerance.json \
  build/onnx/%.tf32.onnx build/onnx/%.fp16.onnx $(heads:%=build/onnx/%.onnx) scripts/convert/compare_fp16.py scripts/convert/emulate_fp16.py convertation/fp16.py convertation/onnx_file.py \
  scripts/convert/probabilities.py $(comparing) requirements-triton.txt convertation/bpr/requirements.txt | .venv/installed .venv-triton/installed
	$(call step,$(python) -m scripts.convert.compare_fp16 --deployed .venv-triton/bin/python3 $(foreach head,$(heads),--head $(head)=build/onnx/$(head).onnx) $(wordlist 1,5,$^) $(out),\
	  torch onnxruntime-gpu onnx onnx-ir ml_dtypes numpy)

# Who checks a repository offline
checking := $(addprefix scripts/serve/,check_repository.py config_rules.py onnx_agreement.py python_model.py releases.py releases.yaml)

# ONNX -> TensorRT plan. What shapes it: the request, the GPU and TensorRT; so neither the ONNX file with its metadata nor
# our own scripts are inputs
$(requests): build/plan/%.request.json: build/onnx/%.onnx build/models/$$(call plain,$$*).json scripts/plans/plan_request.py scripts/plans/trtexec_options.py $(checking) \
  | .venv/installed
	$(call step,$(python) -m scripts.plans.plan_request $(call precision,$*) $(flags) $(wordlist 1,2,$^) $(out),onnx tritonclient)

$(built): build/plan/%.plan: build/plan/$$(*F).request.json | build/onnx/$$(*F).onnx
	$(call step,$(system_python) -m scripts.plans.plan --gpu $(*D) --tensorrt $(tensorrt) $< build/onnx/$(*F).onnx $@ $(out))

# or one that was built elsewhere
$(taken): build/plan/%.plan: $$(brought.$$*) build/plan/$$(*F).request.json build/models/$$(*F).tolerance.json \
  $$(wildcard $$(brought.$$*:.plan=.json) $$(brought.$$*:.plan=.check.json)) scripts/plans/take_plan.py scripts/steps/records.py
	$(call step,$(system_python) -m scripts.plans.take_plan --gpu $(*D) --tensorrt $(tensorrt) $(wordlist 1,3,$^) $@ $(out))

# and is to be signed, where a key is given: by the folder's own signature, FOLDER.sig
signature = .venv-signing/bin/$(notdir $(python)) -m scripts.publish.signature
ifneq ($(and $(KEY),$(taken)),)
$(taken): | signed-plans
endif
.PHONY: signed-plans
signed-plans: .venv-signing/installed
	$(if $(EXPLAIN)$(dry),,@$(signature) verify $(call quote,$(KEY)) $(foreach folder,$(PLANS),$(if $(filter $(CURDIR)/build/plan,$(realpath $(folder))),,$(folder))))

# What NVIDIA's parser and builder make of it where there is no GPU
$(rtx): build/checks/%.rtx.json: scripts/plans/cards.yaml scripts/plans/fleet.yaml build/onnx/%.onnx build/models/$$(call plain,$$*).json \
  scripts/plans/build_rtx.py requirements-rtx.txt | .venv-rtx/installed
	$(call step,.venv-rtx/bin/python3 -m scripts.plans.build_rtx $(wordlist 1,4,$^) $(out))

# What ONNX Runtime answers; a plan against it, on the same input; of a ViT the heads' probabilities too
$(expected): build/plan/%.expected.npy: build/onnx/%.onnx build/models/$$(call plain,$$*).json scripts/plans/expected.py scripts/convert/sample.py \
  | .venv/installed
	$(call step,$(python) -m scripts.plans.expected $(wordlist 1,2,$^) $(out),onnxruntime-gpu numpy)

$(compared): build/plan/%.check.json: build/plan/%.plan build/plan/$$(*F).expected.npy build/models/$$(call plain,$$(*F)).json \
  build/models/$$(*F).tolerance.json build/checks/$$(*F).json $$(if $$(filter vit,$$(call plain,$$(*F))),$$(head_onnx)) scripts/plans/compare_plan.py \
  scripts/plans/expected.py scripts/plans/trtexec.py scripts/plans/gpu.py scripts/archives/base_image.py $(releases) scripts/convert/sample.py scripts/steps/records.py scripts/convert/probabilities.py scripts/convert/ties.py | .venv/installed
	$(call step,$(python) -m scripts.plans.compare_plan $(wordlist 1,5,$^) $(out) $(filter build/onnx/%,$^),onnxruntime-gpu numpy)

$(plan_configs): build/plan/%.config.pbtxt: $$(config.$$*) build/models/%.json scripts/plans/plan_config.py \
  $(checking) | .venv/installed
	$(call step,$(python) -m scripts.plans.plan_config $(wordlist 1,2,$^) $(out) $(folders),onnx tritonclient)

# The whole set, checked offline and served once by a real Triton
published.checks := $(foreach model,$(models),build/checks/$(call variant,$(model)).json)
published.as     := $(foreach model,$(varied),$(filter-out $(varied),$(call variant,$(model))))
sources := $(foreach file,$(contents),$(lastword $(subst =, ,$(file))))
verdict := scripts/serve/verdict.py scripts/convert/collapse.py $(checking) scripts/serve/triton_server.py scripts/serve/sandbox.py scripts/convert/sample.py scripts/convert/ties.py \
           docker/backends/onnxruntime/model.py

build/checks/verdict.json: $(sources) $(published.checks) $(compared) $(models:%=build/models/%.json) $(verdict) requirements-triton.txt \
  | .venv/installed .venv-triton/installed
	$(call step,$(python) -m scripts.serve.verdict --release $(NGC_RELEASE) --checks build/checks $(published.as:%=--variant %) $(on_a_gpu) $(contents) $(out),tritonclient onnx numpy)

# Every hop on eight volumes: how far it moves the answers, and what of it reaches a decision
fidelity_models := vit $(heads)
fidelity_fp16   := $(sort $(wildcard $(onnx_fp16)) $(filter $(onnx_fp16),$(sources)))
fidelity_hops   := $(foreach model,$(fidelity_models),pytorch/$(model)=$(weights)/$($(model).checkpoint) onnx/$(model)=build/onnx/$(model).onnx) \
  $(foreach file,$(fidelity_fp16),fp16/$(notdir $(file:.fp16.onnx=))=$(file)) \
  $(foreach file,$(wildcard $(fidelity_models:%=build/plan/*/%.plan)),$(patsubst build/%.plan,%,$(file))=$(file)) \
  $(addprefix served/,$(filter-out bpr_%,$(contents)))

build/fidelity.json: $$(sort $$(foreach hop,$$(fidelity_hops),$$(lastword $$(subst =, ,$$(hop))))) $(fidelity_models:%=build/models/%.json) \
  scripts/show/fidelity.py scripts/serve/served.py scripts/convert/probabilities.py scripts/convert/compare.py scripts/convert/answer.py scripts/convert/compare_vit.py scripts/convert/compare_bpr.py scripts/convert/judge.py \
  scripts/convert/onnx_session.py scripts/convert/emulate_fp16.py convertation/fp16.py convertation/onnx_file.py $(verdict) $(network.vit) $(network.head) \
  convertation/checkpoint.py requirements-triton.txt requirements-inference.txt | .venv/installed .venv-triton/installed .venv-inference/installed
	$(call step,$(python) -m scripts.show.fidelity $(if $(wildcard /proc/driver/nvidia/gpus),--gpu) $(if $(IMAGE),--image $(IMAGE)) \
	  --weights $(kind) --deployed .venv-triton/bin/python3 --deployed .venv-inference/bin/python3 $(fidelity_hops) $(out),\
	  torch onnxruntime-gpu tritonclient onnx onnx-ir ml_dtypes numpy)

# An archive of finished models, checked offline and served once by a real Triton
prebuilt := training/model_repository_running.zip
judged   := $(prebuilt).verdict.json
# with a key its signature is verified before anything of it runs: FILE.zip.sig, beside the one that was given by hand
prebuilt_signature := $(if $(KEY),$(or $(REPOSITORY_ZIP),$(prebuilt)).sig)
$(if $(KEY),$(eval $(judged): $(KEY) $(prebuilt_signature) | .venv-signing/installed))
%.zip.sig:
	$(error $@ is missing, the signature of $*.zip that KEY=$(KEY) is to verify; without KEY none is asked for)
$(judged): $(prebuilt).lock.json $(models:%=build/models/%.json) scripts/publish/prebuilt.py scripts/archives/unpack.py scripts/archives/progress.py \
  scripts/steps/records.py $(verdict) requirements-triton.txt convertation/bpr/requirements.txt scripts/steps/venv.sh \
  | $(prebuilt) .venv/installed .venv-triton/installed
	$(call step,$(python) -m scripts.publish.prebuilt --release $(NGC_RELEASE) $(if $(KEY),--key $(KEY) --signature $(prebuilt_signature)) --models build/models $(prebuilt) build/prebuilt $(out),tritonclient onnx numpy)

.PHONY: repository onnx trt trt-fleet weights doctor verify-gpu update sign verify fidelity compare report infer serve image push up reload \
        logs down rollback test bench bench-gpu status graph provenance clean distclean help
finished := $(if $(filter prebuilt,$(FROM)),$(judged),$(sources) build/checks/verdict.json)
repository: $(if $(ask),,$(finished))  ## Build whatever is stale, check it, serve it once, publish it
	$(if $(ask),$(ask_gpu),$(missed)$(publish))

chosen     = $(if $(models),$(or $(strip $(foreach model,$(models),$(if $(filter $(or $(MODEL),%),$(model) $($(model).family)),$(model)))),\
               $(error MODEL=$(MODEL): expected vit, head, bpr or one of $(strip $(models)))))
needs.onnx = $(foreach model,$(chosen),build/onnx/$(call variant,$(model)).onnx build/checks/$(call variant,$(model)).json)
onnx: $$(needs.onnx)  ## The ONNX files alone, compared with PyTorch; one family: make onnx MODEL=head
	$(if $(call recent,$(needs.onnx)),@$(summary) $(needs.onnx),@echo "$(filter %.onnx,$(needs.onnx)): up to date")

needs.trt = $(if $(chosen_plans),)$(if $(CHECK),$(judged_by_rtx),$(if $(DRY),$(foreach model,$(chosen_plans),build/models/$(call plain,$(model)).json),$(if $(gpu),$(call plans_for,$(gpu)))))
trt: $$(needs.trt)  ## TensorRT plans by trtexec in Docker, compared with ONNX Runtime; one family: make trt MODEL=head; no GPU: CHECK=1
	$(if $(CHECK),$(tell_what_cards_hold),$(if $(DRY),$(print_commands),$(if $(gpu),$(if $(call recent,$(needs.trt)),@$(summary) $(needs.trt),@echo "$(filter %.plan,$(needs.trt)): up to date"),$(ask_gpu))))

trt-fleet: .venv/installed  ## Plans for many kinds of GPU, one Slurm job for each: make trt-fleet GPUS="a100 l4"
	$(if $(DRY),$(error DRY=1 prints what make trt runs; make -n trt-fleet GPUS=... prints this),$(if $(dry),,+)@$(fleet))

needs.weights = .venv/installed training/weights.zip.lock.json
weights: training/weights.zip.lock.json | training/weights.zip  ## All of weights.zip in training/weights/; your own files stay
	$(if $(call ready,training/weights.zip),$(if $(dry),,+)@$(unpack_all),$(fetch_first))
# Then the steps of the checkpoints, which find the same bytes and record them: the archive may go, a newer one be noticed
unpack_all  = $(python) -m scripts.archives.unpack --all training/weights.zip training/weights --tree 'CT-RATE/*' && \
              $(MAKE) --no-print-directory WEIGHTS=yandex $(checkpoints:$(weights)/%=training/weights/%)
fetch_first = $(if $(dry),,+)@$(MAKE) --no-print-directory training/weights.zip weights

needs.update = .venv/installed
there        = $(or $(patsubst training/%.lock.json,%,$(wildcard $(archives:=.lock.json))),weights.zip)
update: .venv/installed  ## Ask Yandex.Disk whether the locked archives are still those there; ACCEPT=1 locks the new
	@$(foreach name,$(there),$(python) -m scripts.archives.update $(if $(filter 1,$(ACCEPT)),--accept) $(name) || [[ $$? == 1 ]];)

needs.sign = .venv-signing/installed
sign: $$(needs.sign)  ## Sign the published repository, or the folders in PLANS: make sign KEY=key.pem
	$(if $(KEY),,$(error make sign KEY=key.pem: expected a private key; openssl ecparam -name prime256v1 -genkey -noout -out key.pem makes one))
	@$(signature) sign $(call quote,$(KEY)) $(or $(PLANS),$(REPOSITORY) $(judged_as))

needs.verify = $(if $(KEY),.venv-signing/installed,$(if $(ask),,.venv/installed .venv-triton/installed $(published.checks) $(compared)))
verify: $$(needs.verify)  ## Check and serve the published repository once more; or its signature: make verify KEY=key.pub
	$(if $(KEY),@$(signature) verify $(call quote,$(KEY)) $(or $(PLANS),$(REPOSITORY)),$(if $(ask),$(ask_gpu),@$(python) -m scripts.serve.verdict --release $(NGC_RELEASE) --checks build/checks $(published.as:%=--variant %) $(or $(on_a_gpu),$(if $(IMAGE),--image $(IMAGE))) --repository $(REPOSITORY) build/verify.json))

doctor:  ## What this machine has, lacks, and what to do about it
	@$(system_python) -m scripts.plans.doctor $(PORTS)

needs.verify-gpu = $(if $(gpu),$(onnx) $(published.checks) $(plans) $(compared) $(plan_configs) .venv-triton/installed)
verify-gpu: $$(needs.verify-gpu)  ## On a machine with a GPU: plans and ONNX models in the real Triton image, their speed and memory
	$(if $(gpu),@$(python) -m scripts.plans.verify_gpu $(published.as:%=--variant %) $(on_a_gpu) $(contents) build/verify-gpu.json,\
	  @$(system_python) -m scripts.plans.doctor --gpu && $(subst @,,$(ask_gpu)))

needs.fidelity = build/fidelity.json
fidelity: build/fidelity.json  ## Every hop on eight volumes, from PyTorch to served: differences, codes, decisions
	@$(system_python) -m scripts.show.fidelity_table $<

needs.compare = .venv/installed .venv-triton/installed $(if $(INPUT),.venv-inference/installed)
compare: $$(needs.compare)  ## The published repository against another one: make compare WITH=/path [INPUT=folder of studies]
	@$(own_triton) $(python) -m scripts.show.compare_repositories $(if $(INPUT),--input $(call quote,$(INPUT))) $(if $(IMAGE),--image $(IMAGE)) \
	  $(REPOSITORY) $(call quote,$(WITH)) build/compare.json

# Code of a finished archive runs in an environment of its own
own_triton  = $(if $(filter prebuilt,$(firstword $(ours))),$(addprefix TRITON_VENV=,$(wildcard .venv-prebuilt)))
needs.serve = .venv/installed .venv-triton/installed
serve: $$(needs.serve)  ## Run Triton on the published repository until Ctrl-C
	@$(own_triton) $(python) -m scripts.serve.serve $(REPOSITORY) \
	  --address $(ADDRESS) --http $(word 1,$(PORTS)) --grpc $(word 2,$(PORTS)) --metrics $(word 3,$(PORTS)) $(if $(LOCK),--lock) $(if $(filter prebuilt,$(firstword $(ours))),--foreign)

needs.infer = .venv-inference/installed
infer: $$(needs.infer)  ## What the networks find in each CT study: make infer INPUT=folder OUTPUT=folder
	$(if $(and $(INPUT),$(OUTPUT)),,$(error make infer INPUT=folder OUTPUT=folder: expected both))
	@.venv-inference/bin/python3 -m scripts.infer --models $(REPOSITORY) $(if $(TRITON),--triton $(call quote,$(TRITON))) $(if $(AGAIN),--again) \
	  -- $(call quote,$(INPUT)) $(call quote,$(OUTPUT))

# Images: the published repository inside NVIDIA's Triton; and the stack that runs it
ready_image   := $(or $(IMAGE),$(if $(filter prebuilt,$(FROM)),$(REGISTRY)borntowarn/porcupine-tritonserver))
judged_as      = --verdict $(if $(filter prebuilt,$(firstword $(ours))),$(judged),build/checks/verdict.json)

needs.image = .venv/installed
image: $$(needs.image)  ## An image with the published repository inside, rebuilt if that changed: make image IMAGE=registry.example/name:1
	$(image.$(TARGET))
image.triton   = @$(system_python) -m scripts.deploy.image $(REPOSITORY) --base $(TRITON_IMAGE) --tag $(call quote,$(IMAGE)) $(judged_as) && \
                     $(python) -m scripts.deploy.sbom $(REPOSITORY) --base $(TRITON_IMAGE) --tag $(call quote,$(IMAGE)) $(judged_as) build/image-triton.cdx.json
image.inference = @$(system_python) -m scripts.deploy.inference_image $(REPOSITORY) --base $(REGISTRY)$(BASE) --tag $(call quote,$(IMAGE)) $(judged_as) && \
                     $(python) -m scripts.deploy.sbom $(REPOSITORY) --base $(REGISTRY)$(BASE) --tag $(call quote,$(IMAGE)) $(judged_as) \
                       --usual chest-ct-inference --pins requirements-inference.txt build/image-inference.cdx.json

push:  ## Push that image, after consent to its weights' licences
	@$(system_python) -m scripts.deploy.push $(call quote,$(IMAGE))

up:  ## Run Triton with Docker Compose on the published repository; ready images: FROM=prebuilt or IMAGE=…; no GPU: DEVICE=cpu
	@$(system_python) -m scripts.deploy.stack up $(if $(ready_image),--image $(ready_image),--repository $(REPOSITORY) --base $(TRITON_IMAGE)) \
	  --address $(ADDRESS) --ports '$(PORTS)' --device $(DEVICE) $(if $(LOCK),--lock)

reload:  ## Let the running Triton take what was published since
	@$(system_python) -m scripts.deploy.reload $(REPOSITORY)

logs:  ## Its log, until Ctrl-C
	@$(system_python) -m scripts.deploy.stack logs

down:  ## Stop it
	@$(system_python) -m scripts.deploy.stack down

rollback:  ## Put the previously published models back
	@$(system_python) -m scripts.publish.publish $(REPOSITORY) --rollback

needs.test = .venv/installed .venv-triton/installed .venv-inference/installed .venv-signing/installed .venv/installed-for-tests
test: $$(needs.test)  ## Format, lint, types and every test
	@tests/run.sh

needs.bench = .venv/installed .venv-triton/installed
bench: $$(needs.bench)  ## Measure what the README promises
	@$(python) -m scripts.bench $(if $(COMPARE),--compare $(call quote,$(COMPARE))) build/bench.json

needs.bench-gpu = .venv/installed
bench-gpu: $$(needs.bench-gpu)  ## On a machine with a GPU, no Docker: speed, memory and answers of fp32, tf32 and fp16
	@$(python) -m scripts.bench.gpu build/bench-gpu.json

explained = $(if $(dry),,+)@explained=$$($(MAKE) --no-print-directory EXPLAIN=1 WEIGHTS=$(WEIGHTS) PRECISION=$(PRECISION) repository) && \
            printf '%s\n' "$$explained" | $(system_python)
status:  ## What would run, and why; CHECK=1: fails if anything is stale; FILE=build/onnx/vit.onnx: all that it hangs on
	$(explained) -m scripts.show.status $(if $(CHECK),--check) $(REPOSITORY) $(if $(FILE),$(call quote,$(FILE)))

graph:  ## Draw the pipeline and its state: build/graph.svg
	$(explained) -m scripts.show.graph $(REPOSITORY) build/graph.svg

report:  ## All of this on one page to look at, print and keep: build/report.html
	$(explained) -m scripts.show.report $(REPOSITORY) build/report.html

provenance:  ## What each published file was made from, as JSON; compare: make provenance CHECK=file.json
	$(if $(CHECK),\
	  @$(system_python) -m scripts.publish.provenance $(REPOSITORY) --check $(call quote,$(CHECK)),\
	  $(explained) -m scripts.publish.provenance $(REPOSITORY))

clean:  ## Free what can be made again; records, checkpoints and the repository stay
	rm -rf build .make/out

distclean: clean  ## Also the environments and records; your files and the repository stay
	rm -rf .venv .venv-triton .venv-inference .venv-rtx .venv-signing .venv-prebuilt .venv-compare .make/seen .make/made .make/took .make/lock .make/cache-off .make/cache-spoiled

help:  ## Show this list
	@scripts/show/help.sh $(firstword $(MAKEFILE_LIST)) $(foreach knob,$(knobs),$(call quote,$(knob)=$($(knob))))

include scripts/steps/content.mk
