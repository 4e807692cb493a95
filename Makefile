# Run as root on a bare Debian 12 or 13: `make demo` and `make test` need nothing else.
.PHONY: setup build demo bench apps test pytest lint manifests soak life plugin-speed test-kernels test-runtimes \
	image-test setup-test clean
.DELETE_ON_ERROR:

PY := .venv/bin/python
PLUGIN := dist/tcpip-bypass/tcpip-bypass
PLUGIN_SOURCES := build.spec conf/schema.json $(addprefix bpf/,__init__.py abi.py bpfsys.py pins.py) $(wildcard cni_plugin/*.c cni_plugin/*.py)
C_SOURCES := $(wildcard cni_plugin/*.c bpf/*.c bpf/*.h bpf/data_path/*.h tests/*/*.c tests/*/*.h tests/*/*/*.c tests/*/*/*.h)

setup: .venv/.ready

AGENT := install/program/agent

.venv/.ready: requirements.txt pyproject.toml install/setup.sh $(AGENT)/cri.proto \
		$(AGENT)/messages.sh
	./install/setup.sh
	touch $@

# The applications of tests/apps: distribution packages (no service starts), and what is compiled.
APPS_SOURCES := $(addprefix tests/apps/,requirements.txt setup.sh programs/httpd.go programs/Java.java)

.venv/.apps-ready: .venv/.ready $(APPS_SOURCES)
	tests/apps/setup.sh
	touch $@

build: $(PLUGIN)

$(PLUGIN): .venv/.ready $(PLUGIN_SOURCES)
	.venv/bin/pyinstaller --noconfirm --clean --log-level WARN --distpath dist --workpath build/pyinstaller build.spec

# Plain TCP against the bypass, in the mode that `auto` decides and, if that is less, in `full`;
# `DEMO=--mode=full`: that one. `.venv/bin/python -m tests.demo.reach` has round trips of IPv6, plain
# pods, ClusterIPs and TPROXY.
demo: build
	$(PY) -m tests.demo $(DEMO)

# Plain TCP against the bypass, in 25 minutes; `BENCH=--quick`: two. `BENCH=--report` renders
# docs/benchmarks.md, every table into build/bench/tables.md, and the figures of `estimate`.
bench: build
	$(PY) -m tests.bench $(BENCH)

# Real applications, plain and bypassed in turn; `APPS=redis,nginx`: those; `MODE=auto`.
# The log is build/apps/MODE.log. docs/applications.md is rendered by `APPS=--report`.
MODE ?= full
apps: build .venv/.apps-ready
	$(PY) -m tests.apps --mode $(MODE) $(APPS)

test: lint pytest

# Two processes; the tests of one file, which may share what they need, run in one of them.
pytest: build .venv/.apps-ready
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests

# Random traffic on all three hops, every byte checked, for MINUTES; a load and pauses meanwhile.
MINUTES ?= 30
soak: build
	$(PY) -m tests.fuzz --hops inbound,outbound,sidecars --at-once 12 \
		--seconds $$(( $(MINUTES) * 60 )) --pause-flips --reload 60

# A node's long life: what it holds after 10,000 pods. Draws docs/img/life.png.
life: build
	$(PY) -m tests.containerd.life

# How long each call of the plugin takes, in turn with the reference bridge plugin.
plugin-speed: build
	$(PY) -m tests.integration.plugin_speed 50

# The self-test, the semantics suite, the fuzzer and real programs on other kernels, under QEMU, and
# docs/kernels.md. `python -m tests.kernels --page` writes that page alone.
test-kernels: build .venv/.apps-ready
	$(PY) -m tests.kernels

# The tests with a real runtime on each containerd of tests/containerd/releases.py.
RUNTIMES ?= own 1.7 2
test-runtimes: build
	for runtime in $(RUNTIMES); do \
		echo "containerd $$runtime"; \
		TCPIP_BYPASS_RUNTIME=$$runtime $(PY) -m pytest tests/containerd || exit; \
	done

# The DaemonSet's image as install/Dockerfile has it, built and tried without a container engine.
image-test: .venv/.ready
	$(PY) -m tests.image

# These commands from a clean clone of HEAD on a bare Debian 12 and on a bare Debian 13.
setup-test: .venv/.ready
	$(PY) -m tests.bare

# install/daemonset.yaml, the overlays and the rest that is rendered from install/chart.
manifests: .venv/.ready
	$(PY) -m tests.manifests

lint: .venv/.ready .venv/.apps-ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/clang-format --dry-run --Werror $(C_SOURCES)
	$(PY) -m tests.words

clean:
	rm -rf build dist .venv
