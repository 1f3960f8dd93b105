# TensorRT plans: which there are, for which GPUs; included by the Makefile
#
# Which GPU this machine has is asked in a recipe, for Docker answers in seconds: `ask_gpu` runs scripts/gpu.py, and make
# once more with gpu=sm86 tensorrt=10.1.0.27, for which then all rules of plans exist.

# The two images of one release; scripts read these names
export TENSORRT_IMAGE := $(REGISTRY)nvcr.io/nvidia/tensorrt:$(NGC_RELEASE)-py3
export TRITON_IMAGE   := $(REGISTRY)nvcr.io/nvidia/tritonserver:$(NGC_RELEASE)-py3

# Answers come on the command line, never from an environment that happens to have such a name
ifneq ($(origin gpu) $(origin tensorrt),command line command line)
override gpu :=
endif
# PRECISION=fp16: plans of build/onnx/vit.fp16.onnx are strongly typed, their reference stays the fp32 file
variant    := $(if $(filter fp16,$(PRECISION)),.fp16)
with_plans := $(if $(filter onnx,$(FORMAT)),$(filter trt verify-gpu,$(MAKECMDGOALS)),yes)
ask        := $(if $(filter onnx,$(FORMAT)),,$(if $(gpu),,yes))
ask_gpu     = $(if $(dry),,+)@answer=$$($(system_python) -m scripts.gpu $(if $(filter trt,$@),,--triton $(TRITON_IMAGE))) && \
                $(MAKE) --no-print-directory $$answer $(if $(filter verify-gpu,$@),FORMAT=both) $@
on_a_gpu    = $(if $(compared),--image $(TRITON_IMAGE) --gpu-checks build/plan/$(gpu)/{}$(variant).check.json)
missed      = $(if $(filter plan,$(FORMAT)),$(if $(EXPLAIN),,$(info FORMAT=plan: the existing client asks for $(planned:%=%_onnx) and will not find them; FORMAT=both keeps them)))

requests := $(if $(with_plans),$(planned:%=build/plan/%$(variant).request.json))
expected := $(if $(with_plans),$(planned:%=build/plan/%.expected.npy))
ifneq ($(and $(gpu),$(with_plans)),)
# Plans of other machines: their folders are named by compute capability, as ours
others   := $(filter-out build/plan/%,$(patsubst $(CURDIR)/%,%,$(foreach folder,$(PLANS),$(wildcard $(folder)/*/*.plan))))
under     = $(lastword $(subst /, ,$(dir $1)))
others   := $(foreach plan,$(others),$(if $(filter $(planned:%=%$(variant)),$(basename $(notdir $(plan)))),$(plan)))
folders  := $(sort $(gpu) $(foreach plan,$(others),$(call under,$(plan))) \
              $(if $(filter build/plan $(CURDIR)/build/plan,$(abspath $(PLANS))),$(foreach plan,$(wildcard build/plan/*/*.plan),$(call under,$(plan)))))
plans    := $(foreach folder,$(folders),$(planned:%=build/plan/$(folder)/%$(variant).plan))
$(foreach plan,$(others),$(eval brought.$(call under,$(plan))/$(basename $(notdir $(plan))) := $(plan)))
taken    := $(foreach plan,$(plans),$(if $(brought.$(patsubst build/plan/%.plan,%,$(plan))),$(plan)))
built    := $(filter-out $(taken),$(plans))
compared := $(sort $(planned:%=build/plan/$(gpu)/%$(variant).check.json) $(built:.plan=.check.json))
plan_configs := $(planned:%=build/plan/%.config.pbtxt)
endif
head_onnx := $(heads:%=build/onnx/%.onnx)
entry_of   = $(firstword $(subst ., ,$1))
flags = $(if $(variant),--precision fp16) $(if $(TRTEXEC_FLAGS),--flags=$(call quote,$(TRTEXEC_FLAGS)))

chosen_plans   = $(or $(filter $(planned),$(chosen)),$(error MODEL=$(MODEL): no plan is made of it; expected vit, head or one of $(planned)))
plans_for      = $(chosen_plans:%=build/plan/$1/%$(variant).plan) $(chosen_plans:%=build/plan/$1/%$(variant).check.json)
print_commands = @answer=$$($(system_python) -m scripts.gpu 2>/dev/null) || echo "\# no GPU could be asked (make doctor): sm86 stands for its compute capability"; \
  eval "$${answer:-gpu=sm86 tensorrt=}"; $(foreach model,$(chosen_plans),$(system_python) -m scripts.plan --print --gpu $$gpu --tensorrt "$$tensorrt" \
  $(flags) build/models/$(model).json build/onnx/$(model)$(variant).onnx build/plan/$$gpu/$(model)$(variant).plan;)

# Many kinds of GPU: what needs none is made first; then each job runs `make trt` with the knobs that were given
prepared     = $(foreach model,$(chosen_plans),build/plan/$(model)$(variant).request.json build/plan/$(model).expected.npy \
                 build/models/$(model).tolerance.json) $(if $(filter vit,$(chosen_plans)),$(heads:%=build/plan/%$(variant).request.json))
given        = $(foreach knob,$(filter-out GPUS DRY,$(knobs)),$(if $(filter file,$(origin $(knob))),,$(call quote,$(knob)=$($(knob)))))
fleet        = exec $(python) -m scripts.fleet scripts/fleet.yaml $(call quote,$(GPUS)) $(call quote,$(prepared)) \
                 $(call quote,$(call plans_for,{gpu})) $(MAKE) trt $(given)
