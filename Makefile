# weights.zip -> .pt -> .onnx -> checks -> Triton's verdict -> model_repository_running/        make help

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-builtin-rules --no-builtin-variables
.DEFAULT_GOAL := help
.SECONDEXPANSION:

# --- Knobs: make repository WEIGHTS=synthetic ---------------------------------

# Where the models come from: weights (built here) or prebuilt (model_repository_running.zip, checked and served here)
FROM ?= weights
# Where checkpoints come from: yandex (weights.zip and your own files in training/weights/) or synthetic (made here)
WEIGHTS ?= $(or $(if $(filter verify status graph provenance,$(MAKECMDGOALS)),$(filter synthetic,$(ours))),yandex)
# weights.zip fetched by hand, used instead of downloading it
WEIGHTS_ZIP ?=
# model_repository_running.zip fetched by hand, used instead of downloading it
REPOSITORY_ZIP ?=
# Variant of the CT-ViT: LiPro, Base or VocabFine
VIT ?= LiPro
# Optional models to add, such as lipro
WITH ?=
# Where the finished models are published
REPOSITORY ?= model_repository_running
# What `make onnx` makes: vit, head or bpr (nothing: all)
MODEL ?=
# ONNX operator set; Triton 24.06 reads up to 21
OPSET ?= 20
# Python that .venv is made with (3.11 or 3.12)
PYTHON ?= python3
# Consent: 1 lets `make update` lock the new archives, unserved lets FROM=prebuilt publish what cannot be served here
ACCEPT ?=
# Image whose Triton `make verify` asks, in Docker (nothing: the one in .venv-triton)
IMAGE ?=

$(if $(filter 3.% 4.0 4.0.% 4.1 4.1.% 4.2 4.2.%,$(MAKE_VERSION)),$(error GNU Make $(MAKE_VERSION) is too old, 4.3 is needed: apt install make on Debian 11 or Ubuntu 22.04 and newer, or brew install make and type gmake))
one_of = $(if $(filter $2,$($1)),,$(error $1=$($1): expected one of $2))
$(call one_of,FROM,weights prebuilt)
$(call one_of,WEIGHTS,yandex synthetic)
$(call one_of,VIT,LiPro Base VocabFine)

# The kind of weights that REPOSITORY was made from, and each file that was ever published there
ours = $(file <.make/published/$(subst /,%,$(REPOSITORY)))

# --- What there is ------------------------------------------------------------

# Facts of convertation/models.yaml become variables: vit.family, vit.checkpoint, binary.trained_on, lipro.optional
$(foreach fact,$(shell awk '/^[a-z]/ {sub(":.*", ""); model = $$0} \
  /^  (family|checkpoint|trained_on|optional):/ {sub(":", ""); print model "." $$1 ":=" $$2}' convertation/models.yaml), \
  $(eval $(subst {VIT},$$(VIT),$(fact)))$(eval all_models += $(firstword $(subst ., ,$(fact)))))

optional := $(strip $(foreach model,$(sort $(all_models)),$(if $($(model).optional),$(model))))
$(if $(filter-out $(optional),$(WITH)),$(error WITH=$(WITH): expected one of $(optional)))

# One spelling for one folder, links resolved, since records go by it; and none that other targets empty
$(if $(filter 1,$(words $(REPOSITORY))),,$(error REPOSITORY=$(REPOSITORY): expected one folder, its name without spaces))
override REPOSITORY := $(patsubst $(CURDIR)/%,%,$(or $(realpath $(REPOSITORY)),$(abspath $(REPOSITORY))))
$(if $(filter / $(CURDIR) build build/% .make .make/% .venv%,$(REPOSITORY)),$(error \
  REPOSITORY=$(REPOSITORY): expected a folder for published models alone, such as model_repository_running))

models      := $(foreach model,$(sort $(all_models)),$(if $($(model).optional),$(filter $(model),$(WITH)),$(model)))
heads       := $(foreach model,$(models),$(if $(filter head,$($(model).family)),$(model)))
weights     := $(if $(filter synthetic,$(WEIGHTS)),build/synthetic,training/weights)
kind        := $(if $(filter synthetic,$(WEIGHTS)),synthetic,real)
checkpoints := $(foreach model,$(models),$(weights)/$($(model).checkpoint)) $(weights)/bpr/inference-settings.json
onnx        := $(models:%=build/onnx/%.onnx)
checks      := $(models:%=build/checks/%.json)
entries     := $(models:%=build/models/%.json) $(models:%=build/models/%.tolerance.json)
bpreg       := $(sort $(wildcard convertation/bpr/bpreg/*.py))

# Each file of the published repository, and the file it is a copy of
contents := \
  vit_onnx/config.pbtxt=convertation/vit/config.pbtxt vit_onnx/1/model.onnx=build/onnx/vit.onnx \
  $(foreach head,$(heads),$(head)_onnx/config.pbtxt=convertation/head/$(head).pbtxt \
                          $(head)_onnx/1/model.onnx=build/onnx/$(head).onnx) \
  bpr_model/config.pbtxt=convertation/bpr/config.pbtxt bpr_model/1/model.py=convertation/bpr/model.py \
  bpr_model/1/requirements.txt=convertation/bpr/requirements.txt $(foreach file,$(bpreg),$(file:convertation/bpr/%=bpr_model/1/%)=$(file)) \
  bpr_model/1/weights/model.onnx=build/onnx/bpr.onnx \
  bpr_model/1/weights/inference-settings.json=$(weights)/bpr/inference-settings.json

# What each family's scripts import
network.vit  := convertation/vit/ctvit.py
network.head := convertation/head/mlp.py
network.bpr  := convertation/bpr/vgg.py
check.vit    := convertation/vit/check_vit.py
check.bpr    := convertation/bpr/check_bpr.py $(bpreg) $(weights)/bpr/inference-settings.json

# --- The pipeline, in order ---------------------------------------------------

# Environments; the second is Triton's own
.venv/installed: requirements.txt scripts/venv.sh
	$(call step,scripts/venv.sh $(PYTHON) .venv requirements.txt $(out))

.venv-triton/installed: requirements-triton.txt convertation/bpr/requirements.txt scripts/venv.sh
	$(call step,scripts/venv.sh $(PYTHON) .venv-triton requirements-triton.txt $(out))

# One model's part of models.yaml
$(models:%=build/models/%.json): build/models/%.json: convertation/models.yaml scripts/model_entry.py | .venv/installed
	$(call step,$(python) -m scripts.model_entry $< $* model $(out))

$(models:%=build/models/%.tolerance.json): build/models/%.tolerance.json: convertation/models.yaml scripts/model_entry.py | .venv/installed
	$(call step,$(python) -m scripts.model_entry $< $* tolerance $(out))

# The two archives, each downloaded only when a step that runs has to read it, and their locks (see scripts/fetch.py)
archives := training/weights.zip training/model_repository_running.zip
fetched  := $(archives) $(archives:=.lock.json)
archive   = $(@:.lock.json=)
by_hand   = $(if $(filter %/weights.zip,$(archive)),$(WEIGHTS_ZIP),$(REPOSITORY_ZIP))
linked    = $(and $(call ready,$(archive)),$(call same,$(realpath $(by_hand)),$(realpath $(archive))))
$(fetched): FORCE | .venv/installed
	$(if $(EXPLAIN),,$(if $(or $(filter $@,$(MAKECMDGOALS)),$(if $(by_hand),$(if $(linked),,absent))),$(if $(absent),$(first),$(if $(fetched.$(archive)),,$(fetch)))))
fetch = $(eval fetched.$(archive) := once)@$(python) -m scripts.fetch $(if $(by_hand),--from $(call quote,$(by_hand))) $(notdir $(archive)) $(archive) && $(system_python) scripts/look.py $(archive) $(archive).lock.json >/dev/null

# Checkpoints: seeded ones of the real size, or members of weights.zip where you have put none of your own
$(foreach model,$(models),$(eval model_of.$($(model).checkpoint) := $(model)))
model_of.bpr/inference-settings.json := bpr

ifeq ($(WEIGHTS),synthetic)
$(checkpoints): build/synthetic/%: build/models/$$(model_of.$$*).json scripts/synthesize.py $$(network.$$($$(model_of.$$*).family)) convertation/export.py | .venv/installed
	$(call step,$(python) -m scripts.synthesize $< $(out),torch numpy)
else
$(checkpoints): training/weights/%: training/weights.zip.lock.json scripts/unpack.py scripts/progress.py scripts/records.py | training/weights.zip .venv/installed
	$(call step,$(python) -m scripts.unpack training/weights.zip $* $(out))
endif

# PyTorch -> ONNX
$(onnx): build/onnx/%.onnx: $(weights)/$$($$*.checkpoint) build/models/%.json convertation/$$($$*.family)/torch2onnx.py $$(network.$$($$*.family)) convertation/export.py | .venv/installed
	$(call step,$(python) -m convertation.$($*.family).torch2onnx --opset $(OPSET) --weights $(kind) $< build/models/$*.json $(out),torch onnx onnxscript onnx-ir ml_dtypes numpy)

# ONNX against PyTorch, on the same input
$(checks): build/checks/%.json: $(weights)/$$($$*.checkpoint) build/models/%.json build/models/%.tolerance.json build/onnx/%.onnx scripts/compare.py scripts/sample.py $$(check.$$($$*.family)) $$(network.$$($$*.family)) convertation/export.py | .venv/installed
	$(call step,$(python) -m scripts.compare $(wordlist 1,4,$^) $(out),torch onnxruntime-gpu onnx numpy)

# The whole set, checked offline and served once by a real Triton
sources := $(foreach file,$(contents),$(lastword $(subst =, ,$(file))))
verdict := scripts/verdict.py scripts/check_repository.py scripts/triton_server.py scripts/sample.py docker/backends/onnxruntime/model.py

build/checks/verdict.json: $(sources) $(checks) $(models:%=build/models/%.json) $(verdict) requirements-triton.txt | .venv/installed .venv-triton/installed
	$(call step,$(python) -m scripts.verdict --checks build/checks $(contents) $(out),tritonclient onnx numpy)

# An archive of finished models, checked offline and served once by a real Triton
prebuilt := training/model_repository_running.zip
judged   := $(prebuilt).verdict.json
$(judged): $(prebuilt).lock.json $(models:%=build/models/%.json) scripts/prebuilt.py scripts/unpack.py scripts/progress.py scripts/records.py $(verdict) requirements-triton.txt convertation/bpr/requirements.txt scripts/venv.sh | $(prebuilt) .venv/installed .venv-triton/installed
	$(call step,$(python) -m scripts.prebuilt --models build/models $(prebuilt) build/prebuilt $(out),tritonclient onnx numpy)

.PHONY: repository onnx weights update verify serve rollback test bench status graph provenance clean distclean help
ifeq ($(FROM),prebuilt)
needs.repository = $(judged)
repository: $(judged)
	$(if $(EXPLAIN),,$(if $(dry),,+)@$(publish_prebuilt) || { [[ $$? == 3 ]] && $(unpack_again) && $(publish_prebuilt); })
publish_prebuilt = $(system_python) scripts/publish.py $(REPOSITORY) --prebuilt $(judged) build/prebuilt
unpack_again     = $(MAKE) --no-print-directory $(prebuilt) && rm -rf build/prebuilt && $(python) -m scripts.unpack --all $(prebuilt) build/prebuilt --tree '*/config.pbtxt'
else
repository: $(sources) build/checks/verdict.json  ## Build whatever is stale, check it, serve it once, publish it
	$(publish)
endif

chosen     = $(or $(strip $(foreach model,$(models),$(if $(filter $(or $(MODEL),%),$(model) $($(model).family)),$(model)))),$(error MODEL=$(MODEL): expected vit, head, bpr or one of $(strip $(models))))
needs.onnx = $(chosen:%=build/onnx/%.onnx) $(chosen:%=build/checks/%.json)
onnx: $$(needs.onnx)  ## The ONNX files alone, compared with PyTorch: make onnx MODEL=head
	$(if $(call recent,$(needs.onnx)),@$(summary) $(needs.onnx),@echo "$(filter %.onnx,$(needs.onnx)): up to date")

weights: training/weights.zip.lock.json | training/weights.zip  ## The whole of weights.zip under training/weights/; your own files there stay
	$(if $(call ready,training/weights.zip),@$(python) -m scripts.unpack --all training/weights.zip training/weights --tree 'CT-RATE/*',+@$(MAKE) --no-print-directory training/weights.zip weights)

update: .venv/installed  ## Ask Yandex.Disk whether the locked archives are still those there; ACCEPT=1 locks the new
	@$(foreach name,$(locked),$(python) -m scripts.update $(if $(filter 1,$(ACCEPT)),--accept) $(name) || [[ $$? == 1 ]];)
locked        = $(or $(patsubst training/%.lock.json,%,$(wildcard $(archives:=.lock.json))),weights.zip)
needs.weights = .venv/installed training/weights.zip.lock.json
needs.update  = .venv/installed

needs.verify = .venv/installed .venv-triton/installed $(checks)
verify: $$(needs.verify)  ## Check and serve the published repository once more
	@$(python) -m scripts.verdict --checks build/checks $(if $(IMAGE),--image $(IMAGE)) --repository $(REPOSITORY) build/verify.json

needs.serve = .venv/installed .venv-triton/installed
serve: $$(needs.serve)  ## Run Triton on the published repository until Ctrl-C
	@$(if $(filter prebuilt,$(firstword $(ours))),$(addprefix TRITON_VENV=,$(wildcard .venv-prebuilt))) $(python) -m scripts.serve $(REPOSITORY)

rollback:  ## Put the previously published models back
	@$(system_python) scripts/publish.py $(REPOSITORY) --rollback

needs.test = .venv/installed .venv-triton/installed .venv/installed-for-tests
test: $$(needs.test)  ## Format, lint, types and every test
	@tests/run.sh

needs.bench = .venv/installed .venv-triton/installed
bench: $$(needs.bench)  ## Measure what the README promises
	@$(python) -m scripts.bench build/bench.json

explained = $(if $(dry),,+)@explained=$$($(MAKE) --no-print-directory EXPLAIN=1 WEIGHTS=$(WEIGHTS) repository) && printf '%s\n' "$$explained" | $(system_python)
status:  ## What would run, and why; with FILE=build/onnx/vit.onnx, all that it hangs on
	$(explained) scripts/status.py $(REPOSITORY) $(FILE)

graph:  ## Draw the pipeline and its state: build/graph.svg
	$(explained) scripts/graph.py $(REPOSITORY) build/graph.svg

provenance:  ## What each published file was made from, as JSON; compare: make provenance CHECK=file.json
	$(if $(CHECK),@$(system_python) scripts/provenance.py $(REPOSITORY) --check $(CHECK),$(explained) scripts/provenance.py $(REPOSITORY))

clean:  ## Free what can be made again; records, checkpoints and the repository stay
	rm -rf build .make/out

distclean: clean  ## Also the environments and records; your files and the repository stay
	rm -rf .venv .venv-triton .venv-prebuilt .make/seen .make/made .make/took .make/lock

help:  ## Show this list
	@scripts/help.sh $(firstword $(MAKEFILE_LIST)) $(foreach knob,FROM WEIGHTS WEIGHTS_ZIP REPOSITORY_ZIP VIT WITH REPOSITORY MODEL OPSET ACCEPT IMAGE PYTHON,'$(knob)=$($(knob))')

# --- Rebuild on content, never on time ----------------------------------------
#
#   .make/seen/X   digest of X, its size, mtime, ctime, inode; the digest alone once X is gone
#   .make/made/X   digest of X, its command, digests of its inputs: how X was made     (X with % for /)
#
# EXPLAIN=1 prints what each record would have to say, and runs nothing: what status, graph and provenance read.
# A step runs when .make/made/X is no longer true; Make compares the text itself and starts scripts/step.py only if
# it differs.  A file that is absent counts as what its record says, until a step that runs has to read it; an ONNX
# file is moved when it is published, and read there from then on.

EXPLAIN   :=
artifacts := .venv/installed .venv/installed-for-tests .venv-triton/installed $(entries) $(checkpoints) $(onnx) $(checks) build/checks/verdict.json $(judged)
$(artifacts): FORCE
.PHONY: FORCE
.PRECIOUS: $(artifacts)

.venv/installed-for-tests: tests/requirements.txt scripts/venv.sh | .venv/installed
	$(call step,scripts/venv.sh $(PYTHON) .venv tests/requirements.txt $(out))

# Needs the standard library only; a pyenv shim in front of python3 would cost 0.1 s
system_python := $(firstword $(wildcard /usr/bin/python3) python3) -sESB
# -B and this: on a full disk half a .pyc would be left, over which every later make would stumble
export PYTHONDONTWRITEBYTECODE := 1
python_minor  := $(if $(filter default file undefined,$(origin PYTHON)),$(notdir $(firstword $(wildcard .venv/bin/python3.??))))
python        := .venv/bin/$(or $(python_minor),$(shell $(PYTHON) -c 'import sys; print("python3.%d" % sys.version_info[1])'))

looked        := $(if $(filter-out clean distclean help,$(or $(MAKECMDGOALS),help)),$(shell $(system_python) scripts/look.py $(artifacts) $(fetched) $(sources) $(foreach file,$(contents),$(REPOSITORY)/$(firstword $(subst =, ,$(file))))),nothing to look at)
$(if $(looked),,$(error scripts/look.py could not look at the files))
nested        := $(MAKE_RUN)
export MAKE_RUN := $(or $(MAKE_RUN),$(looked))

key   = $(subst /,%,$1)
note  = $(file <.make/seen/$(key))
made  = $(file <.make/made/$(key))
here  = $(word 2,$(call note,$1))
wrote = $(patsubst $1=%,%,$(firstword $(call made,$1)))
sha   = $(if $(call here,$1),$(firstword $(call note,$1)))
known = $(or $(call sha,$1),$(call wrote,$1),$(firstword $(call note,$1)))
same  = $(and $(findstring <$1>,<$2>),$(findstring <$2>,<$1>))

inputs = $(filter-out FORCE,$^)
keep   = $(filter training/weights/%,$@)
self   = $(if $(keep),$(call wrote,$@),$(call known,$@))
pins   = $(foreach tool,$1,$(or $(filter $(tool)==%,$(file <requirements.txt)),$(error $@: $(tool) is no package of requirements.txt; a comma in a command belongs into a variable)))
now    = $(strip $@=$(self) $1 $(call pins,$2) : $(foreach in,$(inputs),$(in)=$(call known,$(in))))
wanted = $(filter $@,$(MAKECMDGOALS) $(foreach goal,$(MAKECMDGOALS),$(needs.$(goal))))
ready  = $(if $(filter %.zip,$1),$(and $(call here,$1),$(findstring $(call known,$1),$(file <$1.lock.json))),$(or $(call here,$1),$(call twin,$1)))
twin   = $(and $(filter build/onnx/%,$1),$(call same,$(call wrote,$1),$(call sha,$(REPOSITORY)/$(firstword $(subst =, ,$(filter %=$1,$(contents)))))))
absent = $(strip $(foreach in,$(filter $(artifacts) $(fetched),$(inputs) $|),$(if $(call ready,$(in)),,$(in))))

out   = .make/out/$@
true  = $(and $(call same,$(now),$(call made,$@)),$(or $(call here,$@),$(if $(wanted),,vouched for)))
own   = $(and $(keep),$(call here,$@),$(filter-out $(call wrote,$@),$(call known,$@)))
step  = $(if $(EXPLAIN),$(info $(now)$(if $|, | $|)),$(if $(true),$(local),$(run)))
local = $(if $(own),$(if $(nested),,$(info local: $@ is yours; it is used as it is)))
run   = $(if $(absent),$(if $(own),$(local),$(first)),$(start))
first = $(if $(dry),,+)@$(MAKE) --no-print-directory $(absent) $@
dry   = $(strip $(foreach flag,n q t,$(findstring $(flag),$(firstword -$(MAKEFLAGS)))))
quote = '$(subst ','\'',$(strip $1))'
start = @$(system_python) scripts/step.py $(if $(keep),--keep) $@ $(call quote,$1) '$(call pins,$2)' $(inputs)

# Publishing compares each published file with what it is to be a copy of, and replaces the models that differ
space   := $(subst ,, )
comma   := ,
differs = $(if $(call same,$(call sha,$(REPOSITORY)/$(word 1,$1)),$(call known,$(word 2,$1))),,$(call model,$(word 1,$1)))
model   = $(firstword $(subst /, ,$1))
served  = $(sort $(foreach file,$(contents),$(call model,$(file))))
dropped = $(strip $(foreach model,$(filter-out $(served),$(sort $(foreach file,$(wordlist 2,999,$(ours)),$(call model,$(file))))),$(if $(wildcard $(REPOSITORY)/$(model)),$(model))))
changed = $(sort $(foreach file,$(contents),$(call differs,$(subst =, ,$(file)))) $(dropped))
recent  = $(strip $(foreach file,$1,$(findstring "$(MAKE_RUN)",$(file <.make/took/$(call key,$(file))))))
summary = $(system_python) scripts/summary.py
publish = $(if $(EXPLAIN),$(foreach file,$(contents),$(info $(REPOSITORY)/$(subst =,=$(call known,$(lastword $(subst =, ,$(file)))) publish : ,$(file))=$(call known,$(lastword $(subst =, ,$(file)))))),$(call replace,$(changed)))
replace = $(if $1,$(call bring,$(call lacking,$1),$1),$(if $(call recent,$(artifacts)),@$(summary) build/checks/verdict.json,$(info $(REPOSITORY) is up to date: $(words $(contents)) files, nothing rebuilt)@:))
lacking = $(strip $(foreach file,$(filter $(1:%=%/%),$(contents)),$(filter $(artifacts),$(foreach source,$(lastword $(subst =, ,$(file))),$(if $(call ready,$(source)),,$(source))))))
bring   = $(if $1,$(if $(dry),,+)@$(MAKE) --no-print-directory $1 repository,@$(call exchange,$2))
exchange = $(system_python) scripts/publish.py $(REPOSITORY) --weights $(kind) --verdict build/checks/verdict.json --models $(subst $(space),$(comma),$1) $(contents) && $(summary) build/checks/verdict.json

ifneq ($(filter repository,$(MAKECMDGOALS)),)
publishes := $(if $(filter prebuilt,$(FROM)),prebuilt,$(kind))
$(foreach head,$(heads),$(if $(filter $(VIT),$(or $($(head).trained_on),$(VIT))),,$(error \
  $(head) was trained on the $($(head).trained_on) ViT (convertation/models.yaml) and is never paired with VIT=$(VIT); train a head on it and say so there, or make onnx MODEL=vit VIT=$(VIT))))
$(if $(wildcard $(REPOSITORY)/*/config.pbtxt $(served:%=$(REPOSITORY)/%)),$(if $(filter $(publishes),$(firstword $(ours))),,$(error \
  $(REPOSITORY) $(if $(ours),is made from $(firstword $(ours)) weights and these are $(publishes),was not made by this build); move it away (mv $(REPOSITORY) $(REPOSITORY).old) or publish elsewhere (make repository REPOSITORY=dir))))
endif
