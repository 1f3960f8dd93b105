"""Find plans that other machines built, and print for make where they are, as taken=sm89/vit ...

    python3 -sESB -m scripts.plans.find_plans FOLDER...

A FOLDER is a copy of another machine's build/plan: it holds sm89/vit.plan and its two records.  For each plan,
build/brought/sm89/vit.json says where the plan is and gives the digests of the three files, so that make sees when one
changes.  there=sm89/vit is printed for a plan in this project's own build/plan, where make trt-fleet built it.
Standard library only.
"""

import json
import os
import sys
from pathlib import Path

from scripts.steps.records import current_digest, read_text, write_text


def find_plans(folders: list[str]) -> list[str]:
    """Return the words for make; SystemExit if two folders have the same plan."""
    words, places = list[str](), dict[str, str]()
    for folder in dict.fromkeys(os.path.realpath(folder) for folder in folders):
        for plan in sorted(map(str, Path(folder).glob("*/*.plan"))):
            name = plan[len(folder) + 1 :].removesuffix(".plan")
            if folder == os.path.realpath("build/plan"):
                words.append(f"there={name}")
                continue
            if name in places:
                raise SystemExit(
                    f"PLANS: {places[name]} {plan}: expected one {name}.plan; leave out all of these folders but one"
                )
            places[name] = plan
            words.append(f"taken={name}")
    for name, plan in places.items():
        files = {"plan": plan, "record": str(Path(plan).with_suffix(".json"))}
        files["check"] = str(Path(plan).with_suffix(".check.json"))
        record = files | {f"{kind}_sha256": current_digest(file) for kind, file in files.items()}
        text = json.dumps(record, indent=1) + "\n"
        if read_text(out := f"build/brought/{name}.json") != text:
            write_text(out, text)
            current_digest(out)
    return words


if __name__ == "__main__":
    print(" ".join(find_plans(sys.argv[1:])))
