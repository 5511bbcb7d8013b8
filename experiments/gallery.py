"""Which pictures and quotes of the gallery are as old as the code? And make all of them anew.

    python experiments/gallery.py                # a line for each script
    python experiments/gallery.py --run          # run the scripts that are not up to date: hours
    python experiments/gallery.py --run --full   # ... with enough seeds to decide
    python experiments/gallery.py --redraw       # draw anew what the last runs measured: seconds
    python experiments/gallery.py --quote        # put the last runs' sentences into README.md

Each script leaves a hash of its own code and its sentences in pictures/made.json. Changes of the
models behind it (lab.py, the main job) are not noticed: delete out/experiments and run all.
--redraw is for changes that leave the measurements alone; afterwards the script counts as up to
date.
"""
import argparse
import re
import subprocess
import sys
import textwrap

import output

FOLDER = output.PICTURES.parent
# Other files of this folder hold what the scripts share.
SHARED = ("lab", "output", "measures", "exercises", "campaign", "decide", "skills", "steps",
          "gallery", "picture", "rollout_speed")


def scripts() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in SHARED)


def words(text: str) -> str:
    """The text of a quotation without its markup and line breaks."""
    return " ".join(re.sub(r"(?m)^>", "", text).split())


def state(name: str, made: dict, readme: str) -> str:
    """What is wrong with a script's entry in the gallery; "" if nothing is."""
    if name not in made or not (output.PICTURES / f"{name}.png").exists():
        return "has no picture by a run that left a record"
    if made[name]["code"] != output.code_hash(name):
        return "is older than its script"
    if words(made[name]["sentence"]) not in words(readme):
        return "is quoted otherwise in README.md"
    return ""


def quotation(sentence: str) -> str:
    """The sentence as a quotation with a paragraph for each finding."""
    lines = []
    for finding in re.split(r"(?<=\.)\s(?=(?:HOLDS|DOES NOT HOLD|NOT DECIDED): )", sentence):
        if lines:
            lines.append(">")
        lines += textwrap.wrap(finding, 100, initial_indent="> ", subsequent_indent="> ",
                               break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines) + "\n"


def with_quotation(readme: str, name: str, sentence: str) -> str:
    """The gallery's text with this quotation below the script's picture."""
    start = re.search(rf"\(pictures/{name}\.png\)\n", readme)
    if start is None:
        return readme
    old = r"\A(>.*\n)*\n?"  # with the empty line after it
    rest = re.sub(old, lambda found: quotation(sentence) + "\n", readme[start.end():])
    return readme[:start.end()] + rest


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", action="store_true", help="run the scripts that need it")
    parser.add_argument("--full", action="store_true", help="the same option of the scripts")
    parser.add_argument("--redraw", action="store_true", help="draw anew from the CSV files")
    parser.add_argument("--quote", action="store_true", help="write the sentences into README.md")
    args = parser.parse_args()
    readme = (FOLDER / "README.md").read_text()
    for name in scripts():
        made = output.made()
        wrong = state(name, made, readme)
        how = f"{made[name]['seconds']} s" if name in made else ""
        if how and made[name]["full"]:
            how += ", --full"
        print(f"{name:15} {how:15} {wrong or 'up to date'}", flush=True)
        if args.redraw and name in made and (output.OUT / f"{name}.csv").exists():
            options = ["--redraw", "--seed", str(made[name]["first seed"])]
            options += ["--full"] if made[name]["full"] else []
            subprocess.run([sys.executable, FOLDER / f"{name}.py", *options])
        is_short = args.full and name in made and not made[name]["full"]
        if args.run and (is_short or wrong and "quoted" not in wrong):
            options = ["--full"] if args.full else []
            subprocess.run([sys.executable, FOLDER / f"{name}.py", *options])
        if args.quote:
            made = output.made()  # the script may just have run
            if "quoted" in state(name, made, readme):
                readme = with_quotation(readme, name, made[name]["sentence"])
                (FOLDER / "README.md").write_text(readme)


if __name__ == "__main__":
    main()
