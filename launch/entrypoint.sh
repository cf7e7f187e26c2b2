#!/bin/bash
# Runs any launcher for a scheduler that looks at exit codes: launch/entrypoint.sh torchrun ... esol/train.py ... --resume
# Launchers replace a process's exit code by 1, and USR1 kills torchrun. This passes TERM and USR1 on as TERM, Ctrl-C as
# INT, and ends with the code of the machine's first process: 0 done, 2 yours to mend, 70 and 75 start me again, 130
# Ctrl-C (esol/base/exits.py).
ESOL_EXIT_FILE=$(mktemp)
export ESOL_EXIT_FILE
trap 'kill -TERM -- "-$launcher" 2>/dev/null' TERM USR1
trap 'kill -INT -- "-$launcher" 2>/dev/null' INT
# A group of its own: the deepspeed command does not hand signals on, but its ranks are in its group. What runs behind &
# would ignore INT.
(trap - INT; exec setsid "$@") &
launcher=$!
while true; do  # a trapped signal ends wait, not the launcher
    wait "$launcher"
    code=$?
    if [ "$code" -le 128 ] || ! kill -0 "$launcher" 2>/dev/null; then break; fi
done
noted=$(cat "$ESOL_EXIT_FILE")
rm -f "$ESOL_EXIT_FILE"
if [ "$code" -ne 0 ] && [ -n "$noted" ] && [ "$noted" -ne 0 ]; then
    code=$noted
fi
exit "$code"
