# Run as root on a bare Debian 12 or Ubuntu 24.04: `make demo` and `make test` need nothing else.
.PHONY: setup build demo test lint unit integration clean
.DELETE_ON_ERROR:

PY := .venv/bin/python
PLUGIN := dist/tcpip-bypass/tcpip-bypass
PLUGIN_SOURCES := build.spec conf/schema.json bpf/__init__.py bpf/abi.py $(wildcard cni_plugin/*.py)
C_SOURCES := $(wildcard bpf/*.c bpf/*.h tests/*/*.c)

setup: .venv/.ready

.venv/.ready: requirements.txt pyproject.toml install/setup.sh
	./install/setup.sh
	touch $@

build: $(PLUGIN)

$(PLUGIN): .venv/.ready $(PLUGIN_SOURCES)
	.venv/bin/pyinstaller --noconfirm --clean --log-level WARN --distpath dist --workpath build/pyinstaller build.spec

demo: build
	$(PY) -m tests.demo

test: build lint
	$(PY) -m pytest tests

lint: .venv/.ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	clang-format --dry-run --Werror $(C_SOURCES)

clean:
	rm -rf build dist .venv
