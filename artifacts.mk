# The lists that the Makefile's rules are about: models, the files of each, what is published

models   := $(foreach model,$(sort $(all_models)),$(if $($(model).optional),$(filter $(model),$(WITH)),$(model)))
optional := $(strip $(foreach model,$(all_models),$(if $($(model).optional),$(model))))
heads    := $(foreach model,$(models),$(if $(filter head,$($(model).family)),$(model)))
family    = $(filter $(or $(MODEL),%),$1 $($1.family))
chosen   := $(strip $(foreach model,$(models),$(if $(call family,$(model)),$(model))))
weights  := $(if $(filter synthetic,$(WEIGHTS)),build/synthetic,training/weights)
kind     := $(if $(filter synthetic,$(WEIGHTS)),synthetic,real)
bpreg    := $(sort $(wildcard convertation/bpr/bpreg/*.py))

# vit, vit.tf32 or vit.fp16, according to PRECISION
varied   := $(foreach model,$(models),$(if $($(model).variants),$(model)))
variant   = $1$(if $(filter $1,$(varied)),$(filter-out .fp32,.$(PRECISION)))
variants := $(models) $(varied:%=%.tf32) $(varied:%=%.fp16)

checkpoints := $(foreach model,$(models),$(weights)/$($(model).checkpoint)) $(weights)/bpr/inference-settings.json
entries     := $(variants:%=build/models/%.json) $(variants:%=build/models/%.tolerance.json)
onnx        := $(models:%=build/onnx/%.onnx)
onnx_tf32   := $(varied:%=build/onnx/%.tf32.onnx)
onnx_fp16   := $(varied:%=build/onnx/%.fp16.onnx)
checks      := $(models:%=build/checks/%.json)
checks_tf32 := $(varied:%=build/checks/%.tf32.json)
checks_fp16 := $(varied:%=build/checks/%.fp16.json)
archives    := training/weights.zip training/model_repository_running.zip
prebuilt    := training/model_repository_running.zip

# Plans: one for each model and GPU; the folder names the GPU (build/plan/sm86).  A container tells which GPU is here
planned  := $(foreach model,$(filter vit $(heads),$(models)),$(call variant,$(model)))
plannable = $(filter $(chosen) $(varied:%=%.$(PRECISION)),$(planned))
$(if $(and $(models),$(filter trt trt-fleet,$(MAKECMDGOALS))),$(if $(strip $(plannable)),,\
  $(error MODEL=$(MODEL): no plan is made of it; expected vit, head or one of $(planned))))
override FORMAT := $(if $(filter verify-gpu,$(MAKECMDGOALS)),both,$(FORMAT))
with_plans := $(filter-out onnx,$(FORMAT))$(filter trt trt-fleet,$(MAKECMDGOALS))
asking := $(filter trt verify-gpu $(if $(filter-out onnx,$(FORMAT)),repository verify),$(MAKECMDGOALS))
asking := $(if $(CT_GPU)$(dry)$(and $(CHECK),$(filter trt,$(asking))),,$(asking))
printing := $(and $(DRY),$(filter trt,$(MAKECMDGOALS)))
answer := $(if $(asking),$(shell export TENSORRT_IMAGE=$(TENSORRT_IMAGE) TRITON_IMAGE=$(TRITON_IMAGE) \
            NGC_RELEASE=$(NGC_RELEASE); \
            $(if $(filter verify-gpu,$(asking)),$(system_python) -m scripts.plans.doctor --gpu >&2 &&) \
            $(system_python) -m scripts.plans.gpu $(if $(filter trt,$(asking)),,--triton $(TRITON_IMAGE)) \
            --flags=$(call quote,$(TRTEXEC_FLAGS)) $(if $(printing),2>/dev/null)))
gpu      := $(or $(patsubst gpu=%,%,$(filter gpu=%,$(answer))),$(CT_GPU))
tensorrt := $(or $(patsubst tensorrt=%,%,$(filter tensorrt=%,$(answer))),$(CT_TENSORRT))
$(if $(asking),$(if $(gpu)$(printing),,$(error no plan was made; what is lacking stands above)))
$(if $(and $(dry),$(models),$(filter trt,$(MAKECMDGOALS))),$(if $(gpu)$(DRY)$(CHECK),,$(error \
  make -n asks for no GPU; make trt DRY=1 prints the commands)))
export CT_GPU := $(gpu)
export CT_TENSORRT := $(tensorrt)

# Plans from other machines: taken=sm89/vit, or there=sm89/vit if a fleet built it in build/plan
brought  := $(if $(and $(PLANS),$(gpu)),$(shell $(system_python) -m scripts.plans.find_plans $(PLANS) || echo failed))
$(if $(filter failed,$(brought)),$(error PLANS=$(PLANS): nothing was taken))
fitting   = $(foreach plan,$(patsubst $1=%,%,$(filter $1=%,$(brought))), \
              $(if $(filter $(notdir $(plan)),$(planned)),$(plan)))
folders  := $(if $(and $(gpu),$(with_plans)), \
              $(sort $(gpu) $(patsubst %/,%,$(dir $(call fitting,taken) $(call fitting,there)))))
plans    := $(foreach folder,$(folders),$(planned:%=build/plan/$(folder)/%.plan))
taken    := $(patsubst %,build/plan/%.plan,$(call fitting,taken))
built    := $(filter-out $(taken),$(plans))
compared := $(sort $(if $(folders),$(planned:%=build/plan/$(gpu)/%.check.json)) $(built:.plan=.check.json))
requests := $(planned:%=build/plan/%.request.json)
expected := $(planned:%=build/plan/%.expected.npy)
configs  := $(if $(folders),$(filter vit $(heads),$(models)))
warm     := $(if $(filter-out onnx,$(FORMAT)),$(configs:%=build/plan/%_onnx.config.pbtxt))
rtx      := $(patsubst %,build/checks/%.rtx.json,$(filter-out bpr,$(variants)))
rtx_on_gpu := $(rtx:.rtx.json=.rtx-gpu.json)
has_gpu  := $(wildcard /proc/driver/nvidia/gpus)
head_onnx     := $(foreach head,$(heads),build/onnx/$(head).onnx)

# Each file of the published repository, and the file it is a copy of
config    = $(if $(filter-out fp32,$(PRECISION)),config.tf32,config)
config_of = convertation/$(if $(filter vit,$1),vit/$(config),head/$1).pbtxt
bpr_pins := $(wildcard convertation/bpr/requirements-$(NGC_RELEASE).txt)
contents := \
  $(foreach model,$(if $(filter plan,$(FORMAT)),,$(filter vit $(heads),$(models))), \
    $(model)_onnx/config.pbtxt=$(if $(warm),build/plan/$(model)_onnx.config.pbtxt,$(call config_of,$(model))) \
    $(model)_onnx/1/model.onnx=build/onnx/$(call variant,$(model)).onnx) \
  $(foreach model,$(if $(filter onnx,$(FORMAT)),,$(configs)), \
    $(model)_trt/config.pbtxt=build/plan/$(model).config.pbtxt \
    $(foreach folder,$(folders),$(model)_trt/1/$(folder).plan=build/plan/$(folder)/$(call variant,$(model)).plan)) \
  bpr_model/config.pbtxt=convertation/bpr/config.pbtxt bpr_model/1/model.py=convertation/bpr/model.py \
  bpr_model/1/requirements.txt=$(or $(bpr_pins),convertation/bpr/requirements.txt) \
  $(foreach file,$(bpreg),$(file:convertation/bpr/%=bpr_model/1/%)=$(file)) \
  bpr_model/1/weights/model.onnx=build/onnx/bpr.onnx \
  bpr_model/1/weights/inference-settings.json=$(weights)/bpr/inference-settings.json
sources   := $(foreach file,$(contents),$(lastword $(subst =, ,$(file))))
published := $(foreach model,$(models),$(call variant,$(model)))

environments := .venv .venv-triton .venv-inference .venv-rtx .venv-signing
artifacts := $(environments:%=%/installed) .venv/installed-for-tests .venv/installed-for-s3 $(entries) $(checkpoints) \
  $(onnx) $(onnx_tf32) $(onnx_fp16) $(checks) $(checks_tf32) $(checks_fp16) $(requests) $(expected) $(plans) \
  $(compared) \
  $(rtx) $(rtx_on_gpu) $(configs:%=build/plan/%.config.pbtxt) $(warm) build/checks/verdict.json build/fidelity.json \
  $(prebuilt).verdict.json

# Refuse wrong values before the long work starts
$(if $(models),$(if $(filter compare,$(MAKECMDGOALS)),,\
  $(if $(filter-out $(optional),$(WITH)),$(error WITH=$(WITH): expected one of $(optional)))))
$(if $(models),$(if $(chosen),,$(error MODEL=$(MODEL): expected vit, head, bpr or one of $(strip $(models)))))
misled := $(strip $(if $(filter repository,$(MAKECMDGOALS)),$(foreach head,$(heads),$(if \
            $(filter $(VIT),$(or $($(head).trained_on),$(VIT))),,$(head)))))
$(if $(misled),$(error $(firstword $(misled)) was trained on the $($(firstword $(misled)).trained_on) ViT \
  (convertation/models.yaml) and is never paired with VIT=$(VIT); train a head on it and say so there, \
  or make onnx MODEL=vit VIT=$(VIT)))

# --- What rules and targets share ---
model     = $(patsubst %.tf32,%,$(basename $(@F)))
exporting = --opset $(OPSET) --weights $(kind) $(checkpoint) $< $(out)
exporters = torch onnx onnxscript onnx-ir ml_dtypes numpy
rounders  = onnxruntime-gpu onnx onnx-ir ml_dtypes numpy
checkpoint = $(weights)/$($(model).checkpoint)
deployed := requirements-triton.txt convertation/bpr/requirements.txt | .venv-triton/installed
serving  := docker/backends/onnxruntime/model.py requirements-triton.txt | .venv-triton/installed
precision = $(if $(filter %.tf32 %.fp16,$*),--precision=$(PRECISION))
flags     = $(if $(TRTEXEC_FLAGS),--flags=$(call quote,$(TRTEXEC_FLAGS)))
request   = build/plan/$(*F).request.json
published.as := $(filter %.tf32 %.fp16,$(published))
judging   = --release $(NGC_RELEASE) --checks build/checks $(published.as:%=--variant %)
signature = .venv-signing/bin/$(notdir $(python)) -m scripts.publish.signature
zip_signature := $(if $(KEY),$(or $(REPOSITORY_ZIP),$(prebuilt)).sig)
on_a_gpu  = $(if $(compared),--image $(TRITON_IMAGE) --gpu-checks build/plan/$(gpu)/{}.check.json)

fidelity_hops := $(foreach model,vit $(heads),pytorch/$(model)=$(weights)/$($(model).checkpoint) \
    onnx/$(model)=build/onnx/$(model).onnx) \
  $(foreach file,$(sort $(wildcard $(onnx_fp16)) $(filter $(onnx_fp16),$(sources))),fp16/vit=$(file)) \
  $(foreach file,$(wildcard $(patsubst %,build/plan/*/%.plan,vit $(heads))), \
    $(patsubst build/%.plan,%,$(file))=$(file)) \
  $(addprefix served/,$(filter-out bpr_%,$(contents)))
fidelity_files := $(sort $(foreach hop,$(fidelity_hops),$(lastword $(subst =, ,$(hop)))))

needs.repository := $(if $(filter prebuilt,$(FROM)),$(prebuilt).verdict.json)
finished := $(or $(needs.repository),$(sources) build/checks/verdict.json)
needs.onnx := $(foreach model,$(chosen),build/onnx/$(call variant,$(model)).onnx \
                build/checks/$(call variant,$(model)).json)
needs.trt := $(if $(CHECK),.venv/installed $(foreach kind,rtx $(if $(has_gpu),rtx-gpu), \
  $(plannable:%=build/checks/%.$(kind).json)), \
  $(if $(DRY),$(plannable:%=build/models/%.json), \
  $(foreach plan,$(plannable:%=build/plan/$(gpu)/%),$(plan).plan $(plan).check.json)))
needs.weights := training/weights.zip $(filter training/%,$(checkpoints)) .venv/installed
needs.compare := .venv/installed .venv-triton/installed $(if $(INPUT),.venv-inference/installed)
needs.sign := .venv-signing/installed
needs.image := .venv/installed
needs.verify := $(if $(KEY),$(needs.sign),.venv/installed .venv-triton/installed $(published:%=build/checks/%.json) \
  $(compared))
needs.verify-gpu := $(onnx) $(published:%=build/checks/%.json) $(plans) $(compared) \
  $(configs:%=build/plan/%.config.pbtxt) .venv-triton/installed
needs.test := .venv/installed .venv-triton/installed .venv-inference/installed .venv-signing/installed \
  .venv/installed-for-tests
needs.serve := .venv/installed .venv-triton/installed
needs.bench := $(needs.serve) .venv-inference/installed
needs.infer := .venv-inference/installed
needs.update := .venv/installed
needs.trt-fleet := .venv/installed
needs.bench-gpu := .venv/installed
