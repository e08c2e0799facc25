#!/usr/bin/env bash
# Each of these first sets up what is missing of the project's environment.
# ./run.sh [FLAGS]         get the track's data, train on all GPUs or on the CPU
# ./run.sh test [...]      run the linter and the tests (--slow: all); further words go to pytest
# ./run.sh FILE.py [...]   run any script of the project
# ./run.sh torchrun [...]  run torchrun
# Of `sh run.sh` and `bash < run.sh` bash makes this; dash cannot read the rest.
[ -n "${BASH_SOURCE:-}" ] || exec bash "$([ -f "$0" ] && echo "$0" || echo ./run.sh)" "$@"
set -euo pipefail
root=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
venv="$root/.venv" own=$venv
# torch.compile cannot link against a torch that lies below a path with blanks.
if [[ $root == *[[:space:]]* || ! -w $root ]]; then
    venv="${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/photofinish/venv_$(cksum <<<"$root" | cut -d' ' -f1)"
    [[ $root != *[[:space:]]* ]] || own=$venv
fi

fail() {
    echo "error: $*" >&2
    exit 1
}

find_python() { # a Python of at least 3.11, the active environment's first
    local name
    for name in python3 python python3.14 python3.13 python3.12 python3.11; do
        if [[ $(command -v "$name") != *[[:space:]]* ]] &&
            "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    fail "no Python of 3.11 or later on the PATH; install one, for example: apt install python3-venv"
}

satisfies() { # satisfies PYTHON FILE...: do the installed packages meet every pin?
    "$1" -P - "${@:2}" 2>/dev/null <<'PYTHON'
import sys
from importlib.metadata import version
for path in sys.argv[1:]:
    for line in open(path):
        name, _, pin = line.partition("#")[0].strip().partition("==")
        if name and version(name).partition("+")[0] != pin:
            sys.exit(1)
PYTHON
}

# Python gets -P, for its modules must not be those of the caller's folder, such as random.py.
set_up() { # set_up FILE...: make $python an interpreter with these requirements
    local found flags=() file ticker
    trap 'exit 130' INT # pip has a code of its own for ctrl-C
    unset PIP_USER PIP_TARGET PIP_PREFIX PIP_CONSTRAINT # they lead pip away from the environment
    for python in "$own/bin/python" "$venv/bin/python"; do
        if satisfies "$python" "$@"; then
            return
        fi
    done
    found=$(find_python)
    if satisfies "$found" "$@"; then
        python=$found
        return
    fi
    echo "installing ${*#"$root/"} into $venv, once: pip says little while it unpacks" >&2
    if ! "$python" -c '' 2>/dev/null; then # there is none yet, or its Python is gone
        "$found" -P -m venv --clear "$venv" ||
            fail "cannot make $venv (see above): apt install python3-venv, or set XDG_CACHE_HOME"
    fi
    if ! "$python" -P -m pip --version >/dev/null 2>&1; then
        "$python" -P -m ensurepip >&2 ||
            fail "$venv has no pip (see above); delete it, and run this again"
    fi
    for file in "$@"; do flags+=(-r "$file"); done
    while sleep 8 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
        echo "pip is at work, $SECONDS s so far" >&2
    done &
    ticker=$!
    trap "kill $ticker" EXIT
    disown # else bash would report its end
    { "$python" -P -m pip install --disable-pip-version-check "${flags[@]}" 2>&1 >&3 3>&- |
        tee "$venv/pip_errors" >&2; } 3>&2 ||
        fail "pip could not install the requirements: $(grep -i '^error' "$venv/pip_errors" | tail -n 1)"
    kill $ticker
    trap - EXIT
    echo "set up in $SECONDS s" >&2
}

set_up_tools() { # set_up_tools [FILE...]: with the packages of all scripts, too
    set_up "$root/requirements.txt" "$root/tools/requirements.txt" "$@"
}

count_gpus() { # the largest of 1, 2, 4, 8 GPUs that are visible and that torch can use
    local said found=0 usable=0 n
    if command -v nvidia-smi >/dev/null || [ -e /dev/nvidiactl ]; then
        said=$(nvidia-smi -L 2>&1) || true
        found=$("$python" -P -c 'import torch as t; print(t.cuda.is_available() * t.cuda.device_count())')
        if [ "$found" = 0 ] && [ -z "${CUDA_VISIBLE_DEVICES+set}" ]; then
            echo "torch can use none of the GPUs (is the driver older than its CUDA?): training on" \
                "the CPU; nvidia-smi says: ${said//$'\n'/; }" >&2
        fi
    fi
    for n in 1 2 4 8; do [ "$n" -le "$found" ] && usable=$n; done
    if [ "$usable" != "$found" ]; then
        echo "$usable of $found GPUs are used: batches can be dealt to 1, 2, 4 or 8" >&2
    fi
    echo "$usable"
}

get_data() { # get_data TASK: its shards, unless they are there; its scripts say what is missing
    local status=0
    case $1 in
    embedded*)
        [ -e "$root/data/embedded/embedded_train.bin" ] && [ -e "$root/data/embedded/embedded_val.bin" ] ||
            "$python" "$root/data/embedded.py" >&2
        ;;
    fineweb | fineweb_8min) set_up_tools && "$python" "$root/data/cached_fineweb10B.py" 9 >&2 ;;
    fineweb_medium) set_up_tools && "$python" "$root/data/cached_fineweb10B.py" 44 >&2 ;;
    wikitext103) # manifest.json is written last
        [ -e "$root/data/wikitext103/manifest.json" ] ||
            { set_up_tools && "$python" "$root/data/tokenize_text.py" --preset wikitext103 >&2; }
        ;;
    esac || status=$?
    [ "$status" -lt 128 ] || exit "$status" # a signal ends this script as well
    return "$status"
}

launch() { # run torchrun; its traceback would bury what a rank has said of its end
    exec "$python" -P -c '
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main
sys.argv[0] = "torchrun"
try:
    main()
except ChildFailedError:
    sys.exit(1)
except SignalException as error:
    sys.exit(128 + error.sigval)
' "$@"
}

if [ "${1:-}" = test ]; then
    set_up_tools "$root/tests/requirements.txt"
    cd "$root"
    "$python" -m ruff check .
    "$python" -m ruff format --check .
    exec "$python" -m pytest -n 2 --dist worksteal "${@:2}"
fi

case ${1:-} in
*.py) set_up_tools ;;
torchrun | -* | "")
    set_up "$root/requirements.txt"
    echo "starting: torch takes some seconds to load" >&2
    ;;
*) fail "there is no command $1; there are test, torchrun, FILE.py, and flags of the trainer: ./run.sh --help" ;;
esac
# What torchrun passes on to its processes, and how long it lets them save a checkpoint.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
case ${1:-} in
*.py)
    script=$1
    [ -e "$script" ] || script=$root/$1
    [ -e "$script" ] || fail "there is no script $1; name one below $root, such as tools/diff.py"
    exec "$python" "$script" "${@:2}"
    ;;
torchrun) launch "${@:2}" ;;
esac
gpus=$(count_gpus)
track="" task="" wants_data=yes previous=""
for flag in "$@"; do
    [ "$previous" = --track ] && track=$flag
    [ "$previous" = --task ] && task=$flag
    case $flag in
    --track=*) track=${flag#--track=} ;;
    --task=*) task=${flag#--task=} ;;
    --train_files*) wants_data=no ;;
    -h | --help)
        wants_data=no
        sed -n 's|^# \(./run.sh\)|\1|p' "$root/run.sh"
        ;;
    esac
    previous=$flag
done
chosen=()
if [ -z "$track" ]; then
    track=embedded
    [ "$gpus" = 0 ] || track=fineweb
    if [ $track = fineweb ] && [ $wants_data = yes ] && [ -z "$task" ] && ! get_data fineweb; then
        echo "FineWeb cannot be had: training on the embedded track instead" >&2
        track=embedded
    fi
    chosen=(--track "$track")
fi
[ $wants_data = no ] || get_data "${task:-$track}" || exit

if [ "$gpus" = 0 ]; then
    exec "$python" "$root/train_gpt.py" ${chosen[@]+"${chosen[@]}"} "$@"
fi
[ "${task:-$track}" != wikitext103 ] || gpus=1 # its 30 validation rows cannot be dealt to 4 or 8
launch --standalone --nproc_per_node="$gpus" \
    "$root/train_gpt.py" ${chosen[@]+"${chosen[@]}"} "$@"
