"""Commands that talk to a Hub on the loopback, and a Hub that does something at the Nth request."""

from __future__ import annotations

import copy
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from support.fake_hub import FakeHub
from support.faults.breaking import RUN, World, digest_of
from support.faults.scenarios import Scenario
from support.faults.warm import Child, Ended, Warm

REPO = "fake/merged"
State = dict[str, str]


class Wire(FakeHub):
    """A Hub that calls `act(number, stage, path)` at each request: stage "status" before its work, "drop" after it.

    What `act` returns is the fault that the request meets then, or None.
    """

    def __init__(self) -> None:
        super().__init__()
        self.act: Callable[[int, str, str], dict[str, Any] | None] = lambda number, stage, path: None
        self._local = threading.local()
        self._begun = self._ended = 0

    def take_fault(self, method: str, path: str, kinds: tuple[str, ...]) -> dict[str, Any] | None:
        with self.lock:
            if "status" in kinds:
                self._begun += 1
                self._local.number = self._begun
            self._ended += "drop" in kinds
        if kinds[0] not in ("status", "drop"):
            return None
        fault = self.act(self._local.number, kinds[0], path)
        return fault if fault and fault["kind"] in kinds else None

    @property
    def requests(self) -> int:
        return self._begun

    def settle(self) -> None:
        """Wait until the requests of a client that is gone are through."""
        until = time.monotonic() + 1
        while self._begun > self._ended and time.monotonic() < until:
            time.sleep(0.002)

    def restart(self) -> None:
        """Count from the first request again, and do nothing to any."""
        self.settle()
        self.act = lambda number, stage, path: None
        self._begun = self._ended = 0
        self.log.clear()

    def state(self) -> State | None:
        """What the published branch shows: names and digests; None where there is no repo, or nothing in it."""
        if ("model", REPO) not in self.repos:
            return None
        names = [name for name in self.listing(REPO) if name != ".gitattributes"]
        return {name: digest_of(name, self.read(REPO, name)) for name in names} or None


@dataclass
class Talk:
    """A scenario that talks to the Hub: where it begins, and what the Hub shows at its end."""

    scenario: Scenario
    repos: dict[tuple[str, str], Any]
    objects: dict[str, bytes]
    before: State | None
    after: State | None = None
    requests: int = 0


@dataclass
class Talks:
    """All of them, on one Hub."""

    hub: Wire
    warm: Warm
    home: Path
    root: Path
    world: World
    _made: dict[str, Talk] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Talk:
        if name not in self._made:
            make: Callable[[], Talk] = getattr(self, f"_{name.replace(' ', '_')}")
            self._made[name] = make()
        return self._made[name]

    def begin(self, talk: Talk, within: Path) -> Path:
        """Put the Hub, and this machine's cache, in the state in which the scenario begins; a folder to run it in."""
        self.hub.restart()
        self.hub.repos, self.hub.objects = copy.deepcopy(talk.repos), dict(talk.objects)
        shutil.rmtree(self.home, ignore_errors=True)
        return talk.scenario.place(within)

    def start(self, talk: Talk, folder: Path) -> Child:
        return self.warm.start(talk.scenario.arguments, folder, hasty=True)

    def assert_nothing_half_done(self, talk: Talk, folder: Path) -> None:
        talk.scenario.assert_nothing_half_done(folder)
        assert self.hub.state() in (talk.before, talk.after), "the repo shows neither the old state nor the new one"

    def assert_goes_on(self, talk: Talk, folder: Path) -> None:
        """The same command again leaves all as it must be, and sends no large file that the Hub has."""
        self.hub.restart()
        there = set(self.hub.objects)
        ended = self.start(talk, folder).wait()
        assert ended.code == 0 or (ended.code == 5 and "already holds" in ended.err), ended
        talk.scenario.assert_left(folder)
        assert self.hub.state() == talk.after
        sent = {one["path"].rpartition("/")[2].partition("?")[0] for one in self.hub.log if one["method"] == "PUT"}
        assert not sent & there, "what the Hub has was sent again"

    def _publish(self) -> Talk:
        """A finished merge into a new repo."""
        return self._talk("publish", ["publish", str(self._merged("shards")), REPO, "-q"])

    def _republish(self) -> Talk:
        """A merge in one file in place of one in three shards."""
        self._run(self.begin(self["publish"], self.root), ["publish", str(self._merged("shards")), REPO, "-q"])
        return self._talk("republish", ["publish", str(self._merged("single")), REPO, "-q"], keep=True)

    def _download(self) -> Talk:
        """A merge of models that are downloaded first."""
        return self._talk("download", self._merge("download"), uses=True)

    def _stream(self) -> Talk:
        """A merge of models that stay on the Hub."""
        return self._talk("stream", [*self._merge("stream"), "--stream-inputs"], uses=True)

    def _ship(self) -> Talk:
        """A merge whose shards go to the Hub one by one."""
        recipe = self.root / "ship.yaml"
        recipe.write_text(yaml.safe_dump(self.world.recipe("shards")))
        return self._talk("ship", ["run", str(recipe), "--out", "out", "-q", "--stream-to-hub", REPO])

    def _merge(self, name: str) -> list[str]:
        recipe = self.root / f"{name}.yaml"
        models = [{"model": f"org/{one}", "parameters": {"weight": 0.5}} for one in ("base", "tuned")]
        recipe.write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
        return ["run", str(recipe), "--out", "out", "-q", "--threads", "1"]

    def _merged(self, kind: str) -> Path:
        self.world.reference(kind)
        return self.world.root / f"reference-{kind}" / "out"

    def _talk(self, name: str, arguments: list[str], *, uses: bool = False, keep: bool = False) -> Talk:
        """Run it once undisturbed, from an empty Hub (`keep`: as it is now; `uses`: with the inputs on it)."""
        if not keep:
            self.hub.repos, self.hub.objects = {}, {}
        for one in ("base", "tuned") if uses else ():
            folder = self.world.root / one
            self.hub.add_repo(f"org/{one}", {path.name: path.read_bytes() for path in folder.iterdir()})
        scenario = Scenario(name, tuple(arguments), {}, apart=(*RUN, "fingerprint"))  # which knows the cache's times
        talk = Talk(scenario, copy.deepcopy(self.hub.repos), dict(self.hub.objects), self.hub.state())
        folder = self.begin(talk, self.root)
        ended = self._run(folder, arguments)
        assert ended.code == 0, ended
        talk.after, talk.requests = self.hub.state(), self.hub.requests
        talk.scenario = replace(scenario, reference=scenario.left(folder))
        return talk

    def _run(self, folder: Path, arguments: list[str]) -> Ended:
        return self.warm.learn(arguments, folder)


TALKS = ("publish", "republish", "download", "stream", "ship")
