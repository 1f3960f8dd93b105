# Rebuild on content, never on time: `step`, `fetch` and `publish`, which the Makefile's recipes call
#
#   .make/seen/X   digest of X, its size, mtime, ctime, inode; the digest alone once X is gone
#   .make/made/X   digest of X, its command, digests of its inputs: how X was made     (X with % for /)
#
# EXPLAIN=1 prints what each record would have to say, and runs nothing: what status, graph and provenance read.
# A step runs when .make/made/X is no longer true; Make compares the text itself and starts scripts/steps/step.py only if
# it differs.  A file that is absent counts as what its record says, until a step that runs has to read it; an ONNX
# file is moved when it is published, and read there from then on.


EXPLAIN   :=
artifacts := .venv/installed .venv/installed-for-tests .venv/installed-for-s3 .venv-triton/installed .venv-inference/installed .venv-rtx/installed .venv-signing/installed \
             $(entries) $(checkpoints) $(onnx) $(checks) $(onnx_tf32) $(checks_tf32) $(onnx_fp16) $(checks_fp16) $(requests) $(expected) $(rtx) $(plans) $(compared) \
             $(plan_configs) build/checks/verdict.json build/fidelity.json $(judged)
$(artifacts): FORCE
.PHONY: FORCE
.PRECIOUS: $(artifacts)

# Needs the standard library only; a pyenv shim in front of python3 would cost 0.1 s
system_python := $(firstword $(wildcard /usr/bin/python3) python3) -sESB
# -B and this: on a full disk half a .pyc would be left, over which every later make would stumble
export PYTHONDONTWRITEBYTECODE := 1
# The cache in a bucket needs its client
client       := $(if $(filter s3://%,$(CACHE)),.venv/installed-for-s3)
step_python   = $(if $(and $(client),$(cached)),$(python) -sEB,$(system_python))
$(if $(client),$(eval $(filter-out .venv%,$(artifacts)): | $(client)))
python_minor  := $(if $(filter default file undefined,$(origin PYTHON)),$(notdir $(firstword $(living))))
python        := .venv/bin/$(or $(python_minor),$(shell $(PYTHON) -c 'import sys; m = sys.version_info[1]; print("python3.%d" % (m if m in (11, 12) else 12))'))

# place=source, as in `contents`
place  = $(firstword $(subst =, ,$1))
source = $(lastword $(subst =, ,$1))

# What the files are now; this make's token, which the steps of its sub-makes share
looks  := $(filter-out clean distclean help doctor,$(or $(MAKECMDGOALS),help))
looked := $(if $(looks),$(shell $(system_python) scripts/steps/look.py $(artifacts) $(fetched) $(sources) $(foreach pair,$(contents),$(REPOSITORY)/$(call place,$(pair)))),not needed)
$(if $(looked),,$(error scripts/steps/look.py could not look at the files))
nested := $(MAKE_RUN)
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
pins   = $(foreach tool,$1,$(or $(filter $(tool)==%,$(file <requirements.txt)),$(error \
           $@: $(tool) is no package of requirements.txt; a comma in a command belongs into a variable)))
now    = $(strip $@=$(self) $1 $(call pins,$2) : $(foreach in,$(inputs),$(in)=$(call known,$(in))))
wanted = $(filter $@,$(client) $(MAKECMDGOALS) $(foreach goal,$(MAKECMDGOALS),$(needs.$(goal))))
locked = $(and $(call here,$1),$(findstring $(call known,$1),$(file <$1.lock.json)))
twin   = $(and $(filter build/onnx/%,$1),$(call same,$(call wrote,$1),$(call sha,$(REPOSITORY)/$(call place,$(filter %=$1,$(contents))))))
ready  = $(if $(filter %.zip,$1),$(call locked,$1),$(or $(call here,$1),$(call twin,$1)))
absent = $(strip $(foreach in,$(filter $(artifacts) $(fetched),$(inputs) $|),$(if $(call ready,$(in)),,$(in))))

out   = .make/out/$@
true  = $(and $(call same,$(now),$(call made,$@)),$(or $(call here,$@),$(if $(wanted),,vouched for)))
own   = $(and $(keep),$(call here,$@),$(filter-out $(call wrote,$@),$(call known,$@)))
step  = $(if $(EXPLAIN),$(info $(now)$(if $|, | $|)),$(if $(true),$(local),$(run)))
local = $(if $(own),$(if $(nested),,$(info local: $@ is yours; it is used as it is)))
run   = $(if $(absent),$(if $(own),$(local),$(first)),$(start))
first = $(if $(dry),,+)@$(MAKE) --no-print-directory WEIGHTS=$(WEIGHTS) PRECISION=$(PRECISION) $(absent) $@
dry   = $(strip $(foreach flag,n q t,$(findstring $(flag),$(firstword -$(MAKEFLAGS)))))
start = @$(step_python) -m scripts.steps.step $(if $(keep),--keep) $(if $(wanted),,$(if $(call twin,$@),--moved)) $(if $(cached),--cached) \
          $@ $(call quote,$1) '$(call pins,$2)' $(inputs)

# With a shared cache, first all that it knows of the goals, so that a step whose result is known lacks no input
uncached  = build/checks/verdict.json build/fidelity.json $(plans) $(judged)
cached    = $(and $(CACHE),$(filter-out .venv% $(uncached),$@))
steps_of  = $(filter $(artifacts) repository,$(MAKECMDGOALS) $(foreach goal,$(MAKECMDGOALS),$(needs.$(goal))))
ifneq ($(if $(EXPLAIN),,$(CACHE)),)
$(filter-out .venv%,$(artifacts)): | taken
.PHONY: taken
taken: $(client)
	$(if $(or $(dry),$(if $(steps_of),,nothing)),,+@$(take))
endif
take = $(MAKE) --no-print-directory EXPLAIN=1 WEIGHTS=$(WEIGHTS) PRECISION=$(PRECISION) $(steps_of) | \
         $(step_python) -m scripts.steps.take $(steps_of) -- $(uncached)

# An archive is fetched when it is a goal, as it becomes where a step lacks it, or when one is given by hand
archive = $(@:.lock.json=)
by_hand = $(if $(filter %/weights.zip,$(archive)),$(WEIGHTS_ZIP),$(REPOSITORY_ZIP))
linked  = $(and $(call locked,$(archive)),$(call same,$(realpath $(by_hand)),$(realpath $(archive))))
asked   = $(or $(filter $@,$(MAKECMDGOALS)),$(if $(by_hand),$(if $(linked),,absent)))
fetch   = $(if $(EXPLAIN),,$(if $(asked),$(if $(absent),$(first),$(if $(fetched.$(archive)),,$(fetch_it)))))
fetch_it = $(eval fetched.$(archive) := once)@$(python) -m scripts.archives.fetch $(if $(by_hand),--from $(call quote,$(by_hand))) \
             $(notdir $(archive)) $(archive) && $(system_python) scripts/steps/look.py $(archive) $(archive).lock.json >/dev/null

# Publishing compares each published file with what it is to be a copy of, and replaces the models that differ
comma   := ,
model    = $(firstword $(subst /, ,$1))
served   = $(sort $(foreach pair,$(contents),$(call model,$(pair))))
recorded = $(sort $(foreach path,$(filter-out $(firstword $(ours)),$(ours)),$(call model,$(path))))
dropped  = $(strip $(foreach model,$(filter-out $(served),$(recorded)),$(if $(wildcard $(REPOSITORY)/$(model)),$(model))))
current  = $(call same,$(call sha,$(REPOSITORY)/$(call place,$1)),$(call known,$(call source,$1)))
changed  = $(sort $(foreach pair,$(contents),$(if $(call current,$(pair)),,$(call model,$(pair)))) $(dropped))
lacking  = $(strip $(foreach pair,$(filter $(1:%=%/%),$(contents)),$(if $(call ready,$(call source,$(pair))),,$(filter $(artifacts),$(call source,$(pair))))))
recent   = $(strip $(foreach path,$1,$(findstring "$(MAKE_RUN)",$(file <.make/took/$(call key,$(path))))))
summary  = $(system_python) -m scripts.steps.summary

publish = $(if $(EXPLAIN),$(tell),$(if $(filter prebuilt,$(FROM)),$(exchange_prebuilt),$(call replace,$(changed))))
tell    = $(foreach pair,$(contents),$(info $(REPOSITORY)/$(call place,$(pair))=$(call known,$(call source,$(pair))) publish : \
            $(call source,$(pair))=$(call known,$(call source,$(pair)))))
replace = $(if $1,$(call bring,$(call lacking,$1),$1),$(if $(call recent,$(artifacts)),@$(summary) build/checks/verdict.json,$(idle)))
idle    = $(info $(REPOSITORY) is up to date: $(words $(contents)) files, nothing rebuilt)@:
bring   = $(if $1,$(if $(dry),,+)@$(MAKE) --no-print-directory $1 repository,@$(call exchange,$(subst $(space),$(comma),$2)))
exchange = $(system_python) -m scripts.publish.publish $(REPOSITORY) --weights $(kind) --verdict build/checks/verdict.json --models $1 \
             $(contents) && $(summary) build/checks/verdict.json

# Exit status 3: what was judged is to be published, and has to be unpacked again
exchange_prebuilt = $(if $(dry),,+)@$(publish_prebuilt) || { [[ $$? == 3 ]] && $(unpack_again) && $(publish_prebuilt); }
publish_prebuilt  = $(system_python) -m scripts.publish.publish $(REPOSITORY) --prebuilt $(judged) build/prebuilt
unpack_again      = $(MAKE) --no-print-directory $(prebuilt) && rm -rf build/prebuilt && \
                    $(python) -m scripts.archives.unpack --all $(prebuilt) build/prebuilt --tree '*/config.pbtxt'
needs.repository  = $(if $(filter prebuilt,$(FROM)),$(judged))

# What is said before an hour of work, not after it
ifneq ($(filter repository,$(MAKECMDGOALS)),)
publishes := $(if $(filter prebuilt,$(FROM)),prebuilt,$(kind))
misled    := $(strip $(foreach head,$(heads),$(if $(filter $(VIT),$(or $($(head).trained_on),$(VIT))),,$(head))))
$(if $(misled),$(error $(firstword $(misled)) was trained on the $($(firstword $(misled)).trained_on) ViT (convertation/models.yaml) and is never \
  paired with VIT=$(VIT); train a head on it and say so there, or make onnx MODEL=vit VIT=$(VIT)))
$(if $(wildcard $(REPOSITORY)/*/config.pbtxt $(served:%=$(REPOSITORY)/%)),$(if $(filter $(publishes),$(firstword $(ours))),,$(error \
  $(REPOSITORY) $(if $(ours),is made from $(firstword $(ours)) weights and these are $(publishes),was not made by this build); \
  move it away (mv $(REPOSITORY) $(REPOSITORY).old) or publish elsewhere (make repository REPOSITORY=dir))))
endif
