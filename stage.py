"""One output folder, and how a training stage starts, resumes and ends in it.

This file knows nothing about models or RLHF. A trainer uses a stage like this (the toy's PM calls
`record` earlier, because it samples its data):

    stage = run.begin("pm", cfg)     # check the options; with --resume, read the interrupted state
    if stage is None:                # --resume was given, and the result is already there
        return
    ...                              # read data; a mistake found here leaves the folder as it was
    stage.start(pm=pm, optimizer=optimizer)  # restore both; an older result is now stale
    for step, batch in stage.steps(batches, save_every=50):
        ...                          # one training step
        stage.log(step, loss=loss)   # a line of metrics.jsonl
    stage.end(model=pm.state_dict())  # write the result, then delete the state

While it runs, a stage keeps <stage>_state.pt. --resume restores from this file the networks, the
optimizer, the step and the number of lines logged. No generator state is needed: step 30 of a
resumed run draws the random numbers that step 30 always draws (run.rng). Without --resume the
stage starts over.

No run resumes from NaN. Only the next step shows that an update has led to NaN, so a new state
waits in <stage>_state.next.pt until that step is done. After the last step the stage must check
what it measures (run.check_finite) before it calls `end`. Several processes (ranks.py) run all this
together, and only the first one writes. Read the file in this order:
  1. Folder  which result depends on which, and whether a result can be used
  2. Stage   its methods, in the order in which they run
"""
import dataclasses
import json
import math
import os
import time
from pathlib import Path
from random import Random
from typing import Sequence

import torch
from tqdm import tqdm

import ranks
from run import (UserError, file_hash, first_sentence, flag, is_first, is_out_of_memory,
                 load, lock, read_text, rng, save, torch_rng, write_atomically)

# ---- 1. Folder ---------------------------------------------------------------


_locks = {}  # folder -> its open lock file; the system unlocks it when this process ends or dies


class Folder:
    """One output folder: config.json, metrics.jsonl, record.jsonl, and a checkpoint of each stage.

    pipeline: {stage: (its result, the results it depends on)}, in the order in which stages run.
    options: what all the stages of one folder must agree on, as {option: value}.
    speed_options: options of a stage that may change when it is resumed.
    resume: whether an interrupted stage continues from its state.
    files: that every stage may read besides its parents."""

    def __init__(self, out: Path, pipeline: dict, options: dict, speed_options: tuple[str, ...],
                 seed: int, resume: bool, files: Sequence[Path] = ()):
        self.out, self.pipeline = out, pipeline
        self.options, self.speed_options = options, speed_options
        self.seed, self.resume, self.files = seed, resume, files

    def path(self, name: str) -> Path:
        return self.out / name

    def has(self, name: str) -> bool:
        return self.path(name).exists()

    def rng(self, *name) -> Random:
        """A generator named by its purpose; see run.rng."""
        return rng(self.seed, *name)

    def torch_rng(self, *name) -> torch.Generator:
        return torch_rng(self.seed, *name)

    def is_complete(self, name: str) -> bool:
        """A finished stage has a result and no state: `Stage.end` deletes it after writing the
        result."""
        return self.has(self.pipeline[name][0]) and not self.has(f"{name}_state.pt")

    def begin(self, name: str, cfg, data: Sequence[str] = ()) -> "Stage | None":
        """Return the stage, ready to run; or print a note and return None if --resume finds that it
        is done. data: more files that the stage reads. Raises UserError if the
        folder, or its state, was made with other options or files."""
        self.check_options()
        result_name, parent_names = self.pipeline[name]
        stage = Stage(self, name, cfg, self.path(result_name), self.paths(parent_names),
                      [*self.files, *data])
        if self.resume and self.is_complete(name):
            self.check_parents(result_name, load(stage.result))
            print(f"nothing to resume: {stage.result} is there, and this stage is complete"
                  + stage.ignored_note())
            return None
        stage.read_state()
        return stage

    def reuse(self, name: str, cfg, data: Sequence[str] = ()) -> bool:
        """Return whether an earlier stage's result can be used; print what was decided.
        data: more files that the stage read, if they must be the same ones."""
        self.check_options()
        result_name, _ = self.pipeline[name]
        # No parents: `check_parents` hashes them if the result is used.
        stage = Stage(self, name, cfg, self.path(result_name), parents=[])
        if stage.state_path.exists():  # a state marks the result beside it as stale
            print(f"{stage.result} is unfinished; its stage runs first")
            return False
        if not stage.result.exists():
            print(f"{stage.result} is missing; its stage runs first")
            return False
        saved = load(stage.result)
        self.check_parents(result_name, saved)
        if data and saved.get("data") != file_hash([*self.files, *data]):
            raise UserError(f"{stage.result} was not trained from the present {_join(data)}; "
                            "delete it to train a new one")
        print(f"{stage.result} is there and used as it is" + stage.ignored_note())
        return True

    def lock(self):
        """Keep other processes from training in this folder until this one ends. Raises UserError
        if one already does."""
        folder = self.out.resolve()
        if folder in _locks or not is_first():
            return
        try:
            file = open(self.path(".lock"), "w")
        except OSError:
            return  # a disk that nobody can write to, as `save` will say
        if not lock(file):
            raise UserError(f"another run is working in {self.out}: wait until it ends, or use "
                            "another --out")
        _locks[folder] = file

    def unlock(self):
        """Let other processes work in this folder again. This one must only read it from now on."""
        file = _locks.pop(self.out.resolve(), None)
        if file is not None:
            file.close()

    def check_options(self):
        """Raise UserError if the folder was made with other options that all stages share, or if
        another process is working in it."""
        if self.out.is_dir():  # if not, `record` makes and locks it
            self.lock()
        changes = _changes(read_config(self.out).get("run", {}), self.options, prefix="run")
        if changes:
            raise UserError(f"{self.out} was made with other options ({changes}): "
                            "use another --out or delete it")

    def check_parents(self, result_name: str, saved: dict):
        """Raise UserError if a result's parents are not the files that are here now."""
        for trained, parent_names in self.pipeline.values():
            parents = self.paths(parent_names)
            if trained == result_name and parents and saved.get("parents") != file_hash(parents):
                raise UserError(f"{self.path(result_name)} was not trained from the present "
                                f"{_join(parents)}; delete it to train a new one")

    def paths(self, names) -> list[Path]:
        return [self.path(name) for name in names]

    def descendants(self, name: str) -> set[str]:
        """The stages that depend on the result of stage `name`."""
        stale_results, stages = {self.pipeline[name][0]}, set()
        for stage, (result_name, parent_names) in self.pipeline.items():
            if stale_results & set(parent_names):
                stale_results.add(result_name)
                stages.add(stage)
        return stages


def read_config(out: Path) -> dict:
    """config.json of a folder: {"run": options, stage: its options, ...}; {} if there is none."""
    path = out / "config.json"
    if not os.path.exists(path):
        return {}
    try:
        config = json.loads(read_text(path))
    except ValueError:
        config = None
    if not isinstance(config, dict) or not all(isinstance(v, dict) for v in config.values()):
        raise UserError(f"{path} is not a config of this project; use another --out")
    return config


# ---- 2. Stage ----------------------------------------------------------------


class Stage:
    """One training stage of a folder. The docstring at the top of this file shows how to use it."""

    def __init__(self, folder: Folder, name: str, cfg, result: Path, parents: list[Path],
                 data: Sequence[str] = ()):
        self.folder, self.name, self.cfg = folder, name, cfg
        self.result, self.parents = result, parents
        self.state_path = folder.path(f"{name}_state.pt")
        self.next_state_path = folder.path(f"{name}_state.next.pt")
        self.metrics_path = folder.path("metrics.jsonl")
        self.record_path = folder.path("record.jsonl")
        self.data = list(data)
        self.parent_hash = file_hash(parents)  # taken before this run reads them
        self.data_hash = file_hash(data)
        self.state: dict | None = None         # what an interrupted run saved
        self.first_step, self.n_steps = 0, 0
        self.n_lines = 0                       # lines of metrics.jsonl that this stage has written
        self.n_records = 0                     # lines of record.jsonl
        self.parts = {}                        # name -> what is trained: anything with a state_dict
        self.bar = None
        self.clock = time.perf_counter()

    def read_state(self):
        """Read the state to resume, if there is one and --resume asks for it."""
        if not self.state_path.exists():
            return
        if not self.folder.resume:
            print(f"{self.state_path} comes from an interrupted run; "
                  "without --resume this stage starts over")
            return
        if self.changes():
            raise UserError(f"{self.folder.out} was begun with other options ({self.changes()}): "
                            "resume with the same ones")
        state = load(self.state_path)
        if state.get("stage") != self.name:
            raise UserError(f"{self.state_path} is not the state of an interrupted {self.name} "
                            "stage; delete it to start over")
        if "step" not in state:  # interrupted before the first step, see `record`
            return
        if state.get("parents") != self.parent_hash:
            raise UserError(f"{self.state_path} was not made with the present "
                            f"{_join(self.parents)}; delete it to start over")
        if state.get("data", "") != self.data_hash:
            raise UserError(f"{_join(self.data) or 'a file'} changed since {self.state_path} was "
                            "made: restore what was there, or leave out --resume to start over")
        self.state = state

    def changes(self) -> str:
        """How this stage's options differ from those in config.json, in words; "" if they agree."""
        recorded = read_config(self.folder.out).get(self.name, {})
        options = dataclasses.asdict(self.cfg)
        for name in self.folder.speed_options:
            options.pop(name, None)
        return _changes(recorded, options, prefix=self.name)

    def ignored_note(self) -> str:
        changes = self.changes()
        return f" (ignored: {changes})" if changes else ""

    def record(self):
        """Write this stage's options to config.json, and an empty state, which marks an older
        result as stale. `start` calls it; the toy's PM calls it earlier, before sampling."""
        ranks.wait()  # until all have read the folder as it was
        try:
            self.folder.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {self.folder.out}: {error.strerror}") from None
        self.folder.lock()
        if self.state is None:  # a fresh start: no older state may outlive its options
            save(self.state_path, stage=self.name)
        config = read_config(self.folder.out)
        config["run"] = self.folder.options
        config[self.name] = dataclasses.asdict(self.cfg)
        write_atomically(self.folder.path("config.json"), json.dumps(config, indent=2).encode())

    def start(self, **parts):
        """Record the options and restore `parts` from the state, if a run was interrupted. `parts`
        are the networks and optimizers that the state holds; a stage that trains nothing has none.
        """
        self.record()
        self.parts = parts
        if self.state is not None:
            try:
                for name, part in parts.items():
                    part.load_state_dict(self.state["parts"][name])
                self.first_step, self.n_lines = self.state["step"], self.state["lines"]
                self.n_records = self.state.get("records", 0)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                if is_out_of_memory(error):
                    raise
                raise UserError(f"{self.state_path} does not fit this stage "
                                f"({first_sentence(error)}); delete it to start over") from None
            self.state = None  # frees the memory
        self._trim(self.metrics_path, self.n_lines)
        self._trim(self.record_path, self.n_records)

    def resumed_note(self) -> str:
        return f", from step {self.first_step}" if self.first_step else ""

    def steps(self, items, save_every: int, unit: str = "step"):
        """Yield (step, item) for each remaining step, with a progress bar. Before step 0 and every
        `save_every`-th step the state is written, and after that step it becomes the state to
        resume from."""
        self.n_steps = len(items)
        with tqdm(desc=self.name, unit=unit, initial=self.first_step, total=self.n_steps,
                  leave=False, disable=None) as self.bar:  # disable=None: only in a terminal
            for step in range(self.first_step, self.n_steps):
                is_saved = step % save_every == 0
                if is_saved:
                    self._save_next_state(step)
                yield step, items[step]
                if is_saved:
                    self._adopt_next_state()
                self.bar.update()
        self.bar = None

    def log(self, step: int, every: int = 1, **numbers):
        """Append a line to metrics.jsonl, at every `every`-th step and at the last one.
        On one machine, all numbers but `seconds` repeat exactly."""
        if step % every != 0 and step != self.n_steps - 1:
            return
        self.n_lines += 1
        if not is_first():
            return
        line = {"stage": self.name, "step": step}
        for name, number in numbers.items():
            line[name] = _plain(number)
        line["seconds"] = round(time.perf_counter() - self.clock, 2)
        self._append(self.metrics_path, line)
        if self.bar is not None and every > 1:  # a stage that logs each step prints lines instead
            self.bar.set_postfix(numbers)

    def log_record(self, step: int, **content):
        """Append a line to record.jsonl. record.py says what the lines hold."""
        self.n_records += 1
        if is_first():
            self._append(self.record_path, {"stage": self.name, "step": step} | content)

    def end(self, **content):
        """Write the result, and delete the state."""
        ranks.check_equal(self.parts)
        save(self.result, **content, parents=self.parent_hash, data=self.data_hash)
        if is_first():
            self.state_path.unlink(missing_ok=True)
            self.next_state_path.unlink(missing_ok=True)  # left by an attempt that failed
        ranks.wait()  # from here on all can read the result
        print(f"    -> {self.result}  ({time.perf_counter() - self.clock:.0f} s)")

    def _save_next_state(self, step: int):
        ranks.check_equal(self.parts)
        if not is_first():
            return
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        save(self.next_state_path, stage=self.name, parents=self.parent_hash, data=self.data_hash,
             step=step, lines=self.n_lines, records=self.n_records, parts=parts)

    def _adopt_next_state(self):
        if is_first():
            os.replace(self.next_state_path, self.state_path)

    def _append(self, path: Path, line: dict):
        try:
            with open(path, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None

    def _trim(self, path: Path, n_saved: int):
        """Drop the lines that this stage wrote after its last saved state (all, if it starts
        over), and the lines of the stages that depend on it."""
        descendants = self.folder.descendants(self.name)
        lines = []
        if path.exists():
            lines = read_text(path).splitlines()
        kept, n_own = [], 0
        for line in lines:
            try:
                line_stage = json.loads(line)["stage"]
            except (ValueError, TypeError, KeyError):
                continue  # cut short when a run was killed
            if line_stage in descendants:
                continue
            if line_stage == self.name:
                n_own += 1
                if n_own > n_saved:
                    continue
            kept.append(line + "\n")
        write_atomically(path, "".join(kept).encode())


def _plain(number, digits: int | None = 6):
    """A number as JSON can hold it: rounded, and None for NaN and infinity, which JSON lacks. The
    numbers in a nested table keep all their digits."""
    if isinstance(number, dict):
        return {key: _plain(value, digits=None) for key, value in number.items()}
    if isinstance(number, float):
        if not math.isfinite(number):
            return None
        return number if digits is None else round(number, digits)
    return number


def _changes(recorded: dict, now: dict, prefix: str) -> str:
    """Which options differ, in words; "" if none. An option that was not recorded is no change."""
    words = []
    for name, value in now.items():
        if name in recorded and recorded[name] != value:
            words.append(f"{flag(f'{prefix}.{name}')} was {recorded[name]!r}, now {value!r}")
    return "; ".join(words)


def _join(paths: Sequence) -> str:
    return " and ".join(str(path) for path in paths)
