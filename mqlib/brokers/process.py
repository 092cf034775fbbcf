"""The real brokers as child processes of this machine: no Docker."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from . import settings as defaults
from .base import BrokerUnavailable, Kafka, Node, RabbitMQ, Version
from .install import java, kafka_jars, rabbitmq_server
from .machine import HOST, cache_folder, free_ports, require_disk
from .ownership import Estate
from .probe import probe_kafka, probe_rabbitmq
from .versions import KAFKA_VERSION

START_SECONDS = 60.0
STOP_SECONDS = 20.0
CLUSTER_ID = "bXEtbGliLWNsdXN0ZXItMQ"  # any 16 bytes in base 64; the data folder is ours alone

BrokerT = TypeVar("BrokerT", Kafka, RabbitMQ)

LOG4J = """\
appender.console.type = Console
appender.console.name = console
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d %p %m (%c)%n
rootLogger.level = INFO
rootLogger.appenderRef.console.ref = console
"""


class ProcessNode(Node):
    """A server as a child process of the guardian."""

    def __init__(self, name: str, estate: Estate, argv: Sequence[str], env: dict[str, str], folder: Path) -> None:
        self.name = name
        self.pid = 0
        self.wait_until_ready: Callable[[], object] = lambda: None
        self._estate, self._argv, self._env, self._folder = estate, list(argv), env, folder
        self._log = folder / f"{name}.log"

    def start(self) -> None:
        self.pid = self._estate.spawn(self._argv, self._env, self._folder, self._log)

    def kill(self) -> None:
        self._estate.end(self.pid, 0)

    def pause(self) -> None:
        self._estate.signal(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        self._estate.signal(self.pid, signal.SIGCONT)

    def restart(self, graceful: bool = True) -> None:
        if self.running:
            self._estate.end(self.pid, STOP_SECONDS if graceful else 0)
        self.start()
        self.wait_until_ready()

    @property
    def running(self) -> bool:
        return self._estate.exit_code(self.pid) is None

    def log(self, lines: int = 20) -> str:
        if not self._log.exists():
            return ""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])


class PortTaken(Exception):
    """Somebody took a port between our choosing it and the server's binding it: choose again."""


def await_ready(nodes: Sequence[Node], probe: Callable[[], Version], within: float = START_SECONDS) -> Version:
    """Probes until it succeeds; returns what the probe says.

    Raises `BrokerUnavailable`, with the server's own last log lines, when one of the nodes ends or `within` seconds
    pass; `PortTaken` when the log says so.
    """
    deadline = time.monotonic() + within
    problem = "it never answered"
    while time.monotonic() < deadline:
        ended = next((node for node in nodes if not node.running), None)
        if ended is not None:
            log = ended.log(40)
            if "in use" in log or "eaddrinuse" in log:
                raise PortTaken
            raise BrokerUnavailable(f"{ended.name} ended while starting. The last lines of its log:\n{ended.log()}")
        try:
            return probe()
        except BrokerUnavailable as error:
            problem = str(error)
        time.sleep(0.1)
    raise BrokerUnavailable(
        f"{nodes[0].name} was not ready within {within:.0f} s: {problem}\n"
        f"The last lines of its log:\n{nodes[0].log()}\nIs the machine short of memory or very busy? Try again."
    )


def started(start: Callable[[Estate], BrokerT]) -> BrokerT:
    """Runs `start` with an estate of its own; on failure nothing of it is left. Chooses new ports up to twice."""
    require_disk()
    for attempt in (1, 2, 3):
        estate = Estate()
        try:
            broker = start(estate)
            broker.own(estate.close)
            return broker
        except PortTaken:
            estate.close()
            if attempt == 3:
                raise BrokerUnavailable("three times another program took the port that we had chosen") from None
        except BaseException:
            estate.close()
            raise
    raise AssertionError("unreachable")


def kafka(nodes: int = 1, settings: Mapping[str, str] | None = None) -> Kafka:
    """Kafka with `nodes` servers, each broker and controller (KRaft). `settings` are server properties."""
    jars, runtime = kafka_jars(), java()
    return started(lambda estate: _kafka(estate, nodes, dict(settings or {}), jars, runtime))


def _kafka(estate: Estate, count: int, own: dict[str, str], jars: Sequence[Path], runtime: Path) -> Kafka:
    folder = estate.folder("kafka")
    (folder / "log4j2.properties").write_text(LOG4J)
    ports = free_ports(2 * count + 2)
    clients, controllers, (behind_proxy, advertised) = ports[:count], ports[count:-2], ports[-2:]
    differs = {**defaults.KAFKA, **defaults.kafka_replication(count), **own}
    virtual_machine = [
        str(runtime), "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData",
        f"-Dlog4j2.configurationFile={folder / 'log4j2.properties'}", "-cp", os.pathsep.join(map(str, jars)),
    ]  # fmt: skip
    servers: list[ProcessNode] = []
    for index in range(count):
        name, data = f"kafka-{index + 1}", folder / f"data-{index + 1}"
        # The extra listener advertises a port at which nobody listens until a cell puts a TCP proxy there.
        proxied = index == 0
        properties = {
            "process.roles": "broker,controller",
            "node.id": str(index + 1),
            "controller.quorum.voters": ",".join(f"{i + 1}@{HOST}:{p}" for i, p in enumerate(controllers)),
            "listeners": f"PLAINTEXT://{HOST}:{clients[index]},CONTROLLER://{HOST}:{controllers[index]}"
            + (f",PROXY://{HOST}:{behind_proxy}" if proxied else ""),
            "advertised.listeners": f"PLAINTEXT://{HOST}:{clients[index]}"
            + (f",PROXY://{HOST}:{advertised}" if proxied else ""),
            "controller.listener.names": "CONTROLLER",
            "inter.broker.listener.name": "PLAINTEXT",
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,PROXY:PLAINTEXT",
            "log.dirs": str(data),
            **differs,
        }
        file = folder / f"{name}.properties"
        file.write_text("".join(f"{key}={value}\n" for key, value in properties.items()))
        _format(index + 1, data, file, virtual_machine)
        node = ProcessNode(name, estate, [*virtual_machine, "kafka.Kafka", str(file)], _environment(folder), folder)
        node.start()
        servers.append(node)
    bootstrap = ",".join(f"{HOST}:{port}" for port in clients)

    def probe() -> Version:
        return probe_kafka(bootstrap, {}, 15, replication=count)

    await_ready(servers, probe)
    for node in servers:
        node.wait_until_ready = lambda: await_ready(servers, probe)
    return Kafka(
        provider="process", version=Version.parse(KAFKA_VERSION), nodes=servers, settings=differs,
        bootstrap=bootstrap, proxy_ports=(behind_proxy, advertised),
    )  # fmt: skip


def _format(node: int, data: Path, properties: Path, virtual_machine: Sequence[str]) -> None:
    """Formats a data folder, as KRaft demands before the first start; keeps a copy, since each costs a JVM's start."""
    kept = cache_folder() / f"kafka-{KAFKA_VERSION}-formatted-{node}"
    if not kept.exists():
        command = ["kafka.tools.StorageTool", "format", "-t", CLUSTER_ID, "-c", str(properties)]
        done = subprocess.run([*virtual_machine, *command], capture_output=True, text=True, cwd=properties.parent)
        if done.returncode:
            raise BrokerUnavailable(
                f"Kafka could not format its data folder:\n{done.stdout[-1500:]}{done.stderr[-1500:]}"
            )
        fresh = Path(tempfile.mkdtemp(prefix=kept.name, dir=kept.parent))
        shutil.copytree(data, fresh, dirs_exist_ok=True)
        try:
            fresh.rename(kept)
        except OSError:  # another process was first
            shutil.rmtree(fresh)
        return
    shutil.copytree(kept, data)


def _environment(folder: Path) -> dict[str, str]:
    """What a server may see of our environment: `KAFKA_…` and `RABBITMQ_…` settings of the user's must not leak in."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR", "TZ") if name in os.environ}
    return {**kept, "HOME": str(folder)}


def rabbitmq(nodes: int = 1, settings: Mapping[str, str] | None = None) -> RabbitMQ:
    """RabbitMQ with `nodes` servers, clustered where there are several. `settings` are keys of rabbitmq.conf."""
    script, epmd = rabbitmq_server()
    return started(lambda estate: _rabbitmq(estate, nodes, dict(settings or {}), script, epmd))


def _rabbitmq(estate: Estate, count: int, own: dict[str, str], script: Path, epmd: Path) -> RabbitMQ:
    folder = estate.folder("rabbitmq")
    mapper, *ports = free_ports(1 + 5 * count)
    names = [f"mq{index + 1}@localhost" for index in range(count)]
    cookie = folder / ".erlang.cookie"
    cookie.write_text(secrets.token_hex(16))
    cookie.chmod(0o400)
    plugins = folder / "enabled_plugins"
    plugins.write_text(f"[{','.join(defaults.RABBITMQ_PLUGINS)}].")
    # The port mapper of Erlang nodes. Started here, in the foreground, it is ours to end; a node that finds none
    # would leave a daemon behind.
    estate.spawn([str(epmd), "-address", HOST, "-port", str(mapper)], _environment(folder), folder, folder / "epmd.log")
    clustering = {"cluster_formation.peer_discovery_backend": "classic_config"} if count > 1 else {}
    clustering |= {f"cluster_formation.classic_config.nodes.{i + 1}": name for i, name in enumerate(names) if count > 1}
    differs = {**defaults.RABBITMQ, **own}
    servers: list[ProcessNode] = []
    for index in range(count):
        amqp, management, prometheus, stream, distribution = ports[5 * index : 5 * index + 5]
        home = folder / f"node-{index + 1}"
        home.mkdir()
        shutil.copy2(cookie, home)
        properties = {
            "listeners.tcp.1": f"{HOST}:{amqp}",
            "management.tcp.ip": HOST,
            "management.tcp.port": str(management),
            "prometheus.tcp.ip": HOST,
            "prometheus.tcp.port": str(prometheus),
            "stream.listeners.tcp.1": f"{HOST}:{stream}",
            **clustering,
            **differs,
        }
        (home / "rabbitmq.conf").write_text("".join(f"{key} = {value}\n" for key, value in properties.items()))
        environment = {
            **_environment(home),
            "RABBITMQ_NODENAME": names[index],
            "RABBITMQ_MNESIA_BASE": str(home / "data"),
            "RABBITMQ_LOG_BASE": str(home / "log"),
            "RABBITMQ_CONFIG_FILE": str(home / "rabbitmq.conf"),
            "RABBITMQ_CONF_ENV_FILE": os.devnull,
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(plugins),
            "RABBITMQ_PID_FILE": str(home / "pid"),
            "RABBITMQ_DIST_PORT": str(distribution),
            "ERL_EPMD_PORT": str(mapper),
            "ERL_EPMD_ADDRESS": HOST,
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"{defaults.RABBITMQ_ERLANG_ARGUMENTS} "
            "-kernel inet_dist_use_interface {127,0,0,1}",
        }
        node = ProcessNode(f"rabbitmq-{index + 1}", estate, [str(script)], environment, home)
        node.start()
        servers.append(node)
    urls = [f"amqp://guest:guest@{HOST}:{ports[5 * index]}/" for index in range(count)]

    def probe() -> Version:
        return min(probe_rabbitmq(url, {}, 15) for url in urls)

    version = await_ready(servers, probe)
    for node in servers:
        node.wait_until_ready = lambda: await_ready(servers, probe)
    return RabbitMQ(
        provider="process", version=version, nodes=servers, settings=differs,
        url=urls[0], management_url=f"http://guest:guest@{HOST}:{ports[1]}",
    )  # fmt: skip
