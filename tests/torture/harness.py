"""Trials: a job is killed some times, resumed each time, and let finish; after every kill its claims are checked.

A kill is one of: ``rank``, one rank at a random moment; ``all``, everything at once; ``coordinator`` alone, so that
orphaned ranks are left; ``call``, a process in or beside the k-th of its calls that change files. Any of them may be
followed by a power cut (``powercut``). Half of the trials resume in the same layout and want every byte to be the same;
the others resume in any layout.
"""

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from nemo_qwen_hidden.parallel import launch
from tests.torture import claims, ranks
from tests.torture.claims import insist
from tests.torture.coordinator import FINISHED, NOTHING_TO_DO, Run, warm_up
from tests.torture.faults import Watch
from tests.torture.powercut import cut_power, events, forget
from tests.torture.scene import JOBS, Scene, Way, any_way

KINDS = ("rank", "all", "coordinator", "call", "call", "call")
REFUSED = 2
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Undisturbed:
    """A job that nobody killed. calls: role and function of each watched call. seconds: that it took."""

    store: Path
    calls: list[tuple[str, str]]
    seconds: float


@dataclass
class Tally:
    """What was done. checks: by name. kills: by kind."""

    kills: Counter[str] = field(default_factory=Counter)
    checks: Counter[str] = field(default_factory=Counter)


class Torture:
    """All trials of one seed, in ``folder``, of which only a failure's remains are left."""

    def __init__(self, folder: Path, *, seed: int, layouts: tuple[str, ...], say: Say) -> None:
        self._folder, self._chance, self._layouts, self._say = folder, random.Random(seed), layouts, say
        self._log = folder / "log.txt"
        self._scene = Scene(folder=folder)
        self._undisturbed: dict[tuple[str, str, Way], Undisturbed] = {}
        self.tally = Tally()

    def prepare(self) -> None:
        """Imports NeMo, and makes model and corpus."""
        self._folder.mkdir(parents=True, exist_ok=True)
        warm_up(self._log)
        launch.run_ranks(ranks.make_model, (self._scene.model,), world=1, log=self._log)
        self._scene.write_corpus()

    def run(self, kills: int) -> None:
        """Trials until there were so many kills.

        Raises:
            Broken: a promise was; the folder is left as it is.
        """
        trial = 0
        while self.tally.kills.total() < kills:
            _Trial(self, trial).run()
            trial += 1

    def undisturbed(self, job: str, stored: str, way: Way) -> Undisturbed:
        """Made once for each."""
        key = (job, stored, way)
        if key not in self._undisturbed:
            name = f"undisturbed-{'-'.join(map(str, key))}".replace(" ", "-")
            watch = self.watch(name)
            if job != JOBS[0]:
                shutil.copytree(self.before(job, stored, way), watch.store)
            run = Run(self._scene.settings(job, watch.store, way, stored=stored), watch, self._log)
            run.wait()
            insist(run.status == FINISHED, "an undisturbed job finishes", key, run.word)
            calls = sorted((event[2], event[3]) for event in events(watch) if event[0].islower() and len(event) > 3)
            secs = time.monotonic() - run.started
            self._undisturbed[key] = Undisturbed(store=watch.store, calls=calls, seconds=secs)
        return self._undisturbed[key]

    def before(self, job: str, stored: str, way: Way) -> Path:
        """The store that ``job`` adds to."""
        return self.undisturbed(JOBS[JOBS.index(job) - 1], stored, way).store

    def watch(self, name: str) -> Watch:
        """An empty place for a store, with what is watched beside it."""
        folder = self._folder / name
        shutil.rmtree(folder, ignore_errors=True)
        watch = Watch(role="coordinator", store=folder / "store", folder=folder)
        for made in (watch.kept, watch.pids):
            made.mkdir(parents=True)
        forget(watch)
        return watch


class _Trial:
    def __init__(self, torture: Torture, number: int) -> None:
        self._torture, self._number, self._chance = torture, number, torture._chance
        chance = self._chance
        self._same = chance.random() < 0.6
        self._job = chance.choice([JOBS[0], JOBS[0], *JOBS])
        self._stored = chance.choice(["fp32", "int8", "bf16"]) if self._same else "fp32"
        gather = chance.choice(["none", "none", "none", "rank0"])
        self._way = Way(layout=chance.choice(torture._layouts), gather=gather)
        reference_way = self._way if self._same else Way()
        self._reference = torture.undisturbed(self._job, self._stored, reference_way)
        self._pace = torture.undisturbed(self._job, self._stored, self._way)
        self._watch = torture.watch(f"trial-{number}")
        if self._job != JOBS[0]:
            shutil.copytree(torture.before(self._job, self._stored, reference_way), self._watch.store)

        self._cut = False  # since then, until a run has tidied up, files may be gone of which something is claimed

    def run(self) -> None:
        for _ in range(self._chance.randint(1, 4)):
            if not self._kill_once():
                break
        self._finish()
        shutil.rmtree(self._watch.folder)

    def _start(self, watch: Watch) -> Run:
        settings = self._torture._scene.settings(
            self._job, watch.store, self._way, stored=self._stored, commit_secs=self._chance.choice([0.0, 0.02])
        )
        return Run(settings, watch, self._torture._log)

    def _kill_once(self) -> bool:
        """Runs the job until it is killed; False where it was quicker."""
        chance, tally = self._chance, self._torture.tally
        kind, cuts = chance.choice(KINDS), chance.random() < 0.4
        watch, plan = self._watch, ""
        if kind == "call":
            watch, plan = self._deadly_call()
        run = self._start(watch)
        if kind == "call":
            run.wait()
            killed = run.status != FINISHED
        else:
            killed, plan = self._kill_at_random(run, kind)
        if not cuts and kind == "coordinator":
            left = "orphans"
        elif not cuts and run.status not in (FINISHED, NOTHING_TO_DO) and chance.random() < 0.5:
            left = "orphans" if run.ranks() else "nobody"
        else:
            run.kill()
            left = "nobody"
        self._check_end(run, kind)
        if cuts:
            self._cut = True
            spoilt = cut_power(self._watch, chance)
            plan += f", power cut ({len(spoilt)} changes)"
            (self._watch.folder / "cut.txt").write_text("\n".join(spoilt))
        if killed:
            tally.kills[kind + (" + power cut" if cuts else "")] += 1
        if left == "nobody":
            claimed = claims.check_claims(self._watch.store, self._reference.store, same=self._same, cut=self._cut)
            tally.checks["claims"] += 1
        else:
            claimed = "orphans live"
        self._say(f"{kind}: {plan} -> {run.status if run.status is not None else 'lives'}; {claimed}")
        if not self._same:
            self._way = any_way(chance)
        return killed

    def _deadly_call(self) -> tuple[Watch, str]:
        """Any of the calls that the undisturbed job made, of which the coordinator's are few and the most delicate."""
        roles = sorted({role for role, _ in self._pace.calls})
        role = self._chance.choice(roles)
        name = self._chance.choice([name for other, name in self._pace.calls if other == role])
        most = sum(call == (role, name) for call in self._pace.calls)
        which = 1 + int(most * self._chance.random() ** 1.5)
        moment = self._chance.choice(["before", "half", "after"])
        watch = Watch(
            role="coordinator",
            store=self._watch.store,
            folder=self._watch.folder,
            dies=(role, name, which),
            moment=moment,
        )
        return watch, f"{moment} {name} {which} of {role}"

    def _kill_at_random(self, run: Run, kind: str) -> tuple[bool, str]:
        """Kills after some time, or after some calls by anyone."""
        chance = self._chance
        if chance.random() < 0.4:
            secs = chance.uniform(0, self._pace.seconds)
            due, plan = (lambda: time.monotonic() - run.started > secs), f"after {secs:.2f} s"
        else:
            first = self._watch.log.stat().st_size
            size = chance.uniform(0, 1) ** 1.5 * self._log_bytes()
            due, plan = (lambda: self._watch.log.stat().st_size - first > size), f"after {size:.0f} bytes of calls"
        if chance.random() < 0.15:
            due = self._first_a_second_run(run, due)
        run.wait(until=due)
        if run.ended():
            return False, plan + " (too late)"
        if kind == "rank":
            living = run.ranks()
            if not living:
                run.kill()
                return True, plan + ", before there were ranks: all"
            pid = chance.choice(sorted(living))
            plan += f", {living[pid]}"
            _kill(pid)
            run.wait()
            run.wait_for_ranks(run.ranks())
        elif kind == "coordinator":
            run.kill(ranks=False)
        else:
            run.kill()
        return True, plan

    def _log_bytes(self) -> float:
        return max(1.0, 120.0 * len(self._pace.calls))

    def _first_a_second_run(self, run: Run, due: Callable[[], bool]) -> Callable[[], bool]:
        """Tries a second run of the same job when the first has the lock; it has to be refused in one line."""
        state, lock, torture = {"tried": False}, self._watch.store / "journal/job.lock", self._torture

        def due_after_that() -> bool:
            if not state["tried"] and lock.exists() and f'"pid": {run.pid},' in lock.read_text(errors="replace"):
                state["tried"] = True
                self._second_run()
                torture.tally.checks["second run refused"] += 1
            return due()

        return due_after_that

    def _second_run(self) -> None:
        watch = self._torture.watch(f"trial-{self._number}-second")
        watch = Watch(role="coordinator", store=self._watch.store, folder=watch.folder)
        second = self._start(watch)
        second.wait()
        word = second.word
        shutil.rmtree(watch.folder)
        if second.status in (FINISHED, NOTHING_TO_DO):  # the first had ended by then
            return
        insist(second.status == REFUSED, "a second run is refused", second.status, word)
        insist("no other run is working on; process" in word and "\n" not in word, "... in a line that says why:", word)

    def _check_end(self, run: Run, kind: str) -> None:
        """A run that was not killed whole ends with an error that says why, and finishes where nobody was killed."""
        if run.status is not None and run.status > 0 and run.status != NOTHING_TO_DO:
            expected = "was ended by SIGKILL" in run.word or "rank" in run.word
            insist(expected, "a run whose rank was killed says so", run.status, run.word)

    def _finish(self) -> None:
        """Undisturbed to the end, however many orphans there still are."""
        tally = self._torture.tally
        run = self._start(self._watch)
        run.wait()
        insist(run.status in (FINISHED, NOTHING_TO_DO), "the same command resumes and finishes", run.status, run.word)
        claims.check_same(self._watch.store, self._reference.store, same=self._same)
        tally.checks["stores, every byte" if self._same else "stores, other layouts"] += 1
        if self._chance.random() < 0.3:
            again = self._start(self._watch)
            again.wait()
            insist(again.status == NOTHING_TO_DO, "a finished store is left alone", again.status, again.word)
            claims.check_same(self._watch.store, self._reference.store, same=self._same)
            tally.checks["nothing to do"] += 1
        self._say(f"finished by {self._way}: {'every byte' if self._same else 'every row'} is right")

    def _say(self, text: str) -> None:
        what = f"{self._job} {self._stored} {self._way}" + ("" if self._same else " (any layout)")
        self._torture._say(f"[{self._torture.tally.kills.total():4}] trial {self._number} {what}: {text}")


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
