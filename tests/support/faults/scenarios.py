"""Commands that write something, each with what it must leave, for tests that kill and starve them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from mergeforge.operations.synthetic_models import SHAPES, write_model
from support.faults.breaking import RUN, World, digests
from support.faults.warm import Ended, Warm

DONE = ("already holds", "exists")  # what a command says whose work was finished by the run that was killed


@dataclass(frozen=True)
class Scenario:
    """A command, run in an empty folder (or a copy of `before`), and what it leaves there."""

    name: str
    arguments: tuple[str, ...]
    reference: dict[str, str]
    before: Path | None = None
    apart: tuple[str, ...] = RUN

    @property
    def old(self) -> dict[str, str]:
        return self.left(self.before) if self.before else {}

    def left(self, folder: Path) -> dict[str, str]:
        """What lies in the folder, as far as it must be the same each time."""
        return digests(folder, self.apart)

    def place(self, within: Path) -> Path:
        """A new folder to run it in."""
        folder = Path(tempfile.mkdtemp(dir=within))
        if self.before:
            shutil.copytree(self.before, folder, dirs_exist_ok=True)
        return folder

    def assert_nothing_half_done(self, folder: Path) -> None:
        """What has its final name is whole; what vouches for others stands there only with all of them."""
        held = {name: value for name, value in self.left(folder).items() if not _is_hidden(name)}
        for name, value in held.items():
            assert value in (self.reference.get(name), self.old.get(name)), f"{name} is neither whole nor absent"
        for name in held:
            if name.endswith(("mergeforge.json", ".index.json", "adapter_config.json")):
                state = self.reference if held[name] == self.reference.get(name) else self.old
                weights = {one: value for one, value in state.items() if one.endswith((".safetensors", ".gguf"))}
                assert weights.items() <= held.items(), f"{name} stands there without what it names"

    def assert_left(self, folder: Path) -> None:
        left = self.left(folder)
        assert left == self.reference, difference(left, self.reference)

    def assert_goes_on(self, warm: Warm, folder: Path) -> None:
        """The same command again leaves what an undisturbed one does, and verify agrees."""
        ended = warm.run(self.arguments, folder)
        assert ended.code == 0 or (ended.code == 5 and any(said in ended.err for said in DONE)), ended
        self.assert_left(folder)
        if (folder / "out" / "mergeforge.json").exists():
            assert warm.run(["verify", "out"], folder).code == 0


def difference(one: dict[str, str], two: dict[str, str]) -> str:
    return f"differ: {sorted(name for name in {*one, *two} if one.get(name) != two.get(name))}"


def assert_told(ended: Ended) -> None:
    """A refusal of ours: an error with its exit code, and no traceback."""
    assert ended.code in (1, 2, 3, 4, 5, 6) and "error: " in ended.err and "Traceback" not in ended.err, ended


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts)


class Scenarios:
    """All of them, made when they are asked for."""

    def __init__(self, world: World, warm: Warm, root: Path) -> None:
        self.world, self.warm, self.root = world, warm, root
        root.mkdir()
        self.tiny = write_model(root / "tiny", SHAPES["tiny"], seed=0)
        self.near = write_model(root / "near", SHAPES["tiny"], seed=1, near=0)
        self._made: dict[str, Scenario] = {}

    def __getitem__(self, name: str) -> Scenario:
        if name not in self._made:
            make: Callable[[], Scenario] = getattr(self, f"_{name.replace(' ', '_')}")
            self._made[name] = make()
        return self._made[name]

    def _fold(self) -> Scenario:
        """An adapter into a model in three shards."""
        return self._scenario("fold", self._run("fold", self.world.recipe("shards")))

    def _replace(self) -> Scenario:
        """A finished merge in three shards gives way to one file."""
        arguments = [*self._run("replace", self.world.recipe("single")), "--overwrite"]
        return self._scenario("replace", arguments, before=self._left_by(self["fold"]))

    def _gguf(self) -> Scenario:
        """Two models into a checkpoint and two GGUF files, in one pass."""
        models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in (self.tiny, self.near)]
        recipe = {"merge_method": "linear", "models": models, "output": {"gguf": ["f16", "q8_0"]}}
        return self._scenario("gguf", self._run("gguf", recipe))

    def _join(self) -> Scenario:
        """Adapters joined into one, beside the model that they are folded into."""
        adapter = str(self.world.adapter)
        recipe = {"base_model": str(self.world.base), "adapters": [adapter], "output": {"adapter": {"rank": 2}}}
        return self._scenario("join", self._run("join", recipe))

    def _export(self) -> Scenario:
        """A model to one GGUF file."""
        return self._scenario("export", ["gguf", str(self.tiny), "--type", "f16", "--out", "model.gguf", "-q"])

    def _extract(self) -> Scenario:
        """The difference of two models as an adapter."""
        models = [str(self.world.tuned), "--base", str(self.world.base)]
        return self._scenario("extract", ["extract-lora", *models, "--rank", "2", "--out", "out", "-q"])

    def _run(self, name: str, recipe: object) -> list[str]:
        path = self.root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return ["run", str(path), "--out", "out", "--threads", "1", "-q"]

    def _scenario(self, name: str, arguments: list[str], before: Path | None = None) -> Scenario:
        made = Scenario(name, tuple(arguments), {}, before)
        left = self._left_by(made)
        return Scenario(name, tuple(arguments), digests(left), before)

    def _left_by(self, scenario: Scenario) -> Path:
        folder = scenario.place(self.root)
        ended = self.warm.learn(scenario.arguments, folder)
        assert ended.code == 0, ended
        return folder


NAMES = ("fold", "replace", "gguf", "join", "export", "extract")
