#!/usr/bin/env bash
# Usage: infra/guarded.sh COMMAND [ARGUMENT...]
# Becomes COMMAND (same process: signals and exit status are its own), watched so that no process of it survives it.
#
# Every process below COMMAND inherits a tag in its environment, however it daemonises. A watcher in a session of
# its own looks four times a second whether COMMAND, its parent and, where given, the process GUARD_CALLER still
# run; when one is gone, killed or ended, it kills whatever carries the tag until nothing does.
# Make sets GUARD_CALLER to itself, as a shell may stand between it and this script.
set -u

# started_at PID: sets REPLY to the clock tick at which PID started; fails if it runs no more (a zombie does not).
# A pid and its start name one process for good: whoever gets the same pid later starts later.
started_at() {
    { read -r REPLY <"/proc/$1/stat"; } 2>/dev/null || { REPLY=; return 1; }
    # shellcheck disable=SC2086  # words are wanted: after the name, which may hold anything, come fields 3, 4, ...
    set -- ${REPLY##*) }
    REPLY=${20}
    [[ $1 != [ZX] ]]
}

runs() { started_at "${1%:*}" && [[ $REPLY == "${1#*:}" ]]; } # runs PID:START

# watch TAG COMMAND OTHER...: returns when one of the processes, each given as PID:START, is gone and none is left
# that carries the tag.
watch() {
    local tag=$1 one pause quiet=0 pids
    shift
    exec {pause}<> <(:) # nothing is ever written here: reading it waits without starting a process
    while :; do
        for one; do runs "$one" || break 2; done
        read -rt 0.25 -u "$pause"
    done
    runs "$1" && kill -KILL "${1%:*}" # has no tag yet if the caller was gone before it could become COMMAND
    while ((quiet < 3)); do # more than once: a process may be between its fork and its exec
        mapfile -t pids < <(grep -lsF -e "$tag" /proc/[0-9]*/environ | tr -dc '0-9\n')
        if ((${#pids[@]})); then
            kill -KILL "${pids[@]}" 2>/dev/null
            quiet=0
        fi
        ((++quiet))
        read -rt 0.1 -u "$pause"
    done
}

if [[ ${1-} == --watch ]]; then
    watch "${@:2}"
    exit
fi
[[ $# -gt 0 ]] || { echo "usage: infra/guarded.sh COMMAND [ARGUMENT...]" >&2; exit 2; }
tag=$(</proc/sys/kernel/random/uuid)
marks=()
for pid in $$ "$PPID" ${GUARD_CALLER:+"$GUARD_CALLER"}; do started_at "$pid"; marks+=("$pid:$REPLY"); done
(setsid "${BASH_SOURCE[0]}" --watch "$tag" "${marks[@]}" </dev/null >/dev/null 2>&1 &)
unset GUARD_CALLER
LDM_GUARD="${LDM_GUARD:+$LDM_GUARD:}$tag" exec "$@"
