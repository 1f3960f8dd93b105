"""The licence of each family's weights, as their makers state it: SPDX identifier ("" if there is none), and words."""

LICENCES = {
    "vit": ("CC-BY-NC-SA-4.0", "CC BY-NC-SA 4.0 (CT-CLIP, CT-RATE)"),
    "head": ("", "as the team says"),
    "bpr": ("Apache-2.0", "Apache-2.0"),
}
