# Sourced by quickstart.sh and test.sh: makes .venv and installs requirements.txt, when they have changed.

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
    if [[ -n "$candidate" ]] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: Shardwright needs Python 3.11 or newer, and none was found; install one or set PYTHON to it" >&2
  exit 2
}

install_requirements() {
  local stamp=.venv/requirements.installed
  if cmp -s requirements.txt "$stamp"; then
    return
  fi
  local python
  python=$(find_python)
  echo "Installing into .venv; this takes a few minutes once."
  [[ -x .venv/bin/python ]] || "$python" -m venv .venv
  if ! command -v nvidia-smi >/dev/null; then
    # The CPU build of PyTorch, from the configured sources or PyTorch's own; the plain one brings gigabytes of CUDA.
    local torch
    torch="$(grep '^torch==' requirements.txt)+cpu"
    .venv/bin/pip install --quiet "$torch" 2>/dev/null ||
      .venv/bin/pip install --quiet "$torch" --extra-index-url https://download.pytorch.org/whl/cpu
  fi
  .venv/bin/pip install --quiet --requirement requirements.txt
  cp requirements.txt "$stamp"
}

install_requirements
