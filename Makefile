# weights.zip -> .pt -> .onnx -> checks -> .plan -> Triton's verdict -> model_repository_running/        make help

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-builtin-rules --no-builtin-variables
.DEFAULT_GOAL := help

$(if $(wildcard artifacts.mk),,$(error make works in the project's folder; $(strip make -C \
  $(patsubst %/,%,$(dir $(firstword $(MAKEFILE_LIST)))) $(MAKECMDGOALS))))

# knobs.mk: every knob.  content.mk: $(call step,COMMAND,PACKAGES) runs COMMAND unless its result's record is true.
# artifacts.mk: the lists of files that the rules below are about
include knobs.mk scripts/steps/content.mk artifacts.mk
include $(call told,needs)

# --- The pipeline, in order: each artifact, what it is made from, the script that makes it ---

# Python environments: the project's own, Triton's, and for inference without PyTorch, TensorRT for RTX, signatures
.venv/installed: requirements.txt requirements.lock scripts/steps/venv.sh
	$(call step,scripts/steps/venv.sh $(PYTHON) .venv requirements.txt $(out))
.venv-triton/installed: requirements-triton.txt requirements-triton.lock convertation/bpr/requirements.txt \
  scripts/steps/venv.sh
	$(call step,scripts/steps/venv.sh $(PYTHON) .venv-triton requirements-triton.txt $(out))
.venv-inference/installed .venv-rtx/installed .venv-signing/installed: .venv-%/installed: requirements-%.txt \
  requirements-%.lock scripts/steps/venv.sh
	$(call step,scripts/steps/venv.sh $(PYTHON) .venv-$* requirements-$*.txt $(out))
.venv/installed-for-s3: requirements-s3.txt requirements-s3.lock scripts/steps/venv.sh | .venv/installed
	$(call step,scripts/steps/venv.sh $(PYTHON) .venv requirements-s3.txt $(out))
.venv/installed-for-tests: tests/requirements.txt tests/requirements.lock scripts/steps/venv.sh | .venv/installed
	$(call step,scripts/steps/venv.sh $(PYTHON) .venv tests/requirements.txt $(out))
# A program of .venv makes every other artifact but a plan
$(filter-out .venv% $(plans),$(artifacts)): | .venv/installed

# One model's part of models.yaml, and how far its answers may differ
$(variants:%=build/models/%.json): build/models/%.json: convertation/models.yaml
	$(call step,$(python) -m scripts.convert.model_entry $< $* model $(out))
$(variants:%=build/models/%.tolerance.json): build/models/%.tolerance.json: convertation/models.yaml
	$(call step,$(python) -m scripts.convert.model_entry $< $* tolerance $(out))

# Archives, downloaded when a step has to read them
$(archives): FORCE | .venv/installed
	$(fetch)
$(archives:=.lock.json): %.lock.json: FORCE | % ;

# Checkpoints: your own files, else members of weights.zip; WEIGHTS=synthetic: seeded ones of the real size
$(filter training/%,$(checkpoints)): training/weights/%: training/weights.zip.lock.json | training/weights.zip
	$(call step,$(python) -m scripts.archives.unpack training/weights.zip $* $(out))
$(filter build/%,$(checkpoints)): build/synthetic/%:
	$(call step,$(python) -m scripts.convert.synthesize $(filter %.json,$^) $(out),torch numpy)

# PyTorch -> ONNX; .make/models/ adds to each rule the model's checkpoint, which convertation/models.yaml names
build/onnx/vit.onnx: build/models/vit.json
	$(call step,$(python) -m convertation.vit.torch2onnx $(exporting),$(exporters))
$(heads:%=build/onnx/%.onnx): build/onnx/%.onnx: build/models/%.json
	$(call step,$(python) -m convertation.head.torch2onnx $(exporting),$(exporters))
build/onnx/bpr.onnx: build/models/bpr.json
	$(call step,$(python) -m convertation.bpr.torch2onnx $(exporting),$(exporters))

# The ViT for a GPU: not cut into pieces, for products in TF32; and rounded to fp16 where the range of values allows it
build/onnx/vit.tf32.onnx: build/models/vit.json
	$(call step,$(python) -m convertation.vit.torch2onnx --for gpu $(exporting),$(exporters))
build/onnx/vit.fp16.onnx: build/onnx/vit.tf32.onnx build/models/vit.json
	$(call step,$(python) -m scripts.convert.round_fp16 $(wordlist 1,2,$^) $(out),$(rounders))

# The Triton config of a new head
convertation/head/%.pbtxt:
	$(error $@ is missing, the Triton config of $*; cp convertation/head/binary.pbtxt $@, and write its name, \
	  $*_onnx, and its output into it)

# Compare ONNX with PyTorch on the same volumes, in our ONNX Runtime and in the one that Triton runs
$(checks) $(checks_tf32): build/checks/%.json: build/models/%.json build/models/%.tolerance.json build/onnx/%.onnx \
  $(deployed)
	$(call step,$(python) -m scripts.convert.compare --deployed .venv-triton/bin/python3 $(checkpoint) $(wordlist 1,3,$^) \
	  $(out),torch onnxruntime-gpu onnx numpy)
build/checks/vit.json build/checks/vit.tf32.json: $(call code,convertation.vit.ctvit)
$(heads:%=build/checks/%.json): $(call code,convertation.head.mlp)
build/checks/bpr.json: $(call code,convertation.bpr.vgg) $(bpreg) $(weights)/bpr/inference-settings.json
build/checks/vit.fp16.json: build/checks/vit.tf32.json build/models/vit.json build/models/vit.fp16.tolerance.json \
  build/onnx/vit.tf32.onnx build/onnx/vit.fp16.onnx $(head_onnx) $(call code,convertation.vit.ctvit) $(deployed)
	$(call step,$(python) -m scripts.convert.compare_fp16 --deployed .venv-triton/bin/python3 \
	  $(foreach head,$(heads),--head $(head)=build/onnx/$(head).onnx) $(wordlist 1,5,$^) $(out),\
	  torch $(rounders))

# ONNX -> TensorRT plan.  A plan depends on its request, GPU and TensorRT, not on our scripts or the file's metadata.
# .make/models/ adds what the plans for all GPUs share: the request, the ONNX file and the expected answers
$(requests): build/plan/%.request.json: build/onnx/%.onnx build/models/%.json
	$(call step,$(python) -m scripts.plans.plan_request $(precision) $(flags) $(wordlist 1,2,$^) $(out),onnx tritonclient)
$(built): build/plan/%.plan:
	$(call step,$(system_python) -m scripts.plans.plan --gpu $(*D) --tensorrt $(tensorrt) $(request) \
	  build/onnx/$(*F).onnx $@ $(out))
$(taken): build/plan/%.plan: build/brought/%.json $(call code,scripts.plans.take_plan)
	$(call step,$(system_python) -m scripts.plans.take_plan --gpu $(*D) --tensorrt $(tensorrt) $< $(request) \
	  build/models/$(*F).tolerance.json $@ $(out))
$(if $(KEY),$(taken)): | signed-plans
signed-plans: .venv-signing/installed
	$(if $(EXPLAIN),,@$(signature) verify $(call quote,$(KEY)) $(filter-out build/plan,$(PLANS)))
$(expected): build/plan/%.expected.npy: build/onnx/%.onnx build/models/%.json
	$(call step,$(python) -m scripts.plans.expected $(wordlist 1,2,$^) $(out),onnxruntime-gpu numpy)
$(compared): build/plan/%.check.json: build/plan/%.plan
	$(call step,$(python) -m scripts.plans.compare_plan $< build/plan/$(*F).expected.npy build/models/$(*F).json \
	  build/models/$(*F).tolerance.json build/checks/$(*F).json $(out) $(if $(filter vit vit.%,$(*F)),$(head_onnx)),\
	  onnxruntime-gpu numpy)
$(filter %/vit.check.json %/vit.tf32.check.json %/vit.fp16.check.json,$(compared)): $(head_onnx)
$(configs:%=build/plan/%.config.pbtxt): build/plan/%.config.pbtxt: build/models/%.json
	$(call step,$(python) -m scripts.plans.plan_config $(filter %.pbtxt,$^) $< $(out) $(folders),onnx tritonclient)
# Beside plans the ONNX models run on a GPU, where the first request is slow: Triton asks them once before READY
$(warm):
	$(call step,$(python) -m scripts.plans.plan_config --warm $(filter %.pbtxt,$^) $(out),onnx tritonclient)
build/plan/vit.config.pbtxt: convertation/vit/config.pbtxt
build/plan/vit_onnx.config.pbtxt: $(call config_of,vit)
$(heads:%=build/plan/%.config.pbtxt): build/plan/%.config.pbtxt: convertation/head/%.pbtxt
$(heads:%=build/plan/%_onnx.config.pbtxt): build/plan/%_onnx.config.pbtxt: convertation/head/%.pbtxt

# NVIDIA's own parser and builder judge the files meant for plans without a GPU; with one that they know, they run it
$(rtx): build/checks/%.rtx.json: scripts/plans/cards.yaml scripts/plans/fleet.yaml build/onnx/%.onnx \
  build/models/%.json requirements-rtx.txt | .venv-rtx/installed
	$(call step,.venv-rtx/bin/python3 -m scripts.plans.build_rtx $(wordlist 1,4,$^) $(out))
$(rtx_on_gpu): build/checks/%.rtx-gpu.json: build/onnx/%.onnx build/plan/%.expected.npy build/models/%.json \
  build/models/%.tolerance.json build/checks/%.json $(head_onnx) $(call code,scripts.plans.run_rtx) \
  requirements-rtx.txt | .venv-rtx/installed
	$(call step,$(python) -m scripts.plans.compare_rtx .venv-rtx/bin/python3 $(wordlist 1,5,$^) $(out) \
	  $(if $(filter vit vit.%,$*),$(head_onnx)),onnxruntime-gpu numpy)

# The whole set: check it offline, serve it once with a real Triton, publish it in one exchange
build/checks/verdict.json: $(sources) $(published:%=build/checks/%.json) $(compared) $(models:%=build/models/%.json) \
  $(serving)
	$(call step,$(python) -m scripts.serve.verdict $(judging) $(on_a_gpu) $(contents) $(out),tritonclient onnx numpy)
$(prebuilt).verdict.json: $(prebuilt).lock.json $(models:%=build/models/%.json) \
  convertation/bpr/requirements.txt scripts/steps/venv.sh $(serving) $(prebuilt)
	$(call step,$(python) -m scripts.publish.prebuilt --release $(NGC_RELEASE) $(if $(KEY),--key $(KEY) \
	  --signature $(zip_signature)) --models build/models $(prebuilt) build/prebuilt $(out),tritonclient onnx numpy)
$(if $(KEY),$(prebuilt).verdict.json): $(KEY) $(zip_signature) | .venv-signing/installed
%.zip.sig:
	$(error $@ is missing, the signature of $*.zip that KEY=$(KEY) is to verify; without KEY none is asked for)
build/fidelity.json: $(fidelity_files) $(patsubst %,build/models/%.json,vit $(heads)) \
  $(call code,convertation.vit.ctvit) $(call code,convertation.head.mlp) requirements-inference.txt $(serving) \
  .venv-inference/installed
	$(call step,$(python) -m scripts.show.fidelity $(if $(has_gpu),--gpu) --weights $(kind) \
	  $(addprefix --image ,$(IMAGE)) $(patsubst %,--deployed %/bin/python3,.venv-triton .venv-inference) \
	  $(fidelity_hops) $(out),torch tritonclient $(rounders))

# --- Build --------------------------------------------------------------------

repository: $(finished)  ## Build what is stale, check it, serve it once with Triton, publish it
	$(publish)
onnx: $(needs.onnx)  ## Make only the ONNX files and compare them with PyTorch; one family: MODEL=head
	$(call tell,$(needs.onnx))
trt: $(needs.trt)  ## Build TensorRT plans in Docker and compare them; no GPU: CHECK=1 or DRY=1
	$(trt)
trt-fleet: .venv/installed  ## Build plans for several GPUs, a Slurm job each: make trt-fleet GPUS="a100 l4"
	@$(fleet)
weights: $(needs.weights)  ## Unpack all of weights.zip into training/weights/; your own files stay
	@$(python) -m scripts.archives.unpack --all training/weights.zip training/weights --tree 'CT-RATE/*'
update: .venv/installed  ## Ask Yandex.Disk for newer archives than the locked ones; ACCEPT=1 accepts them
	@$(python) -m scripts.archives.update $(if $(filter 1,$(ACCEPT)),--accept) $(locked) || [[ $$? == 1 ]]
rollback:  ## Put the previously published models back
	@$(system_python) -m scripts.publish.publish $(REPOSITORY) --rollback

# --- Look ---------------------------------------------------------------------

status:  ## Print what would run and why; CHECK=1: fail if anything would; FILE=…: its chain
	@$(system_python) -m scripts.show.status $(if $(CHECK),--check) $(REPOSITORY) $(if $(FILE),$(call quote,$(FILE)))
graph:  ## Draw the pipeline with the state of each step: build/graph.svg
	@$(system_python) -m scripts.show.graph $(REPOSITORY) build/graph.svg
report:  ## Write all results on one page: build/report.html
	@$(system_python) -m scripts.show.report $(REPOSITORY) build/report.html
provenance:  ## Print what each published file was made from; CHECK=file.json: compare
	@$(system_python) -m scripts.publish.provenance $(REPOSITORY) $(if $(CHECK),--check $(call quote,$(CHECK)))
fidelity: build/fidelity.json  ## Measure how much each conversion changes the answers, on eight seeded volumes
	@$(system_python) -m scripts.show.fidelity_table $<
compare: $(needs.compare)  ## Compare the repository with another: make compare WITH=/path [INPUT=folder]
	@$(own_triton) $(python) -m scripts.show.compare_repositories $(if $(INPUT),--input $(call quote,$(INPUT))) \
	  $(addprefix --image ,$(IMAGE)) $(REPOSITORY) $(call quote,$(WITH)) build/compare.json
verify: $(needs.verify)  ## Check and serve what is published again; KEY=key.pub: check its signature
	@$(if $(KEY),$(signature) verify $(call quote,$(KEY)) $(or $(PLANS),$(REPOSITORY)),$(python) -m scripts.serve.verdict \
	  $(judging) $(or $(on_a_gpu),$(addprefix --image ,$(IMAGE))) --repository $(REPOSITORY) build/verify.json)
verify-gpu: $(needs.verify-gpu)  ## On a GPU: run plans and ONNX models in Triton's image; measure speed, memory
	@$(python) -m scripts.plans.verify_gpu $(published.as:%=--variant %) $(on_a_gpu) $(contents) build/verify-gpu.json
doctor:  ## Print what this machine has, what it lacks, and what to do about it
	@$(system_python) -m scripts.plans.doctor $(PORTS)

# --- Serve --------------------------------------------------------------------

serve: $(needs.serve)  ## Run Triton on the published repository until Ctrl-C
	@$(own_triton) $(python) -m scripts.serve.serve $(REPOSITORY) \
	  --address $(ADDRESS) --http $(word 1,$(PORTS)) --grpc $(word 2,$(PORTS)) --metrics $(word 3,$(PORTS)) \
	  $(if $(LOCK),--lock) $(if $(filter prebuilt,$(published_kind)),--foreign)
up:  ## Start Triton in Docker Compose; no GPU: DEVICE=cpu; a ready image: IMAGE=…
	@$(system_python) -m scripts.deploy.stack up --address $(ADDRESS) --ports '$(PORTS)' --device $(DEVICE) \
	  $(if $(LOCK),--lock) \
	  $(if $(ready_image),--image $(ready_image),--repository $(REPOSITORY) --base $(TRITON_IMAGE))
reload:  ## Let the running Triton load what was published since it started
	@$(system_python) -m scripts.deploy.reload $(REPOSITORY)
logs:  ## Show the log of what make up started, until Ctrl-C
	@$(system_python) -m scripts.deploy.stack logs
down:  ## Stop what make up started
	@$(system_python) -m scripts.deploy.stack down

# --- Infer --------------------------------------------------------------------

infer: $(needs.infer)  ## Write what the networks find in studies: make infer INPUT=folder OUTPUT=folder
	@.venv-inference/bin/python3 -m scripts.infer --models $(REPOSITORY) $(if $(TRITON),--triton $(call quote,$(TRITON))) \
	  $(if $(AGAIN),--again) -- $(call quote,$(INPUT)) $(call quote,$(OUTPUT))

# --- Share --------------------------------------------------------------------

image: $(needs.image)  ## Build an image of what is published: make image IMAGE=name:1 [TARGET=inference]
	@$(system_python) -m $(image.$(TARGET)) $(REPOSITORY) --tag $(call quote,$(IMAGE)) $(judged_as)
	@$(python) -m scripts.deploy.sbom $(REPOSITORY) --tag $(call quote,$(IMAGE)) $(judged_as) $(sbom.$(TARGET))
sign: $(needs.sign)  ## Sign the published repository, or the plans in PLANS: make sign KEY=key.pem
	@$(signature) sign $(call quote,$(KEY)) $(or $(PLANS),$(REPOSITORY) $(judged_as))
push:  ## Push that image; it asks you to accept the licences of the weights
	@$(system_python) -m scripts.deploy.push $(call quote,$(IMAGE))

# --- Carry on -----------------------------------------------------------------

test: $(needs.test)  ## Check format, lint and types, then run every test; tests of one room: ONLY=infer
	@tests/run.sh
bench: $(needs.bench)  ## Measure the speed and memory that the README promises
	@$(python) -m scripts.bench $(if $(COMPARE),--compare $(call quote,$(COMPARE))) build/bench.json
bench-gpu: .venv/installed  ## On a GPU, no Docker: measure speed, memory and answers of fp32, tf32 and fp16
	@$(python) -m scripts.bench.gpu build/bench-gpu.json
clean:  ## Delete what can be made again; records, checkpoints and the repository stay
	rm -rf build .make/out
distclean: clean  ## Delete the environments and records, too; your files and the repository stay
	rm -rf $(environments) .venv-prebuilt .venv-compare $(patsubst %,.make/%,seen made took tree run models lock cache-*)
help:  ## Print this list; the knobs: KNOBS=1
	@scripts/show/help.sh $(if $(KNOBS),knobs.mk $(values),Makefile)

# `step` decides what is stale: by content, never by time
$(artifacts): FORCE
.PRECIOUS: $(artifacts)
.PHONY: bench bench-gpu clean compare distclean doctor down fidelity graph help image infer logs onnx provenance \
  push reload report repository rollback serve sign status test trt trt-fleet up update verify verify-gpu weights
.PHONY: FORCE signed-plans
$(if $(taking),$(shell $(take)))
