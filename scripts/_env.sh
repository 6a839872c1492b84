# Shared by quickstart.sh and test.sh; meant to be sourced, not run.
#
#   source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
#   ensure_env dev quant        # extras of pyproject.toml; none = the base package
#
# Afterwards the working folder is the repository root, "$VENV_PYTHON" is the interpreter of .venv, and .venv/bin
# comes first on PATH (nothing needs to be activated). Set PYTHON to choose the interpreter that .venv is made
# with. pip reads its own settings as usual: on a Linux machine without a GPU,
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# takes the small CPU build of torch.

REPO_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
VENV_DIR="$REPO_ROOT/.venv"
VENV_PYTHON="$VENV_DIR/bin/python"
STAMP_DIR="$VENV_DIR/.memdlm"

die() {
    echo "error: $1" >&2
    exit "${2:-1}"
}

# Prints the first interpreter that is new enough.
_find_python() {
    local candidate
    if [[ -n "${PYTHON:-}" ]]; then
        set -- "$PYTHON"
    else
        set -- python3 python3.13 python3.12 python3.11 python3.10
    fi
    for candidate in "$@"; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            command -v "$candidate"
            return 0
        fi
    done
    die "no Python >= 3.10 among: $*; install one, or name it: PYTHON=/path/to/python3.11 bash $0"
}

# What the installed packages depend on. The folder counts because scripts in .venv/bin hold its absolute path.
_fingerprint() {
    echo "$REPO_ROOT $(cat "$REPO_ROOT/pyproject.toml" "$REPO_ROOT/constraints.txt" | cksum)"
}

# True when "base" and every extra given were installed from the present files.
_is_installed() {
    local part
    [[ -x "$VENV_PYTHON" ]] || return 1
    for part in base "$@"; do
        [[ -f "$STAMP_DIR/$part" && "$(<"$STAMP_DIR/$part")" == "$FINGERPRINT" ]] || return 1
    done
}

# Makes .venv, or makes it anew when its interpreter is gone or it was built for another folder.
_make_venv() {
    local old python
    if [[ -f "$STAMP_DIR/folder" ]]; then
        old="$(<"$STAMP_DIR/folder")"
        [[ "$old" == "$REPO_ROOT" ]] || echo ".venv belongs to $old: making it anew"
    fi
    if [[ "${old:-$REPO_ROOT}" == "$REPO_ROOT" ]] && "$VENV_PYTHON" -m pip --version >/dev/null 2>&1; then
        return 0
    fi
    if [[ -e "$VENV_DIR" && ! -f "$VENV_DIR/pyvenv.cfg" && -n "$(ls -A "$VENV_DIR")" ]]; then
        die "$VENV_DIR exists and is not a virtual environment: move it away and run this again"
    fi
    python="$(_find_python)" || exit 1
    echo "making .venv with $("$python" --version) ($python)"
    "$python" -m venv --clear "$VENV_DIR" ||
        die "could not make $VENV_DIR; on Debian and Ubuntu install the package python3-venv first"
}

_install() {
    local extras="" part
    _make_venv
    # The stamps go first and come back last, so that an interrupted install is done again by the next call.
    mkdir -p "$STAMP_DIR"
    rm -f "$STAMP_DIR/base"
    for part in "$@"; do
        rm -f "$STAMP_DIR/$part"
        extras="$extras${extras:+,}$part"
    done
    echo "$REPO_ROOT" >"$STAMP_DIR/folder"
    echo "installing memdlm${extras:+[$extras]} into .venv (once; minutes on a slow network)"
    # DeepSpeed compiles its operators when they are used first, not at every install.
    DS_BUILD_OPS=0 "$VENV_PYTHON" -m pip install --disable-pip-version-check -c constraints.txt -e ".${extras:+[$extras]}" ||
        die "pip failed (its message is above); when that is solved, run this again"
    "$VENV_PYTHON" -c 'import torch, transformers, peft, accelerate, datasets' ||
        die "what was installed does not import (see above); remove .venv and run this again"
    for part in base "$@"; do
        echo "$FINGERPRINT" >"$STAMP_DIR/$part"
    done
}

ensure_env() {
    cd "$REPO_ROOT" || die "cannot enter $REPO_ROOT"
    FINGERPRINT="$(_fingerprint)"
    if ! _is_installed "$@"; then
        # The lock lives on descriptor 9 of this shell: Python only asks for it, and the system frees it when the
        # shell ends, however it ends.
        exec 9>"$REPO_ROOT/.venv.lock" || die "cannot write to $REPO_ROOT"
        local python lock='import fcntl, sys; fcntl.flock(9, fcntl.LOCK_EX | int(sys.argv[1]))'
        python="$(_find_python)" || exit 1
        if ! "$python" -c "$lock" 4 2>/dev/null; then
            echo "another call is installing into .venv: waiting for it"
            "$python" -c "$lock" 0 || die "could not lock $REPO_ROOT/.venv.lock; is another install running?"
        fi
        _is_installed "$@" || _install "$@"
        exec 9>&-
    fi
    export PATH="$VENV_DIR/bin:$PATH" VIRTUAL_ENV="$VENV_DIR"
}
