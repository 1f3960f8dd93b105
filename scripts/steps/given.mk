# Knobs count when they are given to make: make repository OPSET=19.  From the environment only under the prefix CT_
# (CT_OPSET=19), since names like TARGET, FROM or DEVICE are common there.  Included by the Makefile before its knobs.

space :=
space := $(space) $(space)
define newline


endef
# Each NAME ?= of the Makefile, and what two targets take besides
knobs := $(patsubst %?=,%,$(filter %?=,$(subst $(space)?=,?=,$(file <$(firstword $(MAKEFILE_LIST))))))
$(foreach knob,$(knobs) FILE CHECK,$(if $(filter undefined environment,$(origin $(knob))),$(eval override \
  $(if $(filter undefined,$(origin CT_$(knob))),undefine $(knob),$(knob) = $$(CT_$(knob))))))

# Make ends a command where a value has a line's end, in quotes too
$(foreach knob,$(knobs) FILE CHECK,$(if $(findstring $(newline),$($(knob))),$(error $(knob): expected one line, it has more)))

# One word for a shell, whatever is in it; and the characters of a value that has to be one without that
quote  = '$(subst ','\'',$(strip $1))'
hash   := \#
opening := (
closing := )
special = $(strip $(foreach char,' " ` & ; | < > * ? [ ] { } ! ~ ^ \ % $$ $(hash) $(opening) $(closing),$(findstring $(char),$1)))
