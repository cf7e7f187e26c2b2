#!/bin/bash
# Runs any launcher for a scheduler that looks at exit codes: launch/entrypoint.sh torchrun ... esol/train.py ... --resume
# Launchers replace a process's exit code by 1, and USR1 kills torchrun. This passes TERM and USR1 on as TERM, Ctrl-C as
# INT, and ends with the code of the machine's first process: 0 done, 2 yours to mend, 70 and 75 start me again, 130
# Ctrl-C (esol/base/exits.py).
AFTER=${ESOL_LAUNCHER_SECONDS:-60}  # that a launcher may go on when that process is done and no other is left
ESOL_EXIT_FILE=$(mktemp)
export ESOL_EXIT_FILE
trap 'kill -TERM -- "-$launcher" 2>/dev/null' TERM USR1
trap 'kill -INT -- "-$launcher" 2>/dev/null' INT
# A group of its own: the deepspeed command does not hand signals on, but its ranks are in its group. What runs behind &
# would ignore INT.
(trap - INT; exec setsid "$@") &
launcher=$!
# torchrun waits 300 s for the other machines' torchruns to be done, also for one that was killed, and TERM does not end
# that. What was done may be a first command of several, and torchrun may start it again: then something runs.
(
    trap - TERM USR1 INT
    over=0
    while [ "$over" -lt "$AFTER" ]; do
        sleep 1
        over=$((over + 1))
        if [ "$(cat "$ESOL_EXIT_FILE")" != 0 ] || [ -n "$(cat /proc/"$launcher"/task/*/children)" ]; then over=0; fi
    done
    echo "esol: done; $1 has waited $AFTER s for the other machines, and is ended" >&3
    echo ended > "$ESOL_EXIT_FILE"
    kill -KILL -- "-$launcher"
) 3>&2 2>/dev/null &
watcher=$!
while true; do  # a trapped signal ends wait, not the launcher
    wait "$launcher"
    code=$?
    if [ "$code" -le 128 ] || ! kill -0 "$launcher" 2>/dev/null; then break; fi
done
kill "$watcher" 2>/dev/null
noted=$(cat "$ESOL_EXIT_FILE")
rm -f "$ESOL_EXIT_FILE"
if [ "$noted" = ended ]; then
    code=0
elif [ "$code" -ne 0 ] && [ -n "$noted" ] && [ "$noted" -ne 0 ]; then
    code=$noted
fi
exit "$code"
