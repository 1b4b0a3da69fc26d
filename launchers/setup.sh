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

# This machine's GPUs that CUDA_VISIBLE_DEVICES leaves, a line each; nothing where DS_ACCELERATOR=cpu leaves them alone.
list_gpus() {
  local visible="${CUDA_VISIBLE_DEVICES-all}" gpus
  [[ "${DS_ACCELERATOR:-}" != cpu && -n "$visible" && "$visible" != -1 ]] || return 0
  gpus="$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | grep -E '^[0-9]+$')" || return 0
  if [[ "$visible" == all ]]; then echo "$gpus"; else tr ',' '\n' <<<"$visible"; fi
}

install_requirements() {
  local stamp=.venv/requirements.installed build=cpu python torch
  if [[ -n "$(list_gpus)" ]]; then
    build=cuda
  fi
  # A .venv made on a login node has the CPU build of PyTorch, which a GPU node can't use; the other way round is fine.
  if grep -qsx "# for cuda" "$stamp"; then
    build=cuda
  fi
  if [[ "$( (cat requirements.txt; echo "# for $build") | cksum)" == "$(cksum 2>/dev/null <"$stamp")" ]]; then
    return
  fi
  python=$(find_python)
  echo "Installing into .venv (PyTorch for $build); this takes a few minutes once."
  [[ -x .venv/bin/python ]] || "$python" -m venv .venv
  torch="$(grep '^torch==' requirements.txt)"
  if [[ $build == cpu ]]; then
    # The CPU build of PyTorch, from the configured sources or PyTorch's own; the plain one brings gigabytes of CUDA.
    .venv/bin/pip install --quiet "$torch+cpu" 2>/dev/null ||
      .venv/bin/pip install --quiet "$torch+cpu" --extra-index-url https://download.pytorch.org/whl/cpu
  elif [[ "$(.venv/bin/pip show torch 2>/dev/null)" == *+cpu* ]]; then
    .venv/bin/pip uninstall --quiet --yes torch # which satisfies the requirement, and would stay
  fi
  .venv/bin/pip install --quiet --requirement requirements.txt
  (cat requirements.txt; echo "# for $build") >"$stamp"
}

install_requirements
