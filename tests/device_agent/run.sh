#!/usr/bin/env bash
# Run the agent's tests in the agent's own environment: for each Python version named (3.8 3.11 ...), a virtual
# environment with nothing but the agent and what its tests need. A version that is not on this machine is
# named and skipped; if none is, that is a failure.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Print the path of an interpreter of version $1. A shim that is on PATH may still refuse to run.
find_python() {
  local candidate
  for candidate in "python$1" "$HOME/.pyenv/versions/$1".*/bin/python; do
    if "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  return 1
}

digest_of() {
  find "$@" -type f \( -name '*.py' -o -name '*.toml' -o -name '*.txt' \) -print0 |
    sort -z | xargs -0 sha256sum | sha256sum | cut -d ' ' -f 1
}

# Bring the environment $2 up to date with interpreter $1. The sources are built in a copy, so that nothing is
# left in the checkout.
prepare() {
  local python=$1 venv=$2 copy=$work/copy dependencies sources
  dependencies=$("$python" --version; sha256sum < "$root/device_agent/pyproject.toml"; sha256sum < "$here/requirements.txt")
  sources=$(digest_of "$root/device_agent")
  rm -rf "$copy"
  mkdir "$copy"
  cp -R "$root/device_agent" "$copy/"
  rm -rf "$copy"/device_agent/{build,edgekit_agent.egg-info}
  if [[ $(cat "$venv/.dependencies" 2>/dev/null) != "$dependencies" ]]; then
    rm -rf "$venv"
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
      "$copy/device_agent" -r "$here/requirements.txt"
    echo "$dependencies" > "$venv/.dependencies"
    echo "$sources" > "$venv/.sources"
  elif [[ $(cat "$venv/.sources" 2>/dev/null) != "$sources" ]]; then
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall \
      "$copy/device_agent"
    echo "$sources" > "$venv/.sources"
  fi
}

# The working directory is the tests' own and nothing is added to the path, so that only the installed package
# can be imported.
run_tests() {
  local venv=$1
  cd "$here"
  if "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    echo "torch can be imported in $venv; the agent must do without" >&2
    return 1
  fi
  if "$venv/bin/python" -c 'import edgekit' 2>/dev/null; then
    echo "edgekit can be imported in $venv; the agent must do without" >&2
    return 1
  fi
  OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -q -p no:cacheprovider -c "$root/pyproject.toml" -o pythonpath= "$here"
}

tested=0
for version in "$@"; do
  if ! python=$(find_python "$version"); then
    echo "agent tests: Python $version is not on this machine; skipped"
    continue
  fi
  echo "agent tests: Python $version ($python)"
  venv="$root/.venv-agent-$version"
  prepare "$python" "$venv"
  (run_tests "$venv")
  tested=$((tested + 1))
done

if [[ $tested -eq 0 ]]; then
  echo "agent tests: none of the Python versions asked for ($*) is on this machine" >&2
  exit 1
fi
