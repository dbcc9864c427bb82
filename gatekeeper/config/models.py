"""The rule file as pydantic models: which keys there are and what they mean to people.

``Field(description=...)`` is read twice: by editors through the JSON schema, and by people whose file lacks the key.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, WithJsonSchema, model_validator

from gatekeeper.config import fields
from gatekeeper.config.addresses import Span
from gatekeeper.config.fields import (
    ANY,
    BackendText,
    Except,
    From,
    Members,
    Name,
    Path,
    Places,
    Seconds,
    To,
    Verb,
    choice,
    counted,
    parsed,
)
from gatekeeper.policy.model import Protocol

PATHS = ("relay", "guard")
ON_EXIT = ("closed", "open")
KERNEL_MODES = ("auto", "off", "require")
ON_RELOAD = ("revoke", "keep")


class Strict(BaseModel):
    """What all mappings of a rule file have in common.

    ``KIND`` is what messages call it; ``LATER`` are keys that the format has and this version lacks.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    KIND: ClassVar[str] = ""
    LATER: ClassVar[frozenset[str]] = frozenset()


def _backend_is_not_always_there(schema: dict[str, Any]) -> None:
    schema["required"].remove("backend")


class ListenerModel(Strict):
    """A listener: addresses we watch and the backend they protect."""

    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra=_backend_is_not_always_there)

    LATER: ClassVar[frozenset[str]] = frozenset({"accept_proxy", "send_proxy", "limits"})
    KIND: ClassVar[str] = "listener"

    name: Name = Field(description="a unique name, like ssh: it is the metric label and the log field")
    protocol: Annotated[Protocol, choice(("tcp", "udp"), Protocol), WithJsonSchema({"enum": ["tcp", "udp"]})] = Field(
        default=Protocol.TCP, description="tcp (the default) or udp"
    )
    listen: Places = Field(
        description='where clients connect, like 0.0.0.0:22, "[::]:22", "*:22" (both families), 0.0.0.0:8000-8010 or unix:/run/x.sock; or a list'
    )
    backend: BackendText = Field(
        description="what it protects, like 127.0.0.1:2222 or unix:/run/app.sock; an address without a port keeps the destination port"
    )
    path: Annotated[str, choice(PATHS), WithJsonSchema({"enum": list(PATHS)})] = Field(
        default="relay",
        description="relay (the default): connections are carried to the backend; guard: the service owns the port, and the kernel refuses whom the policy refuses",
    )
    on_exit: Annotated[str | None, choice(ON_EXIT), WithJsonSchema({"enum": list(ON_EXIT)})] = Field(
        default=None,
        description="what happens to a guarded port when gatekeeper is gone: closed (the last policy stays in force) or open (nobody is refused)",
    )
    connect_timeout: Seconds = Field(default=None, description="how long a dial to the backend may take (5s); tcp only")
    idle_timeout: Seconds = Field(default=None, description="how long a session may be silent (24h for tcp, 60s for udp)")
    half_close_timeout: Seconds = Field(
        default=None, description="how long a session may be silent once one side has ended (30s); tcp only"
    )
    max_responses: Annotated[
        int | None, counted(0, 1_000_000, "a number of datagrams"), WithJsonSchema({"type": "integer", "minimum": 0, "maximum": 1_000_000})
    ] = Field(default=None, description="a session ends after that many replies for each client datagram; 0 expects none; udp only")
    max_sessions: Annotated[
        int | None, counted(1, 10_000_000, "a number of sessions"), WithJsonSchema({"type": "integer", "minimum": 1, "maximum": 10_000_000})
    ] = Field(default=None, description="sessions live at once, new ones beyond are refused (unlimited for tcp, 10000 for udp)")

    @model_validator(mode="before")
    @classmethod
    def _own_port(cls, data: Any) -> Any:
        """Stand in for the backend of a guarded listener, which has none."""
        if isinstance(data, dict) and data.get("path") == "guard" and "backend" not in data:
            return data | {"backend": fields.OWN_PORT}
        return data


class SetFile(Strict):
    """A set that a file lists, one address, network or range a line."""

    LATER: ClassVar[frozenset[str]] = frozenset({"country", "asn", "url", "dns", "every"})
    KIND: ClassVar[str] = "set"

    file: Path = Field(
        description="a path, from the folder of this file: one address, network or range a line, '#' comments"
    )


SetModel = Annotated[
    Annotated[SetFile, Tag("file")] | Annotated[Members, Tag("members")],
    Discriminator(lambda value: "file" if isinstance(value, (dict, SetFile)) else "members"),
]


class RuleModel(Strict):
    """A rule: the first one that matches decides."""

    LATER: ClassVar[frozenset[str]] = frozenset({"mode", "expires", "active", "owner", "reason", "ticket"})
    KIND: ClassVar[str] = "rule"

    name: Name = Field(description="a unique, stable name, like office-ssh: it is the metric label and the log field")
    action: Verb = Field(description="allow, deny (refused at once) or drop (silence)")
    from_: From = Field(default=[ANY], alias="from", description="addresses, networks, ranges and set names, or any (the default)")
    except_: Except = Field(default=[], alias="except", description="the rule does not match there")
    to: To = Field(default=[ANY], description="listener names, ports, ranges of ports, 53/udp, or any (the default)")


class IncludeModel(Strict):
    """Rules of other files, which stand here in byte order of file names."""

    KIND: ClassVar[str] = "rule"

    include: Path = Field(
        description="a path or a pattern like rules.d/*.yaml, from the folder of this file; each holds a list of rules"
    )


RuleItem = Annotated[
    Annotated[RuleModel, Tag("rule")] | Annotated[IncludeModel, Tag("include")],
    Discriminator(lambda value: "include" if isinstance(value, dict) and "include" in value else "rule"),
]


class TestModel(Strict):
    """A test: every source that it names and that can reach its targets gets this verdict."""

    KIND: ClassVar[str] = "test"

    from_: From = Field(alias="from", description="who connects: an address, network, range, set name or any")
    except_: Except = Field(default=[], alias="except", description="sources that the test does not speak of")
    to: To = Field(default=[ANY], description="where to: listener names, ports, 53/udp, or any (the default)")
    expect: Verb = Field(description="allow, deny (holds for deny and drop) or drop")


class MetricsModel(Strict):
    """Where Prometheus scrapes."""

    KIND: ClassVar[str] = "metrics"

    listen: Annotated[Span, parsed(fields.parse_metrics, "an address and a port"), WithJsonSchema({"type": "string"})] = Field(
        description="an IP address and a port, like 127.0.0.1:9180"
    )


MetricsItem = Annotated[
    Annotated[MetricsModel, Tag("listen")]
    | Annotated[Annotated[str, BeforeValidator(fields.parse_metrics_off), WithJsonSchema({"const": "off"})], Tag("off")],
    Discriminator(lambda value: "listen" if isinstance(value, (dict, MetricsModel)) else "off"),
]


class ControlModel(Strict):
    """Where operators reach the daemon, and who may."""

    KIND: ClassVar[str] = "control"

    socket: Annotated[str | None, BeforeValidator(fields.parse_control), WithJsonSchema({"type": "string"})] = Field(
        default=None, description="the path of the socket, from the folder of this file (/run/gatekeeper/control.sock)"
    )
    group: Annotated[str | None, BeforeValidator(fields.parse_group), WithJsonSchema({"type": "string"})] = Field(
        default=None, description="a group of this system whose members may command the daemon, beside root and its own user"
    )


ControlItem = Annotated[
    Annotated[ControlModel, Tag("mapping")]
    | Annotated[Annotated[str | None, BeforeValidator(fields.parse_control), WithJsonSchema({"type": "string"})], Tag("path")],
    Discriminator(lambda value: "mapping" if isinstance(value, (dict, ControlModel)) else "path"),
]


class RuleFile(Strict):
    """A gatekeeper rule file: listeners, sets, rules, and what they must hold."""

    LATER: ClassVar[frozenset[str]] = frozenset({"limits", "bans", "decoys"})
    KIND: ClassVar[str] = "file"

    version: Annotated[int, BeforeValidator(fields.parse_version), WithJsonSchema({"const": 1})] = Field(
        description="1, the version of the format"
    )
    listeners: Annotated[list[ListenerModel], Field(min_length=1)] = Field(description="what is protected: a list of listeners")
    sets: dict[Name, SetModel] = Field(default={}, description="named groups of addresses")
    default: Verb = Field(description="what happens when no rule matches: allow, deny or drop (deny is what you want)")
    rules: list[RuleItem] = Field(default=[], description="rules, tried in order: the first that matches decides")
    tests: list[TestModel] = Field(default=[], description="what the rules must hold, proved for every address before they are applied")
    workers: Annotated[
        int | None,
        BeforeValidator(fields.parse_workers),
        WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 1, "maximum": fields.MOST_WORKERS}]}),
    ] = Field(default=None, description="worker processes: a number, or auto (the default), one per CPU")
    metrics: MetricsItem = Field(default="off", description="where Prometheus scrapes: {listen: 127.0.0.1:9180}, or off (the default)")
    control: ControlItem = Field(
        default=None,
        description="where operators reach the daemon: a path (/run/gatekeeper/control.sock is the default), {socket: PATH, group: NAME}, or off",
    )
    audit: Annotated[str, parsed(fields.parse_audit, "stdout, journald, off or a path"), WithJsonSchema({"type": "string"})] = Field(
        default="stdout", description="where the audit log goes: stdout (the default), journald, a path, or off"
    )
    kernel: Annotated[str | None, choice(KERNEL_MODES), WithJsonSchema({"enum": list(KERNEL_MODES)})] = Field(
        default=None,
        description="who refuses: auto (the kernel, before there is a connection, or workers where it cannot), require (the kernel, or nothing starts; the default where a listener is guarded), or off (workers; the default elsewhere)",
    )
    state: Annotated[str | None, BeforeValidator(fields.as_path), WithJsonSchema({"type": "string"})] = Field(
        default=None,
        description="a directory that one running gatekeeper owns: its lock is there, and the last accepted policy, with which it starts when the rule file is broken",
    )
    on_reload: Annotated[str, choice(ON_RELOAD), WithJsonSchema({"enum": list(ON_RELOAD)})] = Field(
        default="revoke",
        description="what a reload does to open sessions that the new rules refuse: revoke (end them, the default) or keep (let them go on)",
    )


MODELS: dict[str, type[Strict]] = {"listeners": ListenerModel, "sets": SetFile, "rules": RuleModel, "tests": TestModel, "metrics": MetricsModel, "control": ControlModel}
