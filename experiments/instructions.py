"""IG §4.1 and Fig. 4, §4.3: feedback teaches a model to follow explicit constraints.

    python experiments/instructions.py            # 1 seed; minutes on two CPU cores
    python experiments/instructions.py --full     # 4 seeds

The paper's claim: InstructGPT models "more often follow explicit constraints defined in the
instruction" than GPT-3, such as "Write your answer in 2 paragraphs or less." In Fig. 4 the share
rises from GPT to SFT to PPO (read off). They also follow instructions of kinds that are rare in the
finetuning data, such as French ones or questions about code, and get worse at several constraints
at once (§4.3, examples without numbers).

Here a question comes with a constraint, a sentence from SENTENCES. Labelers follow it in most
demonstrations, but not in all; in rankings a followed constraint is worth BONUS nats. Nobody
constrains a how-to question: this is the subject on which the constraints are new.

1. The finding, on the subjects that were taught: SFT follows more often than the LM, and PPO more
   often than SFT. The control takes the cause away: its RM learns from the same replies, ranked by
   labelers who ignore the constraints. PPO against this RM gains less than 0.05.
2. On the new subject: PPO's replies follow a constraint more often than where the prompt leaves it
   out ("unasked"). For the control, the LM, which was never taught, the difference is below 0.05.
The table also has phrases that no demonstration asked for ("new words"), and two constraints at
once, which no demonstration has either.
"""
import tempfile
from dataclasses import dataclass
from random import Random

import lab
import output
import steps
from decide import Claim, sentence
from picture import groups
from steps import LM, SFT

import toy
import toy_corpus
import toy_people
from data import ASSISTANT, HUMAN
from demonstrations import Demonstration
from toy_corpus import Persona

PPO = "PPO"
CONTROL = "PPO, constraints ignored (control)"
TAUGHT, SUBJECT, WORDS, TWO = "taught", "new subject", "new words", "two at once"

# ---- 1. Tasks ----------------------------------------------------------------

SENTENCES = {"short": "Use at most three words.", "whole": "Write a whole sentence.",
             "begin": "Begin with: {}", "end": "End with: {}"}
PHRASES = {"begin": toy.OPENERS[:3], "end": toy.CLOSERS[:2]}
NEW_PHRASES = {"begin": toy.OPENERS[3:], "end": toy.CLOSERS[2:]}


@dataclass(frozen=True)
class Task:
    """A question and its constraints, each with the phrase that it asks for, or ""."""
    question: str
    constraints: tuple[tuple[str, str], ...]

    @property
    def plain(self) -> str:
        """The prompt without the constraints. The toy's ground truth knows it."""
        return f"{HUMAN} {self.question}{ASSISTANT}"

    @property
    def prompt(self) -> str:
        """What the models read."""
        said = [self.question]
        for kind, phrase in self.constraints:
            said.append(SENTENCES[kind].format(phrase))
        return f"{HUMAN} {' '.join(said)}{ASSISTANT}"


def follows(task: Task, reply: str) -> bool:
    """Whether the reply follows every constraint of the task, whether or not it is right."""
    text = reply.strip()
    statement = toy.understand(task.plain).statement("").rstrip(" .")  # "The color of grass is"
    for kind, phrase in task.constraints:
        found = {"short": len(text.split()) <= 3, "whole": statement in text,
                 "begin": text.startswith(phrase), "end": text.endswith(phrase)}
        if not found[kind]:
            return False
    return True


def constraint(rng: Random, kinds: tuple, phrases: dict) -> tuple[str, str]:
    kind = rng.choice(kinds)
    return kind, rng.choice(phrases[kind]) if kind in phrases else ""


def draw_task(rng: Random, part: str, held_out: bool) -> Task:
    """A question of the part's subjects, with the part's constraints. held_out: whether the
    question is one that is kept for evaluation."""
    while True:
        question, request = toy_people.next_question(rng, "helpful", None, held_out)
        is_how_to = request.skill.name == "benign task"
        if is_how_to == (part == SUBJECT):
            break
    if part == WORDS:
        return Task(question, (constraint(rng, ("begin", "end"), NEW_PHRASES),))
    if part == TWO:
        first = constraint(rng, ("begin", "end"), PHRASES)
        # Three words have no room for an end that was asked for.
        others = ("short", "whole") if first[0] == "begin" else ("whole",)
        return Task(question, (first, constraint(rng, others, PHRASES)))
    return Task(question, (constraint(rng, tuple(SENTENCES), PHRASES),))


def draw_training_task(rng: Random) -> Task:
    """Two in three questions have a constraint, of the part "taught"; the others may be of any
    subject."""
    if rng.random() < 2 / 3:
        return draw_task(rng, TAUGHT, held_out=False)
    return Task(toy_people.next_question(rng, "helpful", None, False)[0], ())


# ---- 2. Labelers -------------------------------------------------------------

LABELER = Persona(right=0.8, complies=0.0, refuses=0.02, offers=0.0, evades=0.03, polite=0.5,
                  rude=0.02, rambles=0.1)
HEEDS = 0.7   # how often a labeler follows the constraint on purpose
BONUS = 3.0   # nats that a followed constraint is worth; as much as a right answer


def demonstrate(rng: Random, task: Task) -> str:
    """A labeler's reply. One who heeds the constraint tries until the reply follows it."""
    heeds = rng.random() < HEEDS
    while True:
        reply = toy_corpus.speak(toy.understand(task.plain), LABELER, rng)
        if follows(task, reply) or not heeds:
            return reply


def utility(task: Task, reply: str, bonus: float) -> float:
    """The worth of a reply in rankings, in nats."""
    is_followed = task.constraints != () and follows(task, reply)
    return toy.helpfulness(task.plain, reply) + bonus * is_followed


# ---- 3. Players --------------------------------------------------------------


def players(run, sizes: steps.Sizes, tiny: bool) -> dict:
    """{player: model}. The run's folder gets the files of the SFT stage."""
    rng = run.rng("instructions", "training")
    tasks = [draw_training_task(rng) for _ in range(sizes.demonstrations)]
    found = [Demonstration(task.prompt, demonstrate(rng, task)) for task in tasks]
    asked = [draw_training_task(rng) for _ in range(sizes.ranked)]
    labelers = {PPO: lambda task, reply: utility(task, reply, BONUS),
                CONTROL: lambda task, reply: utility(task, reply, 0.0)}
    return steps.policies(run, sizes, found, asked, labelers, tiny)


# ---- 4. Measuring ------------------------------------------------------------


def one_seed(seed: int, sizes: steps.Sizes, tiny: bool) -> list[dict]:
    """A row for each part and player, on the same held-out tasks."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        run = lab.with_lm_of(lab.base("toy", seed, tiny), name)
        models = players(run, sizes, tiny)
    for part in (TAUGHT, SUBJECT, WORDS, TWO):
        rng = run.rng("instructions", part)
        tasks = [draw_task(rng, part, held_out=True) for _ in range(sizes.n)]
        for player, model in models.items():
            rows.append({"seed": seed, "part": part, "player": player}
                        | measure(run, model, tasks))
    return rows


def measure(run, model, tasks: list[Task]) -> dict:
    """How often the model follows the constraints; "unasked": how often its replies to the same
    questions without the constraints do; and how often it is right."""
    asked = lab.sample(run, model, [task.prompt for task in tasks], "asked")
    unasked = lab.sample(run, model, [task.plain for task in tasks], "unasked")
    followed, by_chance, correct = [], [], []
    for task, reply, other in zip(tasks, asked, unasked):
        followed.append(follows(task, reply))
        by_chance.append(follows(task, other))
        correct.append(toy.judge(task.plain, reply).correct)
    share, error = output.mean_se(followed)
    return {"followed": share, "+-": error, "unasked": toy.mean_or_nan(by_chance),
            "correct": toy.mean_or_nan(correct)}


def of(rows: list[dict], part: str, player: str, name: str = "followed") -> list[float]:
    """One number a seed."""
    return output.column(output.select(rows, part=part, player=player), name)


def draw(plt, rows):
    parts, found = (TAUGHT, SUBJECT, WORDS, TWO), {}
    for player in (LM, SFT, PPO, CONTROL):
        found[player] = [of(rows, part, player) for part in parts]
    groups(plt, parts, found)
    plt.ylim(0, 1)
    plt.ylabel("share of constraints followed")
    plt.legend()


def verdict(rows: list[dict]) -> tuple[str, str]:
    """The outcome on the subjects that were taught, and the sentences of both findings."""
    lm, sft, ppo, control = [of(rows, TAUGHT, player) for player in (LM, SFT, PPO, CONTROL)]
    outcome, taught = sentence(
        "constraints are followed more often after each step",
        [Claim("SFT less LM", output.less(sft, lm), above=0.0),
         Claim("PPO less SFT", output.less(ppo, sft), above=0.0),
         Claim("the control less SFT", output.less(control, sft), below=0.05)])
    claims = []
    for player, bounds in ((PPO, {"above": 0.0}), (LM, {"below": 0.05})):
        found = output.less(of(rows, SUBJECT, player), of(rows, SUBJECT, player, "unasked"))
        claims.append(Claim(f"{player}, asked less unasked", found, **bounds))
    _, new = sentence("this carries over to a subject without demonstrations of it", claims)
    return outcome, f"{taught} {new}"


def experiment(args):
    sizes, n_seeds = steps.Sizes(n=300), 1
    if args.full:
        sizes, n_seeds = steps.FULL, 4
    if args.tiny:
        sizes = steps.TINY
    rows = output.each_seed("instructions", args, n_seeds,
                            lambda seed: one_seed(seed, sizes, args.tiny))
    print(f"how often constraints are followed; errors over {sizes.n} tasks")
    output.table(rows)
    _, sentences = verdict(rows)
    output.finish("instructions", args, rows, lambda plt: draw(plt, rows), sentences)


if __name__ == "__main__":
    output.main(experiment, __doc__)
