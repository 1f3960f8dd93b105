# What the knobs may be, and what models.yaml says; included by the Makefile

$(if $(filter 3.% 4.0 4.0.% 4.1 4.1.% 4.2 4.2.%,$(MAKE_VERSION)),$(error GNU Make $(MAKE_VERSION) is too old, 4.3 is needed: apt install make on Debian 11 or Ubuntu 22.04 and newer, or brew install make and type gmake))
one_of = $(if $(and $(filter 1,$(words $($1))),$(filter $2,$($1))),,$(error $1=$($1): expected one of $2))
$(call one_of,FROM,weights prebuilt)
$(call one_of,WEIGHTS,yandex synthetic)
$(if $(and $(REPOSITORY_ZIP),$(filter weights,$(FROM))),$(error REPOSITORY_ZIP is read with FROM=prebuilt alone; add that, or leave it out))
$(if $(and $(WEIGHTS_ZIP),$(filter synthetic,$(WEIGHTS))),$(error WEIGHTS_ZIP is not read with WEIGHTS=synthetic; leave one of them out))
$(call one_of,VIT,LiPro Base VocabFine)
$(call one_of,FORMAT,onnx plan both)
$(if $(and $(filter prebuilt,$(FROM)),$(filter-out onnx,$(FORMAT))),$(error FORMAT=$(FORMAT) builds plans of our own ONNX files, FROM=prebuilt has none; leave one of them out))
$(foreach folder,$(PLANS),$(if $(wildcard $(folder)/*/*.plan),,$(error PLANS=$(folder): no plan there; expected a folder like build/plan of another machine, with sm86/vit.plan or so in it)))
$(if $(or $(PLANS),$(TRTEXEC_FLAGS)),$(if $(filter repository,$(MAKECMDGOALS)),$(if $(filter onnx,$(FORMAT)),$(error PLANS and TRTEXEC_FLAGS are of no use to FORMAT=onnx; add FORMAT=both))))
$(call one_of,CACHE_MODE,read write)
$(foreach knob,DRY AGAIN LOCK,$(if $($(knob)),$(call one_of,$(knob),1)))
$(foreach knob,NGC_RELEASE REGISTRY IMAGE BASE TRITON ADDRESS PYTHON KEY,$(if $(filter-out 0 1,$(words $($(knob)))),$(error $(knob)=$($(knob)): expected one word)))
$(foreach knob,NGC_RELEASE REGISTRY IMAGE BASE ADDRESS PORTS PYTHON PLANS OPSET KEY,$(if $(call special,$($(knob))),$(error \
  $(knob)=$($(knob)): expected no character that shells or make take for their own: $(call special,$($(knob))))))
$(if $(filter 1,$(words $(OPSET))),,$(error OPSET=$(OPSET): expected one number))
$(if $(filter-out 0 1,$(words $(CACHE))),$(error CACHE=$(CACHE): expected a folder, its name without spaces, or s3://bucket/prefix))
$(if $(KEY),$(if $(wildcard $(KEY)),,$(error KEY=$(KEY): no such file; a pair of keys: openssl ecparam -name prime256v1 -genkey -noout -out key.pem && openssl ec -in key.pem -pubout -out key.pub)))
export ACCEPT CACHE CACHE_MODE PYTHON
$(call one_of,TARGET,triton inference)
$(call one_of,DEVICE,gpu cpu)

# The checkout's own path is part of what make reads
$(if $(filter-out 1,$(words $(CURDIR)))$(findstring %,$(CURDIR)),$(error \
  this checkout lies in "$(CURDIR)": make cannot work in a path with a space or %; move it to one without))

# One spelling for one folder, links resolved, since records go by it; and none that other targets empty
$(if $(filter 1,$(words $(REPOSITORY))),,$(error REPOSITORY=$(REPOSITORY): expected one folder, its name without spaces))
override REPOSITORY := $(patsubst ~/%,$(HOME)/%,$(REPOSITORY))
no_folder = $(if $(call special,$(REPOSITORY)),$(error REPOSITORY=$(REPOSITORY): expected a folder without \
  characters that shells or make take for their own: $(call special,$(REPOSITORY))))
$(no_folder)
override REPOSITORY := $(patsubst $(CURDIR)/%,%,$(or $(realpath $(REPOSITORY)),$(shell realpath -m -- '$(REPOSITORY)')))
$(no_folder)
$(if $(filter 1,$(words $(REPOSITORY))),,$(error REPOSITORY=$(REPOSITORY): expected one folder, its name without spaces))
$(if $(filter $(foreach folder,.ci .git .github convertation docker docs scripts tests training,$(folder) $(folder)/%),$(REPOSITORY))$(filter $(REPOSITORY)/%,$(CURDIR)),$(error \
  REPOSITORY=$(REPOSITORY): expected a folder apart from the sources, such as model_repository_running))
$(if $(filter / $(CURDIR) build build/% .make .make/% .venv%,$(REPOSITORY)),$(error \
  REPOSITORY=$(REPOSITORY): expected a folder for published models alone, such as model_repository_running))

# These speak of what is published, and so take its kind of weights and its precision
of_the_published := $(filter verify status graph provenance fidelity report image,$(MAKECMDGOALS))

# The kind of weights that REPOSITORY was made from, and each file that was ever published there
ours = $(file <.make/published/$(subst /,%,$(REPOSITORY)))
$(if $(and $(filter prebuilt,$(firstword $(ours))),$(filter $(if $(KEY),,verify) status graph report $(if $(CHECK),,provenance),$(MAKECMDGOALS))),$(error \
  $(REPOSITORY) holds the models of a finished archive, of which nothing was built here; make repository FROM=prebuilt checks it))

# Whether the ViT published there is that of tf32 or fp16; with plans alone, the verdict's record tells
seen_precision = $(strip $(foreach other,tf32 fp16,$(if $(if $(wildcard $(REPOSITORY)/vit_onnx),$(onnx_is),$(findstring /vit.$(other).,\
                   $(file <.make/made/build%checks%verdict.json))),$(other))))
onnx_is = $(strip $(foreach sha,$(firstword $(file <.make/seen/$(subst /,%,$(REPOSITORY))%vit_onnx%1%model.onnx)),\
            $(findstring =$(sha),$(firstword $(file <.make/made/build%onnx%vit.$(other).onnx)))))
$(call one_of,PRECISION,fp32 tf32 fp16)
$(if $(and $(filter tf32 fp16,$(PRECISION)),$(filter prebuilt,$(FROM))),$(error PRECISION=$(PRECISION) is for models built here, not for FROM=prebuilt; leave one of them out))

# Facts of convertation/models.yaml, as variables: vit.family, vit.checkpoint, binary.trained_on, lipro.optional, vit.variants.
# Python reads that file, once for each content of it; nothing needs .venv again until it changes.
# Facts of another text are never read: until they are made anew, make sees the empty .make/facts-read in their place
# A link to a Python that went away is none
living      := $(foreach file,$(wildcard .venv/bin/python3.??),$(if $(realpath $(file)),$(file)))
# GNU Make 4.3's $(file <) leaves a text's last line end now and then (10 of 1,500 runs), so it is cut here
text_of     = $(subst $(newline)<end>,<end>,<start>$(file <$1)<end>)
models_text := $(call text_of,convertation/models.yaml)
facts_text  := $(call text_of,.make/models.yaml)
facts_true  := $(and $(wildcard .make/models.mk),$(findstring $(models_text),$(facts_text)),$(findstring $(facts_text),$(models_text)))
needless    := help doctor clean distclean image push up reload logs down rollback sign $(if $(KEY),verify) $(if $(CHECK),provenance)
ifneq ($(facts_true),)
include .make/models.mk
else ifneq ($(filter-out $(needless),$(or $(MAKECMDGOALS),help)),)
$(if $(filter-out 1 2,$(MAKE_RESTARTS)),$(error convertation/models.yaml: its text was another each of the three times that make read it; \
  expected one that nothing writes to, with plain line ends (\n); then run make again))
include .make/facts-read
.make/facts-read: FORCE | $(if $(living),,.venv/installed)
	@mkdir -p .make && cp convertation/models.yaml .make/models.yaml~$$$$ && \
	  $(python) -m scripts.convert.model_entry facts convertation/models.yaml .make/models.mk~$$$$ && \
	  mv .make/models.mk~$$$$ .make/models.mk && mv .make/models.yaml~$$$$ .make/models.yaml && : > $@
endif

optional := $(strip $(foreach model,$(sort $(all_models)),$(if $($(model).optional),$(model))))
$(if $(filter compare,$(MAKECMDGOALS)),\
  $(if $(filter 1,$(words $(WITH))),,$(error make compare WITH=$(WITH): expected the folder of another repository, its name without spaces)),\
  $(if $(filter-out $(optional),$(WITH)),$(error WITH=$(WITH): expected one of $(optional))))
