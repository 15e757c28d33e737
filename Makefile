# make demo    a trained model finds a code hidden in a 4 000-token text, with a 4-bit cache
# make test    lint, format check and the whole test suite
# make test-real    tests on three real models, downloaded once; MODEL=smollm2-135m takes one of them
# Both set up .venv first. PYTHON picks the interpreter; EXTRAS=cuda the CUDA build of MLX.

PYTHON ?= python3
BIN := .venv/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check

ifeq ($(shell uname),Linux)
EXTRAS ?= cpu,openblas
# MLX's CPU build brings a reference BLAS; OpenBLAS in its place multiplies matrices 19 times faster.
RUN = env LD_PRELOAD="$(wildcard $(CURDIR)/.venv/openblas.so)" $(BIN)/python
else
EXTRAS ?= openblas
RUN = $(BIN)/python
endif

.PHONY: demo test test-real format clean

demo: .venv/ready
	$(RUN) examples/find_code.py

# Two processes on two cores: with more threads of OpenBLAS in each it takes half as long again.
test: .venv/test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OPENBLAS_NUM_THREADS=1 $(RUN) -m pytest -n 2

test-real: .venv/test-ready
	$(RUN) -m pytest -m real -k "$(MODEL)"

format: .venv/test-ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info

.venv/ready: pyproject.toml Makefile tests/openblas.c
	$(PYTHON) -m venv .venv
	$(INSTALL) -e ".[$(EXTRAS)]"
ifeq ($(shell uname),Linux)
	@folder=$$($(BIN)/python -c "import scipy_openblas32 as blas; print(blas.get_lib_dir())") && \
	cc -O2 -shared -fPIC tests/openblas.c -o .venv/openblas.so \
	  -L"$$folder" -lscipy_openblas -Wl,-rpath,"$$folder" \
	  || echo "OpenBLAS is not used, for want of the extra or of a C compiler: products are slow."
endif
	touch $@

.venv/test-ready: .venv/ready
	$(INSTALL) -e ".[$(EXTRAS),test]"
	touch $@
