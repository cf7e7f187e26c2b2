"""What a stage is, which stages there are, and the plugins that add more of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import field, make_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from esol.base.errors import ConfigError, EsolError
from esol.base.named import Named
from esol.base.plugins import import_all, load_plugins
from esol.base.schema import key, semantic
from esol.config import BackboneConfig, Config

if TYPE_CHECKING:
    from esol.data.index import Index
    from esol.pipeline.context import Context
    from esol.pipeline.scores import Results

BUILT_IN = "esol.stages"  # the package whose modules hold the project's own stages


class Stage:
    """One step of a run. A subclass is its row in the table of stages; an instance does the work, on every rank.

    name: of the stage, of its section in the config and of its folder in the run; after: the stage behind which it
    stands; section: the dataclass of its settings; shares: the stage whose section it has instead of one of its own;
    version: raised by hand when its code gives another result from the same inputs, so that what an earlier version
    made is made again; default: whether runs whose config names no stages have it; needs, uses: the stages that it
    always reads, and those that it reads where the run has them; shaped_by: keys of the config, besides its own
    section, that shape its result ("data.crop", "model"), what is not named being no reason to run again; makes: what
    its result is ("weights", "model", "maps", "labels", "masks", "predictions"); produces: patterns of the files below
    its folder that are its result.
    """

    name: ClassVar[str]
    after: ClassVar[str] = ""
    section: ClassVar[type[Any] | None] = None
    shares: ClassVar[str] = ""
    version: ClassVar[int] = 1
    default: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ()
    uses: ClassVar[tuple[str, ...]] = ()
    shaped_by: ClassVar[tuple[str, ...]] = ()
    makes: ClassVar[str] = ""
    produces: ClassVar[tuple[str, ...]] = ()

    config: Any  # its section of the config; subclasses narrow the type

    def __init__(self, context: Context) -> None:
        self.context = context
        self.folder = context.run_dir / self.name
        self.config = self.own(context.config)

    def run(self) -> Results:
        """Does the work on every rank, writes the outputs and returns the results, of which the main rank's count."""
        raise NotImplementedError

    def remarks(self, results: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Sentences to print when it has finished; results: of all stages, its own among them. On the main rank."""
        return []

    @classmethod
    def own(cls, config: Config) -> Any:
        """Its section of a config, None where it has none."""
        return config.named(cls.shares or cls.name) if cls.section or cls.shares else None

    @classmethod
    def brings(cls, config: Config) -> tuple[str, ...]:
        """Stages that a run has besides, by what this one's section says."""
        return ()

    @classmethod
    def consumes(cls, config: Config) -> tuple[str, ...]:
        """The stages that it reads under a config."""
        return (*cls.needs, *(name for name in cls.uses if name in config.stages))

    @classmethod
    def settings(cls, config: Config) -> dict[str, Any]:
        """What of the config shapes its result: seed, engine, its own section, and what `shaped_by` names."""
        found: dict[str, Any] = {"data": {}, "seed": config.seed, "engine": semantic(config.engine)}
        own = ((cls.shares or cls.name),) if cls.section or cls.shares else ()
        for name in (*cls.shaped_by, *own):
            if name.startswith("data."):
                found["data"][name.removeprefix("data.")] = semantic(getattr(config.data, name.removeprefix("data.")))
            else:
                found[name] = semantic(config.named(name))
        return found

    @classmethod
    def weights(cls, config: Config) -> tuple[str, BackboneConfig] | None:
        """Where it starts from published weights: the key of their section, and the section."""
        return None

    @classmethod
    def check(cls, config: Config) -> None:
        """ConfigError where its settings do not go together with the rest of the config."""

    @classmethod
    def lacks(cls, config: Config, index: Index, world_size: int) -> Iterator[EsolError]:
        """An error for each thing that it will want of config, data and processes, and that is not there."""
        return iter(())


STAGES: Named[type[Stage]] = Named("stage")
_S = TypeVar("_S", bound=type[Stage])


def register(stage: _S) -> _S:
    """A class decorator: adds a stage to the table."""
    STAGES.add(stage.name)(stage)
    return stage


def table() -> dict[str, type[Stage]]:
    """All stages that are known, in the order in which a run goes through them; ConfigError for a lost predecessor."""
    import_all(BUILT_IN)
    load_plugins()
    behind: dict[str, list[str]] = {}
    for stage in STAGES.values():
        if stage.after and stage.after not in STAGES:
            raise ConfigError(f"stage {stage.name} stands after {stage.after!r}, and there is no such stage")
        behind.setdefault(stage.after, []).append(stage.name)

    def walk(name: str) -> list[str]:
        # what nothing else stands behind comes first, so that a plugin's stage is next to the one that it names
        branches = sorted((walk(other) for other in behind.get(name, ())), key=lambda names: (len(names), names))
        return [*([name] if name else []), *(n for names in branches for n in names)]

    return {name: STAGES[name] for name in walk("")}


def known_stage(name: str) -> type[Stage]:
    """The stage of that name; ConfigError, with the nearest name, where there is none."""
    table()  # imports them
    return STAGES.need(name, "stages")


def config_type() -> type[Config]:
    """The dataclass of a whole config: Config with a section for every stage, in the order of the table."""
    return _config_type(tuple(table().values()))


@cache
def _config_type(stages: tuple[type[Stage], ...]) -> type[Config]:
    default = tuple(stage.name for stage in stages if stage.default)
    own: list[Any] = [("stages", tuple[str, ...], key(default, runtime=True))]
    own += [(stage.name, stage.section, field(default_factory=stage.section)) for stage in stages if stage.section]
    return make_dataclass("Config", own, bases=(Config,), frozen=True)
