"""A real Kubernetes API server for tests: kube-apiserver and an etcd of its own, loopback only.

There are no controllers behind it (nothing makes pods of a Deployment, nothing collects garbage)
and no admission of service accounts, so that a namespace is there as soon as it is created, and
stays: each test makes its own. Authorization is RBAC. ``admin`` may do everything;
``kubeconfig(user)`` writes a file for any other of ``USERS``, who may do nothing until a test
binds a role.

Folder, ports, certificates and tokens stay over ``kill`` and ``start``. Ready in 3-4 s; about
350 MB. Both processes are known by their pids and end with the context.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.etcd_server import EtcdServer, free_port

READY_TIMEOUT_S: Final = 90.0
# Debian's kubectl takes 0.3 s; a busy machine takes its time.
KUBECTL_TIMEOUT_S: Final = 60.0
USERS: Final = ("controller", "stranger")
PROJECT: Final = Path(__file__).parents[1]
CRDS: Final = PROJECT / "deploy" / "crds"


class KubeNotFound(Exception):
    """No kube-apiserver on this machine; the message is a reason to skip."""


class Refused(Exception):
    """The server answered with a Status: ``code`` (HTTP), ``reason`` and ``message``."""

    def __init__(self, code: int, body: Mapping[str, Any]) -> None:
        super().__init__(f"{code} {body.get('reason', '')}: {body.get('message', '')}")
        self.code = code
        self.reason: str = body.get("reason", "")
        self.message: str = body.get("message", "")
        details = body.get("details") or {}
        self.fields: list[str] = [one.get("field", "") for one in details.get("causes") or ()]


def find_kube_apiserver() -> Path:
    """Where KUBEBUILDER_ASSETS says, as envtest has it; else what deploy/dev built."""
    named = os.environ.get("KUBEBUILDER_ASSETS")
    folders = [Path(named)] if named else []
    for folder in (*folders, PROJECT / ".mesh" / "kubebuilder"):
        path = folder / "kube-apiserver"
        if path.is_file() and os.access(path, os.X_OK):
            return path
    raise KubeNotFound(
        "no kube-apiserver: set KUBEBUILDER_ASSETS, or run deploy/dev/build-kube-apiserver"
    )


class KubeServer:
    """One API server. Use as a context manager, or call ``start`` and ``close``."""

    def __init__(
        self, *, binary: Path | None = None, extra_arguments: tuple[str, ...] = ()
    ) -> None:
        self.binary = binary or find_kube_apiserver()
        self.etcd = EtcdServer()
        self.folder = Path(tempfile.mkdtemp(prefix="mesh-test-kube-"))
        self.port = free_port()
        self._extra_arguments = extra_arguments
        self._process: subprocess.Popen[bytes] | None = None
        self._tokens = {user: uuid.uuid4().hex for user in ("admin", *USERS)}
        write_certificates(self.folder)
        self._write_tokens()
        self._tls = ssl.create_default_context(cafile=str(self.folder / "ca.pem"))

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "kube-apiserver is not running"
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def token(self, user: str = "admin") -> str:
        return self._tokens[user]

    def kubeconfig(
        self, user: str = "admin", *, url: str | None = None, namespace: str = "default"
    ) -> Path:
        """A file with all that a client needs; ``url`` leads through a proxy of the test's."""
        cluster = {
            "server": url or self.url,
            "certificate-authority": str(self.folder / "ca.pem"),
        }
        context = {"cluster": "test", "user": user, "namespace": namespace}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": cluster}],
            "contexts": [{"name": "test", "context": context}],
            "users": [{"name": user, "user": {"token": self._tokens[user]}}],
        }
        path = self.folder / f"kubeconfig-{uuid.uuid4().hex}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        user: str = "admin",
        content_type: str = "application/json",
        timeout_s: float = 30.0,
    ) -> Any:
        """One call, JSON in and out; ``path`` starts at the root. Raises Refused."""
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={
                "Authorization": f"Bearer {self._tokens[user]}",
                "Content-Type": content_type,
                "Accept": "application/json",
            },
        )
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=self._tls)
        )
        try:
            with opener.open(request, timeout=timeout_s) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            text = error.read()
        try:
            answer = json.loads(text)
        except ValueError:
            answer = {"message": text.decode(errors="replace")}
        raise Refused(error_code(answer), answer)

    def create_namespace(self, prefix: str = "test") -> str:
        """A namespace that no other test has; the server's etcd goes with the session."""
        name = f"{prefix}-{uuid.uuid4().hex[:10]}"
        self.request("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
        return name

    def install_crds(self, folder: Path = CRDS) -> None:
        """Creates what lies in the folder and waits until each is served."""
        base = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
        crds = crd_documents(folder)
        for crd in crds:
            self.request("POST", base, crd)
        for crd in crds:
            name, spec = crd["metadata"]["name"], crd["spec"]
            served = f"/apis/{spec['group']}/{spec['versions'][0]['name']}"
            wait_until(partial(self._is_established, f"{base}/{name}"), name)
            wait_until(partial(self._serves, served, spec["names"]["plural"]), name)

    def _is_established(self, path: str) -> bool:
        status = self.request("GET", path).get("status") or {}
        conditions = status.get("conditions") or ()
        return any(one["type"] == "Established" and one["status"] == "True" for one in conditions)

    def _serves(self, group_version: str, plural: str) -> bool:
        try:
            self.request("GET", f"{group_version}/{plural}?limit=1")
        except Refused:
            return False
        return True

    def kubectl(
        self, *arguments: str, namespace: str = "default", stdin: str = "", user: str = "admin"
    ) -> subprocess.CompletedProcess[str]:
        """Runs the kubectl on the PATH; its caches are this server's. Does not check the code."""
        path = self.folder / f"kubectl-{user}.yaml"
        if not path.exists():
            self.kubeconfig(user).rename(path)
        return subprocess.run(
            [
                "kubectl",
                f"--kubeconfig={path}",
                f"--namespace={namespace}",
                f"--cache-dir={self.folder / 'kubectl-cache'}",
                *arguments,
            ],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=KUBECTL_TIMEOUT_S,
        )

    def start(self, *, wait: bool = True) -> None:
        """Starts the etcd as well, unless that runs already."""
        assert not self.running, "kube-apiserver is running already"
        if not self.etcd.running:
            self.etcd.start()
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._arguments(), stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Until /readyz says so; fails with the end of its log."""

        def ready() -> bool:
            if not self.running:
                raise RuntimeError(f"kube-apiserver ended; its log ends:\n{self.log_end()}")
            with contextlib.suppress(Refused, urllib.error.URLError, OSError, ValueError):
                return self.request("GET", "/api/v1/namespaces/default", timeout_s=2.0) is not None
            return False

        wait_until(ready, f"kube-apiserver; its log is in {self.folder}")

    def log_end(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-3_000:]

    def kill(self) -> None:
        """kill -9 of the API server; its etcd goes on."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """kill -9, then the same data and the same port again."""
        self.kill()
        self.start()

    def pause(self) -> None:
        """SIGSTOP: connections stay open, nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.kill()
        self.etcd.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _end(self, signal_number: signal.Signals) -> None:
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal_number)
            process.wait(timeout=60)
        self._process = None

    def _arguments(self) -> list[str]:
        return [
            str(self.binary),
            f"--etcd-servers=http://{self.etcd.endpoint}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            # The Endpoints of the Service `kubernetes` may not be on loopback.
            "--endpoint-reconciler-type=none",
            f"--secure-port={self.port}",
            f"--tls-cert-file={self.folder / 'server.pem'}",
            f"--tls-private-key-file={self.folder / 'server.key'}",
            f"--cert-dir={self.folder}",
            f"--token-auth-file={self.folder / 'tokens.csv'}",
            "--authorization-mode=RBAC",
            "--service-account-issuer=https://test.invalid",
            f"--service-account-key-file={self.folder / 'accounts.pem'}",
            f"--service-account-signing-key-file={self.folder / 'accounts.key'}",
            "--service-cluster-ip-range=10.0.0.0/16",
            # No controller makes a namespace's default service account or its token.
            "--disable-admission-plugins=ServiceAccount",
            "--allow-privileged=true",
            "--profiling=false",
            *self._extra_arguments,
        ]

    def _write_tokens(self) -> None:
        groups = {"admin": "system:masters"}
        lines = [
            f'{token},{user},{user},"{groups.get(user, "")}"'
            for user, token in self._tokens.items()
        ]
        (self.folder / "tokens.csv").write_text("\n".join(lines) + "\n")


def error_code(status: Mapping[str, Any]) -> int:
    return int(status.get("code") or 0)


def wait_until(reached: Callable[[], bool], what: str) -> None:
    """For a fixture's own start-up only: tests wait for what they watch."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not reached():
        if time.monotonic() > deadline:
            raise RuntimeError(f"not ready after {READY_TIMEOUT_S:.0f} s: {what}")
        time.sleep(0.02)


def write_certificates(folder: Path) -> None:
    """ca.pem; server.pem and server.key for 127.0.0.1 and localhost; the service accounts' pair."""
    ca_key, key, accounts = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
    issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test authority")])
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kube-apiserver")])
    now = datetime.now(UTC)

    def builder(name: x509.Name, of: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(issuer)
            .public_key(of.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=1))
        )

    authority = builder(issuer, ca_key).add_extension(
        x509.BasicConstraints(ca=True, path_length=None), critical=True
    )
    names = [x509.IPAddress(ip_address("127.0.0.1")), x509.DNSName("localhost")]
    server = builder(subject, key).add_extension(x509.SubjectAlternativeName(names), critical=False)
    pem = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(authority.sign(ca_key, hashes.SHA256()).public_bytes(pem))
    (folder / "server.pem").write_bytes(server.sign(ca_key, hashes.SHA256()).public_bytes(pem))
    for name, one in (("server", key), ("accounts", accounts)):
        (folder / f"{name}.key").write_bytes(
            one.private_bytes(
                pem,
                serialization.PrivateFormat.TraditionalOpenSSL,
                serialization.NoEncryption(),
            )
        )
    (folder / "accounts.pem").write_bytes(
        accounts.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


def crd_documents(folder: Path = CRDS) -> list[dict[str, Any]]:
    return [
        document
        for path in sorted(folder.glob("*.yaml"))
        for document in yaml.safe_load_all(path.read_text())
        if document and document.get("kind") == "CustomResourceDefinition"
    ]
