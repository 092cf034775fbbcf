"""The real brokers as child processes of this machine: no Docker."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from . import jvm
from . import settings as defaults
from .base import BrokerError, BrokerUnavailable, Kafka, Node, RabbitMQ, Version
from .install import kafka_jars, rabbitmq_server
from .machine import HOST, free_ports
from .ownership import Estate
from .probe import probe_kafka, probe_rabbitmq, sync_rabbitmq
from .starting import await_ready, started
from .versions import KAFKA_VERSION

STOP_SECONDS = 20.0
TRAIN_SECONDS = 60.0
PAUSE_SECONDS = 5.0


def _stopped(pid: int) -> bool:
    """Whether no thread of a process runs any more: on a busy machine the last one stops a while after the signal.
    Only Linux says so; elsewhere, and of a process that has ended, the answer is yes."""
    try:
        stats = [file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/stat")]
    except OSError:  # a thread has just ended
        return False
    return all(stat.rpartition(")")[2].split()[0] in "TtZX" for stat in stats)


class ProcessNode(Node):
    """A server as a child process of the guardian."""

    def __init__(
        self, name: str, estate: Estate, argv: Sequence[str], env: dict[str, str], folder: Path, port: int
    ) -> None:
        self.name, self.port = name, port
        self.pid = 0
        self.wait_until_ready = self.sync = lambda: None
        self._estate, self._argv, self._env, self._folder = estate, list(argv), env, folder
        self._log = folder / f"{name}.log"

    def start(self) -> None:
        self.pid = self._estate.spawn(self._argv, self._env, self._folder, self._log)

    def kill(self) -> None:
        self.sync()
        self._estate.end(self.pid, 0)

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """Ends it politely; with SIGKILL if that takes longer."""
        self._estate.end(self.pid, seconds)

    def pause(self) -> None:
        self._estate.signal(self.pid, signal.SIGSTOP)
        deadline = time.monotonic() + PAUSE_SECONDS
        while not _stopped(self.pid) and time.monotonic() < deadline:
            time.sleep(0.005)

    def resume(self) -> None:
        self._estate.signal(self.pid, signal.SIGCONT)

    def restart(self, graceful: bool = True) -> None:
        if self.running:
            self.stop() if graceful else self.kill()
        self.start()
        self.wait_until_ready()

    @property
    def running(self) -> bool:
        try:
            return self._estate.exit_code(self.pid) is None
        except BrokerError:  # the guardian is gone, and its children with it
            return False

    def listens(self) -> bool:
        """Whether it is this server that listens on its port, and not another that took the port first."""
        import psutil

        try:
            server = psutil.Process(self.pid)
            return any(
                each.status == psutil.CONN_LISTEN and each.laddr.port == self.port
                for process in (server, *server.children(recursive=True))
                for each in process.net_connections("tcp")
            )
        except psutil.Error:
            return False

    def control(self, *arguments: str) -> str:
        tool = Path(self._argv[0]).with_name("rabbitmqctl")
        if "RABBITMQ_NODENAME" not in self._env:
            return super().control(*arguments)
        command = [str(tool), "--quiet", *arguments]
        done = subprocess.run(command, env=self._env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise BrokerError(f"rabbitmqctl {' '.join(arguments)}: {(done.stderr or done.stdout).strip()}")
        return done.stdout

    def log(self, lines: int = 20) -> str:
        if not self._log.exists():
            return ""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])


def settle(servers: Sequence[ProcessNode], probe: Callable[[Sequence[ProcessNode]], Version]) -> Version:
    """Waits until all are ready, and lets each wait likewise after a restart: for itself and those that live then."""

    def ready(living: Sequence[ProcessNode]) -> Version:
        def ask() -> Version:
            version = probe(living)
            for node in living:
                if not node.listens():
                    raise BrokerUnavailable(f"another program answers at port {node.port} of {node.name}")
            return version

        return await_ready(living, ask)

    def again(restarted: ProcessNode) -> Version:
        return ready([node for node in servers if node is restarted or node.running])

    for node in servers:
        node.wait_until_ready = partial(again, node)
    return ready(servers)


def kafka(nodes: int = 1, settings: Mapping[str, str] | None = None) -> Kafka:
    """Kafka with `nodes` servers, each broker and controller (KRaft). `settings` are server properties."""
    jars = kafka_jars()
    classes = jvm.prepared_classes(lambda option: _train(jars, option))
    return started(lambda estate: _kafka(estate, nodes, dict(settings or {}), jars, classes))


def _train(jars: Sequence[Path], option: str) -> None:
    """A Kafka that starts, and ends, for the sake of what its Java notes."""
    with started(lambda estate: _kafka(estate, 1, {}, jars, option)) as broker:
        [server] = broker.nodes
        assert isinstance(server, ProcessNode)
        server.stop(TRAIN_SECONDS)


def _kafka(estate: Estate, count: int, own: dict[str, str], jars: Sequence[Path], option: str) -> Kafka:
    folder = estate.folder("kafka")
    (folder / "log4j2.properties").write_text(jvm.LOG4J)
    ports = free_ports(2 * count + 2)
    clients, controllers, (behind_proxy, advertised) = ports[:count], ports[count:-2], ports[-2:]
    differs = {**defaults.KAFKA, **defaults.kafka_replication(count), **own}
    virtual_machine = jvm.command(option, folder / "log4j2.properties", jars)
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
        jvm.format_data(index + 1, data, file, virtual_machine)
        argv = [*virtual_machine, "kafka.Kafka", str(file)]
        node = ProcessNode(name, estate, argv, _environment(folder), folder, clients[index])
        node.start()
        servers.append(node)
    bootstrap = ",".join(f"{HOST}:{port}" for port in clients)

    settle(servers, lambda living: probe_kafka(bootstrap, {}, 15, replication=len(living)))
    return Kafka(
        provider="process", version=Version.parse(KAFKA_VERSION), nodes=servers, settings=differs,
        bootstrap=bootstrap, proxy_ports=(behind_proxy, advertised),
    )  # fmt: skip


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
            # Makes the script become the server instead of waiting for it: our signals reach the server itself.
            "RUNNING_UNDER_SYSTEMD": "true",
            "ERL_EPMD_PORT": str(mapper),
            "ERL_EPMD_ADDRESS": HOST,
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"{defaults.RABBITMQ_ERLANG_ARGUMENTS} "
            "-kernel inet_dist_use_interface {127,0,0,1}",
        }
        node = ProcessNode(f"rabbitmq-{index + 1}", estate, [str(script)], environment, home, amqp)
        node.start()
        servers.append(node)
    urls = [f"amqp://guest:guest@{HOST}:{ports[5 * index]}/" for index in range(count)]
    consoles = [f"http://guest:guest@{HOST}:{ports[5 * index + 1]}" for index in range(count)]
    for node, console in zip(servers, consoles, strict=True):
        node.sync = partial(sync_rabbitmq, console)

    def probe(living: Sequence[ProcessNode]) -> Version:
        return min(probe_rabbitmq(urls[servers.index(node)], {}, 15) for node in living)

    version = settle(servers, probe)
    return RabbitMQ(
        provider="process", version=version, nodes=servers, settings=differs,
        url=urls[0], management_url=consoles[0], metrics_url=f"http://{HOST}:{ports[2]}/metrics",
        addresses=tuple(zip(urls, consoles, strict=True)),
    )  # fmt: skip
