"""The rounds of HH §4.5, about weekly there (§2.3): deploy, compare, a new PM, a new policy.

    python train_online.py --out out/toy-0 --rounds 3
    python train_online.py --out out/toy-0 --rounds 3 --people choices.jsonl --wanted 100

It continues a run that has stages 1 to 4, and runs them first if they are missing. Round k works in
a folder of its own, OUT/online/round-k, which chat.py, evaluate.py and report.py open like any run:
  1. Deploy. In round 1 people choose between replies that are the best of 16 (HH's RS data, §2.3;
     files "-rs"), and later between those of several snapshots of the last round's policy (files
     "-online"). With --people the round stops here, and goes on when people have made enough
     choices.
  2. PM. It is trained from pmp.pt on all comparisons so far, with stage 4's options.
  3. RLHF. It starts from the initial policy, with stage 5's options.
  4. Elo. The policy is matched against the initial policy and those of all earlier rounds, in chats
     where both answer at each turn (App. B.5). Toy only: here simulated people choose.
What is complete is used as it is; --resume continues a step that was interrupted. To begin anew,
delete OUT/online. Read this file in this order:
  1. Folders   a round's folder shares the files of stages 1 to 3, and all earlier comparisons
  2. Deploy    step 1, with simulated people or with real ones
  3. Command   the rounds
Step 4 is in tournament.py.

Papers: HH = Bai et al. 2022 (arXiv 2204.05862); a § or App. without a name is in HH.
"""
import copy
import os
from dataclasses import dataclass, replace
from pathlib import Path

from run import (  # before torch: Ctrl-C prints no traceback
    UserError, file_hash, is_first, save, write_atomically)

import ranks
import report
from choices import identity, read_choices
from collect import BestOf, collect_from
from data import Comparison, write_comparisons
from evaluate import load_policy
from pipeline import PIPELINE, SPEED_OPTIONS, Run, RunConfig, main
from rollout import Sampler
from tournament import KINDS, EloConfig, play, show
from train_lm import CDConfig, LMConfig
from train_pm import PMConfig, PMPConfig, check_early, delete_comparisons, ensure, train as train_pm
from train_rl import RLConfig, train as train_rl


@dataclass
class OnlineConfig:
    rounds: int = 3          # in all; more continue a run (HH §2.3: weekly, for about five weeks)
    helpful: int = 1200      # toy: new helpful comparisons a round (HH §2.3: RS 52k, online 22k)
    harmless: int = 400      # toy: new red-team comparisons a round (HH §2.3: RS 2k, online none)
    test: int = 200          # toy: held-out comparisons of each kind, a round
    best_of: int = 16        # toy: replies from which the PM takes the best in round 1 (HH 16)
    snapshots: int = 3       # policies of a round's RLHF that are deployed, the last one included
    people: str = ""         # choices of people, who take the place of the simulated ones
    wanted: int = 100        # with people: new choices that a round waits for


# Deploying depends on other files in each round, which `reuse` and `begin` are told as `data`.
ROUND = {"lm": PIPELINE["lm"], "cd": PIPELINE["cd"], "pmp": PIPELINE["pmp"],
         "online": ("deployed.pt", ()), "pm": PIPELINE["pm"], "rl": PIPELINE["rl"],
         "elo": ("elo.pt", ("initial.pt", "policy.pt"))}

# ---- 1. Folders --------------------------------------------------------------


def round_of(run: Run, k: int) -> Run:
    """The folder of round k, as a Run. Round 0 is the folder of stages 1 to 4 itself."""
    if k == 0:
        return run
    part = copy.copy(run)
    part.out, part.pipeline = run.out / "online" / f"round-{k}", ROUND
    part.speed_options = SPEED_OPTIONS + ("rounds", "people", "wanted")  # these may change, too
    return part


def share(source: Path, target: Path):
    """Give a file a second name; a disk without hard links gets a copy. No file is ever changed in
    place, so each name keeps what it has."""
    if not is_first() or (target.exists() and os.path.samefile(source, target)):
        return
    temporary = target.with_name(target.name + ".tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        os.link(source, temporary)
        os.replace(temporary, target)
    except OSError:
        write_atomically(target, source.read_bytes())


def share_all(run: Run, part: Run):
    """Stages 1 to 3 are the same in all rounds. If they were trained anew, `reuse` will say that
    the round's results are stale."""
    for name in ("tokenizer.json", "lm.pt", "initial.pt", "pmp.pt"):
        share(run.path(name), part.path(name))
    ranks.wait()


def deployed(run: Run, k: int) -> list[Path]:
    """The checkpoints that decide what people see in round k."""
    before = round_of(run, k - 1)
    if k == 1:
        return [before.path("initial.pt"), before.path("pm.pt")]
    return [*sorted(before.out.glob("snapshot-*.pt")), before.path("policy.pt")]


# ---- 2. Deploy ---------------------------------------------------------------


def pairs_of_players(run: Run, k: int, online: OnlineConfig, name: str) -> list[list]:
    """The pairs of players that people see in round k. Several snapshots partly make up for RLHF's
    loss of diversity (§4.5): each plays with the next one, and the last with the first. (HH also
    deploys models of different iterations.)"""
    if k == 1:
        player = BestOf(run, run.load_model("initial.pt"), run.load_model("pm.pt"),
                        online.best_of, name)
        return [[player, player]]
    before, players = round_of(run, k - 1), []
    for path in deployed(run, k):
        players.append(Sampler(load_policy(before, path.name), run.tok.end_of_turn))
    if len(players) < 3:
        return [[players[0], players[-1]]]
    return [list(pair) for pair in zip(players, players[1:] + players[:1])]


def deploy(run: Run, k: int, pm: PMConfig, online: OnlineConfig) -> bool:
    """Step 1 of round k. Returns False if people have not yet made enough choices."""
    part, before, files = round_of(run, k), round_of(run, k - 1), deployed(run, k)
    if online.people and not part.is_complete("online") and not has_choices(run, k, online):
        return False
    if part.reuse("online", online, files):
        return True
    stage = part.begin("online", online, data=files)
    stage.start()
    if is_first():
        delete_comparisons(part)
    ranks.wait()
    n_new = 0
    for path in sorted(before.path("comparisons").glob("*/*.jsonl")):
        share(path, part.path("comparisons") / path.parent.name / path.name)
    if online.people:
        # A copy: people go on choosing, and the round must stay what it was. A last line without
        # its end is still being written.
        whole, _, _ = Path(online.people).read_bytes().rpartition(b"\n")
        write_atomically(part.path("people.jsonl"), whole + b"\n")
        ranks.wait()
        n_new = len(new_choices(people_of(part), people_of(before)))
    else:
        print(f"    round {k}, step 1: comparisons by {', '.join(path.name for path in files)}")
        tranche = "rs" if k == 1 else f"online-{k}"
        for kind, n_train in zip(KINDS, (online.helpful, online.harmless)):
            for split, n in (("train", n_train), ("test", online.test)):
                path = part.path("comparisons") / f"{kind}-{tranche}" / f"{split}.jsonl"
                if n_train > 0:
                    found = new_comparisons(run, k, pm, online, kind, split, n)
                    write_comparisons(path, found)
                    n_new += len(found) if split == "train" else 0
    ranks.wait()
    written = sorted(part.path("comparisons").glob("*/*.jsonl")) + people_of(part)
    stage.log(k, new=n_new)
    stage.end(files=[str(path.relative_to(part.out)) for path in written],
              hashes=file_hash(written))
    return True


def new_comparisons(run: Run, k: int, pm: PMConfig, online: OnlineConfig, kind: str, split: str,
                    n: int) -> list[Comparison]:
    """At most n comparisons, about as many of each pair of players."""
    pairs, found = pairs_of_players(run, k, online, f"{kind} {split}"), []
    for i, players in enumerate(pairs):
        share_of_n = n * (i + 1) // len(pairs) - n * i // len(pairs)
        if share_of_n > 0:
            name = f"{split}, round {k}, pair {i}"
            found += collect_from(run, pm, players, kind, name, share_of_n)[0]
    return found


def people_of(part: Run) -> list[Path]:
    """The round's copy of people's choices, if it has one."""
    path = part.path("people.jsonl")
    return [path] if path.exists() else []


def has_choices(run: Run, k: int, online: OnlineConfig) -> bool:
    """Whether people have made the choices that round k waits for; if not, say how to make them."""
    now = [online.people] if os.path.exists(online.people) else []
    n_new = len(new_choices(now, people_of(round_of(run, k - 1))))
    if n_new >= online.wanted:
        return True
    before, options = round_of(run, k - 1), "--model initial.pt"
    if k > 1:  # an earlier snapshot makes the replies more diverse (§4.5)
        options = f"--model policy.pt --against {deployed(run, k)[0].name}"
    options += f" --choices {online.people}"
    print(f"round {k} is deployed and waits for people: {online.people} holds {n_new:,} "
          f"new usable choices of {online.wanted:,}. To add some:\n"
          f"    python chat.py {before.out} --compare {options}\n"
          f"    python serve.py {before.out} {options}\n"
          "Then give the same command again.")
    return False


def new_choices(paths: list, before: list) -> set:
    """The usable choices in files, less those that an earlier round has learned from. Raises
    UserError if any of those is missing: that round's people would be forgotten."""
    found, earlier = usable(paths), usable(before)
    if paths and earlier - found:
        raise UserError(f"{paths[0]} lacks {len(earlier - found):,} choices that the round before "
                        "learned from: add to that file, or join the two")
    return found - earlier


def usable(paths: list) -> set:
    train, held_out, _ = read_choices(paths)
    return {identity(c) for c in train + held_out}


# ---- 3. Command --------------------------------------------------------------


def check_rounds(run: Run, pm: PMConfig, online: OnlineConfig):
    """Find out before any training whether the rounds can run, as far as the options tell."""
    if online.people:
        if os.path.exists(online.people):
            usable([online.people])  # raises UserError for a damaged file
    elif not run.toy:
        raise UserError("the rounds need people, because only the toy world has simulated ones: "
                        "add --people FILE, which chat.py --compare or serve.py writes")
    elif online.helpful + online.harmless == 0 or pm.helpful + pm.harmless == 0:
        raise UserError("without --people, the rounds need simulated comparisons: "
                        "--online.helpful and --online.harmless, or --pm.helpful and "
                        "--pm.harmless, are both 0")


def keep_snapshots(part: Run, n: int, iterations: int):
    """What `train_rl.train` calls after each iteration: it saves n - 1 policies, evenly spaced
    before the last one, which is policy.pt."""
    if not part.resume and is_first():
        for path in part.out.glob("snapshot-*.pt"):  # of another policy
            path.unlink()
    names = {}
    for i in range(1, n):
        names[iterations * i // n] = f"snapshot-{i}.pt"

    def watch(n_updates: int, policy):
        if n_updates in names:
            save(part.path(names[n_updates]), **part.checkpoint(policy))
    return watch


def train_round(run: Run, k: int, pm: PMConfig, rl: RLConfig, online: OnlineConfig) -> bool:
    """Steps 1 to 3 of round k, where they are missing. Returns False if the round waits for people.
    """
    part = round_of(run, k)
    print(f"\nround {k} of {online.rounds}")
    share_all(run, part)
    if not deploy(run, k, pm, online):
        return False
    pm = replace(pm, people=[*pm.people, *map(str, people_of(part))])
    data = [part.path("deployed.pt")]
    if not part.reuse("pm", pm, [*pm.people, *data]):
        train_pm(part, pm, is_collected=True, data=data)
    if not part.reuse("rl", rl):
        with report.written_at_the_end(part.out, is_writer=is_first()):
            train_rl(part, rl, keep_snapshots(part, online.snapshots, rl.iterations))
    return True


def command(run: RunConfig, lm: LMConfig, cd: CDConfig, pmp: PMPConfig, pm: PMConfig, rl: RLConfig,
            online: OnlineConfig, elo: EloConfig):
    folder = Run(run)  # `run` holds the options, `folder` is the Run
    folder.check_memory(lm, cd, pmp, pm, rl)
    check_early(folder, cd, pmp, pm, rl.max_response)
    check_rounds(folder, pm, online)
    ensure(folder, lm, cd, pmp, pm)
    rounds = []
    while len(rounds) < online.rounds:
        k = len(rounds) + 1
        if not train_round(folder, k, pm, rl, online):
            break
        rounds.append(round_of(folder, k))
        if folder.toy:
            play(rounds, elo, rl.max_response)
    if rounds and folder.toy:
        show(rounds, folder.path("online"))


if __name__ == "__main__":
    main(command, __doc__.split("\n")[0], run=RunConfig, lm=LMConfig, cd=CDConfig, pmp=PMPConfig,
         pm=PMConfig, rl=RLConfig, online=OnlineConfig, elo=EloConfig)
