#!/bin/sh
# The steps of the Dockerfile's build stages. They run outside a container too, from the root of the repository:
#
#   deploy/image/install.sh build-tools                 what the project is built with, into this Python
#   deploy/image/install.sh wheel FOLDER                the project as a wheel, with its compiled CPU kernels
#   deploy/image/install.sh dependencies ENV cpu|gpu    a virtual environment with what `stet serve` needs
#   deploy/image/install.sh project ENV FOLDER          the wheel into it, and a check that all is in it
#   deploy/image/install.sh loadtest ENV                a virtual environment with what the load tests need
#
# Variables: TORCH_INDEX, the index that PyTorch is taken from (empty: pip's own); EXTRAS, extras of the project beside
# its dependencies, separated by commas; PYTHON, the interpreter.
set -eu
PYTHON=${PYTHON:-python3}

pip_into() { # ENV ARGUMENTS…
  into=$1 && shift
  "$PYTHON" -m pip --python "$into/bin/python" "$@"
}

case $1 in
build-tools)
  "$PYTHON" -m pip install --constraint constraints.txt hatchling
  ;;
wheel)
  "$PYTHON" -m pip wheel --no-deps --no-build-isolation --wheel-dir "$2" .
  ;;
dependencies)
  environment=$2 device=$3
  "$PYTHON" -m venv --without-pip "$environment"
  if [ -n "${TORCH_INDEX:-}" ]; then
    pip_into "$environment" install --constraint constraints.txt --no-deps --index-url "$TORCH_INDEX" torch
  fi
  "$PYTHON" deploy/image/requirements.py "" "${EXTRAS:-}" > "$environment/requirements.txt"
  pip_into "$environment" install --constraint constraints.txt --requirement "$environment/requirements.txt"
  if [ "$device" = cpu ]; then
    # The CPU backend does without it, and it is larger than all the rest.
    pip_into "$environment" uninstall --yes triton
    if [ "$("$environment/bin/python" -c 'import torch; print(torch.version.cuda)')" != None ]; then
      echo "WARNING: this PyTorch brings CUDA, several GB that a CPU does not need: set TORCH_INDEX" >&2
    fi
  fi
  "$PYTHON" deploy/image/prune.py "$environment"
  ;;
project)
  environment=$2 wheels=$3
  pip_into "$environment" install --no-deps "$wheels"/stet-*.whl
  "$environment/bin/python" -c 'from kernels.cpu.native import library; library()'
  "$environment/bin/python" -c 'from server.http.page import page_files; page_files()'
  "$environment/bin/python" -c 'from models.hub import BUILT_IN_MODELS as models; (models["stet-tales"] / "model.safetensors").stat()'
  "$environment/bin/stet" version
  ;;
loadtest)
  "$PYTHON" -m venv --without-pip "$2"
  "$PYTHON" deploy/image/requirements.py loadtest > "$2/requirements.txt"
  pip_into "$2" install --constraint constraints.txt --requirement "$2/requirements.txt"
  ;;
*)
  echo "no such step: $1" >&2
  exit 2
  ;;
esac
