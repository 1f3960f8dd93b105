# TensorRT plans: which there are, for which GPUs; included by the Makefile
#
# Which GPU this machine has is asked in a recipe, for Docker answers in seconds: `ask_gpu` runs scripts/plans/gpu.py, and make
# once more with gpu=sm86 tensorrt=10.1.0.27, for which then all rules of plans exist.

# The two images of one release; scripts read these names
export NGC_RELEASE
export TENSORRT_IMAGE := $(REGISTRY)nvcr.io/nvidia/tensorrt:$(NGC_RELEASE)-py3
export TRITON_IMAGE   := $(REGISTRY)nvcr.io/nvidia/tritonserver:$(NGC_RELEASE)-py3

# Answers come on the command line, never from an environment that happens to have such a name
ifneq ($(origin gpu) $(origin tensorrt),command line command line)
override gpu :=
endif
variants   := $(foreach model,$(planned),$(call variant,$(model)))
plain       = $(patsubst %.tf32,%,$(1:%.fp16=%))
with_plans := $(if $(filter onnx,$(FORMAT)),$(filter trt verify-gpu,$(MAKECMDGOALS)),yes)
ask        := $(if $(filter onnx,$(FORMAT)),,$(if $(gpu),,yes))
ask_gpu     = $(if $(dry),,+)@answer=$$($(system_python) -m scripts.plans.gpu $(if $(filter trt,$@),,--triton $(TRITON_IMAGE))) && \
                $(MAKE) --no-print-directory $$answer $(if $(filter verify-gpu,$@),FORMAT=both) $@
on_a_gpu    = $(if $(compared),--image $(TRITON_IMAGE) --gpu-checks build/plan/$(gpu)/{}.check.json)
missed      = $(if $(filter plan,$(FORMAT)),$(if $(EXPLAIN),,$(info FORMAT=plan: the existing client asks for $(planned:%=%_onnx) and will not find them; FORMAT=both keeps them)))

requests := $(if $(with_plans),$(variants:%=build/plan/%.request.json))
expected := $(if $(with_plans),$(variants:%=build/plan/%.expected.npy))
rtx      := $(variants:%=build/checks/%.rtx.json)
ifneq ($(and $(gpu),$(with_plans)),)
# Plans of other machines: their folders are named by compute capability, as ours
others   := $(sort $(filter-out build/plan/%,$(patsubst $(CURDIR)/%,%,$(foreach folder,$(realpath $(PLANS)),$(wildcard $(folder)/*/*.plan)))))
under     = $(lastword $(subst /, ,$(dir $1)))
others   := $(foreach plan,$(others),$(if $(filter $(variants),$(basename $(notdir $(plan)))),$(plan)))
twice    := $(firstword $(foreach plan,$(others),$(if $(word 2,$(filter %/$(call under,$(plan))/$(notdir $(plan)),$(others))),$(call under,$(plan))/$(notdir $(plan)))))
$(if $(twice),$(error PLANS: $(filter %/$(twice),$(others)): expected one $(twice); leave out all of these folders but one))
folders  := $(sort $(gpu) $(foreach plan,$(others),$(call under,$(plan))) \
              $(if $(filter $(CURDIR)/build/plan,$(realpath $(PLANS))),$(foreach plan,$(wildcard build/plan/*/*.plan),$(call under,$(plan)))))
plans    := $(foreach folder,$(folders),$(variants:%=build/plan/$(folder)/%.plan))
$(foreach plan,$(others),$(eval brought.$(call under,$(plan))/$(basename $(notdir $(plan))) := $(plan)))
taken    := $(foreach plan,$(plans),$(if $(brought.$(patsubst build/plan/%.plan,%,$(plan))),$(plan)))
built    := $(filter-out $(taken),$(plans))
compared := $(sort $(variants:%=build/plan/$(gpu)/%.check.json) $(built:.plan=.check.json))
plan_configs := $(planned:%=build/plan/%.config.pbtxt)
warm_configs := $(if $(filter onnx,$(FORMAT)),,$(planned:%=build/plan/%_onnx.config.pbtxt))
endif
head_onnx := $(foreach head,$(heads),build/onnx/$(call variant,$(head)).onnx)
precision = $(if $(filter %.tf32 %.fp16,$1),--precision=$(PRECISION))
# Said before anything starts
wrong_flags := $(if $(and $(TRTEXEC_FLAGS),$(with_plans)$(filter trt-fleet,$(MAKECMDGOALS))),$(shell NGC_RELEASE=$(NGC_RELEASE) \
                 $(PYTHON) -sESB -m scripts.plans.trtexec_options '$(subst ','\'',$(TRTEXEC_FLAGS))' 2>&1))
$(if $(wrong_flags),$(error $(wrong_flags)))
export NGC_RELEASE
flags = $(if $(TRTEXEC_FLAGS),--flags=$(call quote,$(TRTEXEC_FLAGS)))

chosen_plans   = $(or $(foreach model,$(filter $(planned),$(chosen)),$(call variant,$(model))),$(if $(filter trt trt-fleet,$(MAKECMDGOALS)),$(if $(models),$(error MODEL=$(MODEL): no plan is made of it; expected vit, head or one of $(planned)))))
plans_for      = $(chosen_plans:%=build/plan/$1/%.plan) $(chosen_plans:%=build/plan/$1/%.check.json)
print_commands = @answer=$$($(system_python) -m scripts.plans.gpu 2>/dev/null) || echo "\# no GPU could be asked (make doctor): sm86 stands for its compute capability"; \
  eval "$${answer:-gpu=sm86 tensorrt=}"; $(foreach model,$(chosen_plans),$(system_python) -m scripts.plans.plan --print --gpu $$gpu --tensorrt "$$tensorrt" \
  $(call precision,$(model)) $(flags) build/models/$(call plain,$(model)).json build/onnx/$(model).onnx build/plan/$$gpu/$(model).plan;)

# Without a GPU: NVIDIA's TensorRT for RTX, and what the cards in fleet.yaml hold
judged_by_rtx        = .venv/installed $(chosen_plans:%=build/checks/%.rtx.json)
tell_what_cards_hold = @$(python) -m scripts.plans.card_memory scripts/plans/cards.yaml scripts/plans/fleet.yaml $(call quote,$(GPUS)) \
  $(foreach model,$(chosen_plans),build/checks/$(model).rtx.json=$(config.$(call plain,$(model))))

# Many kinds of GPU: what needs none is made first; then each job runs `make trt` with the knobs that were given
prepared     = $(foreach model,$(chosen_plans),build/plan/$(model).request.json build/plan/$(model).expected.npy \
                 build/models/$(model).tolerance.json) \
               $(if $(filter vit%,$(chosen_plans)),$(foreach head,$(heads),build/plan/$(call variant,$(head)).request.json))
given        = $(foreach knob,$(filter-out GPUS DRY,$(knobs)),$(if $(filter file,$(origin $(knob))),,$(call quote,$(knob)=$($(knob)))))
fleet        = exec $(python) -m scripts.plans.fleet scripts/plans/fleet.yaml $(call quote,$(GPUS)) $(call quote,$(prepared)) \
                 $(call quote,$(call plans_for,{gpu})) $(MAKE) trt $(given)
