"""Flower's SuperLink as a process of ours, on loopback, and what it is told over its Control API."""

import contextlib
import json
import re
import subprocess
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fedproxy.artifacts import write_secret
from fedproxy.deployment.flower import SETTINGS, prepare
from fedproxy.deployment.flower.command import command
from fedproxy.deployment.flower.ports import reserve_port
from fedproxy.deployment.flower.process import start, stop, tail
from fedproxy.deployment.flower.runtime import SERVER_APP, SIMULATION, Runtime, isolated
from fedproxy.errors import FederationError

START_SECONDS = 90.0
_CONNECTION = "own"
_TAKEN = re.compile(rb'"success":\s*true')
_RUN = re.compile(rb'"run-id":\s*"?([0-9]+)')
ACQUIRE_SECONDS = 30.0
_APP = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fedproxy-app"
version = "1.0.0"
description = "What Flower loads: fedproxy's ServerApp and ClientApp"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedproxy"

[tool.flwr.app.components]
serverapp = "fedproxy.deployment.flower.app:server"
clientapp = "fedproxy.deployment.flower.app:client"

[tool.flwr.app.config]
"""


class SuperLink:
    """A SuperLink with its ServerApp, from `start` to `close`.

    Args:
        folder: Where it keeps its log and what Flower wants on disk.
        certificates: The server's certificate, its key and the CA's certificate; none for plaintext.
        simulation: Run clients in this SuperLink's own processes (Ray).
        environment: Variables for its processes, the ServerApp among them.
    """

    def __init__(
        self,
        folder: Path,
        *,
        certificates: tuple[Path, Path, Path] | None,
        simulation: bool = False,
        environment: Mapping[str, str],
    ) -> None:
        prepare()
        self._reserved = reserve_port()
        self.port = int(self._reserved.getsockname()[1])
        self.log = folder / "superlink.log"
        self.ca = certificates[2] if certificates else None
        self._folder, self._certificates, self._simulation = folder, certificates, simulation
        self._environment = {
            **SETTINGS,
            "FLWR_HOME": str(folder),
            **environment,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._app: subprocess.Popen[bytes] | None = None
        self._ended = False

    def start(self) -> "SuperLink":
        """Start the process and wait until it answers: whoever else listens at its port does not know its secret.

        Raises:
            FederationError: it does not.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._secret, alone = isolated(self._folder)
        where = ["--host", "127.0.0.1", "--port", str(self.port)]
        legacy = ["--control-api-address", "127.0.0.1:0", "--fleet-api-address", "127.0.0.1:0"]
        if self._certificates is None:
            secure = ["--insecure"]
        else:
            certificate, key, ca = map(str, self._certificates)
            secure = ["--ssl-certfile", certificate, "--ssl-keyfile", key, "--ssl-ca-certfile", ca]
            secure += ["--enable-supernode-auth"]
        options = ["--simulation"] if self._simulation else []
        self._process = start(
            command("flower-superlink", *where, *alone, *legacy, *secure, *options),
            self.log,
            self._environment,
            self._folder,
        )
        until = time.monotonic() + START_SECONDS
        with contextlib.closing(self._runtime()) as runtime:
            while time.monotonic() < until and self.alive:
                try:
                    runtime.acquire(())
                    return self
                except (ConnectionError, FederationError):
                    time.sleep(0.1)
        self.close()
        raise FederationError(f"Flower's SuperLink did not start. The end of {self.log}:\n{tail(self.log)}")

    @property
    def alive(self) -> bool:
        """Whether its process lives."""
        return self._process is not None and self._process.poll() is None

    def register(self, public_keys: Collection[bytes]) -> None:
        """Register the public keys (PEM) of SuperNodes that may connect."""
        from flwr.proto.control_pb2 import RegisterNodeRequest

        client = self._control()
        try:
            for key in public_keys:
                client.RegisterNode(RegisterNodeRequest(public_key=key))
        finally:
            client.close()

    def _runtime(self) -> Runtime:
        return Runtime(f"127.0.0.1:{self.port}", self._secret, None if self.ca is None else self.ca.read_bytes())

    def _control(self) -> Any:
        from flwr.supercore.control import ControlHttpClient
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

        return ControlHttpClient.from_server_address(
            f"127.0.0.1:{self.port}",
            self.ca is None,
            None if self.ca is None else self.ca.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-cli")],
        )

    def run(self, settings: str = "") -> None:
        """Submit the run as `flwr run` does, and start its ServerApp.

        Nothing else is ever started: whoever reaches the Control API on loopback can submit runs, and they stay where
        they are.

        Args:
            settings: Settings of a simulation, as `flwr run --federation-config` takes them.

        Raises:
            FederationError: Flower does not take it.
        """
        app = self._folder / "app"
        app.mkdir(exist_ok=True)
        (app / "pyproject.toml").write_text(_APP, encoding="utf-8")
        lines = [f"[superlink.{_CONNECTION}]", f'address = "127.0.0.1:{self.port}"']
        lines += ["insecure = true"] if self.ca is None else [f"root-certificates = {json.dumps(str(self.ca))}"]
        lines += [f"[superlink.{_CONNECTION}.options]", "num-supernodes = 1"] if self._simulation else []
        (self._folder / "config.toml").write_text(
            "\n".join(["[superlink]", f'default = "{_CONNECTION}"', *lines]) + "\n", encoding="utf-8"
        )
        how = ["--federation-config", settings] if settings else []
        submit = command("flwr", "run", str(app), _CONNECTION, "--format", "json", *how)
        process = start(submit, self._folder / "run.log", self._environment, self._folder)
        try:
            code = process.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            stop(process)
        log = self._folder / "run.log"
        said = log.read_bytes()
        number = _RUN.search(said)
        if code != 0 or not _TAKEN.search(said) or number is None:  # it may end with 0 all the same
            raise FederationError(f"Flower did not take the run. The end of {log}:\n{tail(log)}")
        self._start_app(int(number[1]))

    def _start_app(self, run: int) -> None:
        kind = SIMULATION if self._simulation else SERVER_APP
        runtime = self._runtime()
        until = time.monotonic() + ACQUIRE_SECONDS
        try:
            while (task := runtime.acquire([kind])) is None or task.run != run:
                if time.monotonic() > until:
                    raise FederationError("Flower's SuperLink puts up no task for the run.")
                time.sleep(0.05)
        except ConnectionError as error:
            raise FederationError(f"Flower's SuperLink does not answer ({error}).") from error
        finally:
            runtime.close()
        token = self._folder / "token"
        write_secret(token, task.token.encode())
        where = ["--runtime-api-address", f"127.0.0.1:{self.port}", "--token-file", str(token)]
        secure = ["--insecure"] if self.ca is None else ["--root-certificates", str(self.ca)]
        self._app = start(command(kind, *where, *secure), self.log, self._environment, self._folder)

    def check(self) -> None:
        """Check that SuperLink and ServerApp live.

        Raises:
            FederationError: either ended.
        """
        if not self.alive:
            raise FederationError(
                f"Flower's SuperLink ended. Go on with --resume. The end of its log:\n{tail(self.log)}"
            )
        if self._app is not None and self._app.poll() is not None:
            if self._ended:
                raise FederationError(
                    f"Flower's ServerApp ended. Go on with --resume. The end of its log:\n{tail(self.log)}"
                )
            self._ended = True  # what it noted on its way out was not looked for since

    def close(self) -> None:
        """End ServerApp and SuperLink, and all that they started, and give the port back."""
        for process in (self._app, self._process):
            if process is not None:
                stop(process)
        self._app = self._process = None
        self._reserved.close()
