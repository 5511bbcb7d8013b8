"""Talk with a model that you trained, or be the crowdworker who chooses between its replies.

    python chat.py out/toy-0                                  # talk with its best model
    python chat.py out/toy-0 --compare                        # choose: two replies at each turn
    python chat.py out/toy-0 --compare --against initial.pt   # ... of two models
    python chat.py out/toy-0 --compare --red-team             # ... the more harmful one (HH §2.2)

Type /help for the commands. The choices go to choices.jsonl, on which `train_pm.py --comparisons
choices.jsonl` trains a preference model. The run's folder is only read, so a run may go on in it.
Lines from a pipe work like typed ones. Read this file in this order:
  1. Terminal     lines in and out
  2. Chat         a conversation, reply by reply
  3. Crowdworker  a conversation in which a person chooses at each turn
  4. Command      options, and the loop over lines
Papers: HH = Bai et al. 2022 (arXiv 2204.05862); a § or App. without a name is in HH.
"""
import argparse
import contextlib
import os
import secrets
import sys

from run import (  # before torch: Ctrl-C prints no traceback
    LARGEST_COUNT, UserError, errors_in_one_sentence, rng)

import toy
import toy_people
from choices import SURE, UNSURE, ChoiceFile, choice_record, goes_on
from conversation import (Reply, Scorer, Speaker, ask, best_speaker, comparable, known_prompts,
                          one_turn, shown, truth, two_replies)
from outlier_score import Familiar

try:
    import readline  # once imported, it edits the lines of `input` and remembers them
except ImportError:
    readline = None

# ---- 1. Terminal -------------------------------------------------------------


class Terminal:
    """Lines from a person or a pipe. Whatever it prints, it prints as text (`shown`)."""

    def __init__(self):
        if sys.stdin is None:
            raise UserError("there is no input: the standard input is closed")
        self.typed = sys.stdin.isatty()
        sys.stdin.reconfigure(errors="replace")

    def ask(self, question: str, draft: str = "") -> str:
        """The next line. `draft` is there to be edited, where readline exists. Raises EOFError at
        the end of the input."""
        if readline is not None and self.typed:
            readline.set_startup_hook(lambda: readline.insert_text(draft))
        line = input(question).strip().removeprefix("\ufeff")  # some programs begin a pipe with it
        if not self.typed:  # a terminal shows what is typed, a pipe does not
            print(shown(line))
        return line

    def say(self, *notes: str):
        """Words of the program, which are set apart from those of a model."""
        for note in notes:
            print(f"    ({shown(note)})", flush=True)

    def show(self, name: str, text: str):
        print(f"{name}:{_indented(text)}", flush=True)

    def show_growing(self, name: str, replies) -> Reply:
        """Print a reply while it grows (`Speaker.stream`), and return it."""
        print(f"{name}:", end="", flush=True)
        printed = 0
        for reply in replies:
            print(_indented(reply.text[printed:]), end="", flush=True)
            printed = len(reply.text)
        print(flush=True)
        return reply


def _indented(text: str) -> str:
    """No line of a reply can pass for one of the program or of the person."""
    return shown(text).replace("\n", "\n    ")


# ---- 2. Chat -----------------------------------------------------------------


class Chat:
    """A conversation with one model. `dialogues` holds it as it was after each turn."""

    def __init__(self, terminal: Terminal, speaker: Speaker, seed: int):
        self.terminal, self.speaker, self.seed = terminal, speaker, seed
        self.initial: Speaker | None = None  # with /both
        self.scorer: Scorer | None = None    # with /score
        self.familiar: Familiar | None = None  # with /score, if the folder holds prompts
        self.dialogues = [""]
        self.replies: list[tuple[str, Reply]] = []  # each with the dialogue that it answers
        self.n_drawn = 0
        self.warned = set()
        self.commands = {
            "/new": (self.new, "begin a new conversation"),
            "/undo": (self.undo, "take back your last message and its reply"),
            "/both": (self.both, "show the initial policy's reply beside that of the RLHF policy"),
            "/score": (self.score, "show the preference model's score of each reply (toy: and the "
                                   "truth)"),
            "/save": (self.save, "write the conversation to a new file: /save NAME"),
        }

    def answer(self, message: str):
        dialogue = ask(self.dialogues[-1], message)
        self.speaker.fit(dialogue)  # a message that is too long ends here, before anything is said
        self.n_drawn += 1
        seed = rng(self.seed, "chat", self.n_drawn).getrandbits(32)
        warn_if_replaced(self.terminal, self.speaker, self.warned)
        if self.initial is not None:
            warn_if_replaced(self.terminal, self.initial, self.warned)
            other = self.initial.reply([dialogue], [seed])[0]
            self.terminal.show("Initial  ", other.text)
            self.show_score(dialogue, other)
            reply = self.terminal.show_growing("RLHF     ", self.speaker.stream(dialogue, seed))
        else:
            reply = self.terminal.show_growing("Assistant", self.speaker.stream(dialogue, seed))
        say_what_is_missing(self.terminal, self.speaker, reply)
        self.show_score(dialogue, reply)
        say_if_unknown(self.terminal, self.speaker, dialogue, rng(self.seed, "hint", self.n_drawn))
        self.dialogues.append(dialogue + reply.text)
        self.replies.append((dialogue, reply))

    def new(self, _):
        self.dialogues, self.replies = [""], []
        self.terminal.say("a new conversation")

    def undo(self, _):
        if not self.replies:
            raise UserError("there is nothing to take back")
        self.dialogues.pop()
        self.replies.pop()
        self.terminal.say("your last message and its reply are taken back")

    def both(self, _):
        if self.initial is not None:
            self.initial = None
            self.terminal.say("back to one reply a turn")
            return
        if self.speaker.path.name != "policy.pt":
            raise UserError(f"this is {self.speaker.path.name}; /both needs a policy.pt, which "
                            "train_rl.py trains")
        self.initial = Speaker(self.speaker.folder, "initial.pt", self.speaker.temperature,
                               self.speaker.device, self.speaker.max_response)
        self.terminal.say("two replies a turn; the conversation goes on with that of the RLHF "
                          "policy")

    def score(self, _):
        if self.scorer is not None:
            self.scorer = None
            self.terminal.say("scores are off")
            return
        scorer = Scorer(self.speaker.folder, device=self.speaker.device)
        if self.familiar is None:
            prompts = known_prompts(self.speaker.folder, 1000, rng(self.seed, "known prompts"))
            if len(prompts) > 30:  # a Gaussian of fewer says little
                self.familiar = Familiar(self.speaker.net, self.speaker.tok, prompts,
                                         self.speaker.device)
        self.scorer = scorer
        self.terminal.say(f"scores of {self.scorer.path.name} in logits, from now on"
                          + (", and of the replies so far:" if self.replies else ""))
        for dialogue, reply in self.replies:
            self.terminal.show("Assistant", reply.text)
            self.show_score(dialogue, reply)

    def show_score(self, dialogue: str, reply: Reply):
        if self.scorer is None:
            return
        score, = self.scorer.score([dialogue], [reply.text])
        words = "too long to be scored" if score is None else f"PM score {score:.2f}"
        if self.speaker.toy and toy.is_known(dialogue):
            words += (f", true helpfulness {truth(dialogue, reply.text, 'helpful'):.1f}, true "
                      f"harmlessness {truth(dialogue, reply.text, 'harmless'):.1f}")
        elif self.speaker.toy:
            words += ", truth not known: this is no question of the toy world"
        if self.familiar is not None:
            share = self.familiar.share_below(dialogue)
            words += f"; the prompt is more unusual than {share:.0%} of the training prompts"
        self.terminal.say(words)

    def save(self, name: str):
        if not self.replies:
            raise UserError("there is nothing to save yet")
        if not name:
            raise UserError("/save needs the name of a new file, as in /save talk.txt")
        lines = [f"# {self.speaker.label}, temperature {self.speaker.temperature}"]
        for _, reply in self.replies:
            lines.append(f"# seed {reply.seed}")
        try:
            with open(name, "x", encoding="utf-8") as file:  # "x": no file is overwritten
                try:
                    file.write("\n".join(lines) + shown(self.dialogues[-1]) + "\n")
                    file.flush()
                except OSError:  # a full disk: leave no half of it
                    os.unlink(name)
                    raise
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"cannot write {name}: {reason}") from None
        self.terminal.say(f"saved to {name}")


def warn_if_replaced(terminal: Terminal, speaker: Speaker, warned: set):
    """Say once that a checkpoint on the disk is another one now."""
    if speaker.path not in warned and speaker.was_replaced():
        warned.add(speaker.path)
        terminal.say(f"{speaker.path} was replaced or deleted; this chat goes on with the weights "
                     "that it has read")


def say_what_is_missing(terminal: Terminal, speaker: Speaker, reply: Reply):
    if reply.dropped:
        terminal.say(f"the conversation no longer fits: the model did not read its oldest "
                     f"{reply.dropped} turns")
    if not reply.finished:
        terminal.say(f"cut off after {speaker.max_response} tokens")


def say_if_unknown(terminal: Terminal, speaker: Speaker, dialogue: str, generator,
                   kind: str = "helpful"):
    """After a question that is outside the toy world, name three that it knows."""
    if speaker.toy and not toy.is_known(dialogue):
        skills = sorted(toy_people.HELPFUL_SKILLS) if kind == "helpful" else ["red-team"]
        questions = []
        for skill in generator.choices(skills, k=3):
            questions.append(toy_people.ask(generator, skill)[0])
        terminal.say("the toy world does not know this question; it does know: "
                     + " ".join(questions))


# ---- 3. Crowdworker ----------------------------------------------------------

HOW_SURE = "1 barely, 2 somewhat, 3 quite, 4 very"


class Crowdworker:
    """A conversation in which a person chooses between two replies at each turn (§2.1).

    It goes on with the reply that was picked. In red-teaming that is the more harmful one, which
    the file holds as `rejected` (§2.2)."""

    def __init__(self, terminal: Terminal, first: Speaker, second: Speaker, file: ChoiceFile,
                 who: str, kind: str, seed: int):
        self.terminal, self.speakers, self.file = terminal, (first, second), file
        self.who, self.kind, self.seed = who, kind, seed
        self.warned = set()
        self.n_drawn = 0
        self.commands = {"/new": (self.new, "begin a new conversation")}
        self._begin()

    def _begin(self):
        self.dialogue, self.turn = "", 1
        self.name = secrets.token_hex(6)  # of the conversation; no other file has the same

    def new(self, _):
        self._begin()
        self.terminal.say("a new conversation")

    def answer(self, message: str):
        dialogue = ask(self.dialogue, message)
        for speaker in self.speakers:
            warn_if_replaced(self.terminal, speaker, self.warned)
        self.n_drawn += 1
        lot = rng(self.seed, "compare", self.n_drawn)
        pair = two_replies(*self.speakers, [dialogue], [lot.getrandbits(32)])[0]
        sides = list(zip(self.speakers, pair))
        lot.shuffle(sides)  # a person who likes the first side likes no model
        texts = [reply.text for _, reply in sides]
        if not comparable(*texts):
            if not texts[0].strip() or not texts[1].strip():
                raise UserError("a reply is empty, so there is nothing to choose; ask in other "
                                "words")
            self.terminal.show("A and B", texts[0])
            self.terminal.say("both replies are the same, so there is nothing to choose")
            self.dialogue, self.turn = dialogue + texts[0], self.turn + 1
            return
        for name, (speaker, reply) in zip("AB", sides):
            self.terminal.show(name, reply.text)
            say_what_is_missing(self.terminal, speaker, reply)
        say_if_unknown(self.terminal, self.speakers[0], dialogue, lot, self.kind)
        self.choose(dialogue, sides)

    def choose(self, dialogue: str, sides):
        """Ask for a choice until there is one, and store it."""
        while True:
            answer = self.terminal.ask(self._question()).lower().replace(" ", "")
            if answer == "/quit":
                raise EOFError  # which ends `talk`
            try:
                if answer == "s":
                    self.terminal.say("skipped; your message is taken back")
                    return
                if answer in ("ea", "eb"):
                    record = self.edited(dialogue, *sides["ab".index(answer[1])])
                else:
                    record = self.picked(dialogue, sides, answer)
                self.file.append(record)  # on the disk, before the next turn appears
                break
            except UserError as error:
                self.terminal.say(str(error))
        self.terminal.say(f"stored; choices so far: {len(self.file.records):,}")
        if record["strength"] == UNSURE:
            self.terminal.say(f"barely sure, so it is kept apart, in {self.file.unsure.path}")
        self.dialogue, self.turn = goes_on(record), self.turn + 1

    def _question(self) -> str:
        if self.kind == "harmless":
            return "More harmful, A or B, and how sure (a1 to a4, b1 to b4; /help)? "
        return "Better, A or B, and how sure (a1 to a4, b1 to b4; /help)? "

    def picked(self, dialogue: str, sides, answer: str) -> dict:
        """The record of an answer like "a3"."""
        if answer == "/help":
            raise UserError(CHOICE_HELP)
        if len(answer) != 2 or answer[0] not in "ab" or answer[1] not in "1234":
            raise UserError(f"type a or b and how sure you are ({HOW_SURE}), as in a3; or /help")
        picked, other = sides if answer[0] == "a" else sides[::-1]
        # A red-teamer picks the more harmful reply, so the other one is the better one.
        chosen, rejected = (picked, other) if self.kind == "helpful" else (other, picked)
        return self.record(dialogue, chosen[1].text, rejected[1].text, int(answer[1]),
                           [chosen[0].label, rejected[0].label],
                           [chosen[1].seed, rejected[1].seed])

    def edited(self, dialogue: str, speaker: Speaker, reply: Reply) -> dict:
        """The record of an edit: it is preferred to the original (App. D.2). How sure people were
        is not stated; here an edit counts as sure."""
        if self.kind == "harmless":
            raise UserError("edits are for helpful conversations only")
        draft = reply.text.strip()
        if "\n" in draft or shown(draft) != draft:  # a terminal would turn it into another text
            self.terminal.say("type the whole reply on one line")
            draft = ""
        text = one_turn(self.terminal.ask("Your edit: ", draft))
        if not comparable(text, reply.text):
            raise UserError("the edit is the same as the original")
        return self.record(dialogue, text, reply.text, SURE, ["person", speaker.label],
                           [None, reply.seed])

    def record(self, dialogue, chosen, rejected, strength, models, seeds) -> dict:
        return choice_record(dialogue, chosen, rejected, self.kind, self.who, strength, models,
                             seeds, self.name, self.turn)


CHOICE_HELP = (f"a3 picks A; the number says how sure you are: {HOW_SURE}; the barely sure ones "
               "are kept apart; ea or eb: edit A or B, and the edit is preferred to the original; "
               "s: skip this turn")

# ---- 4. Command --------------------------------------------------------------


def talk(terminal: Terminal, room: Chat | Crowdworker):
    """Read lines until the end of the input, Ctrl-C or /quit."""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            line = terminal.ask("\nHuman: ")
            command, _, rest = line.partition(" ")
            try:
                if command == "/quit":
                    return
                if command == "/help":
                    for name, (_, words) in room.commands.items():
                        terminal.say(f"{name:7}{words}")
                    terminal.say("/quit  end the chat")
                elif command in room.commands:
                    room.commands[command][0](rest.strip())
                elif command.startswith("/"):
                    raise UserError(f"unknown command {command}; type /help")
                elif line:
                    room.answer(line)
            except UserError as error:
                terminal.say(str(error))
    print()


def run(args):
    terminal = Terminal()
    name = args.model or best_speaker(args.folder)
    if not args.model and name != "policy.pt":
        terminal.say(f"no policy.pt in {args.folder} yet: this is {name}")
    seed = secrets.randbelow(LARGEST_COUNT) if args.seed is None else args.seed
    speaker = Speaker(args.folder, name, args.temperature, args.device, args.max_response)
    terminal.say(f"{speaker.label}, temperature {args.temperature:g}, seed {seed}; /help lists the "
                 "commands")
    if speaker.toy:
        skill = "red-team" if args.red_team else "capital"
        terminal.say("it is a toy: ask something like "
                     + toy_people.ask(rng(seed, "example"), skill)[0])
    if not args.compare:
        talk(terminal, Chat(terminal, speaker, seed))
        return
    other = speaker
    if args.against:
        other = Speaker(args.folder, args.against, args.temperature, args.device,
                        args.max_response)
    kind = "harmless" if args.red_team else "helpful"
    with ChoiceFile(args.choices) as file:
        terminal.say(*file.notes)
        better = "more harmful" if args.red_team else "more helpful and honest"
        terminal.say(f"choices in {file.path} so far: {len(file.records):,}; at each turn, pick "
                     f"the {better} reply")
        talk(terminal, Crowdworker(terminal, speaker, other, file, args.who, kind, seed))


@contextlib.contextmanager
def quiet_after_the_reader():
    """`python chat.py ... | head` ends without an error when `head` does."""
    try:
        yield
    except BrokenPipeError:  # and nothing more is flushed to the closed pipe at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("folder", help="output folder of a run, finished or not")
    add("--model", help="a language model there (default: policy.pt, else initial.pt, else lm.pt)")
    add("--temperature", type=float, default=1.0, help="of sampling (default: 1)")
    add("--seed", type=int, help="the same seed and lines give the same replies (default: random)")
    add("--max-response", type=int, default=0,
        help="maximum tokens per reply (default: as in RLHF)")
    add("--device", default="auto", help="cpu, cuda, ... (auto: a GPU if any)")
    add("--compare", action="store_true", help="choose between two replies at each turn")
    add("--against", help="the second reply comes from this model (default: from the same one)")
    add("--red-team", action="store_true", help="choose the more harmful reply")
    add("--choices", default="choices.jsonl", help="where the choices go (default: choices.jsonl)")
    add("--who", default="me", help="your name in the file (default: me)")
    with errors_in_one_sentence(), quiet_after_the_reader():
        args = parser.parse_args()
        if not args.compare and (args.red_team or args.against):
            raise UserError("--red-team and --against need --compare")
        if not args.who.strip():
            raise UserError("--who needs a name")
        run(args)


if __name__ == "__main__":
    main()
