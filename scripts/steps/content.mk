# Rebuild by content, never by time: `step` compares two texts.  The Makefile includes this file before its rules
#
#   .make/seen/X   the digest of X, or its last one if X is absent now; if X is present also its size, mtime, …
#   .make/made/X   "X=its digest command versions : INPUT=digest …": how X was made    (in these names % stands for /)
#
# scripts/steps/before_make.py brings .make/seen up to date before make decides.  Where the texts differ,
# scripts/steps/step.py makes X: absent inputs, the user's own files, locks, dry runs, the cache and reasons are its job

$(if $(filter 3.% 4.0 4.0.% 4.1 4.1.% 4.2 4.2.%,$(MAKE_VERSION)),$(error GNU Make $(MAKE_VERSION) is too old, 4.3 is \
  needed: apt install make on Debian 11 or Ubuntu 22.04 and newer, or brew install make and type gmake))
system_python := $(firstword $(wildcard /usr/bin/python3) python3) -sESB
quote   = '$(subst ','\'',$(strip $1))'
comma  := ,
knobs  := $(patsubst $$(CT_%),%,$(filter $$(CT_%),$(subst $(comma), ,$(file <knobs.mk))))
given  := $(foreach knob,$(knobs),$(if $(filter command,$(origin $(knob)))$(CT_$(knob)),$(knob)))
values := $(foreach knob,$(knobs),$(call quote,$(knob)=$($(knob))))
define newline


endef
$(foreach knob,$(knobs),$(if $(findstring $(newline),$($(knob))),$(error $(knob): expected one line, it has more)))
dry     = $(strip $(foreach flag,n q t,$(findstring $(flag),$(filter-out --%,$(firstword $(MAKEFLAGS))))))
nested := $(if $(MAKE_RESTARTS),$(MAKE_NESTED),$(MAKE_RUN))
MAKEFLAGS += $(if $(nested),--silent)
looked := $(shell $(system_python) scripts/steps/before_make.py '$(MAKE_RUN)' '$(nested)' '$(MAKECMDGOALS)' '$(given)' \
            $(values))
$(if $(filter run=%,$(looked)),,$(error $(or $(looked),$(system_python) cannot run scripts/steps/before_make.py)))
told    = $(patsubst $1=%,%,$(filter $1=%,$(looked)))

seen   = $(file <.make/seen/$(subst /,%,$1))
made   = $(file <.make/made/$(subst /,%,$1))
known  = $(firstword $(call seen,$1))
wrote  = $(patsubst $@=%,%,$(firstword $(call made,$@)))
self   = $(if $(filter training/weights/%,$@),$(wrote),$(call known,$@))
# What a step reads: its prerequisites, and the module of this project that its command runs, with all that it imports
inputs = $(filter-out FORCE,$^) $(filter-out $^,$(if $(filter .venv%,$(firstword $1)),$(call code,$(module))))
module = $(firstword $(patsubst @%,%,$(filter @%,$(subst -m ,@,$1))))
now    = $(strip $@=$(self) $1 $(call pins,$2) : $(foreach in,$(inputs),$(in)=$(call known,$(in))))
pins   = $(foreach tool,$1,$(or $(filter $(tool)==%,$(pinned)),$(error $@: $(tool) is not in requirements.txt)))
pinned := $(file <requirements.txt)
same   = $(and $(findstring <$1>,<$2>),$(findstring <$2>,<$1>))
wanted = $(filter $@,$(MAKECMDGOALS) $(foreach goal,$(MAKECMDGOALS),$(needs.$(goal))))
true   = $(and $(call same,$(now),$(call made,$@)),$(or $(word 2,$(call seen,$@)),$(if $(wanted),,$(wrote))))
out    = .make/out/$@
step   = $(if $(EXPLAIN),$(info $(now) | $|)$(if $(wanted),$(info wanted $@)),$(if $(true),,$(run)))
run    = +@$(system_python) -m scripts.steps.step $(if $(wanted),--wanted) $@ $(call quote,$1) \
           $(call quote,$(call pins,$2)) $(inputs) -- $|

# $(call code,scripts.show.graph): a script and all files that it imports, found by scripts/steps/modules.py
include $(call told,modules) $(call told,models)
code = $(if $(call told,modules),$(or $($1),$(error $(subst .,/,$1).py is missing)))
python := $(call told,python)
living = $(and $(wildcard $(python)),$(wildcard .venv/installed))
$(if $(and $(dry),$(call told,models)),$(if $(living)$(wildcard $(call told,models)),,$(error \
  make -n installs nothing, and only .venv can read convertation/models.yaml; first make .venv/installed)))
.make/models/%.mk .make/models/%.needs.mk: | $(if $(living),,.venv/installed)
	@mkdir -p $(@D) && $(python) -m scripts.convert.model_entry facts convertation/models.yaml .make/models/$*.mk

override REPOSITORY := $(call told,REPOSITORY)
override WEIGHTS    := $(call told,WEIGHTS)
override PRECISION  := $(call told,PRECISION)

# What steps get from make
export PYTHONDONTWRITEBYTECODE := 1
export MAKE_RUN       := $(call told,run)
export MAKE_NESTED    := $(nested)
export MAKE_COMMAND   := $(MAKE)
export VENV_PYTHON    := $(python)
export CT_WEIGHTS     := $(WEIGHTS)
export CT_PRECISION   := $(PRECISION)
export TENSORRT_IMAGE := $(REGISTRY)nvcr.io/nvidia/tensorrt:$(NGC_RELEASE)-py3
export TRITON_IMAGE   := $(REGISTRY)nvcr.io/nvidia/tritonserver:$(NGC_RELEASE)-py3
export ACCEPT CACHE CACHE_MODE NGC_RELEASE PYTHON

# A step runs in a dry run, too, to print its reason; these recipes do not
live = $(if $(dry),,+)@

# An archive is fetched when it is a goal (a step that needs it makes it one), or when the user names a file
by_hand = $(if $(filter %/weights.zip,$@),$(WEIGHTS_ZIP),$(REPOSITORY_ZIP))
linked  = $(or $(if $(by_hand),,yes),$(filter $(realpath $@),$(realpath $(by_hand))))
right   = $(and $(word 2,$(call seen,$@)),$(findstring $(call known,$@),$(file <$@.lock.json)),$(linked))
asked   = $(or $(filter $@.lock.json,$(MAKECMDGOALS)),$(wanted),$(by_hand))
fetch   = $(if $(EXPLAIN)$(right),,$(if $(asked),$(live)$(python) -m scripts.archives.fetch \
            $(if $(by_hand),--from $(call quote,$(by_hand))) $(@F) $@))

# Publishing is decided as a step is: by the folder's digest and the source of each file in it
copies    = $(foreach pair,$(contents),$(pair)=$(call known,$(lastword $(subst =, ,$(pair)))))
tree      = $(firstword $(file <.make/tree/$(subst /,%,$(REPOSITORY))))
to_be     = $(strip $(REPOSITORY)=$(tree) publish $(kind) : $(copies))
publisher = $(system_python) -m scripts.publish.publish $(REPOSITORY)
publish   = $(if $(EXPLAIN),$(info $(to_be)),$(if $(filter prebuilt,$(FROM)), \
              $(live)$(publisher) --prebuilt $(prebuilt) build/prebuilt,$(if \
              $(call same,$(to_be),$(call made,$(REPOSITORY))),$(call tell,build/checks/verdict.json), \
              $(live)$(publisher) --weights $(kind) --verdict build/checks/verdict.json $(contents))))
up_to_date = $(if $(filter repository,$@),$(REPOSITORY) is up to date: $(words $(contents)) files$(comma) nothing \
               rebuilt,$(filter %.onnx %.plan,$1): up to date)
tell      = @$(if $(file <.make/run/$(MAKE_RUN)),$(system_python) -m scripts.steps.summary $1,echo '$(up_to_date)')

# With a shared cache: before the steps, take all results that it has, so that a known result needs no inputs
taken_for = $(filter $(artifacts) repository,$(MAKECMDGOALS) $(foreach goal,$(MAKECMDGOALS),$(needs.$(goal))))
taking    = $(and $(CACHE),$(models),$(taken_for),$(if $(EXPLAIN)$(nested)$(dry),,yes))
take      = export CACHE=$(call quote,$(CACHE)) CACHE_MODE=$(CACHE_MODE) MAKE_COMMAND=$(MAKE) VENV_PYTHON=$(python) \
              MAKE_RUN=$(MAKE_RUN) CT_GPU=$(gpu) CT_TENSORRT=$(tensorrt); \
              $(system_python) -m scripts.steps.take_cached $(taken_for) -- \
              $(foreach knob,$(given),$(call quote,$(knob)=$($(knob))))

# Targets whose command has branches
print_plan = $(system_python) -m scripts.plans.plan --print --gpu $(or $(gpu),sm86) --tensorrt "$(tensorrt)" $(flags) \
               $(if $(filter %.tf32 %.fp16,$1),--precision=$(PRECISION)) build/models/$1.json build/onnx/$1.onnx \
               build/plan/$(or $(gpu),sm86)/$1.plan;
trt       = $(if $(CHECK),@$(python) -m scripts.plans.card_memory scripts/plans/cards.yaml scripts/plans/fleet.yaml \
              $(call quote,$(GPUS)) $(foreach model,$(plannable),build/checks/$(model).rtx.json=$(call \
              config_of,$(patsubst %.tf32,%,$(patsubst %.fp16,%,$(model))))),$(if $(DRY),@$(if $(gpu),,echo '# no GPU \
              could be asked (make doctor): sm86 stands for its compute capability';) $(foreach \
              model,$(plannable),$(call print_plan,$(model))),$(call tell,$(needs.trt))))
fleet     = exec $(python) -m scripts.plans.fleet scripts/plans/fleet.yaml $(call quote,$(GPUS)) \
              $(call quote,$(plannable)) $(call quote,$(heads)) $(MAKE) trt \
              $(foreach knob,$(filter-out GPUS,$(given)),$(call quote,$(knob)=$($(knob))))
published_kind = $(firstword $(file <.make/published/$(subst /,%,$(REPOSITORY))))
own_triton  = $(if $(filter prebuilt,$(published_kind)),$(addprefix TRITON_VENV=,$(wildcard .venv-prebuilt)))
judged_as   = --verdict $(if $(filter prebuilt,$(published_kind)),$(prebuilt).verdict.json,build/checks/verdict.json)
sbom.triton     = --base $(TRITON_IMAGE) build/image-triton.cdx.json
sbom.inference  = --base $(REGISTRY)$(BASE) --usual chest-ct-inference --pins requirements-inference.txt \
                    build/image-inference.cdx.json
image.triton    = scripts.deploy.image --base $(TRITON_IMAGE)
image.inference = scripts.deploy.inference_image --base $(REGISTRY)$(BASE)
ready_image = $(or $(IMAGE),$(if $(filter prebuilt,$(FROM)),$(REGISTRY)borntowarn/porcupine-tritonserver))
locked      = $(or $(patsubst training/%.lock.json,%,$(wildcard $(archives:=.lock.json))),weights.zip)
