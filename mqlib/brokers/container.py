"""The official images in containers, through testcontainers."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import settings as defaults
from .base import BrokerError, BrokerUnavailable, Kafka, Node, RabbitMQ, Version
from .jvm import CLUSTER_ID, QUICK_START
from .machine import HOST, free_ports, say
from .ownership import Estate
from .probe import probe_kafka, probe_rabbitmq, sync_rabbitmq
from .starting import PortTaken, await_ready, started
from .versions import KAFKA_IMAGE, KAFKA_VERSION, RABBITMQ_IMAGE

if TYPE_CHECKING:
    from testcontainers.core.container import DockerContainer

IMAGES = {"kafka": KAFKA_IMAGE, "rabbitmq": RABBITMQ_IMAGE}
ANSWER_SECONDS = 5


def why_no_docker() -> str:
    """Empty when a Docker engine answers; otherwise why not, as a clause."""
    if "DOCKER_HOST" not in os.environ and not Path("/var/run/docker.sock").exists() and shutil.which("docker") is None:
        return "no Docker here"
    import docker

    try:
        docker.from_env(timeout=ANSWER_SECONDS).ping()
    except docker.errors.DockerException:
        where = os.environ.get("DOCKER_HOST", "its usual address")
        return f"no Docker engine answers at {where}"
    return ""


@cache
def why_not(kind: str) -> str:
    """Empty when the container provider can serve `kind`; otherwise why not, as a clause. Pulls a missing image."""
    problem = why_no_docker()
    if problem:
        return problem
    import docker

    image = IMAGES[kind]
    client = docker.from_env()
    try:
        client.images.get(image)
        return ""
    except docker.errors.ImageNotFound:
        pass
    say(f"Pulling {image} (once) …")
    try:
        client.images.pull(image)
    except docker.errors.DockerException as error:
        return f"Docker answers, but {image} is not here and cannot be pulled ({_first_line(error)})"
    return ""


def _first_line(error: Exception) -> str:
    text = str(getattr(error, "explanation", None) or error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


class ContainerNode(Node):
    """A server as a container."""

    def __init__(self, name: str, container: DockerContainer) -> None:
        self.name = name
        self._container = container
        self.wait_until_ready = self.sync = lambda: None

    @property
    def _docker(self) -> Any:
        return self._container.get_wrapped_container()

    def _state(self) -> str:
        """Docker's word for what it does now; empty where it is no more."""
        import docker

        try:
            self._docker.reload()
        except (docker.errors.DockerException, OSError):
            return ""
        return str(self._docker.status)

    # Each may be called in any state, as with a process: Docker would refuse to kill what has ended.
    def kill(self) -> None:
        if self.running:
            self.sync()
            self._docker.kill()
            self._docker.wait()

    def pause(self) -> None:
        if self._state() == "running":
            self._docker.pause()

    def resume(self) -> None:
        if self._state() == "paused":
            self._docker.unpause()

    def restart(self, graceful: bool = True) -> None:
        if self.running:
            self.resume()  # a paused server cannot hear that it is to stop
            self._docker.stop(timeout=20) if graceful else self.kill()
        self._docker.start()
        self.wait_until_ready()

    @property
    def running(self) -> bool:
        return self._state() in ("created", "running", "paused", "restarting")

    def control(self, *arguments: str) -> str:
        if "rabbitmq" not in self.name:
            return super().control(*arguments)
        code, said = self._docker.exec_run(["rabbitmqctl", "--quiet", *arguments])
        if code:
            raise BrokerError(f"rabbitmqctl {' '.join(arguments)}: {said.decode(errors='replace').strip()}")
        return str(said.decode(errors="replace"))

    def log(self, lines: int = 20) -> str:
        text: str = self._docker.logs(tail=lines).decode(errors="replace")
        return text.strip()


def _container(
    image: str, name: str, ports: Mapping[int, int], environment: Mapping[str, str], **options: Any
) -> DockerContainer:
    """A container that is not started: ports (inside to outside) on loopback, no reaper image (the guardian reaps)."""
    from testcontainers.core.config import testcontainers_config
    from testcontainers.core.container import DockerContainer

    testcontainers_config.ryuk_disabled = True
    made = DockerContainer(image).with_name(name).with_envs(**environment).with_kwargs(**options)
    # testcontainers would publish on every interface; Docker's own client takes the address along with the port.
    made.ports.update({f"{inside}/tcp": (HOST, outside) for inside, outside in ports.items()})
    return made


def _launch(estate: Estate, name: str, container: DockerContainer) -> ContainerNode:
    import docker

    estate.keep("containers", name)  # before it exists: nothing lies between its birth and its being looked after
    try:
        container.start()
    except docker.errors.APIError as error:
        if "port is already allocated" in str(error) or "address already in use" in str(error):
            raise PortTaken from None
        raise BrokerUnavailable(f"Docker could not start {name}: {_first_line(error)}") from None
    return ContainerNode(name, container)


def _network(estate: Estate, name: str) -> Any:
    import docker

    estate.keep("networks", name)
    return docker.from_env().networks.create(name)


def _joined(network: Any, name: str) -> dict[str, Any]:
    return {} if network is None else {"network": network.name, "hostname": name}


def kafka(nodes: int = 1, settings: Mapping[str, str] | None = None) -> Kafka:
    """Kafka in `nodes` containers of the official image. `settings` are server properties."""
    return started(lambda estate: _kafka(estate, nodes, dict(settings or {})))


def _kafka(estate: Estate, count: int, own: dict[str, str]) -> Kafka:
    salt = secrets.token_hex(3)
    names = [f"mqlib-kafka-{salt}-{index + 1}" for index in range(count)]
    ports = free_ports(count + 2)
    clients, (behind_proxy, advertised) = ports[:count], ports[count:]
    differs = {**defaults.KAFKA, **defaults.kafka_replication(count), **own}
    network = _network(estate, f"mqlib-kafka-{salt}") if count > 1 else None
    servers: list[ContainerNode] = []
    for index, name in enumerate(names):
        inside = name if count > 1 else "localhost"
        proxied = index == 0
        properties = {
            "process.roles": "broker,controller",
            "node.id": str(index + 1),
            "controller.quorum.voters": ",".join(
                f"{i + 1}@{each if count > 1 else 'localhost'}:9093" for i, each in enumerate(names)
            ),
            # Clients outside are told the port on this machine, the servers among themselves a name on their network.
            "listeners": "PLAINTEXT://:9092,CONTROLLER://:9093,INSIDE://:9094" + (",PROXY://:9095" if proxied else ""),
            "advertised.listeners": f"PLAINTEXT://{HOST}:{clients[index]},INSIDE://{inside}:9094"
            + (f",PROXY://{HOST}:{advertised}" if proxied else ""),
            "controller.listener.names": "CONTROLLER",
            "inter.broker.listener.name": "INSIDE",
            "listener.security.protocol.map": ",".join(
                f"{listener}:PLAINTEXT" for listener in ("CONTROLLER", "PLAINTEXT", "INSIDE", "PROXY")
            ),
            **differs,
        }
        # The official image's contract: `a.b.c=d` is given as KAFKA_A_B_C=d.
        environment = {f"KAFKA_{key.upper().replace('.', '_')}": value for key, value in properties.items()}
        environment |= {"CLUSTER_ID": CLUSTER_ID, "KAFKA_HEAP_OPTS": "-Xmx512m -Xms256m"}
        environment["KAFKA_JVM_PERFORMANCE_OPTS"] = " ".join(QUICK_START)
        published = {9092: clients[index], **({9095: behind_proxy} if proxied else {})}
        container = _container(KAFKA_IMAGE, name, published, environment, **_joined(network, name))
        servers.append(_launch(estate, name, container))
    bootstrap = ",".join(f"{HOST}:{port}" for port in clients)

    _settle(servers, lambda living: probe_kafka(bootstrap, {}, 15, replication=len(living)))
    return Kafka(
        provider="container", version=Version.parse(KAFKA_VERSION), nodes=servers, settings=differs,
        bootstrap=bootstrap, proxy_ports=(behind_proxy, advertised),
    )  # fmt: skip


def _settle(servers: Sequence[ContainerNode], probe: Callable[[Sequence[ContainerNode]], Version]) -> Version:
    def ready(living: Sequence[ContainerNode]) -> Version:
        return await_ready(living, lambda: probe(living), within=120)

    def again(restarted: ContainerNode) -> Version:
        return ready([node for node in servers if node is restarted or node.running])

    for node in servers:
        node.wait_until_ready = partial(again, node)
    return ready(servers)


def rabbitmq(nodes: int = 1, settings: Mapping[str, str] | None = None) -> RabbitMQ:
    """RabbitMQ in `nodes` containers of the official image, clustered. `settings` are keys of rabbitmq.conf."""
    return started(lambda estate: _rabbitmq(estate, nodes, dict(settings or {})))


def _rabbitmq(estate: Estate, count: int, own: dict[str, str]) -> RabbitMQ:
    salt = secrets.token_hex(3)
    names = [f"mqlib-rabbitmq-{salt}-{index + 1}" for index in range(count)]
    ports = free_ports(3 * count)
    differs = {**defaults.RABBITMQ, **own}
    clustering = {"cluster_formation.peer_discovery_backend": "classic_config"} if count > 1 else {}
    clustering |= (
        {f"cluster_formation.classic_config.nodes.{i + 1}": f"rabbit@{n}" for i, n in enumerate(names)}
        if count > 1
        else {}
    )
    configuration = "".join(f"{key} = {value}\n" for key, value in {**clustering, **differs}.items())
    network = _network(estate, f"mqlib-rabbitmq-{salt}") if count > 1 else None
    servers: list[ContainerNode] = []
    for index, name in enumerate(names):
        environment = {
            "RABBITMQ_NODENAME": f"rabbit@{name if count > 1 else 'localhost'}",
            "RABBITMQ_ERLANG_COOKIE": salt,
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": defaults.RABBITMQ_ERLANG_ARGUMENTS,
        }
        published = dict(zip((5672, 15672, 15692), ports[3 * index : 3 * index + 3], strict=True))
        container = _container(RABBITMQ_IMAGE, name, published, environment, **_joined(network, name))
        container.with_copy_into_container(configuration.encode(), "/etc/rabbitmq/conf.d/90-mqlib.conf")
        plugins = f"[{','.join(defaults.RABBITMQ_PLUGINS)}]."
        container.with_copy_into_container(plugins.encode(), "/etc/rabbitmq/enabled_plugins")
        servers.append(_launch(estate, name, container))
    urls = [f"amqp://guest:guest@{HOST}:{ports[3 * index]}/" for index in range(count)]
    consoles = [f"http://guest:guest@{HOST}:{ports[3 * index + 1]}" for index in range(count)]
    for node, console in zip(servers, consoles, strict=True):
        node.sync = partial(sync_rabbitmq, console)
    version = _settle(servers, lambda living: min(probe_rabbitmq(urls[servers.index(node)], {}, 15) for node in living))
    return RabbitMQ(
        provider="container", version=version, nodes=servers, settings=differs,
        url=urls[0], management_url=consoles[0], metrics_url=f"http://{HOST}:{ports[2]}/metrics",
        addresses=tuple(zip(urls, consoles, strict=True)),
    )  # fmt: skip
